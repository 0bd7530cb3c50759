// Kernels for any processor: 16-byte vectors, which every 64-bit x86 (SSE2) and ARM (NEON) has.
#include "latent_attention/cpu_kernels.h"
#include "cpu/standard.h"

#define XECO_ISA scalar
#define XECO_LANES 4
#include "cpu/isa.h"
#include "latent_attention/wide_kernels.h"

namespace xeco {
CpuKernels scalar_kernels(Dtype dtype) { return scalar::wide_kernels(dtype); }
}  // namespace xeco
