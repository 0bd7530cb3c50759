// Everything that is compiled once for each instruction set. The including file has set XECO_ISA and XECO_LANES and the
// target of its functions; the standard headers come first, outside that target (latent_attention/cpu_*.cpp show how).
#include "cpu/simd.h"

#include "cpu/gemm.h"

#include "cpu/engine.h"

#include "latent_attention/rows.h"

#include "latent_attention/forward.h"

#include "latent_attention/backward.h"

#include "latent_attention/kernels_of.h"
