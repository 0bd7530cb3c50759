// Tensors as kernels see them: plain pointers and strides. Free of torch.
//
// Letters: B batch, Q query tokens, T cached tokens, H heads, R kv_lora_rank, P qk_rope_head_dim.
// Strides count elements, not bytes; the last dimension is always dense.
#pragma once

#include <cstdint>

namespace xeco {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

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

// Bytes of a row of `width` codes of 8 or 4 bits, its scale at the end.
constexpr int64_t kScaleBytes = 2;

constexpr int64_t code_row_bytes(int64_t width, int64_t bits) { return width * bits / 8 + kScaleBytes; }

}  // namespace xeco
