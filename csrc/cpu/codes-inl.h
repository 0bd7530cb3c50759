// Rows of a cache in codes of few bits (xeco_convert/ops/packed_rows.py): x = scale * (code - middle), one scale a row.
//
// A row is its codes, then its scale as bfloat16. With 8 bits a code is a byte; with 4 bits byte i holds code i in its
// low half and code i + width / 2 in its high half. In bit planes plane p holds the p-th highest bit of the first
// numbers' bytes; the bit behind the lowest one that a number has is set as well, and those below it are not.

namespace xeco::XECO_ISA {

typedef uint8_t VbAny __attribute__((vector_size(XECO_LANES), aligned(1), may_alias));

XECO_INLINE float middle_code(int64_t bits) { return bits == 8 ? 127.5f : bits == 4 ? 7.5f : 128.0f; }

XECO_INLINE float scale_of_row(const uint8_t* row, int64_t width, int64_t bits) {
  const uint8_t* at = row + code_row_bytes(width, bits) - kScaleBytes;
  return BFloat16::read_one(static_cast<uint16_t>(at[0] | at[1] << 8));
}

// Bytes as integers. By the processor's own instruction where there is one: GCC 12 takes the vector of bytes apart,
// which makes a row of codes three times as long as one of bfloat16.
XECO_INLINE Vi bytes_at(const uint8_t* from) {
#if defined(XECO_X86_KERNELS) && XECO_LANES == 8
  return reinterpret_cast<Vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(XECO_X86_KERNELS) && XECO_LANES == 16
  return reinterpret_cast<Vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const VbAny*>(from), Vh), Vi);
#endif
}

// Codes as float32 numbers scale * (code - middle) = scale * code + shift.
XECO_INLINE Vf decoded(Vi codes, float scale, float shift) {
  return __builtin_convertvector(codes, Vf) * scale + shift;
}

#if defined(XECO_X86_KERNELS) && XECO_LANES >= 8

// The first `count` of 32 bytes.
XECO_INLINE __m256i first_bytes(int64_t count) {
  const __m256i place = _mm256_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21,
                                         22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
  return _mm256_cmpgt_epi8(_mm256_set1_epi8(static_cast<char>(count)), place);
}

// 32 numbers of the plane that begins with four bytes: -1 where a number has the bit, 0 where not.
XECO_INLINE __m256i bits_of_plane(uint32_t four_bytes) {
  const __m256i own_byte =
      _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201u));
  const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(four_bytes)), own_byte);
  return _mm256_cmpeq_epi8(_mm256_and_si256(spread, own_bit), own_bit);
}

// The bits of 32 numbers that kPlanes planes reach, as the highest of their bytes.
template <int kPlanes>
XECO_INLINE __m256i bits_of_planes(const uint8_t* const* planes, int64_t i) {
  __m256i bytes = _mm256_setzero_si256();
#pragma GCC unroll 8
  for (int p = 0; p < kPlanes; ++p) {
    uint32_t four;
    __builtin_memcpy(&four, planes[p] + i, sizeof four);
    const __m256i bit = _mm256_set1_epi8(static_cast<char>(0x80 >> p));
    bytes = _mm256_or_si256(bytes, _mm256_and_si256(bits_of_plane(four), bit));
  }
  return bytes;
}

// The same for any number of planes, found by counting down.
template <int kPlanes = kMostPlanes>
XECO_INLINE __m256i bits_of_whole_planes(int count, const uint8_t* const* planes, int64_t i) {
  if constexpr (kPlanes > 0) {
    if (count == kPlanes) return bits_of_planes<kPlanes>(planes, i);
    return bits_of_whole_planes<kPlanes - 1>(count, planes, i);
  }
  return _mm256_setzero_si256();
}

