// The launches of a call, for one dtype.
#pragma once

#include "latent_attention/gpu/heuristics.cuh"
#include "latent_attention/gpu/kernels.h"

namespace xeco::gpu {

constexpr int kBackwardBlocks = 2;  // that stages leave room for, where shared memory has it

template <class Element, bool kPacked>
ForwardBlocks blocks_of_forward(const AttentionShape& shape, const Stream& stream) {
  ForwardBlocks blocks;
  with_forward_tile<Element, kPacked>(shape, stream, [&](auto tile) {
    using Tile = decltype(tile);
    const auto bytes = [&](int stages) { return Tile::shared_bytes(shape, stages); };
    blocks.rows = Tile::kRows;
    blocks.resident = resident_blocks(stream, bytes(stages_that_fit(stream, Tile::kBlocks, bytes)), Tile::kBlocks);
  });
  return blocks;
}

template <class Element, bool kPacked>
void run_forward(const ForwardParams& params, const Parts& parts, const Stream& stream) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = shape.num_queries * shape.num_heads;
  with_forward_tile<Element, kPacked>(shape, stream, [&](auto tile) {
    using Tile = decltype(tile);
    const auto bytes = [&](int stages) { return Tile::shared_bytes(shape, stages); };
    const int stages = stages_that_fit(stream, Tile::kBlocks, bytes);
    const int64_t blocks = (rows + Tile::kRows - 1) / Tile::kRows;
    launch(stream, &forward_kernel<Tile>, shape.batch * blocks * params.num_splits, Tile::kThreads, bytes(stages),
           params, parts, stages);
  });
  if (parts.sums != nullptr)
    launch(stream, &combine_kernel<Element>, shape.batch * rows, kCombineThreads,
           combine_shared_bytes(params.num_splits), params, parts);
}

template <class Tile>
void run_query_gradient(const BackwardParams& params, const Stream& stream) {
  const AttentionShape& shape = params.shape;
  const auto bytes = [&](int stages) {
    return Tile::query_shared_bytes(row_stride(shape), gradient_stride(shape), stages);
  };
  const int stages = stages_that_fit(stream, kBackwardBlocks, bytes);
  const int64_t blocks = (shape.num_queries * shape.num_heads + Tile::kOwned - 1) / Tile::kOwned;
  launch(stream, &query_gradient_kernel<Tile>, shape.batch * blocks, Tile::kThreads, bytes(stages), params, stages);
}

template <class Tile>
void run_token_gradient(const BackwardParams& params, const TokenGradients& to, const Stream& stream) {
  const AttentionShape& shape = params.shape;
  const auto bytes = [&](int stages) {
    return Tile::token_shared_bytes(row_stride(shape), gradient_stride(shape), stages);
  };
  const int stages = stages_that_fit(stream, kBackwardBlocks, bytes);
  const int64_t blocks = (shape.num_tokens + Tile::kOwned - 1) / Tile::kOwned;
  launch(stream, &token_gradient_kernel<Tile>, shape.batch * blocks * params.num_groups, Tile::kThreads, bytes(stages),
         params, to, stages);
}

template <class Element>
void run_backward(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                  const Stream& stream) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = shape.batch * shape.num_queries * shape.num_heads, warps = kDeltaThreads / kLanes;
  launch(stream, &delta_kernel<Element>, (rows + warps - 1) / warps, kDeltaThreads, 0, params, saved.out, saved.d_lse,
         saved.delta);
  with_backward_tile<Element, false>(shape, stream,
                                     [&](auto tile) { run_query_gradient<decltype(tile)>(params, stream); });
  with_backward_tile<Element, true>(shape, stream,
                                    [&](auto tile) { run_token_gradient<decltype(tile)>(params, to, stream); });
  if (params.num_groups > 1)
    launch(stream, &sum_groups_kernel<Element>, shape.batch * shape.num_tokens, kSumThreads, 0, params, to);
}

}  // namespace xeco::gpu
