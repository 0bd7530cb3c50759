// Forward pass and decode on a GPU: online softmax (arXiv 2205.14135) over tiles of cached rows, which are read once
// and serve as keys and as values.
//
//   A block owns kRows query rows and one part of the tokens. Its warps form a grid: kRowWarps of 16 rows each, times
//   kColumnWarps that share these rows: in S = Q · Cᵀ each takes some of the tokens, in O += P · C some of the columns.
//   Copies of the next tiles run while one is worked on. Parts of the tokens leave (O, m, l) behind for combine_kernel.
//   Rows of codes (kPacked) are copied as they lie and widened in shared memory, into one tile.
#pragma once

#include "latent_attention/gpu/codes.cuh"
#include "latent_attention/gpu/kernels.h"

namespace xeco::gpu {

// kBlocks: that a multiprocessor has registers for.
template <class Element_, bool kPacked_, int kRank_, int kRows_, int kTokens_, int kWarps_, int kBlocks_>
struct ForwardTile : WarpGrid<kRows_, kTokens_, kWarps_> {
  using Element = Element_;
  using Grid = WarpGrid<kRows_, kTokens_, kWarps_>;
  static constexpr bool kPacked = kPacked_;
  static constexpr int kMaxRank = kRank_, kRows = kRows_, kTokens = kTokens_, kBlocks = kBlocks_;
  static constexpr int kOutTiles = max(1, kRank_ / kTile / Grid::kColumnWarps);

  // Queries, tiles, weights, board; where rows are codes, factors and the rows as they lie.
  XECO_LAYOUT static int64_t shared_bytes(const AttentionShape& shape, int stages) {
    const int64_t rows = (kRows + (kPacked ? int64_t{1} : stages) * kTokens) * row_stride(shape) * 2;
    const int64_t codes = kPacked ? kTokens * (8 + static_cast<int64_t>(stages) * code_places(shape)) : 0;
    return rows + (Grid::kColumnWarps > 1 ? kRows * Grid::kWeightStride * 2 : 0) + kRows * Grid::kColumnWarps * 4 +
           codes;
  }
};

// The part of a sequence's tokens that a block works on.
struct Work {
  int64_t batch;
  int first_row, num_rows, split;
  Seen seen;  // of all its rows, within this part
};

template <class Tile>
XECO_DEVICE Work forward_work(const ForwardParams& params, const Sequence& sequence, int64_t batch, int block,
                              int split) {
  const AttentionShape& shape = params.shape;
  const int splits = static_cast<int>(params.num_splits), rows = static_cast<int>(shape.num_queries * shape.num_heads);
  Work work{batch, block * Tile::kRows, min(Tile::kRows, rows - block * Tile::kRows), split, {0, 0}};
  work.seen = seen_by_any(shape, sequence, work.first_row, work.num_rows);
  const int tokens = work.seen.high - work.seen.low;
  // Whole tiles for each part.
  const int tiles = (tokens + Tile::kTokens - 1) / Tile::kTokens, step = (tiles + splits - 1) / splits * Tile::kTokens;
  const int64_t first = work.seen.low + static_cast<int64_t>(split) * step;
  work.seen.low = static_cast<int>(min<int64_t>(first, work.seen.high));
  work.seen.high = static_cast<int>(min<int64_t>(first + step, work.seen.high));
  return work;
}

// Running state of the rows that a lane holds a part of.
template <class Tile>
struct RowState {
  Seen seen[Layout::kRowsOfLane];
  float maximum[Layout::kRowsOfLane], total[Layout::kRowsOfLane];
};

// S of one tile -> base-2 logits in place; returns the largest of each row in this lane's share.
template <class Tile>
XECO_DEVICE void mask_scores(Accumulator (&scores)[Tile::kScoreTiles], const RowState<Tile>& state,
                             const ScoreRule& rule, bool all, int first_token, int column_warp,
                             float (&largest)[Layout::kRowsOfLane]) {
  const int lane = lane_index();
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s) largest[s] = negative_infinity();
#pragma unroll
  for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e) scores[t].values[e] *= rule.scale;
  if (rule.softcap > 0.0f) {  // one branch around each pass, not one for each number
#pragma unroll
    for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
      for (int e = 0; e < Layout::kFloats; ++e) scores[t].values[e] = tanh(scores[t].values[e]) * rule.softcap;
  }
  if (!all) {
#pragma unroll
    for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
      for (int e = 0; e < Layout::kFloats; ++e) {
        const int slot = Layout::slot(e);
        const int token = first_token + (column_warp + t * Tile::kColumnWarps) * kTile + Layout::column(lane, e);
        if (token < state.seen[slot].low || token >= state.seen[slot].high) scores[t].values[e] = negative_infinity();
      }
  }
