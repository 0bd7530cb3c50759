// The ops xeco::latent_attention, latent_attention_backward and latent_attention_decode on the CPU:
// check -> params -> choose -> run. Schemas, references and autograd are in xeco_convert/ops/.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "latent_attention/checks.h"
#include "latent_attention/cpu_kernels.h"
#include "xeco/dispatch.h"

namespace xeco {
namespace {

CpuKernels choose_kernels(const AttentionShape& shape) {
  const CpuLevel level = cpu_level();
#if defined(XECO_X86_KERNELS)
  // Pairs need even widths; the widening kernels take any.
  const bool pairs = shape.dtype == Dtype::kBFloat16 && shape.rank % 2 == 0 && shape.rope % 2 == 0;
  if (pairs && level >= CpuLevel::kAmx) return amx_kernels();
  if (pairs && level >= CpuLevel::kAvx512Bf16) return avx512_bf16_kernels();
  // Few query rows leave half of a 16-lane vector empty; 8 lanes cost half as much then.
  const bool few_rows = shape.num_queries * shape.num_heads <= 8;
  if (level >= CpuLevel::kAvx512 && !few_rows) return avx512_kernels(shape.dtype);
  if (level >= CpuLevel::kAvx2) return avx2_kernels(shape.dtype);
#else
  (void)level;
#endif
  return scalar_kernels(shape.dtype);
}

// Values within [low, high] keep the kernels' sums of them far from overflow.
void check_values(const char* op, const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t b = 0; values != nullptr && b < count; ++b)
    require(values[b] >= low && values[b] <= high, op, ": ", name, ": expected values from ", low, " to ", high, ", got ",
            values[b], " for sequence ", b);
}

void check_ranges(const char* op, const AttentionShape& shape) {
  constexpr int64_t kFar = int64_t{1} << 40;
  check_values(op, "starts", shape.starts, shape.batch, 0, shape.num_tokens);
  check_values(op, "ends", shape.ends, shape.batch, 0, shape.num_tokens);
  check_values(op, "query_positions", shape.query_positions, shape.batch, -kFar, kFar);
}

Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes);
}

std::tuple<Tensor, Tensor> run_forward(const Inputs& in, ForwardParams& params) {
  const AttentionShape& shape = params.shape;
  Tensor out = empty_like(in.q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor lse = torch::stable::new_empty(in.q_latent, {shape.batch, shape.num_heads, shape.num_queries}, ScalarType::Float);
  params.q_latent = heads_view(in.q_latent), params.q_rope = heads_view(in.q_rope);
  params.c_kv = rows_view(in.c_kv), params.k_rope = rows_view(in.k_rope);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (out.numel() > 0) choose_kernels(shape).forward(params, parallel_items);
  return {out, lse};
}

int64_t query_blocks(const AttentionShape& shape) {
  constexpr int64_t kBlockRows = 128;  // as in latent_attention/rows.h
  return shape.batch * ((shape.num_queries * shape.num_heads + kBlockRows - 1) / kBlockRows);
}

// Enough parts to keep many threads busy where there are few query rows, none shorter than 512 tokens. It depends on the
// shapes alone, so that the result does not depend on the number of threads.
int64_t automatic_splits(const AttentionShape& shape) {
  constexpr int64_t kWantedItems = 32, kLeastTokens = 512;
  const int64_t blocks = std::max<int64_t>(1, query_blocks(shape));
  return std::clamp<int64_t>(shape.num_tokens / kLeastTokens, 1, std::max<int64_t>(1, kWantedItems / blocks));
}

std::tuple<Tensor, Tensor> latent_attention(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                            OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions,
                                            double softmax_scale, bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  params.shape = check_inputs(op, in, false);
  set_rule(op, params.shape, softmax_scale, window, softcap);
  set_ranges(op, params.shape, causal, starts, ends, query_positions);
  check_ranges(op, params.shape);
  params.num_splits = automatic_splits(params.shape);
  return run_forward(in, params);
}

// Every page that a sequence uses must exist. starts and ends: the tokens that are read.
void check_pages(const char* op, const AttentionShape& shape, int64_t num_pages) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first = shape.starts == nullptr ? 0 : shape.starts[b];
    for (int64_t page = first / shape.page_size; page * shape.page_size < shape.ends[b]; ++page) {
      const int32_t found = shape.block_table[b * shape.block_table_stride + page];
      require(found >= 0 && found < num_pages, op, ": block_table: expected pages from 0 to ", num_pages - 1, ", got ",
              found, " at [", b, ", ", page, "]");
    }
  }
}

