// Kernels for rows of codes by AVX-512 VNNI (VPDPBUSD). Everything else is that of AVX-512.
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#if defined(XECO_X86_KERNELS)

#include "cpu/intrinsics.h"

#define XECO_ISA avx512_vnni
#define XECO_LANES 16
#define XECO_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#include "cpu/target_begin-inl.h"
#include "latent_attention/cpu/isa-inl.h"
#include "cpu/code_blocks-inl.h"
#include "cpu/vnni_engine-inl.h"
#include "cpu/target_end-inl.h"

namespace xeco {
CpuKernels avx512_vnni_code_kernels(Dtype dtype) {
  using namespace avx512_vnni;
  static_assert(VnniEngine<Float32>::kMaxDepth >= kMaxRank && VnniEngine<Float32>::kMaxDepth >= kMaxRope, "widths");
  return code_kernels_of<VnniEngine>(dtype);
}
}  // namespace xeco

#endif