#pragma unroll
  for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e)
      largest[Layout::slot(e)] = fmax(largest[Layout::slot(e)], scores[t].values[e]);
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s)
    largest[s] = reduce_row(largest[s], [](float a, float b) { return fmax(a, b); });
}

// Logits -> weights 2^(logit - m), m and l brought up to date; returns the factors that O must be multiplied by.
template <class Tile>
XECO_DEVICE void weigh_scores(Accumulator (&scores)[Tile::kScoreTiles], RowState<Tile>& state,
                              const float (&largest)[Layout::kRowsOfLane], float (&factor)[Layout::kRowsOfLane]) {
  float reference[Layout::kRowsOfLane];
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s) {
    const float most = fmax(state.maximum[s], largest[s]);
    // A row that has seen nothing yet keeps m = -inf; 0 in its place keeps -inf - m from becoming NaN.
    reference[s] = most == negative_infinity() ? 0.0f : most;
    factor[s] = exp2(state.maximum[s] - reference[s]);
    state.maximum[s] = most;
    state.total[s] *= factor[s];
  }
#pragma unroll
  for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e) {
      const float weight = exp2(scores[t].values[e] - reference[Layout::slot(e)]);
      scores[t].values[e] = weight;
      state.total[Layout::slot(e)] += weight;
    }
}

template <class Tile>
XECO_DEVICE void rescale(Accumulator (&out)[Tile::kOutTiles], const float (&factor)[Layout::kRowsOfLane]) {
#pragma unroll
  for (int j = 0; j < Tile::kOutTiles; ++j)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e) out[j].values[e] *= factor[Layout::slot(e)];
}

// One number of each row, combined over the warps that share the rows. `board`: kColumnWarps × kRows floats.
template <class Tile, class Combine>
XECO_DEVICE void reduce_warps(float (&values)[Layout::kRowsOfLane], float* board, int row_warp, int column_warp,
                              const Combine& combine) {
  const int lane = lane_index();
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s)
    if (Layout::leads(lane)) board[column_warp * Tile::kRows + row_warp * kTile + Layout::row(lane, s)] = values[s];
  sync_block();
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s) {
    const float* column = board + row_warp * kTile + Layout::row(lane, s);
    values[s] = column[0];
    for (int w = 1; w < Tile::kColumnWarps; ++w) values[s] = combine(values[s], column[w * Tile::kRows]);
  }
}

// numbers[t] *= a factor of each of its tokens.
template <class Tile>
XECO_DEVICE void multiply_tokens(Accumulator (&numbers)[Tile::kScoreTiles], const float* factors, int column_warp) {
#pragma unroll
  for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e)
      numbers[t].values[e] *= factors[(column_warp + t * Tile::kColumnWarps) * kTile + Layout::column(lane_index(), e)];
}

