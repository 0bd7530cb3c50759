// HIP: CDNA 2 and 3 (gfx90a, gfx942), waves of 64 lanes. Builtins of clang alone, so that the same source compiles
// without ROCm's headers and device library (scripts/check_device.sh does).
#pragma once

#include <cstdint>

#if !defined(__global__)
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __host__ __attribute__((host))
#define __shared__ __attribute__((shared))
#endif

#define XECO_DEVICE __device__ inline __attribute__((always_inline))
#define XECO_LAYOUT __host__ __device__ constexpr
#define XECO_KERNEL(threads, blocks) __global__ void __attribute__((amdgpu_flat_work_group_size(threads, threads)))
#define XECO_MATRIX_IS_MFMA

namespace xeco::gpu {

constexpr int kLanes = 64;
constexpr bool kCopiesAreAsynchronous = false;

XECO_DEVICE int thread_index() { return static_cast<int>(__builtin_amdgcn_workitem_id_x()); }
XECO_DEVICE int64_t block_index() { return static_cast<int64_t>(__builtin_amdgcn_workgroup_id_x()); }

extern __shared__ __attribute__((aligned(16))) char xeco_shared_memory[];
XECO_DEVICE char* shared_memory() { return xeco_shared_memory; }

XECO_DEVICE void sync_block() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
  __builtin_amdgcn_s_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
}

// Lanes of a wave run in step; the fence keeps the compiler from moving accesses across.
XECO_DEVICE void sync_warp() {
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

XECO_DEVICE void trap() { __builtin_trap(); }

XECO_DEVICE float shuffle_xor(float value, int mask) {
  const int lane = static_cast<int>(__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u)));
  return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute((lane ^ mask) * 4, __builtin_bit_cast(int, value)));
}

// Through registers: gfx90a and gfx942 copy at most 4 bytes a lane straight into the LDS. Done when it returns.
// All 16 bytes or none: rows of codes, which end anywhere, are not copied here.
XECO_DEVICE void copy_async_16(void* to, const void* from, int bytes) {
  typedef int Int4 __attribute__((ext_vector_type(4)));
  *static_cast<Int4*>(to) = bytes > 0 ? *static_cast<const Int4*>(from) : Int4{0, 0, 0, 0};
}

XECO_DEVICE void commit_copies() {}
XECO_DEVICE void wait_copies(int) {}

XECO_DEVICE float exp2(float x) { return __builtin_amdgcn_exp2f(x); }
XECO_DEVICE float log2(float x) { return __builtin_amdgcn_logf(x); }
XECO_DEVICE float nearest(float x) { return __builtin_rintf(x); }
XECO_DEVICE float whole(float x) { return __builtin_floorf(x); }
XECO_DEVICE double root(double x) { return __builtin_sqrt(x); }
XECO_DEVICE float fmax(float a, float b) { return __builtin_fmaxf(a, b); }
XECO_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
XECO_DEVICE uint32_t with_byte(uint32_t base, uint32_t word, int at) {
  return __builtin_amdgcn_perm(word, base, 0x03020000u | static_cast<uint32_t>(4 + at) << 8);
}

template <class Element>
XECO_DEVICE uint32_t centered_by_floats(uint32_t nibbles) {
  const auto number = [](uint32_t code) { return static_cast<float>(code) * 0.125f - 0.9375f; };
  return Element::pack(number(nibbles & 15), number(nibbles >> 16));
}

struct BFloat16 {
  using Storage = uint16_t;
  XECO_DEVICE static float widen(uint16_t bits) { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }
  // No instruction before gfx950 rounds to bfloat16.
  XECO_DEVICE static uint32_t round(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    return (x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
  XECO_DEVICE static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  XECO_DEVICE static uint32_t centered(uint32_t nibbles) { return centered_by_floats<BFloat16>(nibbles); }
};

struct Float16 {
  using Storage = uint16_t;
  XECO_DEVICE static float widen(uint16_t bits) { return static_cast<float>(__builtin_bit_cast(_Float16, bits)); }
  XECO_DEVICE static uint32_t round(float x) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(x)); }
  XECO_DEVICE static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  XECO_DEVICE static uint32_t centered(uint32_t nibbles) { return centered_by_floats<Float16>(nibbles); }
};

// d += a · b for 16×16×16 (V_MFMA_F32_16X16X16_BF16_1K, _F16).
template <class Element>
XECO_DEVICE void mfma_16_16_16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  typedef float Float4 __attribute__((ext_vector_type(4)));
  typedef uint32_t Bits2 __attribute__((ext_vector_type(2)));
  typedef short Short4 __attribute__((ext_vector_type(4)));
  typedef _Float16 Half4 __attribute__((ext_vector_type(4)));
  const Bits2 left = {a[0], a[1]}, right = {b[0], b[1]};
  Float4 sum = {d[0], d[1], d[2], d[3]};
  if constexpr (__is_same(Element, BFloat16))
    sum = __builtin_amdgcn_mfma_f32_16x16x16bf16_1k(__builtin_bit_cast(Short4, left), __builtin_bit_cast(Short4, right),
                                                    sum, 0, 0, 0);
  else
    sum = __builtin_amdgcn_mfma_f32_16x16x16f16(__builtin_bit_cast(Half4, left), __builtin_bit_cast(Half4, right), sum,
                                                0, 0, 0);
  d[0] = sum[0], d[1] = sum[1], d[2] = sum[2], d[3] = sum[3];
}

}  // namespace xeco::gpu
