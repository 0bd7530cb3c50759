// What the GPU kernels share: which tokens a row sees, how rows reach shared memory, products of tiles.
//
// Query rows: the Q·H rows of a sequence, in the order (query, head), all attend to the same tokens. A row in shared
// memory is [latent, padded to 16 | rotary part, padded to 16 | 8 elements]: the last 16 bytes let eight rows lie in
// different banks.
#pragma once

#include "latent_attention/params.h"
#include "xeco/gpu/products.h"

namespace xeco::gpu {

constexpr int kTile = 16;  // rows, columns and depth of a product
constexpr int kRowPadding = 8;
static_assert(kTile == kWidthMultiple, "rows are padded to whole tiles");

// std::min and std::max are for the host alone.
template <class T>
XECO_LAYOUT T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
XECO_LAYOUT T max(T a, T b) {
  return a > b ? a : b;
}

// padded_width, for the device as well.
XECO_LAYOUT int padded(int64_t width) { return static_cast<int>((width + kTile - 1) / kTile * kTile); }
XECO_LAYOUT int row_stride(const AttentionShape& shape) {
  return padded(shape.rank) + padded(shape.rope) + kRowPadding;
}

// The warps of a block as a grid: kRowWarps of 16 rows each, times kColumnWarps that share these rows and divide the
// columns of their products: kColumns of scores.
template <int kRows, int kColumns, int kWarps_>
struct WarpGrid {
  static constexpr int kWarps = kWarps_, kThreads = kWarps * kLanes;
  static constexpr int kRowWarps = min(kRows / kTile, kWarps), kColumnWarps = kWarps / kRowWarps;
  static constexpr int kScoreTiles = max(1, kColumns / kTile / kColumnWarps);
  static constexpr int kWeightStride = kColumns + kRowPadding;
  static_assert(kRowWarps * kTile == kRows, "a warp has 16 rows");
};

// The tokens [begin, end) of a sequence, and where its first query stands.
struct Sequence {
  int begin, end;
  int64_t first_position;
};

// The tokens [low, high) that a row sees; 0, 0 where it sees none.
struct Seen {
  int low, high;
};

XECO_DEVICE Sequence sequence_of(const AttentionShape& shape, int64_t batch) {
  const int64_t begin = shape.starts == nullptr ? 0 : shape.starts[batch];
  const int64_t end = shape.ends == nullptr ? shape.num_tokens : shape.ends[batch];
  const int64_t last = shape.queries_end_at_ends ? end : shape.num_tokens;
  const int64_t first = shape.query_positions == nullptr ? last - shape.num_queries : shape.query_positions[batch];
  if (begin < 0 || begin > shape.num_tokens || end < 0 || end > shape.num_tokens) trap();
  return {static_cast<int>(begin), static_cast<int>(end), first};
}

XECO_DEVICE Seen seen_by(const AttentionShape& shape, const Sequence& sequence, int64_t query) {
  const int64_t position = sequence.first_position + query;
  int64_t low = sequence.begin, high = sequence.end;
  if (shape.causal) high = min(high, position + 1);
  if (shape.window > 0) low = max(low, position - shape.window + 1);
  if (low >= high) return {0, 0};
  return {static_cast<int>(low), static_cast<int>(high)};
}

// What the rows [first, first + count) see together: the union. Positions grow with the row, and so do both bounds.
XECO_DEVICE Seen seen_by_any(const AttentionShape& shape, const Sequence& sequence, int first, int count) {
  const int heads = static_cast<int>(shape.num_heads);
  int64_t from = first / heads, to = (first + count - 1) / heads;
  if (shape.causal) from = max(from, sequence.begin - sequence.first_position);
  if (shape.window > 0) to = min(to, sequence.end + shape.window - 2 - sequence.first_position);
  if (from > to) return {0, 0};
  const Seen lowest = seen_by(shape, sequence, from), highest = seen_by(shape, sequence, to);
  return {lowest.low, highest.high};
}

// Whether every row of [first, first + count) sees all tokens of [token, token + tokens).
XECO_DEVICE bool seen_by_all(const Seen& first_row, const Seen& last_row, int token, int tokens) {
  return last_row.low <= token && token + tokens <= first_row.high && first_row.low < first_row.high &&
         last_row.low < last_row.high;
}

// Scores become base-2 logits: scaled, capped. As score_rule of cpu/rows-inl.h.
struct ScoreRule {
  float scale, softcap;
};

XECO_DEVICE ScoreRule score_rule(const AttentionShape& shape) {
  if (shape.softcap > 0.0f) return {shape.softmax_scale / shape.softcap, shape.softcap * kLog2E};
  return {shape.softmax_scale * kLog2E, 0.0f};
}

XECO_DEVICE float tanh(float x) {
  constexpr float kTwoLog2E = 2.88539008f;
  return 1.0f - 2.0f / (1.0f + exp2(x * kTwoLog2E));
}

XECO_DEVICE float negative_infinity() { return -__builtin_inff(); }

// Rows to shared memory, each by kCopyLanes threads that share it. Rows that lie on 16 bytes everywhere are copied
// asynchronously, by as few instructions as can be: every thread has copies to make for every tile.
constexpr int kCopyLanes = 8;

struct RowCopy {
  int width, padded_width;
  bool aligned;
};

XECO_DEVICE bool on_16_bytes(const void* data) { return (reinterpret_cast<uintptr_t>(data) & 15) == 0; }

XECO_DEVICE RowCopy row_copy(const RowsView& view, int64_t width) {
  const bool aligned =
      on_16_bytes(view.data) && view.outer_stride % 8 == 0 && view.row_stride % 8 == 0 && width % 8 == 0;
  return {static_cast<int>(width), padded(width), aligned};
}

XECO_DEVICE RowCopy row_copy(const HeadsView& view, int64_t width) {
  const bool aligned = on_16_bytes(view.data) && view.batch_stride % 8 == 0 && view.query_stride % 8 == 0 &&
                       view.head_stride % 8 == 0 && width % 8 == 0;
  return {static_cast<int>(width), padded(width), aligned};
}

// Where this thread's part of a row begins, in elements.
XECO_DEVICE int first_copied() { return thread_index() % kCopyLanes * 8; }

// One row of at most kMaxWidth; zeros where it is not `there`, and behind its width. Both pointers are at
// first_copied().
template <bool kAligned, int kMaxWidth>
XECO_DEVICE void copy_row(uint16_t* to, const uint16_t* from, bool there, const RowCopy& copy) {
  constexpr int kStep = kCopyLanes * 8;
  const int lane = first_copied();
#pragma unroll
  for (int at = 0; at < kMaxWidth; at += kStep) {
    if (lane + at >= copy.padded_width) continue;
    if constexpr (kAligned) {
      copy_async_16(to + at, from + at, there && lane + at < copy.width ? 16 : 0);
    } else {
      const int left = there ? copy.width - lane - at : 0;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint32_t low = i < left ? from[at + i] : 0, high = i + 1 < left ? from[at + i + 1] : 0;
        *reinterpret_cast<uint32_t*>(to + at + i) = low | high << 16;
      }
    }
  }
}