// S of one tile: Q · Cᵀ over latents and rotary parts, where rows are codes each with its factor.
template <class Tile>
XECO_DEVICE void score_tile(const AttentionShape& shape, const uint16_t* queries, const uint16_t* rows,
                            const float* factors, int column_warp, Accumulator (&scores)[Tile::kScoreTiles]) {
  using Element = typename Tile::Element;
  const int stride = row_stride(shape), step = Tile::kColumnWarps * kTile * stride, rank = padded(shape.rank);
  rows += column_warp * kTile * stride;
  if constexpr (!Tile::kPacked) {
    multiply_rows<Element, Tile::kMaxRank>(scores, queries, stride, rows, stride, step,
                                           rank / kTile + padded(shape.rope) / kTile);
  } else {
    Accumulator of_keys[Tile::kScoreTiles];
    multiply_rows<Element, Tile::kMaxRank>(scores, queries, stride, rows, stride, step, rank / kTile);
    multiply_rows<Element, static_cast<int>(kMaxRope)>(of_keys, queries + rank, stride, rows + rank, stride, step,
                                                       padded(shape.rope) / kTile);
    multiply_tokens<Tile>(scores, factors, column_warp);
    multiply_tokens<Tile>(of_keys, factors + Tile::kTokens, column_warp);
#pragma unroll
    for (int t = 0; t < Tile::kScoreTiles; ++t)
#pragma unroll
      for (int e = 0; e < Layout::kFloats; ++e) scores[t].values[e] += of_keys[t].values[e];
  }
}

// One tile in shared memory: S, softmax, O.
template <class Tile>
XECO_DEVICE void attend_tile(const AttentionShape& shape, const uint16_t* queries, const uint16_t* rows,
                             const float* factors, int first_token, bool all, uint16_t* weights, float* board,
                             RowState<Tile>& state, Accumulator (&out)[Tile::kOutTiles]) {
  using Element = typename Tile::Element;
  const int row_warp = warp_index() % Tile::kRowWarps, column_warp = warp_index() / Tile::kRowWarps;
  const int stride = row_stride(shape), rank_tiles = padded(shape.rank) / kTile;
  Accumulator scores[Tile::kScoreTiles];
  float largest[Layout::kRowsOfLane], factor[Layout::kRowsOfLane];
  // Where a tile has fewer than kColumnWarps times 16 tokens, the last warps have no share in S.
  const bool has_share = Tile::kTokens >= Tile::kColumnWarps * kTile || column_warp * kTile < Tile::kTokens;
  if (has_share) {
    score_tile<Tile>(shape, queries + row_warp * kTile * stride, rows, factors, column_warp, scores);
    mask_scores<Tile>(scores, state, score_rule(shape), all, first_token, column_warp, largest);
  } else {
#pragma unroll
    for (int s = 0; s < Layout::kRowsOfLane; ++s) largest[s] = negative_infinity();
#pragma unroll
    for (int e = 0; e < Layout::kFloats; ++e) scores[0].values[e] = negative_infinity();
  }
  if constexpr (Tile::kColumnWarps > 1)
    reduce_warps<Tile>(largest, board, row_warp, column_warp, [](float a, float b) { return fmax(a, b); });
  weigh_scores<Tile>(scores, state, largest, factor);
  rescale<Tile>(out, factor);
  if constexpr (Tile::kPacked) {
    if (has_share) multiply_tokens<Tile>(scores, factors, column_warp);
  }
  if constexpr (Tile::kColumnWarps > 1) {
    uint16_t* mine = weights + row_warp * kTile * Tile::kWeightStride;
    if (has_share) {
#pragma unroll
      for (int t = 0; t < Tile::kScoreTiles; ++t)
        store_tile<Element>(mine + (column_warp + t * Tile::kColumnWarps) * kTile, Tile::kWeightStride, scores[t]);
    }
    sync_block();
#pragma unroll 2
    for (int k = 0; k < Tile::kTokens / kTile; ++k)
      multiply_columns<Element>(out, load_rows(mine + k * kTile, Tile::kWeightStride), rows + k * kTile * stride,
                                stride, column_warp, Tile::kColumnWarps, rank_tiles);
  } else {
#pragma unroll
    for (int k = 0; k < Tile::kScoreTiles; ++k)
      multiply_columns<Element>(out, as_operand<Element>(scores[k]), rows + k * kTile * stride, stride, 0, 1,
                                rank_tiles);
  }
}

