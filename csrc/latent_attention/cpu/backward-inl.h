// Backward pass (FlashAttention-2, arXiv 2307.08691, section 3.1, for one shared latent that is key and value at once):
//
//   P = 2^(logit - lse)           dP[t][row] = c_t · dO_row           dS = P · (dP - delta) · softmax_scale
//   dq_row = Σ_t dS · [c_t, k_t]  d[c_t, k_t] += Σ_row dS · q_row     dc_t += Σ_row P · dO_row
//
// A group is every num_groups-th block of query rows. Each adds up its own d[c, k] in float32, its blocks in order, and
// the groups are added in order afterwards: the result does not depend on the number of threads.

namespace xeco::XECO_ISA {

template <class Engine>
class Backward {
  using Element = typename Engine::Element;
  using Storage = typename Element::Storage;
  using Operand = typename Engine::Operand;

 public:
  explicit Backward(const BackwardParams& params) : params_(params), shape_(params.shape), rule_(score_rule(shape_)) {}

  void run(ParallelItems parallel) {
    parallel(
        shape_.batch * params_.num_groups, [](int64_t item, void* self) { static_cast<Backward*>(self)->group(item); },
        this);
  }

 private:
  struct Buffers {
    Operand *q_latent, *q_rope, *d_out;             // panels over the features
    Operand *q_latent_rows, *q_rope_rows, *d_rows;  // panels over the query rows, one for each piece of the features
    Operand *tile, *weight_panel, *weight_rows;
    float *scores, *d_scores, *d_query, *row, *lse, *delta;
  };

  int64_t row_panels(int64_t width) const { return Engine::panel_operands(kPanelWidth, padded_width(width)); }

  template <class Take>
  Buffers arrange(const Take& take) const {
    const int64_t rank = shape_.rank, rope = shape_.rope;
    Buffers b{};
    b.q_latent = take(b.q_latent, Engine::panel_operands(rank, kPanelWidth));
    b.q_rope = take(b.q_rope, Engine::panel_operands(rope, kPanelWidth));
    b.d_out = take(b.d_out, Engine::panel_operands(rank, kPanelWidth));
    b.q_latent_rows = take(b.q_latent_rows, row_panels(rank));
    b.q_rope_rows = take(b.q_rope_rows, row_panels(rope));
    b.d_rows = take(b.d_rows, row_panels(rank));
    b.tile = take(b.tile, Engine::tile_operands(rank, rope));
    b.weight_panel = take(b.weight_panel, Engine::weight_operands());
    b.weight_rows = take(b.weight_rows, Engine::weight_operands());
    b.scores = take(b.scores, kTileTokens * kPanelWidth);
    b.d_scores = take(b.d_scores, kTileTokens * kPanelWidth);
    b.d_query = take(b.d_query, (rank + rope) * kPanelWidth);
    b.row = take(b.row, max(rank, rope));
    b.lse = take(b.lse, kPanelWidth);
    b.delta = take(b.delta, kPanelWidth);
    return b;
  }

  Buffers buffers() const {
    static thread_local Scratch scratch;
    size_t bytes = 0;
    arrange([&](auto* piece, int64_t count) {
      bytes += Scratch::piece_bytes<std::remove_pointer_t<decltype(piece)>>(count);
      return piece = nullptr;
    });
    scratch.reserve(bytes);
    return arrange([&](auto* piece, int64_t count) {
      return piece = scratch.take<std::remove_pointer_t<decltype(piece)>>(count);
    });
  }

  void group(int64_t item) {
    const int64_t batch = item / params_.num_groups, group = item % params_.num_groups;
    const int64_t width = padded_width(shape_.rank) + padded_width(shape_.rope);
    float* sums = params_.d_rows + item * shape_.num_tokens * width;
    const Buffers memory = buffers();
    Engine::begin();
    for (int64_t number = group; number < num_blocks(shape_); number += params_.num_groups) {
      const Block block = make_block(shape_, batch, number);
      for (int64_t p = 0; p < block.num_panels; ++p) panel(batch, block.panels[p], memory, sums, width);
    }
    Engine::end();
  }

  void panel(int64_t batch, const Panel& panel, const Buffers& memory, float* sums, int64_t width) const {
    const PanelRange range = panel_range(shape_, batch, panel);
    pack(batch, panel, memory);
    for (int64_t i = 0; i < (shape_.rank + shape_.rope) * panel.width(); ++i) memory.d_query[i] = 0.0f;
    for (int64_t token = range.first_seen; token < range.last_seen;) {
      const auto rows = token_rows<Storage>(shape_, params_.c_kv, params_.k_rope, batch, token,
                                            min(kTileTokens, range.last_seen - token));
      const auto tile = Engine::tile(rows, shape_.rank, shape_.rope, true, memory.tile);
      accumulate(tile, token, rows.tokens, panel, range, memory, sums + token * width, width);
      token += rows.tokens;
    }
    write(batch, panel, memory);
  }

