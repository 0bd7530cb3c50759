// Rows of a cache in codes of few bits (xeco_convert/ops/packed_rows.py): x = scale * (code - middle), one scale a row.
//
// A row is its codes, then its scale as bfloat16. With 8 bits a code is a byte; with 4 bits byte i holds code i in its
// low half and code i + width / 2 in its high half. In bit planes plane p holds the p-th highest bit of the first
// numbers' bytes; the bit behind the lowest one that a number has is set as well, and those below it are not.

namespace xeco::XECO_ISA {

typedef uint8_t Vb __attribute__((vector_size(XECO_LANES)));
typedef uint8_t VbAny __attribute__((vector_size(XECO_LANES), aligned(1), may_alias));

XECO_INLINE float middle_code(int64_t bits) { return bits == 8 ? 127.5f : bits == 4 ? 7.5f : 128.0f; }

XECO_INLINE float scale_of_row(const uint8_t* row, int64_t width, int64_t bits) {
  const uint8_t* at = row + code_row_bytes(width, bits) - kScaleBytes;
  return BFloat16::read_one(static_cast<uint16_t>(at[0] | at[1] << 8));
}

// Codes as float32 numbers scale * (code - middle) = scale * code + shift. By way of 16 bits: GCC 12 takes a vector of
// bytes that comes from memory apart, one byte after the other.
XECO_INLINE Vf decoded(Vb codes, float scale, float shift) {
  const Vh wider = __builtin_convertvector(codes, Vh);
  return __builtin_convertvector(__builtin_convertvector(wider, Vi), Vf) * scale + shift;
}

// Eight bits as the highest of eight bytes, the lowest bit first.
XECO_INLINE uint64_t spread_bits(uint8_t bits) {
  const uint64_t apart = bits * 0x0101010101010101u & 0x8040201008040201u;
  return apart + 0x00406070787c7e7fu & 0x8080808080808080u;
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

static void decode_row(const uint8_t* row, int64_t width, int64_t bits, float* to) {
  const float scale = scale_of_row(row, width, bits), shift = -scale * middle_code(bits);
  alignas(64) uint8_t from_planes[kMostPlaneNumbers];
  if (lies_in_planes(bits)) {
    bytes_of_planes(row, bits, from_planes);
    row = from_planes;
  }
  const bool are_bytes = bits != 4;
  const int64_t bytes = are_bytes ? width : width / 2;
  int64_t i = 0;
  if (are_bytes) {
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