// O / l and lse of whole rows, or (O, m, l) of a part.
template <class Tile>
XECO_DEVICE void write_rows(const ForwardParams& params, const Parts& parts, const Work& work,
                            const RowState<Tile>& state, const Accumulator (&out)[Tile::kOutTiles]) {
  const AttentionShape& shape = params.shape;
  const int lane = lane_index(), row_warp = warp_index() % Tile::kRowWarps,
            column_warp = warp_index() / Tile::kRowWarps;
  const int rank = static_cast<int>(shape.rank), heads = static_cast<int>(shape.num_heads);
  const int64_t rows = shape.num_queries * shape.num_heads;
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s) {
    const int row = row_warp * kTile + Layout::row(lane, s), number = work.first_row + row;
    if (row >= work.num_rows) continue;
    const int64_t at = work.batch * rows + number;
    // NaN where an input was: only a true zero, a row that saw nothing, gives zeros
    const bool nothing = state.total[s] == 0.0f;
    const float share = parts.sums != nullptr ? 1.0f : nothing ? 0.0f : 1.0f / state.total[s];
    float* sums = parts.sums + (at * params.num_splits + work.split) * rank;
    uint16_t* to = static_cast<uint16_t*>(params.out) + at * rank;
#pragma unroll
    for (int j = 0; j < Tile::kOutTiles; ++j)
#pragma unroll
      for (int e = 0; e < Layout::kFloats; e += 2) {
        if (Layout::slot(e) != s) continue;
        const int column = (column_warp + j * Tile::kColumnWarps) * kTile + Layout::column(lane, e);
        const float first = out[j].values[e] * share, second = out[j].values[e + 1] * share;
        if (parts.sums == nullptr) {
          write_pair<typename Tile::Element>(to, column, rank, first, second);
        } else if (!nothing) {  // combine_kernel passes over parts that saw nothing
          if (column < rank) sums[column] = first;
          if (column + 1 < rank) sums[column + 1] = second;
        }
      }
    if (column_warp != 0 || !Layout::leads(lane)) continue;
    if (parts.sums == nullptr) {
      params.lse[(work.batch * heads + number % heads) * shape.num_queries + number / heads] =
          nothing ? negative_infinity() : (state.maximum[s] + log2(state.total[s])) * kLn2;
    } else {
      float* of_part = parts.states + (at * params.num_splits + work.split) * 2;
      of_part[0] = state.maximum[s], of_part[1] = state.total[s];
    }
  }
}

// How a block reads the cache.
template <bool kPacked>
struct TilesOf {
  using Type = TokenTiles;
};
template <>
struct TilesOf<true> {
  using Type = CodeTiles;
};

