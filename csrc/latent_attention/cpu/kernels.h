// The CPU kernels of latent attention, one pair for each instruction set. Free of torch.
#pragma once

#include "cpu/parallel.h"
#include "latent_attention/params.h"

namespace xeco {

// Query rows of a block: what one thread works on at a time.
constexpr int64_t kBlockRows = 128;

// Blocks of a sequence.
inline int64_t num_blocks(const AttentionShape& shape) {
  return (shape.num_queries * shape.num_heads + kBlockRows - 1) / kBlockRows;
}

struct CpuKernels {
  void (*forward)(const ForwardParams&, ParallelItems);
  void (*backward)(const BackwardParams&, ParallelItems);
};

// Kernels for one instruction set and element type. The last two take bfloat16 of even widths alone.
CpuKernels baseline_kernels(Dtype dtype);
CpuKernels avx2_kernels(Dtype dtype);
CpuKernels avx512_kernels(Dtype dtype);
CpuKernels avx512_bf16_kernels();
CpuKernels amx_kernels();

// Kernels over rows of 8- or 4-bit codes, in queries and results of the element type; without a backward pass.
CpuKernels baseline_code_kernels(Dtype dtype);
CpuKernels avx2_code_kernels(Dtype dtype);
CpuKernels avx512_code_kernels(Dtype dtype);
CpuKernels avx512_vnni_code_kernels(Dtype dtype);

}  // namespace xeco
