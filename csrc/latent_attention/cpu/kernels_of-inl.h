// The forward and backward kernel of one engine.

namespace xeco::XECO_ISA {

template <class Engine>
static CpuKernels kernels_of() {
  return {[](const ForwardParams& params, ParallelItems parallel) { Forward<Engine>(params).run(parallel); },
          [](const BackwardParams& params, ParallelItems parallel) { Backward<Engine>(params).run(parallel); }};
}

// The forward kernel alone: there is no gradient for rows of codes.
template <class Engine>
static CpuKernels forward_kernel_of() {
  return {[](const ForwardParams& params, ParallelItems parallel) { Forward<Engine>(params).run(parallel); }, nullptr};
}

// The same by the element type of queries and results.
template <template <class> class Engine>
static CpuKernels code_kernels_of(Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return forward_kernel_of<Engine<BFloat16>>();
  if (dtype == Dtype::kFloat16) return forward_kernel_of<Engine<Float16>>();
  return forward_kernel_of<Engine<Float32>>();
}

}  // namespace xeco::XECO_ISA