// Grid: B × row blocks × num_splits, the last row blocks of a sequence first, since they see the most tokens.
template <class Tile>
XECO_KERNEL(Tile::kThreads, Tile::kBlocks)
forward_kernel(const ForwardParams params, const Parts parts, int stages) {
  const AttentionShape& shape = params.shape;
  const int splits = static_cast<int>(params.num_splits), rows = static_cast<int>(shape.num_queries * shape.num_heads);
  const int blocks = (rows + Tile::kRows - 1) / Tile::kRows;
  const int64_t group = block_index() / splits, batch = group / blocks;
  const Sequence sequence = sequence_of(shape, batch);
  const Work work = forward_work<Tile>(params, sequence, batch, blocks - 1 - static_cast<int>(group % blocks),
                                       static_cast<int>(block_index() % splits));
  const int stride = row_stride(shape);
  uint16_t* queries = reinterpret_cast<uint16_t*>(shared_memory());
  uint16_t* tiles = queries + Tile::kRows * stride;
  uint16_t* weights = tiles + (Tile::kPacked ? 1 : stages) * Tile::kTokens * stride;
  float* board = reinterpret_cast<float*>(weights + (Tile::kColumnWarps > 1 ? Tile::kRows * Tile::kWeightStride : 0));
  float* factors = board + Tile::kRows * Tile::kColumnWarps;
  uint8_t* codes = reinterpret_cast<uint8_t*>(factors + 2 * Tile::kTokens);

  const typename TilesOf<Tile::kPacked>::Type tokens(shape, params.c_kv, params.k_rope, batch);
  const int num_tiles = (work.seen.high - work.seen.low + Tile::kTokens - 1) / Tile::kTokens;
  const auto load_tile = [&](int number) {
    const int first = work.seen.low + number * Tile::kTokens;
    if constexpr (Tile::kPacked)
      tokens.template load<Tile::kTokens, Tile::kThreads>(codes + number % stages * Tile::kTokens * code_places(shape),
                                                          first, work.seen);
    else
      tokens.template load<Tile::kMaxRank, Tile::kTokens, Tile::kThreads>(
          tiles + number % stages * Tile::kTokens * stride, first, work.seen);
  };
  const int end = work.first_row + work.num_rows;
  QueryTiles(shape, params.q_latent, params.q_rope, params.q_latent, batch)
      .load<false, Tile::kMaxRank, Tile::kRows, Tile::kThreads>(queries, nullptr, work.first_row, end);
  // Where copies pass through registers there is one stage, and one place that copies: compilers then keep it in the
  // kernel.
  const bool one_stage = !kCopiesAreAsynchronous || stages == 1;
  for (int number = 0; !one_stage && number < stages - 1; ++number) {
    if (number < num_tiles) load_tile(number);
    commit_copies();
  }

  RowState<Tile> state;
  Accumulator out[Tile::kOutTiles];
  const int row_warp = warp_index() % Tile::kRowWarps;
#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s) {
    const int row = row_warp * kTile + Layout::row(lane_index(), s), heads = static_cast<int>(shape.num_heads);
    state.seen[s] = row < work.num_rows ? seen_by(shape, sequence, (work.first_row + row) / heads) : Seen{0, 0};
    state.maximum[s] = negative_infinity(), state.total[s] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < Tile::kOutTiles; ++j) clear(out[j]);
  const int heads = static_cast<int>(shape.num_heads);
  const Seen of_first = seen_by(shape, sequence, work.first_row / heads);
  const Seen of_last = seen_by(shape, sequence, (end - 1) / heads);

  for (int number = 0; number < num_tiles; ++number) {
    if (one_stage) {
      // Where codes are copied, all of the last tile's were widened before it was used; where they are not, load_tile
      // does nothing.
      if (number > 0 && !(Tile::kPacked && kCopiesAreAsynchronous)) sync_block();
      load_tile(number);
      commit_copies();
      wait_copies(0);
      if (!Tile::kPacked || kCopiesAreAsynchronous) sync_block();
    } else {
      wait_copies(stages - 2);
      sync_block();  // the tile is there for all, and all are done with the one before it, whose place is filled now
      if (number + stages - 1 < num_tiles) load_tile(number + stages - 1);
      commit_copies();
    }
    const int first_token = work.seen.low + number * Tile::kTokens;
    if constexpr (Tile::kPacked) {
      tokens.template widen<typename Tile::Element, Tile::kTokens, Tile::kThreads>(
          tiles, factors, codes + number % stages * Tile::kTokens * code_places(shape), first_token, work.seen);
      sync_block();
    }
    const bool all =
        first_token + Tile::kTokens <= work.seen.high && seen_by_all(of_first, of_last, first_token, Tile::kTokens);
    attend_tile<Tile>(shape, queries, tiles + (Tile::kPacked ? 0 : number % stages * Tile::kTokens * stride), factors,
                      first_token, all, weights, board, state, out);
  }
  commit_copies();
  wait_copies(0);  // a thread must not end with copies under way