// How the rows of a tile are divided among threads: thread_index() / kCopyLanes is the first of each, every kStep-th
// follows. Written as loops where it is used: compilers for AMD put the closure of a lambda on the stack.
template <int kCount, int kThreads>
struct RowsOfThread {
  static constexpr int kStep = kThreads / kCopyLanes, kTurns = (kCount + kStep - 1) / kStep;
};

// Cached tokens of a sequence.
struct TokenTiles {
  const AttentionShape& shape;
  const RowsView &c_kv, &k_rope;  // strides are read where they are used: registers are scarce
  RowCopy latent, rotary;
  const uint16_t *latents, *keys;  // of the sequence, or of all pages; at first_copied()
  const int32_t* pages;            // of the sequence
  int page_shift;                  // pages of 2^page_shift tokens; -1: of another number
  int stride;

  XECO_DEVICE TokenTiles(const AttentionShape& shape_, const RowsView& c_kv_, const RowsView& k_rope_, int64_t batch)
      : shape(shape_),
        c_kv(c_kv_),
        k_rope(k_rope_),
        latent(row_copy(c_kv_, shape_.rank)),
        rotary(row_copy(k_rope_, shape_.rope)),
        latents(static_cast<const uint16_t*>(c_kv_.data) + first_copied()),
        keys(static_cast<const uint16_t*>(k_rope_.data) + first_copied()),
        pages(nullptr),
        page_shift(0),
        stride(row_stride(shape_)) {
    if (shape.block_table == nullptr) {
      latents += batch * c_kv.outer_stride, keys += batch * k_rope.outer_stride;
      return;
    }
    pages = shape.block_table + batch * shape.block_table_stride;
    while (page_shift < 31 && int64_t{1} << page_shift < shape.page_size) ++page_shift;
    if (int64_t{1} << page_shift != shape.page_size) page_shift = -1;
  }

