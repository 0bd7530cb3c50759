// The backward kernels in bfloat16. One file for each, so that they are compiled side by side.
#include "latent_attention/device_kernels.h"
#include "latent_attention/tiles.cuh"

namespace xeco::gpu {

void backward_bfloat16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                   const Queue& queue) {
  run_backward<BFloat16>(params, saved, to, queue);
}

}  // namespace xeco::gpu
