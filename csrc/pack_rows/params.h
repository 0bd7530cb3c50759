// What the kernels of pack_rows are given. Free of torch.
#pragma once

#include <cstdint>

#include "xeco/views.h"

namespace xeco {

struct PackParams {
  int64_t batch = 0, num_queries = 0, width = 0;
  int64_t bits = 8;        // the layout (xeco/views.h)
  RowsView rows;           // [B, Q, n]
  uint8_t* out = nullptr;  // [B, Q, bytes], contiguous
};

}  // namespace xeco
