// Kernels for AVX2 with FMA.
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#if defined(XECO_X86_KERNELS)

#include "cpu/intrinsics.h"

#define XECO_ISA avx2
#define XECO_LANES 8
#define XECO_TARGET "avx2,fma,f16c"
#include "cpu/target_begin-inl.h"
#include "latent_attention/cpu/isa-inl.h"
#include "latent_attention/cpu/wide_kernels-inl.h"
#include "cpu/code_blocks-inl.h"
#include "cpu/madd_engine-inl.h"
#include "cpu/target_end-inl.h"

namespace xeco {
CpuKernels avx2_kernels(Dtype dtype) { return avx2::wide_kernels(dtype); }
CpuKernels avx2_code_kernels(Dtype dtype) {
  using avx2::MaddEngine;
  static_assert(MaddEngine<avx2::Float32>::kMaxDepth >= kMaxRank && MaddEngine<avx2::Float32>::kMaxDepth >= kMaxRope,
                "widths");
  return avx2::code_kernels_of<MaddEngine>(dtype);
}
}  // namespace xeco

#endif
