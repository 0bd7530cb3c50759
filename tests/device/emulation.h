// A host that plays a GPU: what csrc/include/xeco/gpu_compat.h asks of a machine. The same kernels run, every thread of
// a block a fiber of one thread of the host (machine.cpp). XECO_EMULATE_LANES is 32 or 64: warps of 32 lanes have
// mma.sync and ldmatrix, waves of 64 have MFMA, each written here from the vendors' tables of which lane holds what,
// and not from fragments.h, which is thereby tested against them.
//
// Stricter than a GPU: warps run ahead of one another, in a random order, as far as barriers let them, and so do the
// threads of a warp between its instructions; shared memory starts as NaN, an asynchronous copy lands no sooner than it
// is waited for, and lanes that meet in different instructions end the program.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#include "xeco/gpu/launch.h"

#define XECO_DEVICE inline
#define XECO_LAYOUT constexpr
#define XECO_KERNEL(threads, blocks) void
#if XECO_EMULATE_LANES == 64
#define XECO_MATRIX_IS_MFMA
#elif XECO_EMULATE_LANES != 32
#error "XECO_EMULATE_LANES: 32 or 64"
#endif

namespace xeco::gpu {

constexpr int kLanes = XECO_EMULATE_LANES;
constexpr bool kCopiesAreAsynchronous = XECO_EMULATE_LANES == 32;

namespace machine {

// Runs `kernel` in every thread of every block. Throws std::runtime_error where a thread stopped.
void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

// The order of warps and threads in the launches that follow. `without_barrier`: that barrier of every block, counted
// from 0 in the order in which a thread comes to them, is none; -1: all are there.
void set_schedule(uint32_t seed, int64_t without_barrier);
// That a thread came to in one block of the launch, at most: launches counted from 0 since then.
int64_t num_barriers(int launch);

int thread();
int64_t block();
char* shared();
void barrier();
// All lanes of a warp come together; `together` is called once, with what each has brought.
using Together = void (*)(void* const* lanes);
void meet(Together together, void* mine);
// Ends the program where 16 bytes do not lie in the block's shared memory, on a multiple of 16.
void check_shared_16(const void* address);
void copy_later(void* to, const void* from, int bytes);
void commit();
void wait(int pending);
[[noreturn]] void trap();
[[noreturn]] void too_much_shared_memory(int64_t bytes);

}  // namespace machine

template <class... Arguments>
void launch(const Stream& stream, void (*kernel)(Arguments...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  if (shared_bytes > stream.max_shared_bytes) machine::too_much_shared_memory(shared_bytes);
  machine::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

inline int thread_index() { return machine::thread(); }
inline int64_t block_index() { return machine::block(); }
inline char* shared_memory() { return machine::shared(); }
inline void sync_block() { machine::barrier(); }
inline void trap() { machine::trap(); }
inline void copy_async_16(void* to, const void* from, int bytes) { machine::copy_later(to, from, bytes); }
inline void commit_copies() { machine::commit(); }
inline void wait_copies(int pending) { machine::wait(pending); }
inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float nearest(float x) { return std::nearbyint(x); }
inline float whole(float x) { return std::floor(x); }
inline double root(double x) { return std::sqrt(x); }
inline float fmax(float a, float b) { return std::fmax(a, b); }

inline void sync_warp() {
  machine::meet([](void* const*) {}, nullptr);
}

struct Shuffle {
  float value, result;
  int mask;
};

inline float shuffle_xor(float value, int mask) {
  Shuffle mine{value, 0.0f, mask};
  machine::meet(
      [](void* const* lanes) {
        for (int lane = 0; lane < kLanes; ++lane) {
          Shuffle& one = *static_cast<Shuffle*>(lanes[lane]);
          one.result = static_cast<Shuffle*>(lanes[lane ^ one.mask])->value;
        }
      },
      &mine);
  return mine.result;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t with_byte(uint32_t base, uint32_t word, int at) {
  return (base & 0xffff00ffu) | (word >> (8 * at) & 255u) << 8;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

struct BFloat16 {
  using Storage = uint16_t;
  static float widen(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
  static uint32_t round(float x) {
    const uint32_t bits = bits_of(x);
    return (x != x ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static uint32_t centered(uint32_t nibbles) {
    return pack(static_cast<float>(nibbles & 0xffffu) / 8 - 0.9375f, static_cast<float>(nibbles >> 16) / 8 - 0.9375f);
  }
};

struct Float16 {
  using Storage = uint16_t;
  static float widen(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    float size = exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                               : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    if (exponent == 31) size = fraction == 0 ? INFINITY : NAN;
    return bits & 0x8000 ? -size : size;
  }
  static uint32_t round(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u;
    const float size = std::fabs(x);
    if (x != x) return 0x7e00u;
    if (size >= 65520.0f) return sign | 0x7c00u;
    if (size == 0.0f) return sign;
    int exponent = 0;
    std::frexp(size, &exponent);
    const int step = exponent < -13 ? -24 : exponent - 11;  // of the last place; subnormal below 2^-14
    const uint32_t steps = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, -step)));  // to even
    return sign | (step == -24 ? steps : static_cast<uint32_t>(step + 24) * 1024 + steps);
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
  static uint32_t centered(uint32_t nibbles) {
    return pack(static_cast<float>(nibbles & 0xffffu) / 8 - 0.9375f, static_cast<float>(nibbles >> 16) / 8 - 0.9375f);
  }
};

inline uint16_t half_of(const uint32_t* words, int element) {
  return static_cast<uint16_t>(words[element / 2] >> (element % 2 * 16));
}

#if defined(XECO_MATRIX_IS_MFMA)

struct Mfma {
  float* d;
  const uint32_t *a, *b;
};

// CDNA 3 ISA, section 7.1.4: A[i][k] in lane i + 16·(k / 4), item k % 4; B[k][j] in lane j + 16·(k / 4), item k % 4;
// D[i][j] in lane j + 16·(i / 4), item i % 4.
template <class Element>
void mfma_16_16_16(float (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[2]) {
  Mfma mine{d, a, b};
  machine::meet(
      [](void* const* lanes) {
        const auto at = [&](int lane) { return *static_cast<Mfma*>(lanes[lane]); };
        for (int i = 0; i < 16; ++i)
          for (int j = 0; j < 16; ++j) {
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k)
              sum += Element::widen(half_of(at(i + 16 * (k / 4)).a, k % 4)) *
                     Element::widen(half_of(at(j + 16 * (k / 4)).b, k % 4));
            at(j + 16 * (i / 4)).d[i % 4] += sum;
          }
      },
      &mine);
}

#else

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

// PTX ISA, "Matrix Fragments for mma.m16n8k16": where a_i, b_i and c_i of a lane lie.
template <class Element>
void mma_16_8_16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Mma mine{d, a, {b0, b1}};
  machine::meet(
      [](void* const* lanes) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const Mma& one = *static_cast<Mma*>(lanes[lane]);
          const int group = lane >> 2, in_group = lane % 4;
          for (int i = 0; i < 8; ++i) {
            const int row = (i < 2 || (4 <= i && i < 6)) ? group : group + 8;
            const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
            left[row][column] = Element::widen(half_of(one.a, i));
          }
          for (int i = 0; i < 4; ++i)
            right[in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0)][group] = Element::widen(half_of(one.b, i));
        }
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int row = i < 2 ? lane >> 2 : (lane >> 2) + 8, column = lane % 4 * 2 + (i & 1);
            float sum = 0.0f;
            for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
            static_cast<Mma*>(lanes[lane])->d[i] += sum;
          }
      },
      &mine);
}

struct LoadMatrices {
  uint32_t* to;
  const uint16_t* row;
  bool transposed;
};

// PTX ISA, ldmatrix: lanes 8i…8i + 7 give the rows of matrix i; a lane receives of each matrix the two elements from
// row lane / 4, column 2·(lane % 4) on, of the matrix or of its transpose.
inline void load_matrices_of(const LoadMatrices& of_mine) {
  machine::check_shared_16(of_mine.row);
  LoadMatrices mine = of_mine;
  machine::meet(
      [](void* const* lanes) {
        for (int lane = 0; lane < 32; ++lane)
          for (int i = 0; i < 4; ++i) {
            const LoadMatrices& one = *static_cast<LoadMatrices*>(lanes[lane]);
            const auto element = [&](int row, int column) -> uint32_t {
              return static_cast<LoadMatrices*>(lanes[8 * i + row])->row[column];
            };
            const int row = lane / 4, column = 2 * (lane % 4);
            one.to[i] = one.transposed ? element(column, row) | element(column + 1, row) << 16
                                       : element(row, column) | element(row, column + 1) << 16;
          }
      },
      &mine);
}

inline void load_matrices(uint32_t (&to)[4], const uint16_t* row) { load_matrices_of({to, row, false}); }
inline void load_matrices_transposed(uint32_t (&to)[4], const uint16_t* row) { load_matrices_of({to, row, true}); }

#endif

}  // namespace xeco::gpu
