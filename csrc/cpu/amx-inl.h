// Products of bfloat16 pairs by AMX tiles: 16 rows of A times 16 columns of a panel, 32 deep, in one instruction.
//
// What does not fill tiles (the last rows, the last 16 of a depth) goes through VDPBF16PS, which every processor with
// AMX has. With XECO_EMULATE_AMX the eight tile registers are memory, so that all but the instructions themselves can
// be tested on a machine without them.

namespace xeco::XECO_ISA {

#if defined(XECO_EMULATE_AMX)

struct TileRegister {
  alignas(64) unsigned char rows[16][64];
};
static thread_local TileRegister tile_registers[8];

static void emulated_load(int number, const void* from, int64_t stride_bytes) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(tile_registers[number].rows[i], static_cast<const char*>(from) + i * stride_bytes, 64);
}

static void emulated_store(int number, void* to, int64_t stride_bytes) {
  for (int i = 0; i < 16; ++i)
    __builtin_memcpy(static_cast<char*>(to) + i * stride_bytes, tile_registers[number].rows[i], 64);
}

static void emulated_product(int sum, int left, int right) {
  const auto pair = [](int number, int row, int index) {
    uint16_t bits;
    __builtin_memcpy(&bits, tile_registers[number].rows[row] + 2 * index, 2);
    return BFloat16::read_one(bits);
  };
  for (int i = 0; i < 16; ++i)
    for (int n = 0; n < 16; ++n) {
      float total;
      __builtin_memcpy(&total, tile_registers[sum].rows[i] + 4 * n, 4);
      for (int k = 0; k < 32; ++k) total += pair(left, i, k) * pair(right, k / 2, 2 * n + k % 2);
      __builtin_memcpy(tile_registers[sum].rows[i] + 4 * n, &total, 4);
    }
}

#define XECO_TILE_LOAD(number, from, stride) emulated_load(number, from, stride)
#define XECO_TILE_STORE(number, to, stride) emulated_store(number, to, stride)
#define XECO_TILE_ZERO(number) __builtin_memset(&tile_registers[number], 0, sizeof(TileRegister))
#define XECO_TILE_PRODUCT(sum, left, right) emulated_product(sum, left, right)

#else

// GCC 12 does not know that a tile load reads memory: the barrier keeps earlier stores before it.
#define XECO_TILE_LOAD(number, from, stride) \
  do {                                       \
    asm volatile("" ::: "memory");           \
    _tile_loadd(number, from, stride);       \
  } while (0)
#define XECO_TILE_STORE(number, to, stride) \
  do {                                      \
    _tile_stored(number, to, stride);       \
    asm volatile("" ::: "memory");          \
  } while (0)
#define XECO_TILE_ZERO(number) _tile_zero(number)
#define XECO_TILE_PRODUCT(sum, left, right) _tile_dpbf16ps(sum, left, right)

#endif

