// The forward kernels in float16. One file for each, so that they are compiled side by side.
#include "latent_attention/device_kernels.h"
#include "latent_attention/tiles.cuh"

namespace xeco::gpu {

void forward_float16(const ForwardParams& params, const Parts& parts, const Queue& queue) {
  run_forward<Float16>(params, parts, queue);
}

}  // namespace xeco::gpu
