// What every backend of rope_and_append checks before it runs, without reading data.
#pragma once

#include "rope_and_append/params.h"
#include "tensor_checks.h"

namespace xeco {

constexpr const char* kAppendOp = "rope_and_append";

struct AppendInputs {
  const Tensor &c_kv, &k_rope, &cos, &sin, &c_kv_cache, &k_rope_cache;
};

struct AppendCall {
  AppendParams params;
  Dtype dtype;
  bool wide_angles;  // cos and sin in float32, else in the dtype of the rows
};

// cos and sin of one sequence serve all: then the step from sequence to sequence is 0.
inline RowsView angles_view(const Tensor& tensor) {
  RowsView view = rows_view(tensor);
  if (tensor.size(0) == 1) view.outer_stride = 0;
  return view;
}

inline void check_rows(const AppendInputs& in, AppendParams& params, bool paged) {
  check_tensor(kAppendOp, "c_kv", in.c_kv, {-1, -1, -1});
  params.batch = in.c_kv.size(0), params.num_queries = in.c_kv.size(1), params.rank = in.c_kv.size(2);
  check_tensor(kAppendOp, "k_rope", in.k_rope, {params.batch, params.num_queries, -1});
  params.rope = in.k_rope.size(2);
  require(params.rope % 2 == 0, kAppendOp, ": k_rope: expected an even width, got ", params.rope);
  const int64_t first = in.cos.dim() == 3 && in.cos.size(0) == 1 ? 1 : params.batch;
  check_tensor(kAppendOp, "cos", in.cos, {first, params.num_queries, params.rope});
  check_tensor(kAppendOp, "sin", in.sin, {in.cos.size(0), params.num_queries, params.rope});
  check_tensor(kAppendOp, "c_kv_cache", in.c_kv_cache, {paged ? -1 : params.batch, -1, params.rank});
  check_tensor(kAppendOp, "k_rope_cache", in.k_rope_cache, {in.c_kv_cache.size(0), in.c_kv_cache.size(1), params.rope});
}

inline AppendCall check_append(const AppendInputs& in, const OptionalTensor& block_table, const Tensor& positions) {
  AppendParams params;
  check_rows(in, params, block_table.has_value());
  const Dtype dtype = float_dtype(kAppendOp, "c_kv", in.c_kv);
  check_same_dtype(kAppendOp, "k_rope", in.k_rope, "c_kv", in.c_kv);
  check_same_dtype(kAppendOp, "c_kv_cache", in.c_kv_cache, "c_kv", in.c_kv);
  check_same_dtype(kAppendOp, "k_rope_cache", in.k_rope_cache, "c_kv", in.c_kv);
  check_same_dtype(kAppendOp, "sin", in.sin, "cos", in.cos);
  const bool wide_angles = in.cos.scalar_type() == ScalarType::Float;
  require(wide_angles || in.cos.scalar_type() == in.k_rope.scalar_type(), kAppendOp,
          ": cos: expected float32 or the dtype of k_rope, got another dtype");
  params.positions = int64_data(kAppendOp, "positions", positions, params.batch);
  params.capacity = in.c_kv_cache.size(1), params.num_pages = in.c_kv_cache.size(0);
  if (block_table.has_value()) {
    check_dtype(kAppendOp, "block_table", *block_table, ScalarType::Int, "int32");
    check_tensor(kAppendOp, "block_table", *block_table, {params.batch, -1});
    params.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
    params.block_table_stride = block_table->stride(0), params.page_size = in.c_kv_cache.size(1);
    params.capacity = block_table->size(1) * params.page_size;
  }
  params.c_kv = rows_view(in.c_kv), params.k_rope = rows_view(in.k_rope);
  params.cos = angles_view(in.cos), params.sin = angles_view(in.sin);
  params.c_kv_cache = rows_view(in.c_kv_cache), params.k_rope_cache = rows_view(in.k_rope_cache);
  return {params, dtype, wide_angles};
}

}  // namespace xeco
