// Engines for bfloat16: products of pairs of neighbouring numbers, summed in float32, by AVX-512 BF16 or by AMX tiles.
//
// A panel [depth][w] is stored as pairs along the depth, [depth / 2][w][2]. Both instruction sets take it like that,
// and both take rows of cached tokens as they lie, since neighbours in a row are neighbours in depth. Only as values,
// where the depth runs over tokens, must a tile be packed: into `columns`, once for all the panels of a block.

namespace xeco::XECO_ISA {

static_assert(kLanes == 16, "AVX-512 vectors");

// Two rows [count] -> [count][2]; `second` may be null, for zeros.
static void interleave(const uint16_t* first, const uint16_t* second, int64_t count, uint16_t* to) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i a = _mm512_loadu_si512(first + i);
    const __m512i b = second == nullptr ? _mm512_setzero_si512() : _mm512_loadu_si512(second + i);
    _mm512_storeu_si512(to + 2 * i, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(to + 2 * i + 32, _mm512_permutex2var_epi16(a, high, b));
  }
  for (; i < count; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second == nullptr ? uint16_t{0} : second[i];
  }
}

XECO_INLINE __m512i load_pair(const uint16_t* from) {
  int32_t pair;
  __builtin_memcpy(&pair, from, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// As gemm_block in cpu/gemm-inl.h. The pair (i, k) lies at a + i * row_step + k * depth_step.
template <int kRows, int kVectors, bool kAhead>
XECO_INLINE void dot_block(int64_t pairs, const uint16_t* a, int64_t row_step, int64_t depth_step, const uint16_t* b,
                           float* c, int64_t c_stride, bool accumulate, const Ahead& ahead) {
  __m512 sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    if constexpr (kAhead) ask_for(ahead, k, kRows);
    __m512bh right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + (k * kVectors + j) * 2 * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512bh left = (__m512bh)load_pair(a + i * row_step + k * depth_step);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], left, right[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      _mm512_storeu_ps(to, accumulate ? _mm512_add_ps(_mm512_loadu_ps(to), sums[i][j]) : sums[i][j]);
    }
}

template <int kRows, int kVectors, bool kAhead>
XECO_INLINE void dot_last_rows(int64_t rows, int64_t pairs, const uint16_t* a, int64_t row_step, int64_t depth_step,
                               const uint16_t* b, float* c, int64_t c_stride, bool accumulate, const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      dot_block<kRows, kVectors, kAhead>(pairs, a, row_step, depth_step, b, c, c_stride, accumulate, ahead);
    else
      dot_last_rows<kRows - 1, kVectors, kAhead>(rows, pairs, a, row_step, depth_step, b, c, c_stride, accumulate,
                                                 ahead);
  }
}

template <int kVectors, bool kAhead = false>
XECO_INLINE void dot_panel(int64_t rows, int64_t pairs, const uint16_t* a, int64_t row_step, int64_t depth_step,
                           const uint16_t* b, float* c, int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
  constexpr int kRowBlock = kRowBlocks[kVectors];
  int64_t i = 0;
  for (; i + kRowBlock <= rows; i += kRowBlock)
    dot_block<kRowBlock, kVectors, kAhead>(pairs, a + i * row_step, row_step, depth_step, b, c + i * c_stride, c_stride,
                                           accumulate, ahead.from_row(i));
  dot_last_rows<kRowBlock - 1, kVectors, kAhead>(rows - i, pairs, a + i * row_step, row_step, depth_step, b,
                                                 c + i * c_stride, c_stride, accumulate, ahead.from_row(i));
}

// depth_step is a constant at every call: inlined, it becomes part of the addresses.
template <bool kAhead = false>
static void dot_rows(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, int vectors,
                     float* c, int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
  if (vectors == 1)
    dot_panel<1, kAhead>(rows, depth / 2, a, stride, 2, b, c, c_stride, accumulate, ahead);
  else
    dot_panel<2, kAhead>(rows, depth / 2, a, stride, 2, b, c, c_stride, accumulate, ahead);
}

static void dot_columns(int64_t rows, int64_t depth, const uint16_t* a, int64_t columns, const uint16_t* b, int vectors,
                        float* c, int64_t c_stride, bool accumulate) {
  if (vectors == 1)
    dot_panel<1>(rows, depth / 2, a, 2, 2 * columns, b, c, c_stride, accumulate);
  else
    dot_panel<2>(rows, depth / 2, a, 2, 2 * columns, b, c, c_stride, accumulate);
}

// Products by VDPBF16PS. A tile's columns are packed as [tokens / 2][columns][2].
struct DotProduct {
  static void begin() {}
  static void end() {}
  static int64_t column_operands(int64_t columns) { return kTileTokens * columns; }

  static void pack_tile_columns(const TileRows<uint16_t>& rows, int64_t rank, int64_t rope, uint16_t* to) {
    const int64_t columns = rank + rope;
    for (int64_t t = 0; t < rows.tokens; t += 2) {
      const bool two = t + 1 < rows.tokens;
      const uint16_t* latent = rows.latent + t * rows.latent_stride;
      const uint16_t* rotary = rows.rope + t * rows.rope_stride;
      interleave(latent, two ? latent + rows.latent_stride : nullptr, rank, to + t * columns);
      if (rope > 0) interleave(rotary, two ? rotary + rows.rope_stride : nullptr, rope, to + t * columns + 2 * rank);
    }
  }

  template <bool kAhead = false>
  static void rows(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, int vectors,
                   float* c, int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
    dot_rows<kAhead>(rows, depth, a, stride, b, vectors, c, c_stride, accumulate, ahead);
  }

