// Backward pass on a GPU (FlashAttention-2, arXiv 2307.08691, section 3.1, for one latent that is key and value at
// once):
//
//   P = 2^(logit - lse)      dP = dO · Cᵀ      dS = P · (dP - delta) · slope
//   dQ = dS · [C, K]         d[C, K] = dSᵀ · Q + Pᵀ · dO (latent columns alone)
//
// Two kernels, each of which owns what it writes and computes P again: one a tile of query rows, which passes over the
// tokens; the other a tile of tokens, which passes over the query rows and collects the key side and the value side of
// the latent in one accumulator. No atomics: every sum has one order. It costs 2·(2R + P) more work for each pair than
// a kernel that adds up dQ or d[C, K] atomically.
//
// Both are one body: "owned" rows times "streamed" rows. A warp owns 16 rows and shares them with kColumnWarps - 1
// others, as in the forward pass.
#pragma once

#include "latent_attention/gpu/kernels.h"
#include "latent_attention/gpu/rows.cuh"

namespace xeco::gpu {

template <class Element_, int kRank_, int kOwned_, int kStreamed_, int kWarps_>
struct BackwardTile : WarpGrid<kOwned_, kStreamed_, kWarps_> {
  using Element = Element_;
  using Grid = WarpGrid<kOwned_, kStreamed_, kWarps_>;
  static constexpr int kOwned = kOwned_, kStreamed = kStreamed_, kMaxRank = kRank_;
  static constexpr int kOutTiles =
      ((kRank_ + static_cast<int>(kMaxRope)) / kTile + Grid::kColumnWarps - 1) / Grid::kColumnWarps;

