// Kernels for AMX with bfloat16 tiles.
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#if defined(XECO_X86_KERNELS)

#include "cpu/intrinsics.h"

#define XECO_ISA amx
#define XECO_LANES 16
#if defined(XECO_EMULATE_AMX)
#define XECO_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#else
#define XECO_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,amx-tile,amx-bf16"
#endif
#include "cpu/target_begin-inl.h"
#include "latent_attention/cpu/isa-inl.h"
#include "cpu/bf16_engines-inl.h"
#include "cpu/amx-inl.h"
#include "cpu/target_end-inl.h"

namespace xeco {
CpuKernels amx_kernels() { return amx::kernels_of<amx::AmxEngine>(); }
}  // namespace xeco

#endif
