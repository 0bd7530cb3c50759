// Numbers in global memory as kernels that copy rows read them; BFloat16 and Float16 are each machine's own.
#pragma once

#include "xeco/gpu_compat.h"
#include "xeco/views.h"

namespace xeco::gpu {

struct Float32 {
  using Storage = float;
  XECO_DEVICE static float widen(float value) { return value; }
};

template <class Storage>
XECO_DEVICE Storage* row_of(const RowsView& view, int64_t outer, int64_t row) {
  return const_cast<Storage*>(static_cast<const Storage*>(view.data)) + outer * view.outer_stride +
         row * view.row_stride;
}

}  // namespace xeco::gpu
