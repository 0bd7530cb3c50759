// The backward kernels in bfloat16. One file for each, so that they are compiled side by side.
#include "latent_attention/gpu/kernels.h"
#include "latent_attention/gpu/run.cuh"

namespace xeco::gpu {

void backward_bfloat16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                       const Stream& stream) {
  run_backward<BFloat16>(params, saved, to, stream);
}

}  // namespace xeco::gpu
