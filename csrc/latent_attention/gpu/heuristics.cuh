// Which tiles the kernels are instantiated for, and which of them a call takes: the first of its table that fits.
//
// R is rounded up to 64, 128, 256 or 512 for registers alone: loops over features and copies follow the true width,
// padded to 16, and so do those over P. A tile must leave room in shared memory: 163 KB on sm_80, 227 KB on sm_90 and
// sm_100, 99 KB on sm_86, sm_89 and sm_120, 64 KB on gfx90a and gfx942. The KB below are those of a block with one
// stage and P 128, except where it says otherwise; "sums" are float32 numbers of O or of a gradient in the registers of
// each lane.
#pragma once

#include <cstddef>

#include "latent_attention/gpu/backward.cuh"
#include "latent_attention/gpu/forward.cuh"
#include "xeco/gpu/launch.h"

namespace xeco::gpu {

struct ForwardShape {
  int max_rank;        // R up to this
  int min_query_rows;  // of a sequence, at least
  int rows;            // query rows of a block
  int tokens;          // of a tile
  int warps;           // of a block
  int blocks;          // that a multiprocessor has registers for
  int stages;          // 2: taken where all its blocks have room in two stages; 1: where one block has room in one
};

// NVIDIA: on an H100, blocks of 8 warps were faster than of 4 wherever 17 to 32 query rows decode, by 1.2 to 1.5 times;
// with 64 rows they were slower.
constexpr ForwardShape kForwardShapes[] = {
#if defined(XECO_MATRIX_IS_MFMA)
    {64, 33, 64, 64, 4, 2, 1},   // a wave for each 16 rows: S stays in its registers
    {64, 17, 32, 64, 4, 2, 1},   // fewer rows than 64 would leave waves without any: two share 16 rows
    {64, 1, 16, 64, 4, 2, 1},    // decode of few heads: the waves divide 64 tokens among them
    {128, 33, 64, 32, 4, 2, 1},  // 50 KB; 64 tokens would take 66
    {128, 17, 32, 64, 4, 2, 1},  // 54 KB
    {128, 1, 16, 64, 4, 2, 1},   // 44 KB
    {256, 17, 32, 32, 4, 2, 1},  // 52 KB; 64 rows would take 74
    {256, 1, 16, 32, 4, 2, 1},   // 38 KB; 64 tokens would take all of 64
    {512, 1, 16, 32, 4, 2, 1},   // 62 KB; 32 rows would take 84
#else
    {64, 33, 64, 64, 4, 2, 1},    // a warp for each 16 rows: S stays in its registers
    {64, 17, 32, 128, 8, 2, 2},   // four warps share 16 rows and divide 128 tokens among them
    {64, 17, 32, 64, 4, 2, 1},    // two warps and 64 tokens
    {64, 1, 16, 64, 4, 2, 1},     // decode of few heads: four warps divide 64 tokens
    {128, 33, 64, 64, 4, 2, 1},   // 64 sums; 99 KB in two stages
    {128, 17, 32, 128, 8, 2, 2},  // 16 sums; 104 KB in two stages at P 32, of which sm_90 has room for two blocks
    {128, 17, 32, 64, 8, 2, 1},   // the same with 64 tokens: 68 KB in two stages at P 64
    {128, 1, 16, 64, 4, 2, 1},    // 16 sums
    {256, 33, 64, 64, 8, 1, 1},   // 64 sums; 4 warps would have 128, beside 32 numbers of S
    {256, 17, 32, 64, 8, 2, 1},   // 32 sums; 113 KB in two stages at P 64: two blocks have room
    {256, 1, 16, 64, 4, 2, 1},    // 32 sums
    {512, 33, 64, 32, 8, 1, 1},   // 127 KB, 168 in two stages; 64 tokens would take 172 in one
    {512, 17, 32, 64, 8, 1, 2},   // 64 sums; 192 KB in two stages at P 64
    {512, 17, 32, 32, 8, 1, 1},   // where a block has less: 135 KB in two stages
    {512, 1, 16, 32, 4, 2, 1},    // 103 KB in two stages; 64 tokens would take 185
#endif
};

// "Owned" and "streamed" rows: gpu/backward.cuh.
struct BackwardShape {
  int max_rank;                // R up to this
  bool of_queries, of_tokens;  // the gradients that it serves
  int owned;                   // rows of a block
  int streamed;                // rows of a tile
  int warps;                   // of a block
};

constexpr BackwardShape kBackwardShapes[] = {
#if defined(XECO_MATRIX_IS_MFMA)
    {64, true, true, 64, 32, 4},    // 53 KB; 64 streamed rows would take 78
    {128, true, true, 32, 32, 4},   // 47 KB; 64 owned rows would take 72
    {256, true, false, 16, 32, 4},  // 46 KB; 32 owned rows would take 68
    {256, false, true, 32, 16, 4},  // 48 KB: streamed query rows come with their gradients, so fewer of them
    {512, true, true, 16, 16, 4},   // 59 KB; 32 rows of either would take 78 and more
#else
    {64, true, true, 64, 64, 4},   // 113 KB in two stages, a warp for each 16 rows
    {128, true, true, 64, 32, 8},  // 64 sums; 4 warps would have 128
    {256, true, true, 64, 32, 8},  // 112 KB; 142 in two stages
    {256, true, true, 32, 32, 8},  // 71 KB, where a block has 99
    {512, true, true, 32, 32, 8},  // 119 KB; 64 owned rows would take 192
    {512, true, true, 16, 16, 4},  // 59 KB, where a block has 99
#endif
};

constexpr size_t kNumForwardShapes = sizeof(kForwardShapes) / sizeof(kForwardShapes[0]);
constexpr size_t kNumBackwardShapes = sizeof(kBackwardShapes) / sizeof(kBackwardShapes[0]);
static_assert(kForwardShapes[kNumForwardShapes - 1].max_rank == kMaxRank, "every R has a tile");
static_assert(kBackwardShapes[kNumBackwardShapes - 1].max_rank == kMaxRank, "every R has a tile");

constexpr int64_t kReservedBytes = 1024;  // that CUDA keeps for itself in the shared memory of each block

// Blocks with `bytes` of shared memory that a multiprocessor holds at once, of `most` that it has registers for.
inline int64_t resident_blocks(const Stream& stream, int64_t bytes, int64_t most) {
  return max<int64_t>(1, min(most, stream.shared_bytes_per_sm / (bytes + kReservedBytes)));
}

// Calls body(Tile{}) with the tile of a forward call: the first that serves it and fits, or the last of its R.
template <class Element, bool kPacked, size_t kIndex = 0, class Body>
void with_forward_tile(const AttentionShape& shape, const Stream& stream, const Body& body) {
  constexpr ForwardShape kShape = kForwardShapes[kIndex];
  using Tile = ForwardTile<Element, kPacked, kShape.max_rank, kShape.rows, kShape.tokens, kShape.warps, kShape.blocks>;
  if constexpr (kShape.min_query_rows == 1) {
    if (shape.rank <= kShape.max_rank) return body(Tile{});
  } else {
    const bool serves = shape.rank <= kShape.max_rank && shape.num_queries * shape.num_heads >= kShape.min_query_rows;
    const int64_t bytes = Tile::shared_bytes(shape, kShape.stages);
    const bool fits = bytes <= stream.max_shared_bytes &&
                      (kShape.stages == 1 || resident_blocks(stream, bytes, kShape.blocks) == kShape.blocks);
    if (serves && fits) return body(Tile{});
  }
  if constexpr (kIndex + 1 < kNumForwardShapes) with_forward_tile<Element, kPacked, kIndex + 1>(shape, stream, body);
}

// Whether no later shape serves the same R and gradient.
constexpr bool is_last_backward_shape(size_t index, bool of_tokens) {
  for (size_t later = index + 1; later < kNumBackwardShapes; ++later) {
    const BackwardShape& shape = kBackwardShapes[later];
    if (shape.max_rank == kBackwardShapes[index].max_rank && (of_tokens ? shape.of_tokens : shape.of_queries))
      return false;
  }
  return true;
}

// Calls body(Tile{}) with the tile of the gradient of the tokens, or of the queries: the first that fits, or the last
// of its R.
template <class Element, bool kOfTokens, size_t kIndex = 0, class Body>
void with_backward_tile(const AttentionShape& shape, const Stream& stream, const Body& body) {
  constexpr BackwardShape kShape = kBackwardShapes[kIndex];
  using Tile = BackwardTile<Element, kShape.max_rank, kShape.owned, kShape.streamed, kShape.warps>;
  if constexpr (kOfTokens ? kShape.of_tokens : kShape.of_queries) {
    const int stride = row_stride(shape), d_stride = gradient_stride(shape);
    const int64_t bytes =
        kOfTokens ? Tile::token_shared_bytes(stride, d_stride, 1) : Tile::query_shared_bytes(stride, d_stride, 1);
    const bool fits = is_last_backward_shape(kIndex, kOfTokens) || bytes <= stream.max_shared_bytes;
    if (shape.rank <= kShape.max_rank && fits) return body(Tile{});
  }
  if constexpr (kIndex + 1 < kNumBackwardShapes)
    with_backward_tile<Element, kOfTokens, kIndex + 1>(shape, stream, body);
}

// As many stages as fit: two if a block can have them, and more where that keeps no other of the `blocks` that
// registers allow off the multiprocessor.
template <class Bytes>
int stages_that_fit(const Stream& stream, int blocks, const Bytes& bytes) {
  int stages = 1;
  if constexpr (kCopiesAreAsynchronous) {
    if (bytes(2) <= stream.max_shared_bytes) stages = 2;
    const int64_t resident = resident_blocks(stream, bytes(stages), blocks);
    const int64_t room = min(stream.max_shared_bytes, stream.shared_bytes_per_sm / resident - kReservedBytes);
    while (stages < 4 && bytes(stages + 1) <= room) ++stages;
  } else {
    static_cast<void>(bytes);  // copies pass through registers: a second stage hides nothing
  }
  return min(stages, stream.max_stages);
}

}  // namespace xeco::gpu
