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

// Of two scales of each run, and their errors; then the numbers of the row.
XECO_LAYOUT int64_t pack_shared_bytes(int64_t width) { return 4 * kMostBits * 8 + width * 4; }

// The bits of a scale as bfloat16, and what they stand for.
XECO_DEVICE uint32_t stored_scale(double scale) {
  return BFloat16::pack(static_cast<float>(least_scale(scale)), 0.0f) & 0xffff;
}
XECO_DEVICE float scale_of(uint32_t stored) { return BFloat16::widen(static_cast<uint16_t>(stored)); }

// Grid: B × Q.
template <class Element>
XECO_KERNEL(kPackThreads, 1)
pack_rows_kernel(const PackParams params) {
  using Storage = typename Element::Storage;
  double* clipped = reinterpret_cast<double*>(shared_memory());
  double *whole = clipped + kMostBits, *lost = whole + kMostBits, *lost_whole = lost + kMostBits;
  float* numbers = reinterpret_cast<float*>(lost_whole + kMostBits);
  const int64_t width = params.width, layout = params.bits;
  const Storage* row =
      row_of<const Storage>(params.rows, block_index() / params.num_queries, block_index() % params.num_queries);
  for (int64_t i = thread_index(); i < width; i += kPackThreads) numbers[i] = Element::widen(row[i]);
  sync_block();
  const Run run = run_of(layout, width, thread_index() + 1);
  if (thread_index() < kMostBits) {
    const Scales scales = run.first < run.end ? scales_for(numbers, run, layout) : Scales{0, 0};
    clipped[thread_index()] = scales.clipped;
    whole[thread_index()] = scales.whole;
  }
  sync_block();
  Scales wanted{0, 0};
  for (int i = 0; i < kMostBits; ++i)
    wanted = {larger_scale(wanted.clipped, clipped[i]), larger_scale(wanted.whole, whole[i])};
  uint32_t stored = stored_scale(wanted.clipped);
  const uint32_t wider = stored_scale(wanted.whole);
  if (stored != wider) {
    if (thread_index() < kMostBits) {
      lost[thread_index()] = error_of(numbers, run, scale_of(stored), layout);
      lost_whole[thread_index()] = error_of(numbers, run, scale_of(wider), layout);
    }
    sync_block();
    double sum = 0, sum_whole = 0;
    for (int i = 0; i < kMostBits; ++i) {
      sum += lost[i];
      sum_whole += lost_whole[i];
    }
    if (sum_whole < sum) stored = wider;
  }
  const float scale = scale_of(stored);
  const int64_t pieces = num_pieces(layout, width);
  int64_t bytes = layout == 8 ? width : layout == 4 ? width / 2 : 0;
  for (int plane = 0; layout > 16 && plane < kMostPlanes; ++plane) bytes += bytes_in_plane(layout, plane);
  uint8_t* to = params.out + block_index() * (bytes + kScaleBytes);
  for (int64_t piece = thread_index(); piece < pieces; piece += kPackThreads)
    write_piece(numbers, width, layout, scale, piece, to);
  if (thread_index() < kScaleBytes) to[bytes + thread_index()] = static_cast<uint8_t>(stored >> 8 * thread_index());
}

}  // namespace xeco::gpu