  // Rows that are streamed in `stages` stages, rows that are owned, weights (two kinds where tokens are owned).
  XECO_LAYOUT static int64_t query_shared_bytes(int stride, int gradient_stride, int stages) {
    const int64_t owned = kOwned * (stride + gradient_stride), streamed = kStreamed * stride;
    return 2 * (owned + stages * streamed + kOwned * Grid::kWeightStride);
  }
  XECO_LAYOUT static int64_t token_shared_bytes(int stride, int gradient_stride, int stages) {
    const int64_t owned = kOwned * stride, streamed = kStreamed * (stride + gradient_stride);
    constexpr int64_t kFacts = kStreamed * 16;  // bytes
    return 2 * (owned + stages * streamed + 2 * kOwned * Grid::kWeightStride) + stages * kFacts;
  }
};

XECO_LAYOUT int gradient_stride(const AttentionShape& shape) { return padded(shape.rank) + kRowPadding; }

// What is known of a query row besides its numbers.
struct RowFacts {
  Seen seen;
  float lse, delta;  // lse in base 2
};
static_assert(sizeof(RowFacts) == 16, "counted in token_shared_bytes");

XECO_DEVICE RowFacts row_facts(const BackwardParams& params, const Sequence& sequence, int64_t batch, int row,
                               int end) {
  const AttentionShape& shape = params.shape;
  const int heads = static_cast<int>(shape.num_heads), query = row / heads, head = row - query * heads;
  if (row >= end) return {{0, 0}, 0.0f, 0.0f};
  const int64_t at = (batch * heads + head) * shape.num_queries + query;
  const float lse = params.lse[at];
  // Rows that saw nothing: their logits are -inf, 0 keeps -inf - lse from becoming NaN.
  return {seen_by(shape, sequence, query), lse == negative_infinity() ? 0.0f : lse * kLog2E, params.delta[at]};
}

// S -> P and dP -> dS, one number.
XECO_DEVICE void differentiate(float& score, float& d_score, const ScoreRule& rule, float softmax_scale,
                               const RowFacts& facts, int token) {
  float logit = score * rule.scale, slope = softmax_scale;
  if (rule.softcap > 0.0f) {
    const float capped = tanh(logit);
    slope *= 1.0f - capped * capped;
    logit = capped * rule.softcap;
  }
  const bool seen = token >= facts.seen.low && token < facts.seen.high;
  const float weight = exp2((seen ? logit : negative_infinity()) - facts.lse);
  score = weight;
  d_score = weight * (d_score - facts.delta) * slope;
}

// S and dP of a warp's share of the streamed rows.
template <class Tile>
XECO_DEVICE void score_tiles(Accumulator (&scores)[Tile::kScoreTiles], Accumulator (&d_scores)[Tile::kScoreTiles],
                             const uint16_t* owned, const uint16_t* streamed, int stride, int tiles,
                             const uint16_t* d_owned, int d_owned_stride, const uint16_t* d_streamed,
                             int d_streamed_stride, int rank_tiles) {
  using Element = typename Tile::Element;
  const int row_warp = warp_index() % Tile::kRowWarps, column_warp = warp_index() / Tile::kRowWarps;
  constexpr int kMaxRank = Tile::kMaxRank;
  multiply_rows<Element, kMaxRank>(scores, owned + row_warp * kTile * stride, stride,
                                   streamed + column_warp * kTile * stride, stride, Tile::kColumnWarps * kTile * stride,
                                   tiles);
  multiply_rows<Element, kMaxRank>(d_scores, d_owned + row_warp * kTile * d_owned_stride, d_owned_stride,
                                   d_streamed + column_warp * kTile * d_streamed_stride, d_streamed_stride,
                                   Tile::kColumnWarps * kTile * d_streamed_stride, rank_tiles);
}

template <class Tile>
XECO_DEVICE bool has_share() {
  return Tile::kStreamed >= Tile::kColumnWarps * kTile || warp_index() / Tile::kRowWarps * kTile < Tile::kStreamed;
}

template <class Tile>
XECO_DEVICE void store_weights(uint16_t* to, const Accumulator (&weights)[Tile::kScoreTiles]) {
  const int row_warp = warp_index() % Tile::kRowWarps, column_warp = warp_index() / Tile::kRowWarps;
#pragma unroll
  for (int t = 0; t < Tile::kScoreTiles; ++t)
    store_tile<typename Tile::Element>(
        to + row_warp * kTile * Tile::kWeightStride + (column_warp + t * Tile::kColumnWarps) * kTile,
        Tile::kWeightStride, weights[t]);
}

// Weights are there for whoever reads them: the warps that share rows, or the one that wrote them.
template <class Tile>
XECO_DEVICE void sync_weights() {
  if constexpr (Tile::kColumnWarps > 1)
    sync_block();
  else
    sync_warp();
}

// out += weights · rows for the column tiles of this warp.
template <class Tile>
XECO_DEVICE void add_columns(Accumulator (&out)[Tile::kOutTiles], const uint16_t* weights, const uint16_t* rows,
                             int stride, int tiles) {
  const int row_warp = warp_index() % Tile::kRowWarps, column_warp = warp_index() / Tile::kRowWarps;
#pragma unroll 1
  for (int k = 0; k < Tile::kStreamed / kTile; ++k)
    multiply_columns<typename Tile::Element>(
        out, load_rows(weights + row_warp * kTile * Tile::kWeightStride + k * kTile, Tile::kWeightStride),
        rows + k * kTile * stride, stride, column_warp, Tile::kColumnWarps, tiles);
}

// A streamed pipeline: `load(number)` fills stage number % stages, `work(number)` uses it.
template <class Load, class Use>
XECO_DEVICE void run_pipeline(int count, int stages, const Load& load, const Use& use) {
  for (int number = 0; number < stages - 1; ++number) {
    if (number < count) load(number);
    commit_copies();
  }
  for (int number = 0; number < count; ++number) {
    if (stages == 1) {
      if (number > 0) sync_block();
      load(number);
      commit_copies();
      wait_copies(0);
    } else {
      wait_copies(stages - 2);
    }
    sync_block();  // the tile is there for all; with several stages all are also done with the one before it
    if (stages > 1) {
      if (number + stages - 1 < count) load(number + stages - 1);
      commit_copies();
    }
    use(number);
  }
  commit_copies();
  wait_copies(0);
}

// Calls body(row in the tile, column, value, value of the next column) for the accumulators of a warp.
template <class Tile, class Body>
XECO_DEVICE void each_pair(const Accumulator (&out)[Tile::kOutTiles], const Body& body) {
  const int lane = lane_index(), row_warp = warp_index() % Tile::kRowWarps,
            column_warp = warp_index() / Tile::kRowWarps;
#pragma unroll
  for (int j = 0; j < Tile::kOutTiles; ++j)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; e += 2)
      body(row_warp * kTile + Layout::row(lane, Layout::slot(e)),
           (column_warp + j * Tile::kColumnWarps) * kTile + Layout::column(lane, e), out[j].values[e],
           out[j].values[e + 1]);
}

