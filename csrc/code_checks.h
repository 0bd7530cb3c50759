// What every op over rows of codes checks of their layout (xeco/views.h).
#pragma once

#include "tensor_checks.h"

namespace xeco {

// `bits` of rows of `width` numbers: 8, 4, or planes each of which reaches no further than the one before.
inline void check_layout(const char* op, const char* rows_name, const char* bits_name, int64_t bits, int64_t width) {
  bool known = bits == 8 || bits == 4;
  if (lies_in_planes(bits)) {
    known = bits >> 7 * kMostPlanes == 0 && plane_bytes(bits, 1) > 0;
    for (int plane = 1; plane < kMostPlanes; ++plane)
      known = known && plane_bytes(bits, plane) <= plane_bytes(bits, plane - 1);
    require(plane_bytes(bits, 0) * 8 == width, op, ": ", bits_name, ": the first bit plane reaches every number, got ",
            plane_bytes(bits, 0) * 8, " of ", width);
  }
  require(known, op, ": ", bits_name, ": expected 8, 6, 5, 4, 3 or 2, or what 2 to ", kMostPlanes,
          " bit planes reach, one no further than the one before, got layout ", bits);
  require(bits != 4 || width % 2 == 0, op, ": ", rows_name, ": a row in 4 bits needs an even width, got ", width);
}

}  // namespace xeco
