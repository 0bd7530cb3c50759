// The op xeco::rope_and_append on a GPU: check -> params -> launch, on the current stream; nothing waits for the
// device.
#include <torch/csrc/stable/library.h>

#include "device/stream.h"
#include "rope_and_append/checks.h"
#include "rope_and_append/gpu/kernels.h"

namespace xeco {
namespace {

void rope_and_append(Tensor c_kv, Tensor k_rope, Tensor cos, Tensor sin, Tensor c_kv_cache, Tensor k_rope_cache,
                     OptionalTensor block_table, Tensor positions) {
  const AppendCall call = check_append({c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache}, block_table, positions);
  check_same_device(kAppendOp, c_kv,
                    {{"k_rope", k_rope},
                     {"cos", cos},
                     {"sin", sin},
                     {"c_kv_cache", c_kv_cache},
                     {"k_rope_cache", k_rope_cache},
                     {"block_table", block_table},
                     {"positions", positions}});
  const DeviceStream stream(kAppendOp, c_kv);
  gpu::rope_and_append(call.params, call.dtype, call.wide_angles, stream.get());
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CUDA, m) { m.impl("rope_and_append", TORCH_BOX(&xeco::rope_and_append)); }
