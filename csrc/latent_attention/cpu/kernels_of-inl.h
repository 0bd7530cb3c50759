// The forward and backward kernel of one engine.

namespace xeco::XECO_ISA {

template <class Engine>
static CpuKernels kernels_of() {
  return {[](const ForwardParams& params, ParallelItems parallel) { Forward<Engine>(params).run(parallel); },
          [](const BackwardParams& params, ParallelItems parallel) { Backward<Engine>(params).run(parallel); }};
}

}  // namespace xeco::XECO_ISA
