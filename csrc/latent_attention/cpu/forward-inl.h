// Forward pass over one block of query rows and one part of the tokens: online softmax (arXiv 2205.14135), tile by
// tile.
//
//   S[t][row] = c_t · q_row,   m = running maximum of each row,   l = running sum,   O[r][row] = running Σ p · c_t[r]
//
// Parts of the same rows leave (O, m, l) behind and are merged in their order.

namespace xeco::XECO_ISA {

// Running state of a panel: O [R][w], then m [w], then l [w].
struct PanelState {
  float* sums;
  float* maxima;
  float* totals;
};

XECO_INLINE int64_t state_floats(int64_t rank, int64_t width) { return (rank + 2) * width; }

XECO_INLINE PanelState panel_state(float* memory, int64_t rank, int64_t width) {
  return {memory, memory + rank * width, memory + (rank + 1) * width};
}

static void clear(const PanelState& state, int64_t rank, int64_t width) {
  for (int64_t i = 0; i < rank * width; ++i) state.sums[i] = 0.0f;
  for (int64_t i = 0; i < width; ++i) state.maxima[i] = -__builtin_inff(), state.totals[i] = 0.0f;
}

XECO_INLINE void rescale(float* sums, int64_t rank, int64_t width, int vector, Vf factor) {
  for (int64_t r = 0; r < rank; ++r) {
    float* at = sums + r * width + vector * kLanes;
    store(at, load(at) * factor);
  }
}

// Logits [tokens][w] -> weights 2^(logit - m), in place, with m, l and O brought up to date.
static void softmax_tile(float* scores, int64_t tokens, int vectors, const ScoreRule& rule, const PanelRange& range,
                         int64_t first_token, const PanelState& state, int64_t rank) {
  const int64_t width = vectors * kLanes;
  const bool all = sees_all(range, first_token, tokens);
  for (int v = 0; v < vectors; ++v) {
    float* column = scores + v * kLanes;
    const Vf before = load(state.maxima + v * kLanes);
    Vf most = before;
    for (int64_t t = 0; t < tokens; ++t) {
      Vf score = load(column + t * width) * rule.scale;
      if (rule.softcap > 0) score = tanh(score) * rule.softcap;
      if (!all) score = visible_only(score, range, v, static_cast<int32_t>(first_token + t));
      store(column + t * width, score);
      most = max(score, most);
    }
    // A row that has seen nothing yet keeps m = -inf; 0 in its place keeps -inf - m from becoming NaN.
    const Vf reference = select(most == -__builtin_inff(), Vf{}, most);
    Vf sum = Vf{};
    for (int64_t t = 0; t < tokens; ++t) {
      const Vf weight = exp2(load(column + t * width) - reference);
      store(column + t * width, weight);
      sum += weight;
    }
    const Vf factor = exp2(before - reference);
    store(state.totals + v * kLanes, load(state.totals + v * kLanes) * factor + sum);
    store(state.maxima + v * kLanes, most);
    if (any(most != before)) rescale(state.sums, rank, width, v, factor);
  }
}

// Adds a later part's state to an earlier one's.
static void merge(const PanelState& into, const PanelState& from, int64_t rank, int vectors) {
  const int64_t width = vectors * kLanes;
  for (int v = 0; v < vectors; ++v) {
    const int64_t at = v * kLanes;
    const Vf mine = load(into.maxima + at), theirs = load(from.maxima + at);
    const Vf most = max(mine, theirs);
    const Vf reference = select(most == -__builtin_inff(), Vf{}, most);
    const Vf keep = exp2(mine - reference), take = exp2(theirs - reference);
    store(into.maxima + at, most);
    store(into.totals + at, load(into.totals + at) * keep + load(from.totals + at) * take);
    for (int64_t r = 0; r < rank; ++r) {
      float* sum = into.sums + r * width + at;
      store(sum, load(sum) * keep + load(from.sums + r * width + at) * take);
    }
  }
}

// Divides by l and writes the rows of a panel to out and lse. `row` holds R floats.
template <class Element>
static void write_panel(const ForwardParams& params, int64_t batch, const Panel& panel, const PanelState& state,
                        float* row) {
  using Storage = typename Element::Storage;
  const AttentionShape& shape = params.shape;
  const int64_t rank = shape.rank, width = panel.width(), heads = shape.num_heads;
  for (int64_t lane = 0; lane < panel.rows; ++lane) {
    const int64_t number = panel.first_row + lane, query = number / heads, head = number % heads;
    const float total = state.totals[lane];
    // total is NaN where an input was: only a true zero, a row that saw nothing, gives zeros
    const float share = total == 0.0f ? 0.0f : 1.0f / total;
    for (int64_t r = 0; r < rank; ++r) row[r] = state.sums[r * width + lane] * share;
    Storage* out = static_cast<Storage*>(params.out) + (batch * shape.num_queries * heads + number) * rank;
    int64_t r = 0;
    for (; r + kLanes <= rank; r += kLanes) Element::write(out + r, load(row + r));
    for (; r < rank; ++r) out[r] = Element::write_one(row[r]);
    params.lse[(batch * heads + head) * shape.num_queries + query] =
        total == 0.0f ? -__builtin_inff() : (state.maxima[lane] + std::log2(total)) * kLn2;
  }
}

template <class Engine>
class Forward {
  using Element = typename Engine::Element;
  using Storage = typename Element::Storage;
  using Cached = typename Engine::Cached;
  using Operand = typename Engine::Operand;

