// The backward kernels in float16. One file for each, so that they are compiled side by side.
#include "latent_attention/gpu/kernels.h"
#include "latent_attention/gpu/run.cuh"

namespace xeco::gpu {

void backward_float16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                      const Stream& stream) {
  run_backward<Float16>(params, saved, to, stream);
}

}  // namespace xeco::gpu