// The bytes of a row in bit planes, 32 at a time: as many are written as make whole vectors.
static void bytes_of_planes(const uint8_t* row, int64_t bits, uint8_t* to) {
  const uint8_t* planes[kMostPlanes];
  int64_t reached[kMostPlanes + 1] = {};  // in bytes
  int count = 0;
  for (; count < kMostPlanes && plane_bytes(bits, count) > 0; ++count) {
    planes[count] = row;
    reached[count] = plane_bytes(bits, count);
    row += reached[count];
  }
  int whole = count;  // planes that reach all of the next 32 numbers
  for (int64_t i = 0; i < reached[0]; i += 4) {
    while (whole > 0 && reached[whole - 1] < i + 4) --whole;
    __m256i bytes = bits_of_whole_planes(whole, planes, i);
    int64_t here = 4;  // bytes that the plane reaches; numbers that end there have the bit behind set as well
    for (int p = whole; here > 0; ++p) {
      const int64_t next = max(0, reached[p] - i);
      const __m256i ends = _mm256_andnot_si256(first_bytes(8 * next), first_bytes(8 * here));
      uint32_t ones = 0;
      for (int64_t k = 0; k < next; ++k) ones |= static_cast<uint32_t>(planes[p][i + k]) << 8 * k;
      const __m256i set = _mm256_or_si256(bits_of_plane(ones), p == 0 ? _mm256_setzero_si256() : ends);
      bytes = _mm256_or_si256(bytes, _mm256_and_si256(set, _mm256_set1_epi8(static_cast<char>(0x80 >> p))));
      here = next;
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), bytes);
  }
}

#else

// Eight bits as the highest of eight bytes, the lowest bit first.
XECO_INLINE uint64_t spread_bits(uint8_t bits) {
  const uint64_t apart = (bits * 0x0101010101010101u) & 0x8040201008040201u;
  return (apart + 0x00406070787c7e7fu) & 0x8080808080808080u;
}

// The bytes of a row in bit planes, `width` of them.
static void bytes_of_planes(const uint8_t* row, int64_t bits, uint8_t* to) {
  const uint8_t* planes[kMostPlanes];
  int64_t reached[kMostPlanes + 1] = {};
  int count = 0;
  for (; count < kMostPlanes && plane_bytes(bits, count) > 0; ++count) {
    planes[count] = row;
    reached[count] = plane_bytes(bits, count);
    row += reached[count];
  }
  // runs of numbers that as many planes reach, eight numbers at a time
  for (int64_t i = 0; count > 0; --count) {
    const uint64_t behind = 0x8080808080808080u >> count;
    for (; i < reached[count - 1]; ++i) {
      uint64_t bytes = behind;
      for (int plane = 0; plane < count; ++plane) bytes |= spread_bits(planes[plane][i]) >> plane;
      __builtin_memcpy(to + 8 * i, &bytes, sizeof bytes);
    }
  }
}

#endif

static void decode_row(const uint8_t* row, int64_t width, int64_t bits, float* to) {
  const float scale = scale_of_row(row, width, bits), shift = -scale * middle_code(bits);
  alignas(64) uint8_t from_planes[kMostPlaneNumbers + 32];
  if (lies_in_planes(bits)) {
    bytes_of_planes(row, bits, from_planes);
    row = from_planes;
  }
  const bool are_bytes = bits != 4;
  const int64_t bytes = are_bytes ? width : width / 2;
  int64_t i = 0;
  if (are_bytes) {
    for (; i + kLanes <= bytes; i += kLanes) {
      store(to + i, decoded(bytes_at(row + i), scale, shift));
    }
    for (; i < bytes; ++i) to[i] = static_cast<float>(row[i]) * scale + shift;
    return;
  }
  for (; i + kLanes <= bytes; i += kLanes) {
    const Vi pairs = bytes_at(row + i);
    store(to + i, decoded(pairs & 15, scale, shift));
    store(to + bytes + i, decoded(pairs >> 4, scale, shift));
  }
  for (; i < bytes; ++i) {
    to[i] = static_cast<float>(row[i] & 15) * scale + shift;
    to[bytes + i] = static_cast<float>(row[i] >> 4) * scale + shift;
  }
}

// Tiles of codes are widened once, queries and results are of ElementType: all else is the WideEngine's.
template <class ElementType>
struct CodeEngine : WideEngine<ElementType> {
  using Cached = uint8_t;
  using Tile = TileRows<float>;

  static int64_t tile_operands(int64_t rank, int64_t rope) { return kTileTokens * (rank + rope); }

  static Tile tile(const TileRows<uint8_t>& rows, int64_t rank, int64_t rope, bool, float* scratch) {
    const int64_t width = rank + rope;
    for (int64_t t = 0; t < rows.tokens; ++t) {
      decode_row(rows.latent + t * rows.latent_stride, rank, rows.latent_bits, scratch + t * width);
      decode_row(rows.rope + t * rows.rope_stride, rope, rows.rope_bits, scratch + t * width + rank);
    }
    return {scratch, width, scratch + rank, width, rows.tokens};
  }
};

}  // namespace xeco::XECO_ISA