 public:
  explicit Forward(const ForwardParams& params)
      : params_(params), shape_(params.shape), blocks_(num_blocks(params.shape)), splits_(params.num_splits) {}

  void run(ParallelItems parallel) {
    const int64_t groups = shape_.batch * blocks_;
    if (groups == 0) return;
    if (splits_ > 1) {
      state_stride_ = state_floats(shape_.rank, kBlockRows + kPanelWidth);
      states_.reserve(Scratch::piece_bytes<float>(groups * splits_ * state_stride_));
      shared_ = states_.template take<float>(groups * splits_ * state_stride_);
    }
    parallel(groups * splits_, [](int64_t item, void* self) { static_cast<Forward*>(self)->part(item); }, this);
    if (splits_ > 1)
      parallel(groups, [](int64_t item, void* self) { static_cast<Forward*>(self)->merge_parts(item); }, this);
  }

 private:
  struct Buffers {
    Operand* queries;  // panels: latent, then rotary part
    Operand* tile;
    Operand* weights;
    float* scores;
    float* row;
    float* states;
  };

  Buffers buffers() {
    static thread_local Scratch scratch;
    const int64_t padded = kBlockRows + kPanelWidth;
    const int64_t queries =
        Engine::panel_operands(shape_.rank + 2, padded) + Engine::panel_operands(shape_.rope + 2, padded);
    const int64_t tile = Engine::tile_operands(shape_.rank, shape_.rope);
    const int64_t states = state_floats(shape_.rank, padded);
    scratch.reserve(Scratch::piece_bytes<Operand>(queries) + Scratch::piece_bytes<Operand>(tile) +
                    Scratch::piece_bytes<Operand>(Engine::weight_operands()) +
                    Scratch::piece_bytes<float>(kTileTokens * kPanelWidth) + Scratch::piece_bytes<float>(shape_.rank) +
                    Scratch::piece_bytes<float>(states));
    Buffers b{};
    b.queries = scratch.take<Operand>(queries);
    b.tile = scratch.take<Operand>(tile);
    b.weights = scratch.take<Operand>(Engine::weight_operands());
    b.scores = scratch.take<float>(kTileTokens * kPanelWidth);
    b.row = scratch.take<float>(shape_.rank);
    b.states = scratch.take<float>(states);
    return b;
  }

  // Panels of a block and where their queries and states lie.
  struct Work {
    Block block;
    PanelRange ranges[kMaxPanels];
    const Operand* latent[kMaxPanels];
    const Operand* rotary[kMaxPanels];
    PanelState states[kMaxPanels];
    int64_t first_token, last_token;
  };

  void part(int64_t item) {
    // The last blocks see the most tokens: they come first, so that no thread is left alone with one at the end.
    const int64_t groups = shape_.batch * blocks_;
    const int64_t split = item % splits_, group = groups - 1 - item / splits_;
    const Buffers memory = buffers();
    Work work;
    work.block = make_block(shape_, group / blocks_, group % blocks_);
    prepare(work, memory, splits_ > 1 ? shared_ + (group * splits_ + split) * state_stride_ : memory.states);
    const int64_t tokens = max(0, work.last_token - work.first_token);
    const int64_t step = round_up((tokens + splits_ - 1) / splits_, kTileTokens);
    const int64_t first = min(work.last_token, work.first_token + split * step);
    Engine::begin();
    attend(work, memory, first, min(work.last_token, first + step));
    Engine::end();
    if (splits_ == 1)
      for (int64_t p = 0; p < work.block.num_panels; ++p)
        write_panel<Element>(params_, work.block.batch, work.block.panels[p], work.states[p], memory.row);
  }

