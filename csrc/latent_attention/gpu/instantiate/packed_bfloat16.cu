// The forward kernels over rows of codes, queries in bfloat16. One file for each, so that they are compiled side by
// side.
#include "latent_attention/gpu/kernels.h"
#include "latent_attention/gpu/run.cuh"

namespace xeco::gpu {

void packed_bfloat16(const ForwardParams& params, const Parts& parts, const Stream& stream) {
  run_forward<BFloat16, true>(params, parts, stream);
}

ForwardBlocks packed_blocks(const AttentionShape& shape, const Stream& stream) {
  return blocks_of_forward<BFloat16, true>(shape, stream);
}

}  // namespace xeco::gpu
