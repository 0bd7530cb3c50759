// What the kernels of rope_and_append are given: rows of new tokens, and the cache that they are written to. Free of
// torch.
#pragma once

#include <cstdint>

#include "xeco/views.h"

namespace xeco {

struct AppendParams {
  int64_t batch = 0, num_queries = 0, rank = 0, rope = 0;
  RowsView c_kv, k_rope;                 // [B, Q, R], [B, Q, P]
  RowsView cos, sin;                     // [B or 1, Q, P]; one for all: outer_stride 0
  RowsView c_kv_cache, k_rope_cache;     // [B, T, R], [B, T, P], or pages
  const int64_t* positions = nullptr;    // [B]
  const int32_t* block_table = nullptr;  // [B, max_pages], or null
  int64_t block_table_stride = 0, page_size = 0;
  int64_t capacity = 0, num_pages = 0;  // slots of a sequence; pages that exist
};

}  // namespace xeco
