// Kernels for AVX-512 (F, BW, DQ, VL).
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#if defined(XECO_X86_KERNELS)

#include "cpu/intrinsics.h"

#define XECO_ISA avx512
#define XECO_LANES 16
#define XECO_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "cpu/target_begin-inl.h"
#include "latent_attention/cpu/isa-inl.h"
#include "latent_attention/cpu/wide_kernels-inl.h"
#include "cpu/target_end-inl.h"

namespace xeco {
CpuKernels avx512_kernels(Dtype dtype) { return avx512::wide_kernels(dtype); }
CpuKernels avx512_code_kernels(Dtype dtype) { return avx512::code_kernels_of<avx512::CodeEngine>(dtype); }
}  // namespace xeco

#endif
