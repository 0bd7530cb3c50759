// Kernels for bfloat16 by AVX-512 BF16 (VDPBF16PS).
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#if defined(XECO_X86_KERNELS)

#include "cpu/intrinsics.h"

#define XECO_ISA avx512_bf16
#define XECO_LANES 16
#define XECO_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#include "cpu/target_begin-inl.h"
#include "latent_attention/cpu/isa-inl.h"
#include "cpu/bf16_engines-inl.h"
#include "cpu/target_end-inl.h"

namespace xeco {
CpuKernels avx512_bf16_kernels() { return avx512_bf16::kernels_of<avx512_bf16::DotEngine>(); }
}  // namespace xeco

#endif