  // kCount of them from `first` on; those outside [low, high) become zeros and are not read.
  template <int kMaxRank, int kCount, int kThreads>
  XECO_DEVICE void load(uint16_t* to, int first, const Seen& seen) const {
    if (latent.aligned && rotary.aligned)
      load_rows<true, kMaxRank, kCount, kThreads>(to, first, seen);
    else
      load_rows<false, kMaxRank, kCount, kThreads>(to, first, seen);
  }

 private:
  template <bool kAligned, int kMaxRank, int kCount, int kThreads>
  XECO_DEVICE void load_rows(uint16_t* to, int first, const Seen& seen) const {
    using Rows = RowsOfThread<kCount, kThreads>;
    to += first_copied();
#pragma unroll 2
    for (int i = 0; i < Rows::kTurns; ++i) {
      const int row = thread_index() / kCopyLanes + i * Rows::kStep, token = first + row;
      if (kCount % Rows::kStep != 0 && row >= kCount) break;
      const bool there = token >= seen.low && token < seen.high;
      const uint16_t *of_latent = latents, *of_key = keys;
      int64_t inner = token;
      if (pages != nullptr && there) {
        const int page_size = static_cast<int>(shape.page_size);
        const int page = page_shift >= 0 ? token >> page_shift : token / page_size, outer = pages[page];
        if (outer < 0 || outer >= shape.num_pages) trap();
        inner = token - page * page_size;
        of_latent += outer * c_kv.outer_stride, of_key += outer * k_rope.outer_stride;
      }
      if (!there) inner = 0;  // the address of what is not read
      copy_row<kAligned, kMaxRank>(to + row * stride, of_latent + inner * c_kv.row_stride, there, latent);
      copy_row<kAligned, static_cast<int>(kMaxRope)>(to + row * stride + latent.padded_width,
                                                     of_key + inner * k_rope.row_stride, there, rotary);
    }
  }
};

// Query rows of a sequence, and the gradients of their outputs where those are asked for.
struct QueryTiles {
  const HeadsView &latent_view, &rotary_view, &gradient_view;
  RowCopy latent, rotary, gradient;
  int64_t batch;
  int num_heads, stride;

  XECO_DEVICE QueryTiles(const AttentionShape& shape, const HeadsView& q_latent, const HeadsView& q_rope,
                         const HeadsView& d_out, int64_t batch_)
      : latent_view(q_latent),
        rotary_view(q_rope),
        gradient_view(d_out),
        latent(row_copy(q_latent, shape.rank)),
        rotary(row_copy(q_rope, shape.rope)),
        gradient(row_copy(d_out, shape.rank)),
        batch(batch_),
        num_heads(static_cast<int>(shape.num_heads)),
        stride(row_stride(shape)) {}

  // kCount rows from `first` on; those at or behind `end` become zeros. Where kGradients, those of the outputs to
  // d_out.
  template <bool kGradients, int kMaxRank, int kCount, int kThreads>
  XECO_DEVICE void load(uint16_t* to, uint16_t* d_out, int first, int end) const {
    if (latent.aligned && rotary.aligned && (!kGradients || gradient.aligned))
      load_rows<true, kGradients, kMaxRank, kCount, kThreads>(to, d_out, first, end);
    else
      load_rows<false, kGradients, kMaxRank, kCount, kThreads>(to, d_out, first, end);
  }

 private:
  XECO_DEVICE const uint16_t* row_of(const HeadsView& view, int query, int head) const {
    return static_cast<const uint16_t*>(view.data) + first_copied() + batch * view.batch_stride +
           query * view.query_stride + head * view.head_stride;
  }

