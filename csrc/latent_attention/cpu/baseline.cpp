// The level of any processor: 16-byte vectors, which every 64-bit x86 (SSE2) and ARM (NEON) has.
#include "latent_attention/cpu/kernels.h"
#include "cpu/standard_headers.h"

#define XECO_ISA baseline
#define XECO_LANES 4
#include "latent_attention/cpu/isa-inl.h"
#include "latent_attention/cpu/wide_kernels-inl.h"

namespace xeco {
CpuKernels baseline_kernels(Dtype dtype) { return baseline::wide_kernels(dtype); }
CpuKernels baseline_code_kernels(Dtype dtype) { return baseline::code_kernels_of<baseline::CodeEngine>(dtype); }
}  // namespace xeco
