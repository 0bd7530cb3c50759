// Which tiles the kernels are instantiated for, and which of them a call takes. Free of torch.
//
// R is rounded up to 64, 128, 256 or 512 for registers alone: loops over features and copies follow the true width, padded
// to 16, and so do those over P. A tile must leave room in shared memory: 163 KB on sm_80, 227 KB on sm_90 and sm_100, 99 KB
// on sm_86, sm_89 and sm_120, 64 KB on gfx90a and gfx942. Where the first choice does not fit, the next one does.
#pragma once

#include "latent_attention/backward.cuh"
#include "latent_attention/kernel.cuh"

namespace xeco::gpu {

// For up to 16, up to 32 and more query rows of a sequence.
template <class Element, int kRank>
struct ForwardTiles;
// Queries: owned rows × tokens. Tokens: owned tokens × rows. Small…: where the first does not fit.
template <class Element, int kRank>
struct BackwardTiles;

#if defined(XECO_MATRIX_IS_MFMA)

template <class Element>
struct ForwardTiles<Element, 64> {
  using Few = ForwardTile<Element, 64, 16, 64, 4>;
  using Some = ForwardTile<Element, 64, 32, 64, 4>;
  using Many = ForwardTile<Element, 64, 64, 64, 4>;
};
template <class Element>
struct ForwardTiles<Element, 128> {
  using Few = ForwardTile<Element, 128, 16, 64, 4>;
  using Some = ForwardTile<Element, 128, 32, 64, 4>;
  using Many = ForwardTile<Element, 128, 64, 32, 4>;
};
template <class Element>
struct ForwardTiles<Element, 256> {
  using Few = ForwardTile<Element, 256, 16, 32, 4>;
  using Some = ForwardTile<Element, 256, 32, 32, 4>;
  using Many = Some;
};
template <class Element>
struct ForwardTiles<Element, 512> {
  using Few = ForwardTile<Element, 512, 16, 32, 4>;
  using Some = Few;
  using Many = Few;
};

template <class Element>
struct BackwardTiles<Element, 64> {
  using Queries = BackwardTile<Element, 64, 64, 32, 4>;
  using Tokens = Queries;
  using SmallQueries = Queries;
  using SmallTokens = Queries;
};
template <class Element>
struct BackwardTiles<Element, 128> {
  using Queries = BackwardTile<Element, 128, 32, 32, 4>;
  using Tokens = Queries;
  using SmallQueries = Queries;
  using SmallTokens = Queries;
};
template <class Element>
struct BackwardTiles<Element, 256> {
  using Queries = BackwardTile<Element, 256, 16, 32, 4>;
  using Tokens = BackwardTile<Element, 256, 32, 16, 4>;
  using SmallQueries = Queries;
  using SmallTokens = Tokens;
};
template <class Element>
struct BackwardTiles<Element, 512> {
  using Queries = BackwardTile<Element, 512, 16, 16, 4>;
  using Tokens = Queries;
  using SmallQueries = Queries;
  using SmallTokens = Queries;
};

#else

template <class Element>
struct ForwardTiles<Element, 64> {
  using Few = ForwardTile<Element, 64, 16, 64, 4>;
  using Some = ForwardTile<Element, 64, 32, 64, 4>;
  using Many = ForwardTile<Element, 64, 64, 64, 4>;
};
template <class Element>
struct ForwardTiles<Element, 128> {
  using Few = ForwardTile<Element, 128, 16, 64, 4>;
  using Some = ForwardTile<Element, 128, 32, 64, 4>;
  using Many = ForwardTile<Element, 128, 64, 64, 4>;
};
template <class Element>
struct ForwardTiles<Element, 256> {
  using Few = ForwardTile<Element, 256, 16, 64, 4>;
  using Some = ForwardTile<Element, 256, 32, 64, 4>;
  using Many = ForwardTile<Element, 256, 64, 64, 8>;
};
template <class Element>
struct ForwardTiles<Element, 512> {
  using Few = ForwardTile<Element, 512, 16, 32, 4>;
  using Some = ForwardTile<Element, 512, 32, 32, 8>;
  using Many = ForwardTile<Element, 512, 64, 32, 8>;
};

template <class Element>
struct BackwardTiles<Element, 64> {
  using Queries = BackwardTile<Element, 64, 64, 64, 4>;
  using Tokens = Queries;
  using SmallQueries = Queries;
  using SmallTokens = Queries;
};
template <class Element>
struct BackwardTiles<Element, 128> {
  using Queries = BackwardTile<Element, 128, 64, 32, 8>;
  using Tokens = Queries;
  using SmallQueries = Queries;
  using SmallTokens = Queries;
};
template <class Element>
struct BackwardTiles<Element, 256> {
  using Queries = BackwardTile<Element, 256, 64, 32, 8>;
  using Tokens = Queries;
  using SmallQueries = BackwardTile<Element, 256, 32, 32, 8>;
  using SmallTokens = SmallQueries;
};
template <class Element>
struct BackwardTiles<Element, 512> {
  using Queries = BackwardTile<Element, 512, 32, 32, 8>;
  using Tokens = Queries;
  using SmallQueries = BackwardTile<Element, 512, 16, 16, 4>;
  using SmallTokens = SmallQueries;
};

#endif

// As many stages as fit: two if a block can have them, and more where that keeps no second block off the multiprocessor:
// while two blocks fit, or where two do not fit anyhow.
template <class Bytes>
int stages_that_fit(const Queue& queue, const Bytes& bytes) {
  int stages = 1;
  if constexpr (kCopiesAreAsynchronous) {
    if (bytes(2) <= queue.max_shared_bytes) stages = 2;
    constexpr int64_t kReserved = 1024;  // that CUDA keeps for itself in each block
    const int64_t half = queue.shared_bytes_of_unit / 2 - kReserved;
    const int64_t room = bytes(stages) <= half ? smaller_of(queue.max_shared_bytes, half) : queue.max_shared_bytes;
    while (stages < 4 && bytes(stages + 1) <= room) ++stages;
  } else {
    static_cast<void>(bytes);  // copies pass through registers: a second stage hides nothing
  }
  return smaller_of(stages, queue.max_stages);
}

// Calls body(Tile{}) with the tile of a forward call.
template <class Element, int kRank, class Body>
void with_forward_tile(const ForwardParams& params, const Queue& queue, const Body& body) {
  using Tiles = ForwardTiles<Element, kRank>;
  const int64_t rows = params.shape.num_queries * params.shape.num_heads;
  const int stride = row_stride(params.shape);
  const auto fits = [&](int64_t bytes) { return bytes <= queue.max_shared_bytes; };
  if (rows > 32 && fits(Tiles::Many::shared_bytes(stride, 1)))
    body(typename Tiles::Many{});
  else if (rows > 16 && fits(Tiles::Some::shared_bytes(stride, 1)))
    body(typename Tiles::Some{});
  else
    body(typename Tiles::Few{});
}

template <class Element, class Body>
void with_forward_tile(const ForwardParams& params, const Queue& queue, const Body& body) {
  const int64_t rank = params.shape.rank;
  if (rank <= 64) return with_forward_tile<Element, 64>(params, queue, body);
  if (rank <= 128) return with_forward_tile<Element, 128>(params, queue, body);
  if (rank <= 256) return with_forward_tile<Element, 256>(params, queue, body);
  with_forward_tile<Element, 512>(params, queue, body);
}

template <class Element, class Body>
void with_backward_tiles(int64_t rank, const Body& body) {
  if (rank <= 64) return body(BackwardTiles<Element, 64>{});
  if (rank <= 128) return body(BackwardTiles<Element, 128>{});
  if (rank <= 256) return body(BackwardTiles<Element, 256>{});
  body(BackwardTiles<Element, 512>{});
}

template <class Tiles>
bool takes_large_token_tile(const AttentionShape& shape, const Queue& queue) {
  return Tiles::Tokens::token_shared_bytes(row_stride(shape), gradient_stride(shape), 1) <= queue.max_shared_bytes;
}

template <class Element>
void run_forward(const ForwardParams& params, const Parts& parts, const Queue& queue) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = shape.num_queries * shape.num_heads;
  with_forward_tile<Element>(params, queue, [&](auto tile) {
    using Tile = decltype(tile);
    const auto bytes = [&](int stages) { return Tile::shared_bytes(row_stride(shape), stages); };
    const int stages = stages_that_fit(queue, bytes);
    const int64_t blocks = (rows + Tile::kRows - 1) / Tile::kRows;
    launch(queue, &forward_kernel<Tile>, shape.batch * blocks * params.num_splits, Tile::kThreads, bytes(stages), params,
           parts, stages);
  });
  if (parts.sums != nullptr)
    launch(queue, &combine_kernel<Element>, shape.batch * rows, kCombineThreads, 0, params, parts);
}

