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

}  // namespace xeco::XECO_ISA
