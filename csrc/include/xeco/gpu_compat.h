// The one place that knows which machine device code is compiled for: CUDA, HIP, or the one whose header
// XECO_GPU_MACHINE names (tests/device/emulation.h: a host that plays either of them). Free of torch and of the
// vendors' headers.
//
// Each of them offers, in xeco::gpu:
//   kLanes                                   threads of a warp, or of a wave
//   thread_index(), block_index()            one-dimensional
//   shared_memory()                          the block's dynamic shared memory, 16-byte aligned
//   sync_block(), sync_warp()
//   shuffle_xor(value, mask)                 value of the lane whose number differs by mask
//   kCopiesAreAsynchronous                   whether these run beside other work:
//   copy_async_16(to, from, bytes), commit_copies(), wait_copies(pending)
//                                            16 bytes from global to shared memory, of which the first `bytes` are read
//                                            and the others become zeros; in groups, the last `pending` left open
//   exp2(x), log2(x)                         the processor's own, about 2 ulp
//   nearest(x), whole(x), root(x)            rounded to even, rounded down; square root of a float64
//   fmax(a, b)                               the larger number; the other one where one is NaN
//   float_of(bits)                           the float32 that has these bits
//   with_byte(base, word, at)                base, whose second byte is that of word with this number, 0 the lowest
//   widen / pack of BFloat16 and Float16     round to nearest even
//   centered(nibbles) of both                c / 8 - 15/16 of the codes in bits 0 to 3 and 16 to 19, exact
//   trap()                                   end the kernel with an error: a value on the device that no host check saw
// and the matrix instruction that gpu/products.h builds on: mma.sync and ldmatrix, or, where it defines
// XECO_MATRIX_IS_MFMA, MFMA.
#pragma once

#if defined(XECO_GPU_MACHINE)
#include XECO_GPU_MACHINE
#elif defined(__HIP__) || defined(__HIPCC__)
#include "xeco/gpu/amd.h"
#else
#include "xeco/gpu/nvidia.h"
#endif
