// Products of rows of codes as integers of 16 bits: two neighbouring codes times two numbers of the other factor in one
// instruction (VPMADDWD), summed in int32. For processors without products of bytes (cpu/vnni_engine-inl.h): twice as
// many products to an instruction as in float32, and tiles of half the size.
//
// The other factor has integers of 15 bits (cpu/code_blocks-inl.h).
//
// A panel [depth][w] is stored as pairs [depth / 2][w][2], then w units, then w sums of its numbers.

namespace xeco::XECO_ISA {

static_assert(kLanes == 8, "AVX2 vectors");

XECO_INLINE int64_t halves(int64_t depth) { return (depth + 1) / 2; }

// A packed panel and its parts.
struct PairPanel {
  int32_t* pairs;
  float *units, *sums;
};

XECO_INLINE PairPanel pair_panel(int32_t* memory, int64_t depth, int64_t width) {
  float* units = reinterpret_cast<float*>(memory + halves(depth) * width);
  return {memory, units, units + width};
}

// The products of both integers of each lane, added.
XECO_INLINE Vi pair_products(Vi a, Vi b) {
  return reinterpret_cast<Vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

// The nearest integer; |value| < 2^22.
XECO_INLINE Vi nearest(Vf value) {
  const Vf magic = splat(12582912.0f);  // 1.5 * 2^23
  return as_bits(value + magic) - as_bits(magic);
}

XECO_INLINE Vi pair_of(Vi first, Vi second) { return (first & 0xffff) | (second << 16); }
XECO_INLINE void store_int(int32_t* to, Vi value) { store(reinterpret_cast<float*>(to), as_float(value)); }
XECO_INLINE Vi load_int(const int32_t* from) { return as_bits(load(reinterpret_cast<const float*>(from))); }

XECO_INLINE Vi two_codes(const int16_t* from) {
  int32_t two;
  __builtin_memcpy(&two, from, sizeof two);
  return splat_int(two);
}

// What a panel's rounding is measured in, of each of its columns.
struct Unit {
  Vf most = {}, odd = {};

  void add(Vf value) {
    most = max(value, most);
    odd += value * 0.0f;  // NaN where one is not finite, else zero
  }
  Vf reciprocal() const { return select(most > 0.0f, kLargest / most, Vf{}); }
  void finish(const PairPanel& panel, int64_t m, Vi total) const {
    const Vf unit = most / kLargest + odd;
    store(panel.units + m, unit);
    store(panel.sums + m, unit * __builtin_convertvector(total, Vf));
  }
};

struct PairProducts {
  using Code = int16_t;
  using Panel = PairPanel;

  // As gemm_block in cpu/gemm-inl.h, over codes: the two codes (i, k) lie at a + i * row_step + k * depth_step. C[i]
  // (+)= scales[i] * (unit * sum - middle * sum of the panel's numbers); without scales they are 1.
  template <int kRows, int kVectors, bool kAhead>
  XECO_INLINE void block(int64_t depth, const int16_t* a, int64_t row_step, int64_t depth_step, const PairPanel& b,
                         float middle, const float* scales, float* c, bool accumulate, const Ahead& ahead) {
    constexpr int64_t kWidth = kVectors * kLanes;
    Vi sums[kRows][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Vi{};
    for (int64_t k = 0; k < depth; ++k) {
      if constexpr (kAhead) ask_for(ahead, k, kRows);
      Vi right[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) right[j] = load_int(b.pairs + k * kWidth + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vi left = two_codes(a + i * row_step + k * depth_step);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sums[i][j] += pair_products(left, right[j]);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vf unit = load(b.units + j * kLanes), of_middle = middle * load(b.sums + j * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        float* to = c + i * kWidth + j * kLanes;
        Vf value = __builtin_convertvector(sums[i][j], Vf) * unit - of_middle;
        if (scales != nullptr) value *= scales[i];
        store(to, accumulate ? load(to) + value : value);
      }
    }
  }
};

// Bytes as integers of 16 bits, 16 at a time.
XECO_INLINE __m256i widened(const uint8_t* from) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
XECO_INLINE void store_vector(int16_t* to, __m256i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values);
}

static void widen_bytes(const uint8_t* from, int64_t count, int16_t* to) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) store_vector(to + i, widened(from + i));
  for (; i < count; ++i) to[i] = from[i];
}

// The codes of a row, `width` of them, as integers of 16 bits.
static void widen_codes(const uint8_t* row, int64_t width, int64_t bits, int16_t* to) {
  if (bits == 8) return widen_bytes(row, width, to);
  if (lies_in_planes(bits)) {
    alignas(64) uint8_t bytes[kMostPlaneNumbers + 32];
    bytes_of_planes(row, bits, bytes);
    return widen_bytes(bytes, width, to);
  }
  const int64_t bytes = width / 2;
  int64_t i = 0;
  for (; i + 16 <= bytes; i += 16) {
    const __m256i both = widened(row + i);
    store_vector(to + i, _mm256_and_si256(both, _mm256_set1_epi16(15)));
    store_vector(to + bytes + i, _mm256_srli_epi16(both, 4));
  }
  for (; i < bytes; ++i) to[i] = row[i] & 15, to[bytes + i] = row[i] >> 4;
}

// Two rows -> [width][2], 16 columns at a time.
XECO_INLINE void interleave_rows(const int16_t* first, const int16_t* second, int64_t width, int16_t* to) {
  for (int64_t r = 0; r < width; r += 16) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + r));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + r));
    // columns 0 to 3 and 8 to 11, 4 to 7 and 12 to 15
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    store_vector(to + 2 * r, _mm256_permute2x128_si256(low, high, 0x20));
    store_vector(to + 2 * r + 16, _mm256_permute2x128_si256(low, high, 0x31));
  }
}

