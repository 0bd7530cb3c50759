// Vectors of one instruction set, in the compiler's own vector extensions: the same source serves every instruction set
// (NEON included), each translation unit compiles it under its own target.
//
// XECO_ISA is a namespace, so that no two instruction sets share a symbol; XECO_LANES counts the float32 lanes of a
// vector.

namespace xeco::XECO_ISA {

constexpr int kLanes = XECO_LANES;
constexpr int kMaxPanelVectors = 2;
constexpr int kPanelWidth = kMaxPanelVectors * kLanes;

typedef float Vf __attribute__((vector_size(XECO_LANES * 4)));
typedef int32_t Vi __attribute__((vector_size(XECO_LANES * 4)));
typedef uint32_t Vu __attribute__((vector_size(XECO_LANES * 4)));
typedef uint16_t Vh __attribute__((vector_size(XECO_LANES * 2)));
// The same at any address, aliasing whatever lies there.
typedef float VfAny __attribute__((vector_size(XECO_LANES * 4), aligned(4), may_alias));
typedef uint16_t VhAny __attribute__((vector_size(XECO_LANES * 2), aligned(2), may_alias));

#define XECO_INLINE static inline __attribute__((always_inline))

XECO_INLINE Vf load(const float* from) { return *reinterpret_cast<const VfAny*>(from); }
XECO_INLINE void store(float* to, Vf value) { *reinterpret_cast<VfAny*>(to) = value; }
XECO_INLINE Vf splat(float value) { return value - Vf{}; }
XECO_INLINE Vi splat_int(int32_t value) { return value - Vi{}; }
XECO_INLINE Vf as_float(Vi bits) { return reinterpret_cast<Vf>(bits); }
XECO_INLINE Vi as_bits(Vf value) { return reinterpret_cast<Vi>(value); }
XECO_INLINE Vf select(Vi condition, Vf yes, Vf no) {
  return as_float((condition & as_bits(yes)) | (~condition & as_bits(no)));
}
XECO_INLINE Vf max(Vf a, Vf b) { return select(a > b, a, b); }

XECO_INLINE bool any(Vi condition) {
  int32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= condition[i];
  return bits != 0;
}

// 2^x. Relative error 2e-7 (Taylor of degree 6 on [-1/2, 1/2]); below 2^-126 zero; NaN stays NaN.
XECO_INLINE Vf exp2(Vf x) {
  const Vf lowest = splat(-126.0f);
  const Vi vanishes = x < lowest;
  x = select(vanishes, lowest, x);
  // Adding 1.5 * 2^23 rounds to the nearest integer, which then stands in the low bits.
  const Vf magic = splat(12582912.0f);
  const Vf shifted = x + magic;
  const Vf f = x - (shifted - magic);
  const Vi exponent = as_bits(shifted) - as_bits(magic);
  Vf p = splat(1.5403530e-4f);
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  const Vf power = as_float((exponent + 127) << 23);
  return select(vanishes, Vf{}, p * power);
}

// tanh by exp: 1 - 2 / (e^2x + 1), exact in its limits.
XECO_INLINE Vf tanh(Vf x) {
  const Vf far = splat(12.0f);
  x = select(x > far, far, select(x < -far, -far, x));
  const Vf e = exp2(x * 2.885390082f);
  return 1.0f - 2.0f / (e + 1.0f);
}

// Conversions of the two 16-bit formats, by integer arithmetic: the same bits on every instruction set.
XECO_INLINE Vf from_bfloat16(Vh bits) { return reinterpret_cast<Vf>(__builtin_convertvector(bits, Vu) << 16); }

XECO_INLINE Vh to_bfloat16(Vf value) {
  const Vu bits = reinterpret_cast<Vu>(value);
  const Vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Vu nan = reinterpret_cast<Vu>(value != value);
  return __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), Vh);
}

XECO_INLINE Vf from_float16(Vh half) {
  const Vu bits = __builtin_convertvector(half, Vu);
  const Vu sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13;
  // Read with float32's exponent the number is 2^112 too small; that factor also normalises float16's denormals.
  const Vf scaled = reinterpret_cast<Vf>(magnitude) * 0x1p112f;
  const Vu special = reinterpret_cast<Vu>(reinterpret_cast<Vi>(magnitude) >= static_cast<int32_t>(0x0f800000));
  const Vu widened = (special & (magnitude | 0x7f800000u)) | (~special & reinterpret_cast<Vu>(scaled));
  return reinterpret_cast<Vf>(widened | sign);
}

XECO_INLINE Vh to_float16(Vf value) {
  const Vu bits = reinterpret_cast<Vu>(value);
  const Vu sign = (bits >> 16) & 0x8000u;
  const Vu magnitude = bits & 0x7fffffffu;
  const Vi ordered = reinterpret_cast<Vi>(magnitude);
  const Vu small = reinterpret_cast<Vu>(ordered < 0x38800000);      // below 2^-14: denormal or zero
  const Vu overflow = reinterpret_cast<Vu>(ordered >= 0x477ff000);  // rounds to infinity
  const Vu nan = reinterpret_cast<Vu>(ordered > 0x7f800000);
  // Adding 1/2 lines up a denormal's last bit with float32's last bit, rounding to even on the way.
  const Vu denormal = reinterpret_cast<Vu>(reinterpret_cast<Vf>(magnitude) + 0.5f) - 0x3f000000u;
  const Vu normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  Vu rounded = (small & denormal) | (~small & normal);
  rounded = (overflow & 0x7c00u) | (~overflow & rounded);
  rounded = (nan & 0x7e00u) | (~nan & rounded);
  return __builtin_convertvector(rounded | sign, Vh);
}

// Element types of the tensors: how a vector of them is read and written, and a single one.
struct Float32 {
  using Storage = float;
  XECO_INLINE Vf read(const float* from) { return load(from); }
  XECO_INLINE void write(float* to, Vf value) { store(to, value); }
  XECO_INLINE float read_one(float value) { return value; }
  XECO_INLINE float write_one(float value) { return value; }
};

struct BFloat16 {
  using Storage = uint16_t;
  XECO_INLINE Vf read(const uint16_t* from) { return from_bfloat16(*reinterpret_cast<const VhAny*>(from)); }
  XECO_INLINE void write(uint16_t* to, Vf value) { *reinterpret_cast<VhAny*>(to) = to_bfloat16(value); }
  XECO_INLINE float read_one(uint16_t bits) { return from_bfloat16(Vh{} + bits)[0]; }
  XECO_INLINE uint16_t write_one(float value) { return to_bfloat16(splat(value))[0]; }
};

struct Float16 {
  using Storage = uint16_t;
  XECO_INLINE Vf read(const uint16_t* from) { return from_float16(*reinterpret_cast<const VhAny*>(from)); }
  XECO_INLINE void write(uint16_t* to, Vf value) { *reinterpret_cast<VhAny*>(to) = to_float16(value); }
  XECO_INLINE float read_one(uint16_t bits) { return from_float16(Vh{} + bits)[0]; }
  XECO_INLINE uint16_t write_one(float value) { return to_float16(splat(value))[0]; }
};

// Converts a row of `count` elements to float32.
template <class Element>
XECO_INLINE void widen(const typename Element::Storage* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, Element::read(from + i));
  for (; i < count; ++i) to[i] = Element::read_one(from[i]);
}

// Not std::min and std::max: those would be compiled for this instruction set and shared with all other code.
XECO_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
XECO_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
XECO_INLINE int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace xeco::XECO_ISA