  void pack(int64_t batch, const Panel& panel, const Buffers& memory) const {
    const int64_t heads = shape_.num_heads, width = panel.width();
    const auto rows_of = [&](const HeadsView& view) {
      return [this, &view, batch, &panel](int64_t lane) {
        return lane < panel.rows ? head_row<Storage>(view, shape_, batch, panel.first_row + lane) : nullptr;
      };
    };
    Engine::pack_columns(rows_of(params_.q_latent), shape_.rank, width, memory.q_latent);
    Engine::pack_columns(rows_of(params_.q_rope), shape_.rope, width, memory.q_rope);
    Engine::pack_columns(rows_of(params_.d_out), shape_.rank, width, memory.d_out);
    pack_pieces(rows_of(params_.q_latent), shape_.rank, width, memory.q_latent_rows);
    pack_pieces(rows_of(params_.q_rope), shape_.rope, width, memory.q_rope_rows);
    pack_pieces(rows_of(params_.d_out), shape_.rank, width, memory.d_rows);
    for (int64_t lane = 0; lane < width; ++lane) {
      const int64_t number = panel.first_row + lane;
      const int64_t at = (batch * heads + number % heads) * shape_.num_queries + number / heads;
      // Padding lanes and rows that saw nothing: their logits are -inf, 0 keeps -inf - lse from becoming NaN.
      const float lse = lane < panel.rows ? params_.lse[at] : 0.0f;
      memory.lse[lane] = lse == -__builtin_inff() ? 0.0f : lse * kLog2E;
      memory.delta[lane] = lane < panel.rows ? params_.delta[at] : 0.0f;
    }
  }

  // Pieces of at most a panel's width, each a panel over the query rows.
  template <class RowOf>
  static void pack_pieces(const RowOf& row_of, int64_t features, int64_t depth, Operand* to) {
    for (int64_t first = 0; first < features; first += kPanelWidth) {
      const int64_t columns = min(kPanelWidth, features - first), width = columns > kLanes ? kPanelWidth : kLanes;
      Engine::pack_rows(
          [&](int64_t row) {
            const Storage* from = row_of(row);
            return from == nullptr ? from : from + first;
          },
          depth, columns, width, to);
      to += Engine::panel_operands(depth, width);
    }
  }

  void accumulate(const typename Engine::Tile& tile, int64_t token, int64_t tokens, const Panel& panel,
                  const PanelRange& range, const Buffers& memory, float* sums, int64_t sums_stride) const {
    const int64_t rank = shape_.rank, rope = shape_.rope;
    const int vectors = panel.vectors;
    Engine::scores(tile, rank, rope, memory.q_latent, memory.q_rope, vectors, memory.scores);
    Engine::latent_scores(tile, rank, memory.d_out, vectors, memory.d_scores);
    differentiate(token, tokens, vectors, range, memory);
    const Operand* d_panel = Engine::weight_panel(tile, memory.d_scores, tokens, vectors, memory.weight_panel);
    Engine::add_weighted_latents(tile, rank, rope, d_panel, vectors, memory.d_query);
    Engine::add_weighted_rope(tile, rank, rope, d_panel, vectors, memory.d_query + rank * panel.width());
    const Operand* d_rows = Engine::weight_rows(memory.d_scores, tokens, vectors, memory.weight_rows);
    add_pieces(tokens, panel.width(), d_rows, memory.q_latent_rows, rank, sums, sums_stride);
    add_pieces(tokens, panel.width(), d_rows, memory.q_rope_rows, rope, sums + padded_width(rank), sums_stride);
    const Operand* p_rows = Engine::weight_rows(memory.scores, tokens, vectors, memory.weight_rows);
    add_pieces(tokens, panel.width(), p_rows, memory.d_rows, rank, sums, sums_stride);
  }

  static void add_pieces(int64_t tokens, int64_t depth, const Operand* weights, const Operand* pieces, int64_t features,
                         float* out, int64_t out_stride) {
    for (int64_t first = 0; first < features; first += kPanelWidth) {
      const int vectors = features - first > kLanes ? 2 : 1;
      Engine::add_rows(tokens, depth, weights, pieces, vectors, out + first, out_stride);
      pieces += Engine::panel_operands(depth, vectors * kLanes);
    }
  }

  // scores become P, d_scores become dS.
  void differentiate(int64_t token, int64_t tokens, int vectors, const PanelRange& range, const Buffers& memory) const {
    const int64_t width = vectors * kLanes;
    const bool all = sees_all(range, token, tokens);
    for (int v = 0; v < vectors; ++v) {
      const Vf lse = load(memory.lse + v * kLanes), delta = load(memory.delta + v * kLanes);
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t at = t * width + v * kLanes;
        Vf score = load(memory.scores + at) * rule_.scale;
        Vf slope = splat(shape_.softmax_scale);
        if (rule_.softcap > 0) {
          const Vf capped = tanh(score);
          slope *= 1.0f - capped * capped;
          score = capped * rule_.softcap;
        }
        if (!all) score = visible_only(score, range, v, static_cast<int32_t>(token + t));
        const Vf weight = exp2(score - lse);
        store(memory.scores + at, weight);
        store(memory.d_scores + at, weight * (load(memory.d_scores + at) - delta) * slope);
      }
    }
  }

  void write(int64_t batch, const Panel& panel, const Buffers& memory) const {
    write_part(batch, panel, memory.d_query, shape_.rank, params_.d_q_latent, memory.row);
    write_part(batch, panel, memory.d_query + shape_.rank * panel.width(), shape_.rope, params_.d_q_rope, memory.row);
  }

  void write_part(int64_t batch, const Panel& panel, const float* sums, int64_t features, void* out, float* row) const {
    for (int64_t lane = 0; lane < panel.rows; ++lane) {
      for (int64_t r = 0; r < features; ++r) row[r] = sums[r * panel.width() + lane];
      const int64_t number = batch * shape_.num_queries * shape_.num_heads + panel.first_row + lane;
      Storage* to = static_cast<Storage*>(out) + number * features;
      int64_t r = 0;
      for (; r + kLanes <= features; r += kLanes) Element::write(to + r, load(row + r));
      for (; r < features; ++r) to[r] = Element::write_one(row[r]);
    }
  }

  const BackwardParams& params_;
  const AttentionShape& shape_;
  const ScoreRule rule_;
};

}  // namespace xeco::XECO_ISA
