// What the kernels of latent attention are given: one struct for each pass, a shape beside each pointer. Free of torch.
//
// Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
#pragma once

#include <cstdint>

#include "xeco/views.h"

namespace xeco {

// Widths that the kernels take, parts that a cache may be cut into, and how far from the cache a query may stand.
// xeco_convert/ops/ says the same, where no extension needs to be built (tests/csrc/ compares them).
constexpr int64_t kMaxRank = 512, kMaxRope = 128;
constexpr int64_t kMaxSplits = 1024;
constexpr int64_t kMaxPosition = int64_t{1} << 40;

// Rows that kernels write for themselves, in scratch or shared memory, have each part padded to a multiple of this: the
// depth of a matrix instruction, and whole vectors of any instruction set.
constexpr int64_t kWidthMultiple = 16;

constexpr int64_t padded_width(int64_t width) { return (width + kWidthMultiple - 1) / kWidthMultiple * kWidthMultiple; }

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

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
  const int64_t* query_positions = nullptr;  // [B], or null: T - Q, or ends[b] - Q where queries_end_at_ends
  // Paged cache: token t of sequence b lies in row t % page_size of page block_table[b, t / page_size].
  const int32_t* block_table = nullptr;  // [B, max_pages], or null: contiguous
  int64_t block_table_stride = 0, page_size = 0;
  int64_t num_pages = 0;  // pages that exist
  // Cached numbers: 16 stands for the dtype, anything else for codes with a scale for each row (xeco/views.h)
  int64_t latent_bits = 16, rope_bits = 16;
  bool queries_end_at_ends = false;  // without query_positions: the last one stands at ends[b] - 1
};

constexpr bool is_packed(const AttentionShape& shape) { return shape.latent_bits != 16; }

struct ForwardParams {
  AttentionShape shape;
  HeadsView q_latent;      // [B, Q, H, R]
  HeadsView q_rope;        // [B, Q, H, P]
  RowsView c_kv;           // [B, T, R] or [num_pages, page_size, R]
  RowsView k_rope;         // [B, T, P] or [num_pages, page_size, P]
  void* out = nullptr;     // [B, Q, H, R], contiguous, in the dtype of the inputs
  float* lse = nullptr;    // [B, H, Q], contiguous
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
  float* d_rows = nullptr;  // [B, num_groups, T, padded R + padded P]
  int64_t num_groups = 1;
};

// What the backward pass needs besides: out [B, Q, H, R] contiguous, d_lse [B, H, Q] or null; delta is written first.
struct SavedForward {
  const void* out = nullptr;
  const float* d_lse = nullptr;
  float* delta = nullptr;
};

// Gradients of the cached rows, contiguous, in the dtype of the inputs.
struct TokenGradients {
  void* d_c_kv = nullptr;    // [B, T, R]
  void* d_k_rope = nullptr;  // [B, T, P]
};

}  // namespace xeco