template <class ElementType>
struct MaddEngine {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  using Cached = uint8_t;
  using Operand = int32_t;
  // Codes as integers, rows [tokens][stride] with the rotary key's at `rope`, and the latents' once more as
  // [tokens / 2][columns][2]; the scales of both.
  struct Tile {
    const int16_t *latent, *rope, *columns;
    int64_t stride, num_columns, tokens;
    const float *latent_scales, *rope_scales;
    int64_t latent_bits, rope_bits;
  };

  // The deepest panel whose sums of the largest codes and numbers fit into int32.
  static constexpr int64_t kMaxDepth = 512;
  static_assert(kMaxDepth * 255 * static_cast<int64_t>(kLargest) <= INT32_MAX, "sums");

  static void begin() {}
  static void end() {}
  static int64_t panel_operands(int64_t depth, int64_t width) { return (halves(depth) + 2) * width; }
  static int64_t padded(int64_t width) { return round_up(width, 16); }
  static int64_t tile_operands(int64_t rank, int64_t rope) {
    return kTileTokens * (2 * padded(rank) + padded(rope)) / 2 + 2 * kTileTokens;
  }
  static int64_t weight_operands() { return panel_operands(kTileTokens, kPanelWidth); }

  static Tile tile(const TileRows<uint8_t>& rows, int64_t rank, int64_t rope, bool, int32_t* scratch) {
    const int64_t columns = padded(rank), stride = columns + padded(rope);
    int16_t* codes = reinterpret_cast<int16_t*>(scratch);
    int16_t* by_column = codes + kTileTokens * stride;
    float* scales = reinterpret_cast<float*>(by_column + kTileTokens * columns);
    for (int64_t t = 0; t < rows.tokens; ++t) {
      const uint8_t* latent = rows.latent + t * rows.latent_stride;
      const uint8_t* rotary = rows.rope + t * rows.rope_stride;
      widen_codes(latent, rank, rows.latent_bits, codes + t * stride);
      widen_codes(rotary, rope, rows.rope_bits, codes + t * stride + columns);
      scales[t] = scale_of_row(latent, rank, rows.latent_bits);
      scales[kTileTokens + t] = scale_of_row(rotary, rope, rows.rope_bits);
    }
    for (int64_t t = 0; t < rows.tokens; t += 2)  // behind the last token its row again: weights are zero there
      interleave_rows(codes + t * stride, codes + min(t + 1, rows.tokens - 1) * stride, columns,
                      by_column + t * columns);
    return {codes,  codes + columns,      by_column,        stride,        columns, rows.tokens,
            scales, scales + kTileTokens, rows.latent_bits, rows.rope_bits};
  }

