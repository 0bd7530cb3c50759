// CUDA, sm_80 and later. Instructions by their PTX names (PTX ISA 8.x), so that no header of the toolkit is needed.
#pragma once

#include <cstdint>

#define XECO_DEVICE __device__ __forceinline__
#define XECO_LAYOUT __host__ __device__ constexpr
// `blocks` of a kernel have room on a multiprocessor by their registers: 65536 for all threads, 255 for each at most.
#define XECO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace xeco::gpu {

constexpr int kLanes = 32;
constexpr bool kCopiesAreAsynchronous = true;

XECO_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
XECO_DEVICE int64_t block_index() { return static_cast<int64_t>(blockIdx.x); }

XECO_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char xeco_shared_memory[];
  return xeco_shared_memory;
}

XECO_DEVICE void sync_block() { __syncthreads(); }
XECO_DEVICE void sync_warp() { __syncwarp(); }
XECO_DEVICE void trap() { __trap(); }
XECO_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

XECO_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// .cg: past the L1 cache, since the rows of a tile are used from shared memory alone.
XECO_DEVICE void copy_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

XECO_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

XECO_DEVICE void wait_copies(int pending) {
  if (pending <= 0)
    asm volatile("cp.async.wait_group 0;" ::: "memory");
  else if (pending == 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 2;" ::: "memory");
}

XECO_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

XECO_DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

XECO_DEVICE float nearest(float x) { return rintf(x); }
XECO_DEVICE float whole(float x) { return floorf(x); }
XECO_DEVICE double root(double x) { return sqrt(x); }
XECO_DEVICE float fmax(float a, float b) { return fmaxf(a, b); }
XECO_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
XECO_DEVICE uint32_t with_byte(uint32_t base, uint32_t word, int at) {
  return __byte_perm(base, word, 0x3200u | static_cast<uint32_t>(4 + at) << 4);
}

struct BFloat16 {
  using Storage = uint16_t;
  XECO_DEVICE static float widen(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
  XECO_DEVICE static uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  // 16 + c, whose steps are an eighth, times an eighth, less 2 + 15/16.
  XECO_DEVICE static uint32_t centered(uint32_t nibbles) {
    uint32_t both;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(both)
        : "r"(nibbles << 3 | 0x41804180u), "r"(0x3e003e00u), "r"(0xc03cc03cu));
    return both;
  }
};

struct Float16 {
  using Storage = uint16_t;
  XECO_DEVICE static float widen(uint16_t bits) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
  }
  XECO_DEVICE static uint32_t pack(float low, float high) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
  }
  // As BFloat16's; the steps of 16 are a 64th.
  XECO_DEVICE static uint32_t centered(uint32_t nibbles) {
    uint32_t both;
    asm("fma.rn.f16x2 %0, %1, %2, %3;"
        : "=r"(both)
        : "r"(nibbles << 6 | 0x4c004c00u), "r"(0x30003000u), "r"(0xc1e0c1e0u));
    return both;
  }
};

// d += a · b, with a 16×16, b 16×8 (mma.sync.aligned.m16n8k16).
template <class Element>
XECO_DEVICE void mma_16_8_16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
XECO_DEVICE void mma_16_8_16<BFloat16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
XECO_DEVICE void mma_16_8_16<Float16>(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8×8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8.
XECO_DEVICE void load_matrices(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

XECO_DEVICE void load_matrices_transposed(uint32_t (&to)[4], const uint16_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace xeco::gpu
