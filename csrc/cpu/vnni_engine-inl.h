// Products of rows of codes without widening them: four neighbouring codes times four bytes of the other factor in one
// instruction (VPDPBUSD), summed in int32.
//
// The 15 bits of the other factor (cpu/code_blocks-inl.h) are taken apart into two bytes: x = unit * (128 * high +
// low), |high| <= 127, |low| <= 64. A sum of 512 products of two bytes each fits into int32. (One byte would be faster
// by a seventh at 4 bits, and off by 1e-2.)
//
// A panel [depth][w] is stored as two planes [depth / 4][w][4] of bytes, then w units, then w sums of its numbers.

namespace xeco::XECO_ISA {

static_assert(kLanes == 16, "AVX-512 vectors");

XECO_INLINE int64_t quarters(int64_t depth) { return (depth + 3) / 4; }

// A packed panel and its parts.
struct CodePanel {
  int32_t* planes;
  float *units, *sums;
  int64_t plane;  // int32 numbers of one
};

XECO_INLINE CodePanel code_panel(int32_t* memory, int64_t depth, int64_t width) {
  const int64_t plane = quarters(depth) * width;
  float* units = reinterpret_cast<float*>(memory + 2 * plane);
  return {memory, units, units + width, plane};
}

// Integers of 15 bits as the bytes of the two planes.
struct TwoBytes {
  __m512i high, low;
};

XECO_INLINE TwoBytes taken_apart(__m512i number) {
  const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(64)), 7);
  return {high, _mm512_sub_epi32(number, _mm512_slli_epi32(high, 7))};
}

// Four vectors of small integers as the four bytes of each lane.
XECO_INLINE __m512i side_by_side(const __m512i* four) {
  const __m512i byte = _mm512_set1_epi32(255);
  const __m512i first =
      _mm512_or_si512(_mm512_and_si512(four[0], byte), _mm512_slli_epi32(_mm512_and_si512(four[1], byte), 8));
  const __m512i second =
      _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(four[2], byte), 16), _mm512_slli_epi32(four[3], 24));
  return _mm512_or_si512(first, second);
}

XECO_INLINE __m512i four_codes(const uint8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, sizeof four);
  return _mm512_set1_epi32(four);
}

// sum += codes · bytes, four products in each lane. Written out: with the intrinsic, GCC 12 keeps a block's sums in
// memory.
XECO_INLINE void add_products(__m512i& sum, __m512i codes, __m512i bytes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(bytes));
}

struct ByteProducts {
  using Code = uint8_t;
  using Panel = CodePanel;

  // As gemm_block in cpu/gemm-inl.h, over codes: the four codes (i, k) lie at a + i * row_step + k * depth_step. C[i]
  // (+)= scales[i] * (unit * sum - middle * sum of the panel's numbers); without scales they are 1.
  template <int kRows, int kVectors, bool kAhead>
  XECO_INLINE void block(int64_t depth, const uint8_t* a, int64_t row_step, int64_t depth_step, const CodePanel& b,
                         float middle, const float* scales, float* c, bool accumulate, const Ahead& ahead) {
    constexpr int64_t kWidth = kVectors * kLanes;
    __m512i sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_si512();
#pragma GCC unroll 2
    for (int plane = 0; plane < 2; ++plane) {
      const int32_t* panel = b.planes + plane * b.plane;
      for (int64_t k = 0; k < depth; ++k) {
        if (kAhead && plane == 0) ask_for(ahead, k, kRows);
        __m512i right[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) right[j] = _mm512_loadu_si512(panel + k * kWidth + j * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
          const __m512i left = four_codes(a + i * row_step + k * depth_step);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) add_products(sums[i][j], left, right[j]);
        }
      }
      if (plane == 0) {
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_slli_epi32(sums[i][j], 7);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const __m512 unit = _mm512_loadu_ps(b.units + j * kLanes);
      const __m512 of_middle = _mm512_mul_ps(_mm512_set1_ps(middle), _mm512_loadu_ps(b.sums + j * kLanes));
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        float* to = c + i * kWidth + j * kLanes;
        __m512 value = _mm512_fmsub_ps(_mm512_cvtepi32_ps(sums[i][j]), unit, of_middle);
        if (scales != nullptr) value = _mm512_mul_ps(value, _mm512_set1_ps(scales[i]));
        _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), value) : value);
      }
    }
  }
};

