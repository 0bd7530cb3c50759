// What each op's kernels are given: plain pointers, strides and sizes, a shape beside each pointer. Free of torch.
//
// Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
// Strides count elements, not bytes; the last dimension is always dense.
#pragma once

#include <cstdint>

namespace xeco {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

inline int64_t element_bytes(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

// A tensor [B, Q, H, width] with any strides but the last.
struct HeadsView {
  const void* data = nullptr;
  int64_t batch_stride = 0, query_stride = 0, head_stride = 0;
};

// Cached rows [B, T, width], or pages [num_pages, page_size, width]: then outer_stride is that of a page.
struct RowsView {
  const void* data = nullptr;
  int64_t outer_stride = 0, row_stride = 0;
};

// Everything that says which token a query sees, and the sizes.
//   query i of sequence b stands at p = query_positions[b] + i, and sees token t iff
//   starts[b] <= t < ends[b], t <= p (causal), t > p - window (window > 0).
struct AttentionShape {
  Dtype dtype = Dtype::kFloat32;
  int64_t batch = 0, num_queries = 0, num_tokens = 0, num_heads = 0;
  int64_t rank = 0, rope = 0;
  float softmax_scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  bool causal = true;
  int64_t window = 0;                        // 0: none
  const int64_t* starts = nullptr;           // [B], or null: 0
  const int64_t* ends = nullptr;             // [B], or null: T
  const int64_t* query_positions = nullptr;  // [B], or null: T - Q
  // Paged cache: token t of sequence b lies in row t % page_size of page block_table[b, t / page_size].
  const int32_t* block_table = nullptr;  // [B, max_pages], or null: contiguous
  int64_t block_table_stride = 0, page_size = 0;
  // For kernels on a device, whose host does not see the numbers: pages that exist, and whether the last query stands at
  // ends[b] - 1 where query_positions is null.
  int64_t num_pages = 0;
  bool queries_end_at_ends = false;
};

struct ForwardParams {
  AttentionShape shape;
  HeadsView q_latent;     // [B, Q, H, R]
  HeadsView q_rope;       // [B, Q, H, P]
  RowsView c_kv;          // [B, T, R] or [num_pages, page_size, R]
  RowsView k_rope;        // [B, T, P] or [num_pages, page_size, P]
  void* out = nullptr;    // [B, Q, H, R], contiguous, in the dtype of the inputs
  float* lse = nullptr;   // [B, H, Q], contiguous
  int64_t num_splits = 1;  // parts that the tokens of a sequence are divided into, merged at the end
};

struct BackwardParams {
  AttentionShape shape;
  HeadsView q_latent, q_rope;
  RowsView c_kv, k_rope;
  HeadsView d_out;               // [B, Q, H, R]
  const float* lse = nullptr;    // [B, H, Q]
  const float* delta = nullptr;  // [B, H, Q]: sum over R of d_out * out, less d_lse
  void* d_q_latent = nullptr;    // [B, Q, H, R], contiguous
  void* d_q_rope = nullptr;      // [B, Q, H, P], contiguous
  // float32 sums over the query rows of each group, later added up in their order
  float* d_rows = nullptr;  // [B, num_groups, T, R + P], zeroed
  int64_t num_groups = 1;
};

// rope_and_append: rows of new tokens, and the cache that they are written to.
struct AppendParams {
  int64_t batch = 0, num_queries = 0, rank = 0, rope = 0;
  RowsView c_kv, k_rope;              // [B, Q, R], [B, Q, P]
  RowsView cos, sin;                  // [B or 1, Q, P]; one for all: outer_stride 0
  RowsView c_kv_cache, k_rope_cache;  // [B, T, R], [B, T, P], or pages
  const int64_t* positions = nullptr;    // [B]
  const int32_t* block_table = nullptr;  // [B, max_pages], or null
  int64_t block_table_stride = 0, page_size = 0;
  int64_t capacity = 0, num_pages = 0;  // slots of a sequence; pages that exist
};

// Runs body(item, context) for every item in [0, count), on several threads at once, in any order.
using ItemBody = void (*)(int64_t item, void* context);
using ParallelItems = void (*)(int64_t count, ItemBody body, void* context);

}  // namespace xeco