  void prepare(Work& work, const Buffers& memory, float* states) {
    Operand* to = memory.queries;
    work.first_token = INT32_MAX, work.last_token = 0;
    for (int64_t p = 0; p < work.block.num_panels; ++p) {
      const Panel& panel = work.block.panels[p];
      work.ranges[p] = panel_range(shape_, work.block.batch, panel);
      if (work.ranges[p].first_seen < work.ranges[p].last_seen) {
        work.first_token = min(work.first_token, work.ranges[p].first_seen);
        work.last_token = max(work.last_token, work.ranges[p].last_seen);
      }
      work.latent[p] = pack(params_.q_latent, work.block.batch, panel, shape_.rank, to);
      work.rotary[p] = pack(params_.q_rope, work.block.batch, panel, shape_.rope, to);
      work.states[p] = panel_state(states, shape_.rank, panel.width());
      clear(work.states[p], shape_.rank, panel.width());
      states += state_floats(shape_.rank, panel.width());
    }
    if (work.last_token == 0) work.first_token = 0;
  }

  const Operand* pack(const HeadsView& view, int64_t batch, const Panel& panel, int64_t depth, Operand*& to) {
    Operand* panel_memory = to;
    const auto row_of = [&](int64_t lane) {
      return lane < panel.rows ? head_row<Storage>(view, shape_, batch, panel.first_row + lane) : nullptr;
    };
    Engine::pack_columns(row_of, depth, panel.width(), panel_memory);
    to += Engine::panel_operands(depth, panel.width());
    return panel_memory;
  }

  void attend(const Work& work, const Buffers& memory, int64_t first, int64_t last) {
    const ScoreRule rule = score_rule(shape_);
    auto rows = tile_rows(work.block.batch, first, last);
    for (int64_t token = first; token < last;) {
      const auto following = tile_rows(work.block.batch, token + rows.tokens, last);
      const NextTile next = next_tile(following, shape_.rank, shape_.rope);
      bool requested = false;  // the next tile
      const auto tile = Engine::tile(rows, shape_.rank, shape_.rope, false, memory.tile);
      for (int64_t p = 0; p < work.block.num_panels; ++p) {
        const PanelRange& range = work.ranges[p];
        if (token >= range.last_seen || token + rows.tokens <= range.first_seen) continue;
        const int vectors = work.block.panels[p].vectors;
        if (requested)
          Engine::scores(tile, shape_.rank, shape_.rope, work.latent[p], work.rotary[p], vectors, memory.scores);
        else
          Engine::template scores<true>(tile, shape_.rank, shape_.rope, work.latent[p], work.rotary[p], vectors,
                                        memory.scores, next);
        requested = true;
        softmax_tile(memory.scores, rows.tokens, vectors, rule, range, token, work.states[p], shape_.rank);
        const Operand* weights = Engine::weight_panel(tile, memory.scores, rows.tokens, vectors, memory.weights);
        Engine::add_weighted_latents(tile, shape_.rank, 0, weights, vectors, work.states[p].sums);
      }
      token += rows.tokens;
      rows = following;
    }
  }

  // The tile that begins at `first`; of no tokens where none is left.
  TileRows<Cached> tile_rows(int64_t batch, int64_t first, int64_t last) const {
    if (first >= last) return {nullptr, 0, nullptr, 0, 0};
    return token_rows<Cached>(shape_, params_.c_kv, params_.k_rope, batch, first, min(kTileTokens, last - first));
  }

  void merge_parts(int64_t group) {
    const Block block = make_block(shape_, group / blocks_, group % blocks_);
    const Buffers memory = buffers();
    for (int64_t p = 0, offset = 0; p < block.num_panels; ++p) {
      const Panel& panel = block.panels[p];
      const auto state_of = [&](int64_t split) {
        return panel_state(shared_ + (group * splits_ + split) * state_stride_ + offset, shape_.rank, panel.width());
      };
      for (int64_t split = 1; split < splits_; ++split) merge(state_of(0), state_of(split), shape_.rank, panel.vectors);
      write_panel<Element>(params_, block.batch, panel, state_of(0), memory.row);
      offset += state_floats(shape_.rank, panel.width());
    }
  }

  const ForwardParams& params_;
  const AttentionShape& shape_;
  const int64_t blocks_, splits_;
  Scratch states_;
  int64_t state_stride_ = 0;
  float* shared_ = nullptr;
};

}  // namespace xeco::XECO_ISA