// d_q_latent and d_q_rope. Grid: B × row blocks, the last first.
template <class Tile>
XECO_KERNEL(Tile::kThreads, 1)
query_gradient_kernel(const BackwardParams params, int stages) {
  const AttentionShape& shape = params.shape;
  const int heads = static_cast<int>(shape.num_heads), end = static_cast<int>(shape.num_queries) * heads;
  const int blocks = (end + Tile::kOwned - 1) / Tile::kOwned;
  const int64_t batch = block_index() / blocks;
  const int first_row = (blocks - 1 - static_cast<int>(block_index() % blocks)) * Tile::kOwned;
  const Sequence sequence = sequence_of(shape, batch);
  const Seen seen = seen_by_any(shape, sequence, first_row, min(Tile::kOwned, end - first_row));
  const int stride = row_stride(shape), d_stride = gradient_stride(shape);
  const int rank_tiles = padded(shape.rank) / kTile, all_tiles = rank_tiles + padded(shape.rope) / kTile;
  uint16_t* queries = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* d_out = queries + Tile::kOwned * stride;
  uint16_t* tiles = d_out + Tile::kOwned * d_stride;
  uint16_t* weights = tiles + stages * Tile::kStreamed * stride;
  QueryTiles(shape, params.q_latent, params.q_rope, params.d_out, batch)
      .load<true, Tile::kMaxRank, Tile::kOwned, Tile::kThreads>(queries, d_out, first_row, end);

  const int lane = lane_index(), row_warp = warp_index() % Tile::kRowWarps,
            column_warp = warp_index() / Tile::kRowWarps;
  RowFacts facts[Layout::kRowsOfLane];
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s)
    facts[s] = row_facts(params, sequence, batch, first_row + row_warp * kTile + Layout::row(lane, s), end);
  Accumulator out[Tile::kOutTiles];
#pragma unroll
  for (int j = 0; j < Tile::kOutTiles; ++j) clear(out[j]);
  const TokenTiles tokens(shape, params.c_kv, params.k_rope, batch);
  const ScoreRule rule = score_rule(shape);
  const auto stage_of = [&](int number) { return tiles + number % stages * Tile::kStreamed * stride; };
  run_pipeline((seen.high - seen.low + Tile::kStreamed - 1) / Tile::kStreamed, stages,
               [&](int number) {
                 tokens.load<Tile::kMaxRank, Tile::kStreamed, Tile::kThreads>(
                     stage_of(number), seen.low + number * Tile::kStreamed, seen);
               },
               [&](int number) {
                 const int first_token = seen.low + number * Tile::kStreamed;
                 if (has_share<Tile>()) {
                   Accumulator scores[Tile::kScoreTiles], d_scores[Tile::kScoreTiles];
                   score_tiles<Tile>(scores, d_scores, queries, stage_of(number), stride, all_tiles, d_out, d_stride,
                                     stage_of(number), stride, rank_tiles);
#pragma unroll
                   for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
                     for (int e = 0; e < Layout::kFloats; ++e)
                       differentiate(
                           scores[t].values[e], d_scores[t].values[e], rule, shape.softmax_scale,
                           facts[Layout::slot(e)],
                           first_token + (column_warp + t * Tile::kColumnWarps) * kTile + Layout::column(lane, e));
                   store_weights<Tile>(weights, d_scores);
                 }
                 sync_weights<Tile>();
                 add_columns<Tile>(out, weights, stage_of(number), stride, all_tiles);
               });

  const int rank = static_cast<int>(shape.rank), rope = static_cast<int>(shape.rope), padded_rank = padded(shape.rank);
  each_pair<Tile>(out, [&](int row, int column, float first, float second) {
    if (first_row + row >= end) return;
    const int64_t number = batch * end + first_row + row;
    if (column < padded_rank)
      write_pair<typename Tile::Element>(static_cast<uint16_t*>(params.d_q_latent) + number * rank, column, rank, first,
                                         second);
    else
      write_pair<typename Tile::Element>(static_cast<uint16_t*>(params.d_q_rope) + number * rope, column - padded_rank,
                                         rope, first, second);
  });
}

