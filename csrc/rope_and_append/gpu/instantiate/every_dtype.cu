// The kernel of rope_and_append, for every dtype of rows and angles.
#include "rope_and_append/gpu/kernel.cuh"

namespace xeco::gpu {
namespace {

template <class Element, class Angle>
void run(const AppendParams& params, const Stream& stream) {
  launch(stream, &rope_and_append_kernel<Element, Angle>, params.batch * params.num_queries, kAppendThreads, 0, params);
}

template <class Element>
void run(const AppendParams& params, bool wide_angles, const Stream& stream) {
  if (wide_angles)
    run<Element, Float32>(params, stream);
  else
    run<Element, Element>(params, stream);
}

}  // namespace

void rope_and_append(const AppendParams& params, Dtype dtype, bool wide_angles, const Stream& stream) {
  if (dtype == Dtype::kFloat32) return run<Float32, Float32>(params, stream);
  if (dtype == Dtype::kBFloat16) return run<BFloat16>(params, wide_angles, stream);
  run<Float16>(params, wide_angles, stream);
}

}  // namespace xeco::gpu
