// The kernels of one instruction set whose arithmetic is float32, by element type.

namespace xeco::XECO_ISA {

static CpuKernels wide_kernels(Dtype dtype) {
  if (dtype == Dtype::kBFloat16) return kernels_of<WideEngine<BFloat16>>();
  if (dtype == Dtype::kFloat16) return kernels_of<WideEngine<Float16>>();
  return kernels_of<WideEngine<Float32>>();
}

}  // namespace xeco::XECO_ISA
