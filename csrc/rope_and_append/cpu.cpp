// The op xeco::rope_and_append on the CPU: rotates the new keys and writes them and their latents into the cache, in one
// pass. Schema and reference are in xeco_convert/ops/rope_and_append.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tensor_checks.h"

namespace xeco {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "rope_and_append";

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
    to[i + half] = static_cast<T>(second * static_cast<float>(cos[i + half]) + first * static_cast<float>(sin[i + half]));
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

// cos and sin of one sequence serve all: then the step from sequence to sequence is 0.
RowsView angles_view(const Tensor& tensor) {
  RowsView view = rows_view(tensor);
  if (tensor.size(0) == 1) view.outer_stride = 0;
  return view;
}

void check_slots(const AppendParams& params, int64_t capacity, int64_t num_pages) {
  for (int64_t b = 0; b < params.batch; ++b) {
    const int64_t first = params.positions[b], last = first + params.num_queries;
    require(first >= 0 && first <= capacity && last <= capacity, kOp, ": positions: expected values from 0 to ",
            capacity - params.num_queries, " (", params.num_queries, " new tokens in a cache of ", capacity, "), got ",
            first, " for sequence ", b);
    for (int64_t slot = first; params.block_table != nullptr && slot < last; ++slot) {
      const int64_t page = slot / params.page_size;
      const int32_t found = params.block_table[b * params.block_table_stride + page];
      require(found >= 0 && found < num_pages, kOp, ": block_table: expected pages from 0 to ", num_pages - 1, ", got ",
              found, " at [", b, ", ", page, "]");
    }
  }
}

void rope_and_append(Tensor c_kv, Tensor k_rope, Tensor cos, Tensor sin, Tensor c_kv_cache, Tensor k_rope_cache,
                     OptionalTensor block_table, Tensor positions) {
  AppendParams params{};
  check_tensor(kOp, "c_kv", c_kv, {-1, -1, -1});
  params.batch = c_kv.size(0), params.num_queries = c_kv.size(1), params.rank = c_kv.size(2);
  check_tensor(kOp, "k_rope", k_rope, {params.batch, params.num_queries, -1});
  params.rope = k_rope.size(2);
  require(params.rope % 2 == 0, kOp, ": k_rope: expected an even width, got ", params.rope);
  check_tensor(kOp, "cos", cos, {cos.dim() == 3 && cos.size(0) == 1 ? 1 : params.batch, params.num_queries, params.rope});
  check_tensor(kOp, "sin", sin, {cos.size(0), params.num_queries, params.rope});
  const bool paged = block_table.has_value();
  check_tensor(kOp, "c_kv_cache", c_kv_cache, {paged ? -1 : params.batch, -1, params.rank});
  check_tensor(kOp, "k_rope_cache", k_rope_cache, {c_kv_cache.size(0), c_kv_cache.size(1), params.rope});
  const Dtype dtype = float_dtype(kOp, "c_kv", c_kv);
  check_same_dtype(kOp, "k_rope", k_rope, "c_kv", c_kv);
  check_same_dtype(kOp, "c_kv_cache", c_kv_cache, "c_kv", c_kv);
  check_same_dtype(kOp, "k_rope_cache", k_rope_cache, "c_kv", c_kv);
  check_same_dtype(kOp, "sin", sin, "cos", cos);
  const bool wide_angles = cos.scalar_type() == ScalarType::Float;
  require(wide_angles || cos.scalar_type() == k_rope.scalar_type(), kOp,
          ": cos: expected float32 or the dtype of k_rope, got another dtype");
  params.positions = int64_data(kOp, "positions", positions, params.batch);
  int64_t capacity = c_kv_cache.size(1);
  if (paged) {
    check_dtype(kOp, "block_table", *block_table, ScalarType::Int, "int32");
    check_tensor(kOp, "block_table", *block_table, {params.batch, -1});
    params.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    params.block_table_stride = block_table->stride(0), params.page_size = c_kv_cache.size(1);
    capacity = block_table->size(1) * params.page_size;
  }
  check_slots(params, capacity, c_kv_cache.size(0));
  params.c_kv = rows_view(c_kv), params.k_rope = rows_view(k_rope);
  params.cos = angles_view(cos), params.sin = angles_view(sin);
  params.c_kv_cache = rows_view(c_kv_cache), params.k_rope_cache = rows_view(k_rope_cache);
  if (dtype == Dtype::kFloat32) append<float, float>(params);
  if (dtype == Dtype::kBFloat16) append_with_angles<torch::headeronly::BFloat16>(params, wide_angles);
  if (dtype == Dtype::kFloat16) append_with_angles<torch::headeronly::Half>(params, wide_angles);
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) { m.impl("rope_and_append", TORCH_BOX(&xeco::rope_and_append)); }