// Which of the next 64 numbers a plane reaches that has `bytes` left.
XECO_INLINE uint64_t reached_by(int64_t bytes) {
  return bytes >= 8 ? ~uint64_t{0} : bytes <= 0 ? 0 : (uint64_t{1} << 8 * bytes) - 1;
}

// As bytes_of_planes, 64 numbers at a time; zeros behind the last one.
static void spread_planes(const uint8_t* row, int64_t width, int64_t bits, uint8_t* to) {
  for (int64_t i = 0; i < width; i += 64) {
    __m512i bytes = _mm512_setzero_si512();
    const uint8_t* plane = row + i / 8;
    uint64_t next = reached_by(plane_bytes(bits, 0) - i / 8);
    for (int p = 0; p < kMostPlanes && next != 0; ++p) {
      const __m512i bit = _mm512_set1_epi8(static_cast<char>(0x80 >> p));
      uint64_t ones = 0;
      __builtin_memcpy(&ones, plane, static_cast<size_t>(min(8, plane_bytes(bits, p) - i / 8)));
      bytes = _mm512_or_si512(bytes, _mm512_maskz_mov_epi8(ones, bit));
      const uint64_t reached = next;
      next = p + 1 < kMostPlanes ? reached_by(plane_bytes(bits, p + 1) - i / 8) : 0;
      // numbers that end here have the bit behind set as well
      bytes = _mm512_or_si512(bytes, _mm512_maskz_mov_epi8(reached & ~next, _mm512_set1_epi8(0x40 >> p)));
      plane += plane_bytes(bits, p);
    }
    _mm512_storeu_si512(to + i, bytes);
  }
}

// The codes of a row as bytes, `width` of them. Whole vectors are written: zeros follow the last code.
static void spread_codes(const uint8_t* row, int64_t width, int64_t bits, uint8_t* to) {
  if (lies_in_planes(bits)) return spread_planes(row, width, bits, to);
  const int64_t bytes = width * bits / 8;
  const __m512i low_half = _mm512_set1_epi8(15);
  const auto load = [&](int64_t i) {
    const __mmask64 some = bytes - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (bytes - i)) - 1;
    return _mm512_maskz_loadu_epi8(some, row + i);
  };
  if (bits == 8) {
    for (int64_t i = 0; i < bytes; i += 64) _mm512_storeu_si512(to + i, load(i));
    return;
  }
  // the second half of the codes comes last: it lies where vectors of the first half end
  for (int64_t i = 0; i < bytes; i += 64) _mm512_storeu_si512(to + i, _mm512_and_si512(load(i), low_half));
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_storeu_si512(to + bytes + i, _mm512_and_si512(_mm512_srli_epi16(load(i), 4), low_half));
}

// Four rows of bytes -> [width][4], 16 columns at a time.
XECO_INLINE void interleave_bytes(const uint8_t* const* rows, int64_t width, uint8_t* to) {
  const auto load16 = [](const uint8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); };
  for (int64_t r = 0; r < width; r += 16) {
    const __m128i a = load16(rows[0] + r), b = load16(rows[1] + r), c = load16(rows[2] + r), d = load16(rows[3] + r);
    const __m128i ab[2] = {_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b)};
    const __m128i cd[2] = {_mm_unpacklo_epi8(c, d), _mm_unpackhi_epi8(c, d)};
    __m128i* at = reinterpret_cast<__m128i*>(to + 4 * r);
    for (int half = 0; half < 2; ++half) {
      _mm_storeu_si128(at + 2 * half, _mm_unpacklo_epi16(ab[half], cd[half]));
      _mm_storeu_si128(at + 2 * half + 1, _mm_unpackhi_epi16(ab[half], cd[half]));
    }
  }
}

template <class ElementType>
struct VnniEngine {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  using Cached = uint8_t;
  using Operand = int32_t;
  // Codes as bytes, rows [tokens][stride] with the rotary key's at `rope`, and the latents' once more as
  // [tokens / 4][columns][4]; the scales of both.
  struct Tile {
    const uint8_t *latent, *rope, *columns;
    int64_t stride, num_columns, tokens;
    const float *latent_scales, *rope_scales;
    int64_t latent_bits, rope_bits;
  };