  // Columns [first, first + count) of the tile, over its tokens.
  static void columns(int64_t first, int64_t count, int64_t all, int64_t tokens, const uint16_t* packed,
                      const uint16_t* b, int vectors, float* c) {
    dot_columns(count, tokens, packed + 2 * first, all, b, vectors, c, vectors * kLanes, true);
  }
};

template <class Product>
struct PairEngine {
  using Element = BFloat16;
  using Storage = uint16_t;
  using Cached = uint16_t;
  using Operand = uint16_t;
  struct Tile {
    TileRows<uint16_t> rows;
    const uint16_t* columns;
    int64_t num_columns;
  };

  static void begin() { Product::begin(); }
  static void end() { Product::end(); }
  static int64_t panel_operands(int64_t depth, int64_t width) { return round_up(depth, 2) * width; }
  static int64_t tile_operands(int64_t rank, int64_t rope) { return Product::column_operands(rank + rope); }
  static int64_t weight_operands() { return kTileTokens * kPanelWidth; }

  static Tile tile(const TileRows<uint16_t>& rows, int64_t rank, int64_t rope, bool with_columns, uint16_t* scratch) {
    const int64_t packed_rope = with_columns ? rope : 0;
    Product::pack_tile_columns(rows, rank, packed_rope, scratch);
    return {rows, scratch, rank + packed_rope};
  }

  template <bool kAhead = false>
  static void scores(const Tile& tile, int64_t rank, int64_t rope, const uint16_t* latent, const uint16_t* rotary,
                     int vectors, float* out, const NextTile& next = {}) {
    const TileRows<uint16_t>& rows = tile.rows;
    const int64_t width = vectors * kLanes;
    Product::template rows<kAhead>(rows.tokens, rank, rows.latent, rows.latent_stride, latent, vectors, out, width,
                                   false, next.latent);
    Product::template rows<kAhead>(rows.tokens, rope, rows.rope, rows.rope_stride, rotary, vectors, out, width, true,
                                   next.rope);
  }

  static void latent_scores(const Tile& tile, int64_t rank, const uint16_t* panel, int vectors, float* out) {
    const TileRows<uint16_t>& rows = tile.rows;
    Product::rows(rows.tokens, rank, rows.latent, rows.latent_stride, panel, vectors, out, vectors * kLanes, false);
  }

  static const uint16_t* weight_panel(const Tile&, const float* weights, int64_t tokens, int vectors, uint16_t* to) {
    alignas(64) static constexpr uint16_t kPairs[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i pairs = _mm512_load_si512(kPairs);
    const int64_t width = vectors * kLanes;
    for (int64_t t = 0; t < tokens; t += 2)
      for (int64_t m = 0; m < width; m += kLanes) {
        const __m512 first = _mm512_loadu_ps(weights + t * width + m);
        const __m512 second = t + 1 < tokens ? _mm512_loadu_ps(weights + (t + 1) * width + m) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_storeu_si512(to + t * width + 2 * m, _mm512_permutexvar_epi16(pairs, both));
      }
    return to;
  }

  static const uint16_t* weight_rows(const float* weights, int64_t tokens, int vectors, uint16_t* to) {
    const int64_t count = tokens * vectors * kLanes;
    for (int64_t i = 0; i < count; i += kLanes) BFloat16::write(to + i, load(weights + i));
    return to;
  }

  static void add_weighted_latents(const Tile& tile, int64_t rank, int64_t, const uint16_t* panel, int vectors,
                                   float* out) {
    const int64_t depth = round_up(tile.rows.tokens, 2);
    Product::columns(0, rank, tile.num_columns, depth, tile.columns, panel, vectors, out);
  }

  static void add_weighted_rope(const Tile& tile, int64_t rank, int64_t rope, const uint16_t* panel, int vectors,
                                float* out) {
    const int64_t depth = round_up(tile.rows.tokens, 2);
    Product::columns(rank, rope, tile.num_columns, depth, tile.columns, panel, vectors, out);
  }

  static void add_rows(int64_t tokens, int64_t width, const uint16_t* weights, const uint16_t* panel, int vectors,
                       float* out, int64_t out_stride) {
    Product::rows(tokens, width, weights, width, panel, vectors, out, out_stride, true);
  }

  template <class RowOf>
  static void pack_columns(RowOf row_of, int64_t depth, int64_t width, uint16_t* panel) {
    for (int64_t m = 0; m < width; ++m) {
      const uint16_t* row = row_of(m);
      for (int64_t k = 0; k < depth; k += 2) {
        panel[k * width + 2 * m] = row == nullptr ? uint16_t{0} : row[k];
        panel[k * width + 2 * m + 1] = row == nullptr ? uint16_t{0} : row[k + 1];
      }
    }
  }

  template <class RowOf>
  static void pack_rows(RowOf row_of, int64_t depth, int64_t columns, int64_t width, uint16_t* panel) {
    for (int64_t m = 0; m < depth; m += 2) {
      const uint16_t *first = row_of(m), *second = row_of(m + 1);
      uint16_t* to = panel + m * width;
      const int64_t filled = first == nullptr ? 0 : columns;  // rows are missing from the end only
      if (filled > 0) interleave(first, second, filled, to);
      for (int64_t n = filled; n < width; ++n) to[2 * n] = to[2 * n + 1] = 0;
    }
  }
};

using DotEngine = PairEngine<DotProduct>;

}  // namespace xeco::XECO_ISA
