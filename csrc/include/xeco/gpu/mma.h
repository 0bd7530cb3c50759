// Tiles by mma.sync and ldmatrix: fragments.h says what a tile is.
#pragma once

#include "xeco/gpu/fragments.h"

namespace xeco::gpu {

template <class Element>
XECO_DEVICE void multiply(Accumulator& sums, const Operand& rows, const Operand& columns) {
  mma_16_8_16<Element>(sums.values, rows.words, columns.words[0], columns.words[2]);
  mma_16_8_16<Element>(sums.values + 4, rows.words, columns.words[1], columns.words[3]);
}

// Operand from shared memory that holds [index][k]: the matrices are (index 0…7 | 8…15) × (k 0…7 | 8…15).
XECO_DEVICE Operand load_rows(const uint16_t* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  Operand to;
  load_matrices(to.words, tile + (lane % 8 + 8 * (matrix & 1)) * stride + 8 * (matrix >> 1));
  return to;
}

// Operand from shared memory that holds [k][index].
XECO_DEVICE Operand load_columns(const uint16_t* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  Operand to;
  load_matrices_transposed(to.words, tile + (lane % 8 + 8 * (matrix >> 1)) * stride + 8 * (matrix & 1));
  return to;
}

}  // namespace xeco::gpu
