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

// Rows of codes, a scale at the end (xeco_convert/ops/packed_rows.py). `bits` is 8 or 4, or says how far each bit plane
// reaches: 7 bits for each, the multiple of 8 of the numbers that it holds a bit of; 0 behind the last.
constexpr int64_t kScaleBytes = 2;
constexpr int kMostPlanes = 7;
constexpr int64_t kMostPlaneNumbers = 127 * 8;

constexpr bool lies_in_planes(int64_t bits) { return bits > 16; }

constexpr int64_t plane_bytes(int64_t bits, int plane) { return bits >> 7 * plane & 127; }

constexpr int64_t code_row_bytes(int64_t width, int64_t bits) {
  if (!lies_in_planes(bits)) return width * bits / 8 + kScaleBytes;
  int64_t bytes = kScaleBytes;
  for (int plane = 0; plane < kMostPlanes; ++plane) bytes += plane_bytes(bits, plane);
  return bytes;
}

}  // namespace xeco