template <class Tile>
void run_query_gradient(const BackwardParams& params, const Queue& queue) {
  const AttentionShape& shape = params.shape;
  const auto bytes = [&](int stages) {
    return Tile::query_shared_bytes(row_stride(shape), gradient_stride(shape), stages);
  };
  const int stages = stages_that_fit(queue, bytes);
  const int64_t blocks = (shape.num_queries * shape.num_heads + Tile::kOwned - 1) / Tile::kOwned;
  launch(queue, &query_gradient_kernel<Tile>, shape.batch * blocks, Tile::kThreads, bytes(stages), params, stages);
}

template <class Tile>
void run_token_gradient(const BackwardParams& params, const TokenGradients& to, const Queue& queue) {
  const AttentionShape& shape = params.shape;
  const auto bytes = [&](int stages) {
    return Tile::token_shared_bytes(row_stride(shape), gradient_stride(shape), stages);
  };
  const int stages = stages_that_fit(queue, bytes);
  const int64_t blocks = (shape.num_tokens + Tile::kOwned - 1) / Tile::kOwned;
  launch(queue, &token_gradient_kernel<Tile>, shape.batch * blocks * params.num_groups, Tile::kThreads, bytes(stages), params,
         to, stages);
}

template <class Element>
void run_backward(BackwardParams params, const SavedForward& saved, const TokenGradients& to, const Queue& queue) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = shape.batch * shape.num_queries * shape.num_heads, warps = kDeltaThreads / kLanes;
  params.delta = saved.delta;
  launch(queue, &delta_kernel<Element>, (rows + warps - 1) / warps, kDeltaThreads, 0, params, saved.out, saved.d_lse,
         saved.delta);
  with_backward_tiles<Element>(shape.rank, [&](auto tiles) {
    using Tiles = decltype(tiles);
    const int64_t bytes = Tiles::Queries::query_shared_bytes(row_stride(shape), gradient_stride(shape), 1);
    if (bytes <= queue.max_shared_bytes)
      run_query_gradient<typename Tiles::Queries>(params, queue);
    else
      run_query_gradient<typename Tiles::SmallQueries>(params, queue);
    if (takes_large_token_tile<Tiles>(shape, queue))
      run_token_gradient<typename Tiles::Tokens>(params, to, queue);
    else
      run_token_gradient<typename Tiles::SmallTokens>(params, to, queue);
  });
  if (params.num_groups > 1)
    launch(queue, &sum_groups_kernel<Element>, shape.batch * shape.num_tokens, kSumThreads, 0, params, to);
}

}  // namespace xeco::gpu
