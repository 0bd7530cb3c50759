// The kernel of rope_and_append, for every dtype of rows and angles.
#include "rope_and_append/kernel.cuh"

namespace xeco::gpu {
namespace {

template <class Element, class Angle>
void run(const AppendParams& params, const Queue& queue) {
  launch(queue, &rope_and_append_kernel<Element, Angle>, params.batch * params.num_queries, kAppendThreads, 0, params);
}

template <class Element>
void run(const AppendParams& params, bool wide_angles, const Queue& queue) {
  if (wide_angles)
    run<Element, Float32>(params, queue);
  else
    run<Element, Element>(params, queue);
}

}  // namespace

void rope_and_append(const AppendParams& params, Dtype dtype, bool wide_angles, const Queue& queue) {
  if (dtype == Dtype::kFloat32) return run<Float32, Float32>(params, queue);
  if (dtype == Dtype::kBFloat16) return run<BFloat16>(params, wide_angles, queue);
  run<Float16>(params, wide_angles, queue);
}

}  // namespace xeco::gpu