#pragma unroll
  for (int s = 0; s < Layout::kRowsOfLane; ++s)
    state.total[s] = reduce_row(state.total[s], [](float a, float b) { return a + b; });
  // All have read the board before the last tile's weights were there: it can be written again.
  if constexpr (Tile::kColumnWarps > 1)
    reduce_warps<Tile>(state.total, board, row_warp, warp_index() / Tile::kRowWarps,
                       [](float a, float b) { return a + b; });
  write_rows<Tile>(params, parts, work, state, out);
}

// Adds up the parts of each query row, in an order that depends on the shape alone. A block of kCombineThreads for each
// row, whose threads divide pairs of columns among them and, where there are fewer pairs than threads, the parts as
// well. Shared memory: a weight for each part, then two sums of each thread. Grid: B × Q·H.
constexpr int kCombineThreads = 256;
static_assert(2 * kCombineThreads >= kMaxRank, "a thread for each pair of columns");

XECO_LAYOUT int64_t combine_shared_bytes(int64_t splits) { return (splits + 2 * kCombineThreads) * 4; }

template <class Element>
XECO_KERNEL(kCombineThreads, 1)
combine_kernel(const ForwardParams params, const Parts parts) {
  const AttentionShape& shape = params.shape;
  const int64_t row = block_index(), rows = shape.num_queries * shape.num_heads;
  const int splits = static_cast<int>(params.num_splits);
  const int rank = static_cast<int>(shape.rank), heads = static_cast<int>(shape.num_heads);
  const float* states = parts.states + row * splits * 2;
  const float* sums = parts.sums + row * splits * rank;
  float* weights = reinterpret_cast<float*>(shared_memory());
  float* board = weights + splits;
  // m and l of all parts: every warp finds them by itself
  float most = negative_infinity(), total = 0.0f;
  for (int i = lane_index(); i < splits; i += kLanes) most = fmax(most, states[2 * i]);
  for (int mask = kLanes / 2; mask > 0; mask /= 2) most = fmax(most, shuffle_xor(most, mask));
  const float reference = most == negative_infinity() ? 0.0f : most;
  for (int i = lane_index(); i < splits; i += kLanes) total += states[2 * i + 1] * exp2(states[2 * i] - reference);
  for (int mask = kLanes / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  const bool nothing = total == 0.0f;
  const float share = nothing ? 0.0f : 1.0f / total;
  // a part that saw nothing has left no sums behind
  for (int i = thread_index(); i < splits; i += kCombineThreads)
    weights[i] = states[2 * i + 1] == 0.0f ? 0.0f : exp2(states[2 * i] - reference) * share;
  sync_block();
  const int pairs = (rank + 1) / 2, groups = kCombineThreads / pairs, mine = thread_index();
  float first = 0.0f, second = 0.0f;
  if (mine < pairs * groups) {
    const int column = mine % pairs * 2;
    const bool whole = column + 1 < rank;
#pragma unroll 8
    for (int i = mine / pairs; i < splits; i += groups) {  // loads that do not wait for one another
      const float weight = weights[i], *from = sums + i * rank + column;
      first += weight == 0.0f ? 0.0f : from[0] * weight;
      second += weight == 0.0f || !whole ? 0.0f : from[1] * weight;
    }
    board[2 * mine] = first, board[2 * mine + 1] = second;
  }
  sync_block();
  if (mine < pairs) {
    for (int group = 1; group < groups; ++group) {
      const float* more = board + 2 * (group * pairs + mine);
      first += more[0], second += more[1];
    }
    write_pair<Element>(static_cast<uint16_t*>(params.out) + row * rank, 2 * mine, rank, first, second);
  }
  if (mine != 0) return;
  const int64_t batch = row / rows, number = row % rows;
  params.lse[(batch * heads + number % heads) * shape.num_queries + number / heads] =
      nothing ? negative_infinity() : (most + log2(total)) * kLn2;
}

}  // namespace xeco::gpu
