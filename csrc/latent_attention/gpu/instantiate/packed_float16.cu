// The forward kernels over rows of codes, queries in float16. One file for each, so that they are compiled side by
// side.
#include "latent_attention/gpu/kernels.h"
#include "latent_attention/gpu/run.cuh"

namespace xeco::gpu {

void packed_float16(const ForwardParams& params, const Parts& parts, const Stream& stream) {
  run_forward<Float16, true>(params, parts, stream);
}

}  // namespace xeco::gpu
