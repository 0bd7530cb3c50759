// The op xeco::pack_rows on a GPU: check -> params -> launch, on the current stream; nothing waits for the device.
#include <torch/csrc/stable/library.h>

#include "device/stream.h"
#include "pack_rows/checks.h"
#include "pack_rows/gpu/kernels.h"

namespace xeco {
namespace {

Tensor pack_rows(Tensor rows, int64_t layout) {
  const PackCall call = check_pack(rows, layout);
  const DeviceStream stream(kPackOp, rows);
  gpu::pack_rows(call.params, call.dtype, stream.get());
  return call.out;
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CUDA, m) { m.impl("pack_rows", TORCH_BOX(&xeco::pack_rows)); }
