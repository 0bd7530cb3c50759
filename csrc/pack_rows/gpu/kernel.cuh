// pack_rows on a GPU: a block for each row. A thread finds the scale that a run of numbers asks for, adding in their
// order as the CPU does; then all write pieces.
#pragma once

#include "pack_rows/gpu/kernels.h"
#include "xeco/gpu/elements.h"

namespace xeco {
using gpu::nearest, gpu::root, gpu::whole;
}

#define XECO_ROW XECO_DEVICE
#include "pack_rows/row-inl.h"

namespace xeco::gpu {

constexpr int kPackThreads = 64, kMostBits = 8;

// Of the scales of the runs, then the numbers of the row.
XECO_LAYOUT int64_t pack_shared_bytes(int64_t width) { return kMostBits * 8 + width * 4; }

// Grid: B × Q.
template <class Element>
XECO_KERNEL(kPackThreads, 1)
pack_rows_kernel(const PackParams params) {
  using Storage = typename Element::Storage;
  double* scales = reinterpret_cast<double*>(shared_memory());
  float* numbers = reinterpret_cast<float*>(scales + kMostBits);
  const int64_t width = params.width, layout = params.bits;
  const Storage* row =
      row_of<const Storage>(params.rows, block_index() / params.num_queries, block_index() % params.num_queries);
  for (int64_t i = thread_index(); i < width; i += kPackThreads) numbers[i] = Element::widen(row[i]);
  sync_block();
  if (thread_index() < kMostBits) {
    const Run run = run_of(layout, width, thread_index() + 1);
    scales[thread_index()] = run.first < run.end ? scale_for(numbers, run, layout) : 0.0;
  }
  sync_block();
  double wanted = 0;
  for (int i = 0; i < kMostBits; ++i) wanted = larger_scale(wanted, scales[i]);
  const uint32_t stored = BFloat16::pack(static_cast<float>(least_scale(wanted)), 0.0f) & 0xffff;
  const float scale = BFloat16::widen(static_cast<uint16_t>(stored));
  const int64_t pieces = num_pieces(layout, width);
  int64_t bytes = layout == 8 ? width : layout == 4 ? width / 2 : 0;
  for (int plane = 0; layout > 16 && plane < kMostPlanes; ++plane) bytes += bytes_in_plane(layout, plane);
  uint8_t* to = params.out + block_index() * (bytes + kScaleBytes);
  for (int64_t piece = thread_index(); piece < pieces; piece += kPackThreads)
    write_piece(numbers, width, layout, scale, piece, to);
  if (thread_index() < kScaleBytes) to[bytes + thread_index()] = static_cast<uint8_t>(stored >> 8 * thread_index());
}

}  // namespace xeco::gpu