// Tiles 0..3 hold C (upper and lower 16 rows, left and right 16 columns), 4 and 5 A, 6 and 7 B.
template <bool kLower, bool kRight>
XECO_INLINE void amx_block(int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, float* c,
                           int64_t c_stride, bool accumulate) {
  const int64_t a_bytes = 2 * stride, c_bytes = 4 * c_stride, b_bytes = kRight ? 128 : 64;
  if (accumulate) {
    XECO_TILE_LOAD(0, c, c_bytes);
    if constexpr (kRight) XECO_TILE_LOAD(1, c + 16, c_bytes);
    if constexpr (kLower) XECO_TILE_LOAD(2, c + 16 * c_stride, c_bytes);
    if constexpr (kLower && kRight) XECO_TILE_LOAD(3, c + 16 * c_stride + 16, c_bytes);
  } else {
    XECO_TILE_ZERO(0);
    if constexpr (kRight) XECO_TILE_ZERO(1);
    if constexpr (kLower) XECO_TILE_ZERO(2);
    if constexpr (kLower && kRight) XECO_TILE_ZERO(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    const uint16_t* right = b + k / 2 * b_bytes / 2;
    XECO_TILE_LOAD(4, a + k, a_bytes);
    XECO_TILE_LOAD(6, right, b_bytes);
    XECO_TILE_PRODUCT(0, 4, 6);
    if constexpr (kRight) {
      XECO_TILE_LOAD(7, right + 32, b_bytes);
      XECO_TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (kLower) {
      XECO_TILE_LOAD(5, a + 16 * stride + k, a_bytes);
      XECO_TILE_PRODUCT(2, 5, 6);
    }
    if constexpr (kLower && kRight) XECO_TILE_PRODUCT(3, 5, 7);
  }
  XECO_TILE_STORE(0, c, c_bytes);
  if constexpr (kRight) XECO_TILE_STORE(1, c + 16, c_bytes);
  if constexpr (kLower) XECO_TILE_STORE(2, c + 16 * c_stride, c_bytes);
  if constexpr (kLower && kRight) XECO_TILE_STORE(3, c + 16 * c_stride + 16, c_bytes);
}

template <bool kRight>
static void amx_panel(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, float* c,
                      int64_t c_stride, bool accumulate) {
  int64_t i = 0;
  for (; i + 32 <= rows; i += 32)
    amx_block<true, kRight>(depth, a + i * stride, stride, b, c + i * c_stride, c_stride, accumulate);
  for (; i + 16 <= rows; i += 16)
    amx_block<false, kRight>(depth, a + i * stride, stride, b, c + i * c_stride, c_stride, accumulate);
}

static void amx_rows(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, int vectors,
                     float* c, int64_t c_stride, bool accumulate) {
  const int64_t tiled_rows = rows / 16 * 16, tiled_depth = depth / 32 * 32;
  if (tiled_rows > 0 && tiled_depth > 0) {
    if (vectors == 1)
      amx_panel<false>(tiled_rows, tiled_depth, a, stride, b, c, c_stride, accumulate);
    else
      amx_panel<true>(tiled_rows, tiled_depth, a, stride, b, c, c_stride, accumulate);
  }
  if (tiled_rows > 0 && tiled_depth < depth)
    dot_rows(tiled_rows, depth - tiled_depth, a + tiled_depth, stride, b + tiled_depth * vectors * kLanes, vectors, c,
             c_stride, accumulate || tiled_depth > 0);
  if (tiled_rows < rows)
    dot_rows(rows - tiled_rows, depth, a + tiled_rows * stride, stride, b, vectors, c + tiled_rows * c_stride, c_stride,
             accumulate);
}

// 16 rows of 16 pairs, transposed.
static void transpose_pairs(const uint16_t* from, int64_t stride, uint16_t* to, int64_t to_stride) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_si512(to + j * to_stride, _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88));
    _mm512_storeu_si512(to + (8 + j) * to_stride, _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd));
    _mm512_storeu_si512(to + (4 + j) * to_stride, _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88));
    _mm512_storeu_si512(to + (12 + j) * to_stride, _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd));
  }
}

// Products by AMX. A tile's columns are packed as [columns][64 tokens]: rows of A over the tokens.
struct AmxProduct {
  static void begin() {
#if !defined(XECO_EMULATE_AMX)
    struct alignas(64) {
      unsigned char palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    asm volatile("" : : "m"(config) : "memory");  // GCC 12: _tile_loadconfig does not say that it reads
    _tile_loadconfig(&config);
#endif
  }

  static void end() {
#if !defined(XECO_EMULATE_AMX)
    _tile_release();
#endif
  }

  // The transposed columns, and before them the pairs that they are made from.
  static int64_t column_operands(int64_t columns) { return 2 * kTileTokens * columns; }

  static void pack_tile_columns(const TileRows<uint16_t>& rows, int64_t rank, int64_t rope, uint16_t* to) {
    const int64_t columns = rank + rope, pairs = (rows.tokens + 1) / 2;
    uint16_t* paired = to + kTileTokens * columns;
    DotProduct::pack_tile_columns(rows, rank, rope, paired);
    for (int64_t pair = 0; pair < pairs; pair += 16)
      for (int64_t column = 0; column < columns; column += 16) {
        const uint16_t* from = paired + 2 * (pair * columns + column);
        uint16_t* out = to + column * kTileTokens + 2 * pair;
        if (pair + 16 <= pairs && column + 16 <= columns) {
          transpose_pairs(from, 2 * columns, out, kTileTokens);
          continue;
        }
        for (int64_t i = 0; i < min(16, pairs - pair); ++i)
          for (int64_t j = 0; j < min(16, columns - column); ++j)
            __builtin_memcpy(out + j * kTileTokens + 2 * i, from + 2 * (i * columns + j), 4);
      }
  }

  // Tiles leave no place between their products: what comes next is asked for before them.
  template <bool kAhead = false>
  static void rows(int64_t rows, int64_t depth, const uint16_t* a, int64_t stride, const uint16_t* b, int vectors,
                   float* c, int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
    if constexpr (kAhead)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t line = 0; line < ahead.lines; ++line)
          __builtin_prefetch(ahead.rows + row * ahead.stride + line * 64, 0, 2);
    amx_rows(rows, depth, a, stride, b, vectors, c, c_stride, accumulate);
  }

  static void columns(int64_t first, int64_t count, int64_t, int64_t tokens, const uint16_t* packed, const uint16_t* b,
                      int vectors, float* c) {
    amx_rows(count, tokens, packed + first * kTileTokens, kTileTokens, b, vectors, c, vectors * kLanes, true);
  }
};

using AmxEngine = PairEngine<AmxProduct>;

}  // namespace xeco::XECO_ISA
