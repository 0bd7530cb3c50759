// All of latent attention that is compiled once for each instruction set. The including file has set XECO_ISA and
// XECO_LANES and the target of its functions; headers of the standard library come first, outside that target.
#include "cpu/simd-inl.h"

#include "cpu/scratch-inl.h"

#include "cpu/gemm-inl.h"

#include "cpu/engine-inl.h"

#include "cpu/codes-inl.h"

#include "latent_attention/cpu/rows-inl.h"

#include "latent_attention/cpu/forward-inl.h"

#include "latent_attention/cpu/backward-inl.h"

#include "latent_attention/cpu/kernels_of-inl.h"
