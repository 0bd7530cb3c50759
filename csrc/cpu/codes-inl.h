// Rows of a cache in 8- or 4-bit codes (xeco_convert/ops/packed_rows.py): x = scale * (code - middle), one scale a row.
//
// A row is its codes, then its scale as bfloat16. With 8 bits a code is a byte; with 4 bits byte i holds code i in its
// low half and code i + width / 2 in its high half.

namespace xeco::XECO_ISA {

typedef uint8_t Vb __attribute__((vector_size(XECO_LANES)));
typedef uint8_t VbAny __attribute__((vector_size(XECO_LANES), aligned(1), may_alias));

XECO_INLINE float middle_code(int64_t bits) { return bits == 8 ? 127.5f : 7.5f; }

XECO_INLINE float scale_of_row(const uint8_t* row, int64_t width, int64_t bits) {
  const uint8_t* at = row + width * bits / 8;
  return BFloat16::read_one(static_cast<uint16_t>(at[0] | at[1] << 8));
}

// Codes as float32 numbers scale * (code - middle) = scale * code + shift. By way of 16 bits: GCC 12 takes a vector of
// bytes that comes from memory apart, one byte after the other.
XECO_INLINE Vf decoded(Vb codes, float scale, float shift) {
  const Vh wider = __builtin_convertvector(codes, Vh);
  return __builtin_convertvector(__builtin_convertvector(wider, Vi), Vf) * scale + shift;
}

static void decode_row(const uint8_t* row, int64_t width, int64_t bits, float* to) {
  const float scale = scale_of_row(row, width, bits), shift = -scale * middle_code(bits);
  const int64_t bytes = width * bits / 8;
  int64_t i = 0;
  if (bits == 8) {
    for (; i + kLanes <= bytes; i += kLanes) {
      const Vb codes = *reinterpret_cast<const VbAny*>(row + i);
      store(to + i, decoded(codes, scale, shift));
    }
    for (; i < bytes; ++i) to[i] = static_cast<float>(row[i]) * scale + shift;
    return;
  }
  for (; i + kLanes <= bytes; i += kLanes) {
    const Vb pairs = *reinterpret_cast<const VbAny*>(row + i);
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
