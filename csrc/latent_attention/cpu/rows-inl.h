// Query rows: the Q·H rows of a sequence, in the order (query, head), all attend to the same tokens. They are handled
// in blocks, a block in panels of one or two vectors, a row in each lane.

namespace xeco::XECO_ISA {

constexpr int64_t kMaxPanels = kBlockRows / kLanes;

// The tokens [low, high) that each row of a panel sees.
struct alignas(64) PanelRange {
  int32_t low[kPanelWidth];
  int32_t high[kPanelWidth];
  int32_t first_seen, last_seen;  // union of the rows' ranges: [first_seen, last_seen)
  int32_t all_from, all_to;       // every row sees [all_from, all_to)
};

struct Panel {
  int64_t first_row;  // within the sequence
  int64_t rows;       // <= width; the lanes behind them are padding
  int vectors;
  int64_t width() const { return vectors * kLanes; }
};

struct Block {
  int64_t batch, first_row, rows;
  int64_t num_panels;
  Panel panels[kMaxPanels];
};

XECO_INLINE Block make_block(const AttentionShape& shape, int64_t batch, int64_t number) {
  Block block;
  block.batch = batch;
  block.first_row = number * kBlockRows;
  block.rows = min(kBlockRows, shape.num_queries * shape.num_heads - block.first_row);
  block.num_panels = 0;
  for (int64_t done = 0; done < block.rows; done += kPanelWidth) {
    const int64_t rows = min(kPanelWidth, block.rows - done);
    block.panels[block.num_panels++] = {block.first_row + done, rows, rows > kLanes ? 2 : 1};
  }
  return block;
}

XECO_INLINE PanelRange panel_range(const AttentionShape& shape, int64_t batch, const Panel& panel) {
  PanelRange range;
  const int64_t begin = shape.starts == nullptr ? 0 : max(0, shape.starts[batch]);
  const int64_t end = shape.ends == nullptr ? shape.num_tokens : min(shape.num_tokens, shape.ends[batch]);
  const int64_t last = shape.queries_end_at_ends ? end : shape.num_tokens;
  const int64_t first = shape.query_positions == nullptr ? last - shape.num_queries : shape.query_positions[batch];
  range.first_seen = INT32_MAX, range.last_seen = 0, range.all_from = 0, range.all_to = INT32_MAX;
  for (int64_t lane = 0; lane < kPanelWidth; ++lane) {
    int64_t low = 0, high = 0;
    if (lane < panel.rows) {
      const int64_t position = first + (panel.first_row + lane) / shape.num_heads;
      low = begin, high = end;
      if (shape.causal) high = min(high, position + 1);
      if (shape.window > 0) low = max(low, position - shape.window + 1);
      if (low >= high) low = high = 0;
      range.all_from = static_cast<int32_t>(max(range.all_from, low));
      range.all_to = static_cast<int32_t>(min(range.all_to, high));
      if (low < high) {
        range.first_seen = static_cast<int32_t>(min(range.first_seen, low));
        range.last_seen = static_cast<int32_t>(max(range.last_seen, high));
      }
    }
    range.low[lane] = static_cast<int32_t>(low);
    range.high[lane] = static_cast<int32_t>(high);
  }
  if (range.last_seen == 0) range.first_seen = 0;
  return range;
}

// First element of head h of query q in a [B, Q, H, width] view, by row number q·H + h.
template <class Storage>
XECO_INLINE const Storage* head_row(const HeadsView& view, const AttentionShape& shape, int64_t batch, int64_t row) {
  const int64_t query = row / shape.num_heads, head = row % shape.num_heads;
  return static_cast<const Storage*>(view.data) + batch * view.batch_stride + query * view.query_stride +
         head * view.head_stride;
}

// The tokens [first, first + count) of a sequence, cut where its page ends.
template <class Storage>
XECO_INLINE TileRows<Storage> token_rows(const AttentionShape& shape, const RowsView& c_kv, const RowsView& k_rope,
                                         int64_t batch, int64_t first, int64_t count) {
  int64_t outer = batch, row = first;
  if (shape.block_table != nullptr) {
    outer = shape.block_table[batch * shape.block_table_stride + first / shape.page_size];
    row = first % shape.page_size;
    count = min(count, shape.page_size - row);
  }
  return {static_cast<const Storage*>(c_kv.data) + outer * c_kv.outer_stride + row * c_kv.row_stride,
          c_kv.row_stride,
          static_cast<const Storage*>(k_rope.data) + outer * k_rope.outer_stride + row * k_rope.row_stride,
          k_rope.row_stride,
          count,
          shape.latent_bits,
          shape.rope_bits};
}

// Scores of a tile [tokens][w] become base-2 logits: scaled, capped, -inf where a row does not see a token.
struct ScoreRule {
  float scale;    // softmax_scale · log2(e), or softmax_scale / softcap
  float softcap;  // softcap · log2(e), 0 where there is none
};

XECO_INLINE ScoreRule score_rule(const AttentionShape& shape) {
  if (shape.softcap > 0) return {shape.softmax_scale / shape.softcap, shape.softcap * kLog2E};
  return {shape.softmax_scale * kLog2E, 0.0f};
}

XECO_INLINE bool sees_all(const PanelRange& range, int64_t first, int64_t tokens) {
  return range.all_from <= first && first + tokens <= range.all_to;
}

XECO_INLINE Vf visible_only(Vf score, const PanelRange& range, int vector, int32_t token) {
  typedef int32_t ViAny __attribute__((vector_size(XECO_LANES * 4), aligned(4), may_alias));
  const Vi low = *reinterpret_cast<const ViAny*>(range.low + vector * kLanes);
  const Vi high = *reinterpret_cast<const ViAny*>(range.high + vector * kLanes);
  const Vi now = splat_int(token);
  return select((now >= low) & (now < high), score, splat(-__builtin_inff()));
}

}  // namespace xeco::XECO_ISA
