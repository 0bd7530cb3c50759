// How the inner products of attention are done for one element type. An engine prepares a tile of cached tokens and the
// panels that face it, and multiplies them; softmax and everything around it are the same for all engines.
//
//   WideEngine<Element>   float32 arithmetic; 16-bit tiles are widened once, float32 ones are read where they lie
//   DotEngine, AmxEngine  bfloat16 pairs (cpu/bf16_engines-inl.h)
//   CodeEngine<Element>   tiles of codes, widened (cpu/codes-inl.h)
//   MaddEngine<Element>   the same by products of integers of 16 bits (cpu/madd_engine-inl.h)
//   VnniEngine<Element>   the same by products of bytes (cpu/vnni_engine-inl.h)
//
// Letters: K depth of a product, w panel width (one or two vectors), R kv_lora_rank, P qk_rope_head_dim.

namespace xeco::XECO_ISA {

constexpr int64_t kTileTokens = 64;

// Where the tokens of a tile lie: rows of c_kv and k_rope.
template <class Storage>
struct TileRows {
  const Storage* latent;
  int64_t latent_stride;
  const Storage* rope;
  int64_t rope_stride;
  int64_t tokens;
  int64_t latent_bits = 16, rope_bits = 16;  // others than 16: rows of codes, Storage is a byte
};

// The rows of the tile that comes next, to be asked for while this one is worked on.
struct NextTile {
  Ahead latent, rope;
};

template <class Storage>
XECO_INLINE NextTile next_tile(const TileRows<Storage>& rows, int64_t rank, int64_t rope) {
  if (rows.tokens == 0) return {};
  constexpr int64_t kBytes = sizeof(Storage);
  const auto ahead = [](const Storage* first, int64_t stride, int64_t width, int64_t bits) {
    const int64_t bytes = bits != 16 ? code_row_bytes(width, bits) : width * kBytes;
    return Ahead{reinterpret_cast<const char*>(first), stride * kBytes, (bytes + 63) / 64};
  };
  return {ahead(rows.latent, rows.latent_stride, rank, rows.latent_bits),
          ahead(rows.rope, rows.rope_stride, rope, rows.rope_bits)};
}

template <class ElementType>
struct WideEngine {
  using Element = ElementType;
  using Storage = typename Element::Storage;
  using Cached = Storage;
  using Operand = float;
  using Tile = TileRows<float>;
  static constexpr bool kInPlace = std::is_same_v<Element, Float32>;

  static void begin() {}
  static void end() {}
  static int64_t panel_operands(int64_t depth, int64_t width) { return depth * width; }
  static int64_t tile_operands(int64_t rank, int64_t rope) { return kInPlace ? 0 : kTileTokens * (rank + rope); }
  static int64_t weight_operands() { return 0; }

  // with_columns says whether the columns of the rotary key will be read too (the backward pass does).
  static Tile tile(const TileRows<Storage>& rows, int64_t rank, int64_t rope, bool, float* scratch) {
    if constexpr (kInPlace) {
      return rows;
    } else {
      const int64_t width = rank + rope;
      for (int64_t t = 0; t < rows.tokens; ++t) {
        widen<Element>(rows.latent + t * rows.latent_stride, rank, scratch + t * width);
        widen<Element>(rows.rope + t * rows.rope_stride, rope, scratch + t * width + rank);
      }
      return {scratch, width, scratch + rank, width, rows.tokens};
    }
  }

  // [tokens][w] = latents · latent panel + rotary keys · rope panel. kAhead: asks for the next tile on the way.
  template <bool kAhead = false>
  static void scores(const Tile& tile, int64_t rank, int64_t rope, const float* latent, const float* rotary,
                     int vectors, float* out, const NextTile& next = {}) {
    const int64_t width = vectors * kLanes;
    gemm<false, kAhead>(tile.tokens, rank, tile.latent, tile.latent_stride, latent, vectors, out, width, false,
                        next.latent);
    gemm<false, kAhead>(tile.tokens, rope, tile.rope, tile.rope_stride, rotary, vectors, out, width, true, next.rope);
  }

  // [tokens][w] = latents · panel
  static void latent_scores(const Tile& tile, int64_t rank, const float* panel, int vectors, float* out) {
    gemm<false>(tile.tokens, rank, tile.latent, tile.latent_stride, panel, vectors, out, vectors * kLanes, false);
  }

  // [tokens][w] float32 as a panel over the tokens
  static const float* weight_panel(const Tile&, const float* weights, int64_t, int, float*) { return weights; }
  // [tokens][w] float32 as rows over the query rows
  static const float* weight_rows(const float* weights, int64_t, int, float*) { return weights; }

  // [R][w] += latentsᵀ · panel
  static void add_weighted_latents(const Tile& tile, int64_t rank, int64_t, const float* panel, int vectors,
                                   float* out) {
    gemm<true>(rank, tile.tokens, tile.latent, tile.latent_stride, panel, vectors, out, vectors * kLanes, true);
  }

  // [P][w] += rotary keysᵀ · panel
  static void add_weighted_rope(const Tile& tile, int64_t, int64_t rope, const float* panel, int vectors, float* out) {
    gemm<true>(rope, tile.tokens, tile.rope, tile.rope_stride, panel, vectors, out, vectors * kLanes, true);
  }

  // out[tokens][columns of a panel] += weight rows [tokens][width] · panel [width][columns]
  static void add_rows(int64_t tokens, int64_t width, const float* weights, const float* panel, int vectors, float* out,
                       int64_t out_stride) {
    gemm<false>(tokens, width, weights, width, panel, vectors, out, out_stride, true);
  }

  // A panel [depth][width] whose column m is row m: row_of(m) points to `depth` elements, null for a column of zeros.
  template <class RowOf>
  static void pack_columns(RowOf row_of, int64_t depth, int64_t width, float* panel) {
    for (int64_t m = 0; m < width; ++m) {
      const Storage* row = row_of(m);
      for (int64_t k = 0; k < depth; ++k) panel[k * width + m] = row == nullptr ? 0.0f : Element::read_one(row[k]);
    }
  }

  // A panel [depth][width] whose row m is a piece of row m: row_of(m) points to `columns` <= width elements, or is
  // null.
  template <class RowOf>
  static void pack_rows(RowOf row_of, int64_t depth, int64_t columns, int64_t width, float* panel) {
    for (int64_t m = 0; m < depth; ++m) {
      const Storage* row = row_of(m);
      float* to = panel + m * width;
      const int64_t filled = row == nullptr ? 0 : columns;
      if (filled > 0) widen<Element>(row, filled, to);
      for (int64_t n = filled; n < width; ++n) to[n] = 0.0f;
    }
  }
};

}  // namespace xeco::XECO_ISA
