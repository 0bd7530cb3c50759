// The kernel of pack_rows, for every dtype of the rows.
#include "pack_rows/gpu/kernel.cuh"

namespace xeco::gpu {
namespace {

template <class Element>
void pack(const PackParams& params, const Stream& stream) {
  launch(stream, &pack_rows_kernel<Element>, params.batch * params.num_queries, kPackThreads,
         pack_shared_bytes(params.width), params);
}

}  // namespace

void pack_rows(const PackParams& params, Dtype dtype, const Stream& stream) {
  if (dtype == Dtype::kFloat32) return pack<Float32>(params, stream);
  if (dtype == Dtype::kBFloat16) return pack<BFloat16>(params, stream);
  pack<Float16>(params, stream);
}

}  // namespace xeco::gpu
