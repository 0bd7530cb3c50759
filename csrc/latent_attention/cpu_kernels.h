// The CPU kernels of latent attention, one pair for each instruction set.
#pragma once

#include "xeco/params.h"

namespace xeco {

struct CpuKernels {
  void (*forward)(const ForwardParams&, ParallelItems);
  void (*backward)(const BackwardParams&, ParallelItems);
};

// Kernels for one instruction set and element type. The last two take bfloat16 of even widths alone.
CpuKernels scalar_kernels(Dtype dtype);
CpuKernels avx2_kernels(Dtype dtype);
CpuKernels avx512_kernels(Dtype dtype);
CpuKernels avx512_bf16_kernels();
CpuKernels amx_kernels();

}  // namespace xeco