  // The deepest panel: <op>/cpu/<level>.cpp says that no row is wider. In whole vectors.
  static constexpr int64_t kMaxDepth = 512;

  static void begin() {}
  static void end() {}
  static int64_t panel_operands(int64_t depth, int64_t width) { return 2 * (quarters(depth) + 1) * width; }
  static int64_t row_stride(int64_t rank, int64_t rope) { return padded(rank) + padded(rope); }
  // Room for what whole vectors write behind a row.
  static int64_t padded(int64_t width) { return round_up(width, 64) + 64; }
  static int64_t tile_operands(int64_t rank, int64_t rope) {
    return kTileTokens * (row_stride(rank, rope) + round_up(rank, 16)) / 4 + 2 * kTileTokens;
  }
  static int64_t weight_operands() { return panel_operands(kTileTokens, kPanelWidth); }

  static Tile tile(const TileRows<uint8_t>& rows, int64_t rank, int64_t rope, bool, int32_t* scratch) {
    const int64_t stride = row_stride(rank, rope), columns = round_up(rank, 16);
    uint8_t* codes = reinterpret_cast<uint8_t*>(scratch);
    uint8_t* by_column = codes + kTileTokens * stride;
    float* scales = reinterpret_cast<float*>(by_column + kTileTokens * columns);
    for (int64_t t = 0; t < rows.tokens; ++t) {
      const uint8_t* latent = rows.latent + t * rows.latent_stride;
      const uint8_t* rotary = rows.rope + t * rows.rope_stride;
      spread_codes(latent, rank, rows.latent_bits, codes + t * stride);
      spread_codes(rotary, rope, rows.rope_bits, codes + t * stride + padded(rank));
      scales[t] = scale_of_row(latent, rank, rows.latent_bits);
      scales[kTileTokens + t] = scale_of_row(rotary, rope, rows.rope_bits);
    }
    for (int64_t t = 0; t < rows.tokens; t += 4) {
      const uint8_t* four[4];
      // behind the last token its row again: weights are zero there
      for (int64_t i = 0; i < 4; ++i) four[i] = codes + min(t + i, rows.tokens - 1) * stride;
      interleave_bytes(four, columns, by_column + t * columns);
    }
    return {codes,  codes + padded(rank), by_column,        stride,        columns, rows.tokens,
            scales, scales + kTileTokens, rows.latent_bits, rows.rope_bits};
  }

  template <bool kAhead = false>
  static void scores(const Tile& tile, int64_t rank, int64_t rope, const int32_t* latent, const int32_t* rotary,
                     int vectors, float* out, const NextTile& next = {}) {
    const int64_t width = vectors * kLanes;
    code_product<ByteProducts, kAhead>(tile.tokens, quarters(rank), tile.latent, tile.stride, 4,
                                       panel_at(latent, rank, width), vectors, middle_code(tile.latent_bits),
                                       tile.latent_scales, out, false, next.latent);
    code_product<ByteProducts, kAhead>(tile.tokens, quarters(rope), tile.rope, tile.stride, 4,
                                       panel_at(rotary, rope, width), vectors, middle_code(tile.rope_bits),
                                       tile.rope_scales, out, true, next.rope);
  }