std::tuple<Tensor, Tensor> latent_attention_decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                                   OptionalTensor block_table, OptionalTensor starts,
                                                   OptionalTensor lengths, double softmax_scale, int64_t window,
                                                   double softcap, int64_t num_splits) {
  constexpr const char* op = "latent_attention_decode";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  AttentionShape& shape = params.shape;
  shape = check_inputs(op, in, block_table.has_value());
  if (block_table.has_value()) set_pages(op, shape, in, *block_table);
  set_rule(op, shape, softmax_scale, window, softcap);
  shape.starts = int64_data(op, "starts", starts, shape.batch);
  shape.ends = int64_data(op, "lengths", lengths, shape.batch);
  require(shape.ends != nullptr || shape.block_table == nullptr, op, ": lengths: needed with a block_table, got none");
  check_values(op, "starts", shape.starts, shape.batch, 0, shape.num_tokens);
  check_values(op, "lengths", shape.ends, shape.batch, 0, shape.num_tokens);
  if (shape.block_table != nullptr) check_pages(op, shape, c_kv.size(0));
  std::vector<int64_t> positions;
  for (int64_t b = 0; shape.ends != nullptr && b < shape.batch; ++b)
    positions.push_back(shape.ends[b] - shape.num_queries);
  shape.query_positions = positions.empty() ? nullptr : positions.data();
  require(num_splits >= 0 && num_splits <= 1024, op, ": num_splits: expected 0 (automatic) to 1024, got ", num_splits);
  params.num_splits = num_splits > 0 ? num_splits : automatic_splits(shape);
  return run_forward(in, params);
}

// As many groups as rows of the queries outnumber the tokens, so that their sums take no more memory than the gradient of
// the queries does; at most 16.
int64_t backward_groups(const AttentionShape& shape) {
  const int64_t rows = shape.num_queries * shape.num_heads, blocks = query_blocks(shape) / std::max<int64_t>(1, shape.batch);
  const int64_t wanted = std::max<int64_t>(1, 16 / std::max<int64_t>(1, shape.batch));
  const int64_t affordable = rows / std::max<int64_t>(1, shape.num_tokens);
  return std::max<int64_t>(1, std::min({wanted, affordable, blocks}));
}

template <class T>
void fill_delta(const HeadsView& d_out, const void* out, const float* d_lse, const AttentionShape& shape, float* delta) {
  const int64_t heads = shape.num_heads, queries = shape.num_queries;
  torch::stable::parallel_for(0, shape.batch * queries, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t b = i / queries, q = i % queries;
        const T* left = static_cast<const T*>(d_out.data) + b * d_out.batch_stride + q * d_out.query_stride +
                        h * d_out.head_stride;
        const T* right = static_cast<const T*>(out) + (i * heads + h) * shape.rank;
        float sum = 0.0f;
        for (int64_t r = 0; r < shape.rank; ++r) sum += static_cast<float>(left[r]) * static_cast<float>(right[r]);
        const int64_t at = (b * heads + h) * queries + q;
        delta[at] = sum - (d_lse == nullptr ? 0.0f : d_lse[at]);
      }
  });
}

// [B, H, Q]: sum over R of d_out · out, less d_lse.
Tensor backward_delta(const Tensor& d_out, const OptionalTensor& d_lse, const Tensor& out, const Tensor& lse,
                      const AttentionShape& shape) {
  Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  float* to = static_cast<float*>(delta.mutable_data_ptr());
  const float* extra = d_lse.has_value() ? static_cast<const float*>(d_lse->const_data_ptr()) : nullptr;
  const HeadsView view = heads_view(d_out);
  if (shape.dtype == Dtype::kFloat32) fill_delta<float>(view, out.const_data_ptr(), extra, shape, to);
  if (shape.dtype == Dtype::kBFloat16)
    fill_delta<torch::headeronly::BFloat16>(view, out.const_data_ptr(), extra, shape, to);
  if (shape.dtype == Dtype::kFloat16) fill_delta<torch::headeronly::Half>(view, out.const_data_ptr(), extra, shape, to);
  return delta;
}

