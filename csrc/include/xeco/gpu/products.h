// Products of 16×16 tiles by mma.sync and ldmatrix, or by MFMA: fragments.h says what a tile is.
//
//   multiply(sums, rows, columns)     sums[row][column] += Σ_k rows[row][k] · columns[column][k]
//   load_rows(tile, stride)           an operand from shared memory that holds [index][k]
//   load_columns(tile, stride)        an operand from shared memory that holds [k][index]
#pragma once

#include "xeco/gpu/fragments.h"

namespace xeco::gpu {

#if defined(XECO_MATRIX_IS_MFMA)

template <class Element>
XECO_DEVICE void multiply(Accumulator& sums, const Operand& rows, const Operand& columns) {
  mfma_16_16_16<Element>(sums.values, columns.words, rows.words);
}

// 8 bytes of a row.
XECO_DEVICE Operand load_rows(const uint16_t* tile, int stride) {
  const int lane = lane_index();
  const uint32_t* from =
      reinterpret_cast<const uint32_t*>(tile + Layout::operand_index(lane, 0) * stride + Layout::operand_k(lane, 0));
  return {{from[0], from[1]}};
}

XECO_DEVICE Operand load_columns(const uint16_t* tile, int stride) {
  const int lane = lane_index();
  const uint16_t* from = tile + Layout::operand_k(lane, 0) * stride + Layout::operand_index(lane, 0);
  const uint32_t first = from[0], second = from[stride], third = from[2 * stride], fourth = from[3 * stride];
  return {{first | second << 16, third | fourth << 16}};
}

#else

template <class Element>
XECO_DEVICE void multiply(Accumulator& sums, const Operand& rows, const Operand& columns) {
  mma_16_8_16<Element>(sums.values, rows.words, columns.words[0], columns.words[2]);
  mma_16_8_16<Element>(sums.values + 4, rows.words, columns.words[1], columns.words[3]);
}

// The matrices are (index 0…7 | 8…15) × (k 0…7 | 8…15).
XECO_DEVICE Operand load_rows(const uint16_t* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  Operand to;
  load_matrices(to.words, tile + (lane % 8 + 8 * (matrix & 1)) * stride + 8 * (matrix >> 1));
  return to;
}

XECO_DEVICE Operand load_columns(const uint16_t* tile, int stride) {
  const int lane = lane_index(), matrix = lane / 8;
  Operand to;
  load_matrices_transposed(to.words, tile + (lane % 8 + 8 * (matrix >> 1)) * stride + 8 * (matrix & 1));
  return to;
}

#endif

}  // namespace xeco::gpu
