// Tiles by MFMA: fragments.h says what a tile is.
#pragma once

#include "xeco/gpu/fragments.h"

namespace xeco::gpu {

template <class Element>
XECO_DEVICE void multiply(Accumulator& sums, const Operand& rows, const Operand& columns) {
  mfma_16_16_16<Element>(sums.values, columns.words, rows.words);
}

// Operand from shared memory that holds [index][k]: 8 bytes of a row.
XECO_DEVICE Operand load_rows(const uint16_t* tile, int stride) {
  const int lane = lane_index();
  const uint32_t* from = reinterpret_cast<const uint32_t*>(
      tile + Layout::operand_index(lane, 0) * stride + Layout::operand_k(lane, 0));
  return {{from[0], from[1]}};
}

// Operand from shared memory that holds [k][index].
XECO_DEVICE Operand load_columns(const uint16_t* tile, int stride) {
  const int lane = lane_index();
  const uint16_t* from = tile + Layout::operand_k(lane, 0) * stride + Layout::operand_index(lane, 0);
  const uint32_t first = from[0], second = from[stride], third = from[2 * stride], fourth = from[3 * stride];
  return {{first | second << 16, third | fourth << 16}};
}

}  // namespace xeco::gpu