// The query rows [from, to) that may see one of the tokens [low, high): whole queries.
XECO_DEVICE Seen rows_that_see(const AttentionShape& shape, const Sequence& sequence, int low, int high) {
  low = max(low, sequence.begin), high = min(high, sequence.end);
  int64_t from = 0, to = shape.num_queries - 1;
  if (shape.causal) from = max<int64_t>(from, low - sequence.first_position);
  if (shape.window > 0) to = min(to, high - 1 + shape.window - 1 - sequence.first_position);
  if (low >= high || from > to) return {0, 0};
  const int heads = static_cast<int>(shape.num_heads);
  return {static_cast<int>(from) * heads, static_cast<int>(to + 1) * heads};
}

// d_c_kv and d_k_rope. Grid: B × token blocks × num_groups.
template <class Tile>
XECO_KERNEL(Tile::kThreads, 1)
token_gradient_kernel(const BackwardParams params, const TokenGradients to, int stages) {
  const AttentionShape& shape = params.shape;
  const int heads = static_cast<int>(shape.num_heads), num_tokens = static_cast<int>(shape.num_tokens);
  const int groups = static_cast<int>(params.num_groups), group = static_cast<int>(block_index() % groups);
  const int blocks = (num_tokens + Tile::kOwned - 1) / Tile::kOwned;
  const int64_t batch = block_index() / groups / blocks;
  const int first_token = static_cast<int>(block_index() / groups % blocks) * Tile::kOwned;
  const Sequence sequence = sequence_of(shape, batch);
  const Seen rows = rows_that_see(shape, sequence, first_token, min(first_token + Tile::kOwned, num_tokens));
  const int all_rows = static_cast<int>(shape.num_queries) * heads;
  const Seen seen = rows.high > 0 ? seen_by_any(shape, sequence, 0, all_rows) : Seen{0, 0};
  const int stride = row_stride(shape), d_stride = gradient_stride(shape);
  const int rank_tiles = padded(shape.rank) / kTile, all_tiles = rank_tiles + padded(shape.rope) / kTile;
  uint16_t* owned = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* tiles = owned + Tile::kOwned * stride;
  uint16_t* d_scores_memory = tiles + stages * Tile::kStreamed * (stride + d_stride);
  uint16_t* weights = d_scores_memory + Tile::kOwned * Tile::kWeightStride;
  RowFacts* facts = reinterpret_cast<RowFacts*>(weights + Tile::kOwned * Tile::kWeightStride);
  TokenTiles(shape, params.c_kv, params.k_rope, batch)
      .load<Tile::kMaxRank, Tile::kOwned, Tile::kThreads>(owned, first_token, seen);

  const int lane = lane_index(), row_warp = warp_index() % Tile::kRowWarps,
            column_warp = warp_index() / Tile::kRowWarps;
  Accumulator out[Tile::kOutTiles];
#pragma unroll
  for (int j = 0; j < Tile::kOutTiles; ++j) clear(out[j]);
  const ScoreRule rule = score_rule(shape);
  const QueryTiles query_tiles(shape, params.q_latent, params.q_rope, params.d_out, batch);
  // Group g has the tiles g, g + groups, ...
  const int num_tiles = (rows.high - rows.low + Tile::kStreamed - 1) / Tile::kStreamed;
  const auto queries_of = [&](int number) { return tiles + number % stages * Tile::kStreamed * (stride + d_stride); };
  const auto facts_of = [&](int number) { return facts + number % stages * Tile::kStreamed; };
  run_pipeline((num_tiles - group + groups - 1) / groups, stages,
               [&](int number) {
                 const int first = rows.low + (group + number * groups) * Tile::kStreamed;
                 query_tiles.load<true, Tile::kMaxRank, Tile::kStreamed, Tile::kThreads>(
                     queries_of(number), queries_of(number) + Tile::kStreamed * stride, first, rows.high);
                 for (int row = thread_index(); row < Tile::kStreamed; row += Tile::kThreads)
                   facts_of(number)[row] = row_facts(params, sequence, batch, first + row, rows.high);
               },
               [&](int number) {
                 const uint16_t *queries = queries_of(number), *d_rows = queries + Tile::kStreamed * stride;
                 if (has_share<Tile>()) {
                   Accumulator scores[Tile::kScoreTiles], d_scores[Tile::kScoreTiles];
                   score_tiles<Tile>(scores, d_scores, owned, queries, stride, all_tiles, owned, stride, d_rows,
                                     d_stride, rank_tiles);
#pragma unroll
                   for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
                     for (int e = 0; e < Layout::kFloats; ++e) {
                       const int column = (column_warp + t * Tile::kColumnWarps) * kTile + Layout::column(lane, e);
                       differentiate(scores[t].values[e], d_scores[t].values[e], rule, shape.softmax_scale,
                                     facts_of(number)[column],
                                     first_token + row_warp * kTile + Layout::row(lane, Layout::slot(e)));
                     }
                   store_weights<Tile>(d_scores_memory, d_scores);
                   store_weights<Tile>(weights, scores);
                 }
                 sync_weights<Tile>();
                 add_columns<Tile>(out, d_scores_memory, queries, stride, all_tiles);
                 add_columns<Tile>(out, weights, d_rows, d_stride, rank_tiles);
               });

  const int rank = static_cast<int>(shape.rank), rope = static_cast<int>(shape.rope), padded_rank = padded(shape.rank);
  const int width = padded_rank + padded(shape.rope);
  each_pair<Tile>(out, [&](int row, int column, float first, float second) {
    const int token = first_token + row;
    if (token >= num_tokens || column >= width) return;
    if (groups > 1) {
      float* sums = params.d_rows + ((batch * groups + group) * num_tokens + token) * width + column;
      sums[0] = first, sums[1] = second;
    } else if (column < padded_rank) {
      write_pair<typename Tile::Element>(static_cast<uint16_t*>(to.d_c_kv) + (batch * num_tokens + token) * rank,
                                         column, rank, first, second);
    } else {
      write_pair<typename Tile::Element>(static_cast<uint16_t*>(to.d_k_rope) + (batch * num_tokens + token) * rope,
                                         column - padded_rank, rope, first, second);
    }
  });
}

