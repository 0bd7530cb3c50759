// The op xeco::rope_and_append on the CPU: rotates the new keys and writes them and their latents into the cache, in
// one pass. Schema and reference are in xeco_convert/ops/rope_and_append.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "rope_and_append/checks.h"

namespace xeco {
namespace {

template <class T>
T* row_of(const RowsView& view, int64_t outer, int64_t row) {
  return const_cast<T*>(static_cast<const T*>(view.data)) + outer * view.outer_stride + row * view.row_stride;
}

// Half-split pairs (RoFormer, arXiv 2104.09864): k · cos + [-second half, first half] · sin, in float32, rounded once.
template <class T, class Angle>
void rotate(const T* key, const Angle* cos, const Angle* sin, int64_t rope, T* to) {
  const int64_t half = rope / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = static_cast<float>(key[i]), second = static_cast<float>(key[i + half]);
    to[i] = static_cast<T>(first * static_cast<float>(cos[i]) - second * static_cast<float>(sin[i]));
    to[i + half] =
        static_cast<T>(second * static_cast<float>(cos[i + half]) + first * static_cast<float>(sin[i + half]));
  }
}

template <class T, class Angle>
void append(const AppendParams& params) {
  torch::stable::parallel_for(0, params.batch * params.num_queries, 256, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / params.num_queries, q = i % params.num_queries;
      int64_t outer = b, slot = params.positions[b] + q;
      if (params.block_table != nullptr) {
        outer = params.block_table[b * params.block_table_stride + slot / params.page_size];
        slot %= params.page_size;
      }
      const T* latent = row_of<T>(params.c_kv, b, q);
      T* to = row_of<T>(params.c_kv_cache, outer, slot);
      for (int64_t r = 0; r < params.rank; ++r) to[r] = latent[r];
      rotate(row_of<T>(params.k_rope, b, q), row_of<Angle>(params.cos, b, q), row_of<Angle>(params.sin, b, q),
             params.rope, row_of<T>(params.k_rope_cache, outer, slot));
    }
  });
}

template <class T>
void append_with_angles(const AppendParams& params, bool wide_angles) {
  if (wide_angles)
    append<T, float>(params);
  else
    append<T, T>(params);
}

void check_slots(const AppendParams& params) {
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t first = params.positions[b], last = first + params.num_queries;
    require(first >= 0 && first <= params.capacity && last <= params.capacity, kAppendOp,
            ": positions: expected values from 0 to ", params.capacity - params.num_queries, " (", params.num_queries,
            " new tokens in a cache of ", params.capacity, "), got ", first, " for sequence ", b);
    for (int64_t slot = first; params.block_table != nullptr && slot < last; ++slot) {
      const int64_t index = slot / params.page_size;
      const int32_t page = params.block_table[b * params.block_table_stride + index];
      require(page >= 0 && page < params.num_pages, kAppendOp, ": block_table: expected pages from 0 to ",
              params.num_pages - 1, ", got ", page, " at [", b, ", ", index, "]");
    }
  }
}

void rope_and_append(Tensor c_kv, Tensor k_rope, Tensor cos, Tensor sin, Tensor c_kv_cache, Tensor k_rope_cache,
                     OptionalTensor block_table, Tensor positions) {
  const AppendCall call = check_append({c_kv, k_rope, cos, sin, c_kv_cache, k_rope_cache}, block_table, positions);
  check_slots(call.params);
  if (call.dtype == Dtype::kFloat32) append<float, float>(call.params);
  if (call.dtype == Dtype::kBFloat16) append_with_angles<torch::headeronly::BFloat16>(call.params, call.wide_angles);
  if (call.dtype == Dtype::kFloat16) append_with_angles<torch::headeronly::Half>(call.params, call.wide_angles);
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) { m.impl("rope_and_append", TORCH_BOX(&xeco::rope_and_append)); }