  // [tokens][w] float32 times the scales of the latents, as a panel over the tokens
  static const int32_t* weight_panel(const Tile& tile, const float* weights, int64_t tokens, int vectors, int32_t* to) {
    const int64_t width = vectors * kLanes;
    const CodePanel panel = code_panel(to, tokens, width);
    for (int64_t m = 0; m < width; m += kLanes) {
      const auto scaled = [&](int64_t t) {
        return _mm512_mul_ps(_mm512_loadu_ps(weights + t * width + m), _mm512_set1_ps(tile.latent_scales[t]));
      };
      __m512 most = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int64_t t = 0; t < tokens; ++t) {
        const __m512 weight = scaled(t);
        most = _mm512_max_ps(most, weight);
        odd = _mm512_fmadd_ps(weight, _mm512_setzero_ps(), odd);  // NaN where one is not finite, else zero
      }
      const __m512 per_unit = reciprocal_unit(most);
      __m512i total = _mm512_setzero_si512();
      for (int64_t t = 0; t < tokens; t += 4) {
        __m512i high[4], low[4];
        for (int64_t i = 0; i < 4; ++i) {
          const __m512i number =
              t + i < tokens ? _mm512_cvtps_epi32(_mm512_mul_ps(scaled(t + i), per_unit)) : _mm512_setzero_si512();
          const TwoBytes bytes = taken_apart(number);
          high[i] = bytes.high, low[i] = bytes.low, total = _mm512_add_epi32(total, number);
        }
        int32_t* at = panel.planes + t / 4 * width + m;
        _mm512_storeu_si512(at, side_by_side(high));
        _mm512_storeu_si512(at + panel.plane, side_by_side(low));
      }
      finish(panel, m, most, odd, total);
    }
    return to;
  }

  // [R][w] += latentsᵀ · panel
  static void add_weighted_latents(const Tile& tile, int64_t rank, int64_t, const int32_t* panel, int vectors,
                                   float* out) {
    code_product<ByteProducts>(rank, quarters(tile.tokens), tile.columns, 4, 4 * tile.num_columns,
                               panel_at(panel, tile.tokens, vectors * kLanes), vectors, middle_code(tile.latent_bits),
                               nullptr, out, true);
  }

  // A panel whose column m is row m: row_of(m) points to `depth` elements, null for a column of zeros.
  template <class RowOf>
  static void pack_columns(RowOf row_of, int64_t depth, int64_t width, int32_t* to) {
    const CodePanel panel = code_panel(to, depth, width);
    for (int64_t m = 0; m < width; ++m) {
      const Storage* row = row_of(m);
      alignas(64) float numbers[kMaxDepth];
      const int64_t padded_depth = round_up(depth, kLanes);
      for (int64_t k = 0; k < padded_depth; ++k) numbers[k] = 0.0f;
      if (row != nullptr) widen<Element>(row, depth, numbers);
      __m512 most = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
      for (int64_t k = 0; k < padded_depth; k += kLanes) {
        const __m512 value = _mm512_load_ps(numbers + k);
        most = _mm512_max_ps(most, _mm512_abs_ps(value));
        odd = _mm512_fmadd_ps(value, _mm512_setzero_ps(), odd);
      }
      const float largest = _mm512_reduce_max_ps(most), not_finite = _mm512_reduce_add_ps(odd);
      const __m512 per_unit = reciprocal_unit(_mm512_set1_ps(largest));
      alignas(64) int8_t high[kMaxDepth], low[kMaxDepth];
      __m512i total = _mm512_setzero_si512();
      for (int64_t k = 0; k < padded_depth; k += kLanes) {
        const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(numbers + k), per_unit));
        const TwoBytes bytes = taken_apart(number);
        _mm_store_si128(reinterpret_cast<__m128i*>(high + k), _mm512_cvtepi32_epi8(bytes.high));
        _mm_store_si128(reinterpret_cast<__m128i*>(low + k), _mm512_cvtepi32_epi8(bytes.low));
        total = _mm512_add_epi32(total, number);
      }
      for (int64_t k = 0; k < quarters(depth); ++k) {
        __builtin_memcpy(panel.planes + k * width + m, high + 4 * k, 4);
        __builtin_memcpy(panel.planes + panel.plane + k * width + m, low + 4 * k, 4);
      }
      const float unit = largest / kLargest + not_finite;
      panel.units[m] = unit;
      panel.sums[m] = unit * static_cast<float>(_mm512_reduce_add_epi32(total));
    }
  }

 private:
  static CodePanel panel_at(const int32_t* memory, int64_t depth, int64_t width) {
    return code_panel(const_cast<int32_t*>(memory), depth, width);
  }

  // kLargest / most, 0 where that is 0.
  XECO_INLINE __m512 reciprocal_unit(__m512 most) {
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_maskz_div_ps(some, _mm512_set1_ps(kLargest), most);
  }

  XECO_INLINE void finish(const CodePanel& panel, int64_t m, __m512 most, __m512 odd, __m512i total) {
    const __m512 unit = _mm512_add_ps(_mm512_div_ps(most, _mm512_set1_ps(kLargest)), odd);
    _mm512_storeu_ps(panel.units + m, unit);
    _mm512_storeu_ps(panel.sums + m, _mm512_mul_ps(unit, _mm512_cvtepi32_ps(total)));
  }
};

}  // namespace xeco::XECO_ISA