// Adds the groups in their order and rounds once. A block for each token; grid: B × T.
constexpr int kSumThreads = 128;

template <class Element>
XECO_KERNEL(kSumThreads, 1)
sum_groups_kernel(const BackwardParams params, const TokenGradients to) {
  const AttentionShape& shape = params.shape;
  const int64_t batch = block_index() / shape.num_tokens, token = block_index() % shape.num_tokens;
  const int rank = static_cast<int>(shape.rank), rope = static_cast<int>(shape.rope), padded_rank = padded(shape.rank);
  const int width = padded_rank + padded(shape.rope);
  for (int column = 2 * thread_index(); column < width; column += 2 * kSumThreads) {
    float first = 0.0f, second = 0.0f;
    for (int64_t group = 0; group < params.num_groups; ++group) {
      const float* sums =
          params.d_rows + ((batch * params.num_groups + group) * shape.num_tokens + token) * width + column;
      first += sums[0], second += sums[1];
    }
    if (column < padded_rank)
      write_pair<Element>(static_cast<uint16_t*>(to.d_c_kv) + block_index() * rank, column, rank, first, second);
    else
      write_pair<Element>(static_cast<uint16_t*>(to.d_k_rope) + block_index() * rope, column - padded_rank, rope, first,
                          second);
  }
}

// delta [B, H, Q] = Σ over R of d_out · out, less d_lse (which may be null). A warp for each query row.
constexpr int kDeltaThreads = 256;

template <class Element>
XECO_KERNEL(kDeltaThreads, 1)
delta_kernel(const BackwardParams params, const void* out, const float* d_lse, float* delta) {
  const AttentionShape& shape = params.shape;
  const int64_t row = block_index() * (kDeltaThreads / kLanes) + warp_index(),
                rows = shape.num_queries * shape.num_heads;
  if (row >= shape.batch * rows) return;
  const int64_t batch = row / rows, query = row % rows / shape.num_heads, head = row % shape.num_heads;
  const uint16_t* left = static_cast<const uint16_t*>(params.d_out.data) + batch * params.d_out.batch_stride +
                         query * params.d_out.query_stride + head * params.d_out.head_stride;
  const uint16_t* right = static_cast<const uint16_t*>(out) + row * shape.rank;
  float sum = 0.0f;
  for (int64_t r = lane_index(); r < shape.rank; r += kLanes) sum += Element::widen(left[r]) * Element::widen(right[r]);
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const int64_t at = (batch * shape.num_heads + head) * shape.num_queries + query;
  if (lane_index() == 0) delta[at] = sum - (d_lse == nullptr ? 0.0f : d_lse[at]);
}

}  // namespace xeco::gpu