  template <bool kAhead = false>
  static void scores(const Tile& tile, int64_t rank, int64_t rope, const int32_t* latent, const int32_t* rotary,
                     int vectors, float* out, const NextTile& next = {}) {
    const int64_t width = vectors * kLanes;
    code_product<PairProducts, kAhead>(tile.tokens, halves(rank), tile.latent, tile.stride, 2,
                                       panel_at(latent, rank, width), vectors, middle_code(tile.latent_bits),
                                       tile.latent_scales, out, false, next.latent);
    code_product<PairProducts, kAhead>(tile.tokens, halves(rope), tile.rope, tile.stride, 2,
                                       panel_at(rotary, rope, width), vectors, middle_code(tile.rope_bits),
                                       tile.rope_scales, out, true, next.rope);
  }

  // [tokens][w] float32 times the scales of the latents, as a panel over the tokens
  static const int32_t* weight_panel(const Tile& tile, const float* weights, int64_t tokens, int vectors, int32_t* to) {
    const int64_t width = vectors * kLanes;
    const PairPanel panel = pair_panel(to, tokens, width);
    for (int64_t m = 0; m < width; m += kLanes) {
      const auto scaled = [&](int64_t t) { return load(weights + t * width + m) * tile.latent_scales[t]; };
      Unit unit;
      for (int64_t t = 0; t < tokens; ++t) unit.add(scaled(t));
      const Vf per_unit = unit.reciprocal();
      Vi total = {};
      for (int64_t t = 0; t < tokens; t += 2) {
        const Vi first = nearest(scaled(t) * per_unit);
        const Vi second = t + 1 < tokens ? nearest(scaled(t + 1) * per_unit) : Vi{};
        store_int(panel.pairs + t / 2 * width + m, pair_of(first, second));
        total += first + second;
      }
      unit.finish(panel, m, total);
    }
    return to;
  }

  // [R][w] += latentsᵀ · panel
  static void add_weighted_latents(const Tile& tile, int64_t rank, int64_t, const int32_t* panel, int vectors,
                                   float* out) {
    code_product<PairProducts>(rank, halves(tile.tokens), tile.columns, 2, 2 * tile.num_columns,
                               panel_at(panel, tile.tokens, vectors * kLanes), vectors, middle_code(tile.latent_bits),
                               nullptr, out, true);
  }

  // A panel whose column m is row m: row_of(m) points to `depth` elements, null for a column of zeros.
  template <class RowOf>
  static void pack_columns(RowOf row_of, int64_t depth, int64_t width, int32_t* to) {
    const PairPanel panel = pair_panel(to, depth, width);
    alignas(64) float rows[kLanes * kMaxDepth];  // of kLanes columns at a time
    for (int64_t m = 0; m < width; m += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const Storage* row = row_of(m + lane);
        for (int64_t k = 0; k < depth; ++k) rows[k * kLanes + lane] = row == nullptr ? 0.0f : Element::read_one(row[k]);
      }
      Unit unit;
      for (int64_t k = 0; k < depth; ++k) {
        const Vf value = load(rows + k * kLanes);
        unit.add(max(value, -value));
      }
      const Vf per_unit = unit.reciprocal();
      Vi total = {};
      for (int64_t k = 0; k < depth; k += 2) {
        const Vi first = nearest(load(rows + k * kLanes) * per_unit);
        const Vi second = k + 1 < depth ? nearest(load(rows + (k + 1) * kLanes) * per_unit) : Vi{};
        store_int(panel.pairs + k / 2 * width + m, pair_of(first, second));
        total += first + second;
      }
      unit.finish(panel, m, total);
    }
  }

 private:
  static PairPanel panel_at(const int32_t* memory, int64_t depth, int64_t width) {
    return pair_panel(const_cast<int32_t*>(memory), depth, width);
  }
};

}  // namespace xeco::XECO_ISA