  template <bool kAligned, bool kGradients, int kMaxRank, int kCount, int kThreads>
  XECO_DEVICE void load_rows(uint16_t* to, uint16_t* d_out, int first, int end) const {
    using Rows = RowsOfThread<kCount, kThreads>;
    to += first_copied();
    if constexpr (kGradients) d_out += first_copied();
#pragma unroll 2
    for (int i = 0; i < Rows::kTurns; ++i) {
      const int row = thread_index() / kCopyLanes + i * Rows::kStep;
      if (kCount % Rows::kStep != 0 && row >= kCount) break;
      const bool there = first + row < end;
      const int number = there ? first + row : 0, query = number / num_heads, head = number - query * num_heads;
      copy_row<kAligned, kMaxRank>(to + row * stride, row_of(latent_view, query, head), there, latent);
      copy_row<kAligned, static_cast<int>(kMaxRope)>(to + row * stride + latent.padded_width,
                                                     row_of(rotary_view, query, head), there, rotary);
      if constexpr (kGradients)
        copy_row<kAligned, kMaxRank>(d_out + row * (latent.padded_width + kRowPadding),
                                     row_of(gradient_view, query, head), there, gradient);
    }
  }
};

// sums[t] += left · right_tᵀ over the features [16·first, 16·last): left is 16 rows, right_t the 16 rows at right +
// t·step.
template <class Element, int kCount>
XECO_DEVICE void multiply_chain(Accumulator (&sums)[kCount], const uint16_t* left, int left_stride,
                                const uint16_t* right, int right_stride, int step, int first, int last) {
#pragma unroll 2
  for (int k = first; k < last; ++k) {
    const Operand rows = load_rows(left + k * kTile, left_stride);
#pragma unroll
    for (int t = 0; t < kCount; ++t)
      multiply<Element>(sums[t], rows, load_rows(right + t * step + k * kTile, right_stride));
  }
}

// sums[t] = left · right_tᵀ over the features [0, 16·depth) of rows whose latents have at most kMaxRank. Tensor cores
// cut off what they add where an adder rounds it, so long sums are taken in parts: at R 512 an H100 was off by 3.5
// times what roundings predict, at R 256 by less than twice.
template <class Element, int kMaxRank, int kCount>
XECO_DEVICE void multiply_rows(Accumulator (&sums)[kCount], const uint16_t* left, int left_stride,
                               const uint16_t* right, int right_stride, int step, int depth) {
  constexpr int kChain = 8;
#pragma unroll
  for (int t = 0; t < kCount; ++t) clear(sums[t]);
  multiply_chain<Element>(sums, left, left_stride, right, right_stride, step, 0,
                          kMaxRank > 256 ? min(depth, kChain) : depth);
  if constexpr (kMaxRank > 256) {
#pragma unroll 1
    for (int first = kChain; first < depth; first += kChain) {
      Accumulator part[kCount];
#pragma unroll
      for (int t = 0; t < kCount; ++t) clear(part[t]);
      multiply_chain<Element>(part, left, left_stride, right, right_stride, step, first, min(depth, first + kChain));
#pragma unroll
      for (int t = 0; t < kCount; ++t)
#pragma unroll
        for (int e = 0; e < Layout::kFloats; ++e) sums[t].values[e] += part[t].values[e];
    }
  }
}

// sums[j] += weights · right_j: right holds 16 rows, column tile first + j·every, of which there are `tiles`.
template <class Element, int kCount>
XECO_DEVICE void multiply_columns(Accumulator (&sums)[kCount], const Operand& weights, const uint16_t* right,
                                  int stride, int first, int every, int tiles) {
#pragma unroll
  for (int j = 0; j < kCount; ++j)
    if (first + j * every < tiles)
      multiply<Element>(sums[j], weights, load_columns(right + (first + j * every) * kTile, stride));
}

// A score as the other warps of a row need it: two neighbouring columns of 2-byte numbers at a time.
template <class Element>
XECO_DEVICE void store_tile(uint16_t* to, int stride, const Accumulator& from) {
  const int lane = lane_index();
#pragma unroll
  for (int e = 0; e < Layout::kFloats; e += 2)
    *reinterpret_cast<uint32_t*>(to + Layout::row(lane, Layout::slot(e)) * stride + Layout::column(lane, e)) =
        Element::pack(from.values[e], from.values[e + 1]);
}

// Two neighbouring columns of a row in global memory whose width may be odd.
template <class Element>
XECO_DEVICE void write_pair(uint16_t* row, int column, int width, float first, float second) {
  const uint32_t both = Element::pack(first, second);
  if (width % 2 == 0) {
    if (column < width) *reinterpret_cast<uint32_t*>(row + column) = both;
  } else {
    if (column < width) row[column] = static_cast<uint16_t>(both);
    if (column + 1 < width) row[column + 1] = static_cast<uint16_t>(both >> 16);
  }
}

}  // namespace xeco::gpu