// The float32 sums of a backward pass: [B, num_groups, T, latent part | rotary part], each part padded.
struct RowSums {
  const float* data;
  int64_t groups, tokens, stride;
};

// Columns [offset, offset + width) of the sums, the groups added in their order and rounded once.
template <class T>
void write_rows(const RowSums& sums, int64_t batch, int64_t offset, int64_t width, Tensor& out) {
  T* to = static_cast<T*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * sums.tokens, 64, [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / sums.tokens, t = i % sums.tokens;
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t g = 0; g < sums.groups; ++g) {
        const float* from = sums.data + ((b * sums.groups + g) * sums.tokens + t) * sums.stride + offset;
        for (int64_t r = 0; r < width; ++r) row[static_cast<size_t>(r)] += from[r];
      }
      for (int64_t r = 0; r < width; ++r) to[i * width + r] = static_cast<T>(row[static_cast<size_t>(r)]);
    }
  });
}

void write_rows(const RowSums& sums, Dtype dtype, int64_t batch, int64_t offset, int64_t width, Tensor& out) {
  if (dtype == Dtype::kFloat32) write_rows<float>(sums, batch, offset, width, out);
  if (dtype == Dtype::kBFloat16) write_rows<torch::headeronly::BFloat16>(sums, batch, offset, width, out);
  if (dtype == Dtype::kFloat16) write_rows<torch::headeronly::Half>(sums, batch, offset, width, out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_attention_backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor out,
    Tensor lse, OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions, double softmax_scale,
    bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention_backward";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  BackwardParams params;
  AttentionShape& shape = params.shape;
  shape = check_inputs(op, in, false);
  set_rule(op, shape, softmax_scale, window, softcap);
  set_ranges(op, shape, causal, starts, ends, query_positions);
  check_ranges(op, shape);
  check_saved(op, shape, q_latent, d_out, d_lse, out, lse);
  const OptionalTensor dense_d_lse = d_lse.has_value() ? OptionalTensor(torch::stable::contiguous(*d_lse)) : d_lse;
  const Tensor delta = backward_delta(d_out, dense_d_lse, out, lse, shape);
  Tensor d_q_latent = empty_like(q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor d_q_rope = empty_like(q_rope, {shape.batch, shape.num_queries, shape.num_heads, shape.rope});
  Tensor d_c_kv = empty_like(c_kv, {shape.batch, shape.num_tokens, shape.rank});
  Tensor d_k_rope = empty_like(k_rope, {shape.batch, shape.num_tokens, shape.rope});
  const int64_t padded_rank = (shape.rank + 15) / 16 * 16, stride = padded_rank + (shape.rope + 15) / 16 * 16;
  params.num_groups = backward_groups(shape);
  Tensor sums = torch::stable::new_zeros(lse, {shape.batch, params.num_groups, shape.num_tokens, stride});
  params.q_latent = heads_view(q_latent), params.q_rope = heads_view(q_rope), params.d_out = heads_view(d_out);
  params.c_kv = rows_view(c_kv), params.k_rope = rows_view(k_rope);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.delta = static_cast<const float*>(delta.const_data_ptr());
  params.d_q_latent = d_q_latent.mutable_data_ptr(), params.d_q_rope = d_q_rope.mutable_data_ptr();
  params.d_rows = static_cast<float*>(sums.mutable_data_ptr());
  if (d_q_latent.numel() > 0) choose_kernels(shape).backward(params, parallel_items);
  const RowSums rows{params.d_rows, params.num_groups, shape.num_tokens, stride};
  write_rows(rows, shape.dtype, shape.batch, 0, shape.rank, d_c_kv);
  write_rows(rows, shape.dtype, shape.batch, padded_rank, shape.rope, d_k_rope);
  return {d_q_latent, d_q_rope, d_c_kv, d_k_rope};
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) {
  m.impl("latent_attention", TORCH_BOX(&xeco::latent_attention));
  m.impl("latent_attention_backward", TORCH_BOX(&xeco::latent_attention_backward));
  m.impl("latent_attention_decode", TORCH_BOX(&xeco::latent_attention_decode));
}
