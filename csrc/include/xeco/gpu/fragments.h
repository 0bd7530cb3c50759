// 16×16 tiles spread over the lanes of a warp, and their product: the same for mma.sync and MFMA.
//
//   Operand: element [index][k] of a 16×16 tile of 2-byte numbers, summed over k.
//   Accumulator: element [row][column] of a 16×16 tile of float32.
//   multiply(c, a, b):  c[row][column] += Σ_k a[row][k] · b[column][k]
//   as_operand(c):      the accumulator itself as an operand with index = row, k = column: no lane gives anything away.
//
// mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"; g = lane / 4, j = lane % 4): register i of A holds
// row g + 8·(i & 1), k = 8·(i / 2) + 2j and the next; B is the same with two registers for 8 columns, so a 16-column B
// is A with its registers in another order. C holds row g + 8·(i / 2 & 1), column 2j + (i & 1), for columns 0…7, then
// 8…15.
//
// MFMA 16×16×16 (CDNA 3 ISA, section 7.1; m = lane % 16, n = lane / 16): A and B hold index m, k = 4n…4n + 3; D holds
// column m and rows 4n…4n + 3. It is therefore given b and a, exchanged: its column is our row, and D is laid out as an
// operand is.
#pragma once

#include "xeco/gpu_compat.h"

namespace xeco::gpu {

struct MmaLayout {
  static constexpr int kLanes = 32, kRowsOfLane = 2, kFloats = 8, kOperandWords = 4;
  // Lanes that share a row differ in these bits.
  static constexpr int kFirstPeer = 1, kSecondPeer = 2;
  XECO_LAYOUT static int slot(int element) { return (element >> 1) & 1; }
  XECO_LAYOUT static int row(int lane, int slot) { return lane / 4 + 8 * slot; }
  XECO_LAYOUT static int column(int lane, int element) { return 8 * (element >> 2) + 2 * (lane % 4) + (element & 1); }
  XECO_LAYOUT static int operand_index(int lane, int element) { return lane / 4 + 8 * ((element >> 1) & 1); }
  XECO_LAYOUT static int operand_k(int lane, int element) {
    return 8 * (element >> 2) + 2 * (lane % 4) + (element & 1);
  }
  XECO_LAYOUT static bool leads(int lane) { return lane % 4 == 0; }
};

struct MfmaLayout {
  static constexpr int kLanes = 64, kRowsOfLane = 1, kFloats = 4, kOperandWords = 2;
  static constexpr int kFirstPeer = 16, kSecondPeer = 32;
  XECO_LAYOUT static int slot(int) { return 0; }
  XECO_LAYOUT static int row(int lane, int) { return lane % 16; }
  XECO_LAYOUT static int column(int lane, int element) { return 4 * (lane / 16) + element; }
  XECO_LAYOUT static int operand_index(int lane, int) { return lane % 16; }
  XECO_LAYOUT static int operand_k(int lane, int element) { return 4 * (lane / 16) + element; }
  XECO_LAYOUT static bool leads(int lane) { return lane < 16; }
};

#if defined(XECO_MATRIX_IS_MFMA)
using Layout = MfmaLayout;
#else
using Layout = MmaLayout;
#endif
static_assert(Layout::kLanes == kLanes);

struct Operand {
  uint32_t words[Layout::kOperandWords];
};

struct Accumulator {
  float values[Layout::kFloats];
};

XECO_DEVICE int lane_index() { return thread_index() % kLanes; }
XECO_DEVICE int warp_index() { return thread_index() / kLanes; }

XECO_DEVICE void clear(Accumulator& sums) {
#pragma unroll
  for (int e = 0; e < Layout::kFloats; ++e) sums.values[e] = 0.0f;
}

template <class Element>
XECO_DEVICE Operand as_operand(const Accumulator& from) {
  Operand to;
#pragma unroll
  for (int w = 0; w < Layout::kOperandWords; ++w)
    to.words[w] = Element::pack(from.values[2 * w], from.values[2 * w + 1]);
  return to;
}

// Over the columns of a row that other lanes hold; all of them get the result.
template <class Combine>
XECO_DEVICE float reduce_row(float value, const Combine& combine) {
  value = combine(value, shuffle_xor(value, Layout::kFirstPeer));
  return combine(value, shuffle_xor(value, Layout::kSecondPeer));
}

}  // namespace xeco::gpu
