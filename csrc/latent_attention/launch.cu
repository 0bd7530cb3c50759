// The ops xeco::latent_attention, latent_attention_backward and latent_attention_decode on a GPU: check -> params -> choose
// -> launch, on the current stream. Nothing waits for the device, so a call can be captured in a CUDA graph; values that only
// the device knows (ranges, pages) are checked by the kernels, which stop where one is wrong.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "device/queue.h"
#include "latent_attention/checks.h"
#include "latent_attention/device_kernels.h"

namespace xeco {
namespace {

// Numbers of rows and tokens are int32 in the kernels, and so are those behind them that a tile is filled up with.
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max() - 1024;

void check_tokens(const char* op, const AttentionShape& shape) {
  require(shape.num_tokens <= kMostRows, op, ": c_kv: at most ", kMostRows, " tokens of one sequence, got ",
          shape.num_tokens);
}

AttentionShape check_call(const char* op, const Inputs& in, bool paged) {
  const AttentionShape shape = check_inputs(op, in, paged);
  require(shape.dtype != Dtype::kFloat32, op,
          ": q_latent: the fused GPU kernels take bfloat16 and float16, got float32; the plain-torch reference takes it");
  check_same_device(op, "q_rope", in.q_rope, in.q_latent);
  check_same_device(op, "c_kv", in.c_kv, in.q_latent);
  check_same_device(op, "k_rope", in.k_rope, in.q_latent);
  require(shape.num_queries * shape.num_heads <= kMostRows, op, ": q_latent: at most ", kMostRows,
          " query rows (tokens times heads) of one sequence, got ", shape.num_queries * shape.num_heads);
  return shape;
}

Tensor empty_like(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes);
}

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts that give every multiprocessor two blocks, none shorter than 256 tokens. Shapes alone decide, since lengths are on
// the device; the number of multiprocessors too, so results are the same on every run of one kind of device.
int64_t automatic_splits(const AttentionShape& shape, const gpu::Queue& queue) {
  constexpr int64_t kLeastTokens = 256, kRowsOfBlock = 64;
  const int64_t rows = shape.num_queries * shape.num_heads;
  const int64_t blocks = std::max<int64_t>(1, shape.batch * divided_up(rows, kRowsOfBlock));
  return std::clamp<int64_t>(2 * queue.num_units / blocks, 1, std::max<int64_t>(1, shape.num_tokens / kLeastTokens));
}

std::tuple<Tensor, Tensor> run_forward(const Inputs& in, ForwardParams& params, const gpu::Queue& queue) {
  const AttentionShape& shape = params.shape;
  const int64_t rows = shape.num_queries * shape.num_heads;
  Tensor out = empty_like(in.q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor lse = torch::stable::new_empty(in.q_latent, {shape.batch, shape.num_heads, shape.num_queries}, ScalarType::Float);
  params.q_latent = heads_view(in.q_latent), params.q_rope = heads_view(in.q_rope);
  params.c_kv = rows_view(in.c_kv), params.k_rope = rows_view(in.k_rope);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  gpu::Parts parts;
  // One allocation: sums, then states. It may be freed when this returns: the allocator hands it out again in stream order.
  const int64_t floats = params.num_splits > 1 ? shape.batch * rows * params.num_splits * (shape.rank + 2) : 0;
  Tensor scratch = torch::stable::new_empty(lse, {floats});
  if (params.num_splits > 1) {
    parts.sums = static_cast<float*>(scratch.mutable_data_ptr());
    parts.states = parts.sums + shape.batch * rows * params.num_splits * shape.rank;
  }
  if (out.numel() == 0) return {out, lse};
  (shape.dtype == Dtype::kBFloat16 ? gpu::forward_bfloat16 : gpu::forward_float16)(params, parts, queue);
  return {out, lse};
}

std::tuple<Tensor, Tensor> latent_attention(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                            OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions,
                                            double softmax_scale, bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  params.shape = check_call(op, in, false);
  check_tokens(op, params.shape);
  set_rule(op, params.shape, softmax_scale, window, softcap);
  set_ranges(op, params.shape, causal, starts, ends, query_positions);
  check_same_device(op, "starts", starts, q_latent);
  check_same_device(op, "ends", ends, q_latent);
  check_same_device(op, "query_positions", query_positions, q_latent);
  const DeviceQueue queue(op, q_latent);
  params.num_splits = automatic_splits(params.shape, queue.get());
  return run_forward(in, params, queue.get());
}

std::tuple<Tensor, Tensor> latent_attention_decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                                   OptionalTensor block_table, OptionalTensor starts,
                                                   OptionalTensor lengths, double softmax_scale, int64_t window,
                                                   double softcap, int64_t num_splits) {
  constexpr const char* op = "latent_attention_decode";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  AttentionShape& shape = params.shape;
  shape = check_call(op, in, block_table.has_value());
  if (block_table.has_value()) set_pages(op, shape, in, *block_table);
  check_tokens(op, shape);
  set_rule(op, shape, softmax_scale, window, softcap);
  shape.starts = int64_data(op, "starts", starts, shape.batch);
  shape.ends = int64_data(op, "lengths", lengths, shape.batch);
  shape.queries_end_at_ends = true;
  require(shape.ends != nullptr || shape.block_table == nullptr, op, ": lengths: needed with a block_table, got none");
  require(num_splits >= 0 && num_splits <= 1024, op, ": num_splits: expected 0 (automatic) to 1024, got ", num_splits);
  check_same_device(op, "block_table", block_table, q_latent);
  check_same_device(op, "starts", starts, q_latent);
  check_same_device(op, "lengths", lengths, q_latent);
  const DeviceQueue queue(op, q_latent);
  params.num_splits = num_splits > 0 ? num_splits : automatic_splits(shape, queue.get());
  return run_forward(in, params, queue.get());
}

// Enough groups of query rows to give every multiprocessor two blocks of the token gradient; their float32 sums take no more
// memory than the gradient of the queries does.
int64_t backward_groups(const AttentionShape& shape, const gpu::Queue& queue) {
  constexpr int64_t kTokens = 64, kRows = 64, kMostGroups = 16;
  const int64_t rows = shape.num_queries * shape.num_heads;
  const int64_t blocks = std::max<int64_t>(1, shape.batch * divided_up(shape.num_tokens, kTokens));
  const int64_t wanted = std::min(kMostGroups, 2 * queue.num_units / blocks);
  const int64_t affordable = std::min(rows / std::max<int64_t>(1, shape.num_tokens), divided_up(rows, kRows));
  return std::max<int64_t>(1, std::min(wanted, affordable));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> latent_attention_backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor out,
    Tensor lse, OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions, double softmax_scale,
    bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention_backward";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  BackwardParams params;
  AttentionShape& shape = params.shape;
  shape = check_call(op, in, false);
  check_tokens(op, shape);
  set_rule(op, shape, softmax_scale, window, softcap);
  set_ranges(op, shape, causal, starts, ends, query_positions);
  check_saved(op, shape, q_latent, d_out, d_lse, out, lse);
  check_same_device(op, "d_out", d_out, q_latent);
  check_same_device(op, "d_lse", d_lse, q_latent);
  check_same_device(op, "out", out, q_latent);
  check_same_device(op, "lse", lse, q_latent);
  check_same_device(op, "starts", starts, q_latent);
  check_same_device(op, "ends", ends, q_latent);
  check_same_device(op, "query_positions", query_positions, q_latent);
  const DeviceQueue queue(op, q_latent);
  const OptionalTensor dense_d_lse = d_lse.has_value() ? OptionalTensor(torch::stable::contiguous(*d_lse)) : d_lse;
  Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  Tensor d_q_latent = empty_like(q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor d_q_rope = empty_like(q_rope, {shape.batch, shape.num_queries, shape.num_heads, shape.rope});
  Tensor d_c_kv = empty_like(c_kv, {shape.batch, shape.num_tokens, shape.rank});
  Tensor d_k_rope = empty_like(k_rope, {shape.batch, shape.num_tokens, shape.rope});
  params.num_groups = backward_groups(shape, queue.get());
  const int64_t width = divided_up(shape.rank, 16) * 16 + divided_up(shape.rope, 16) * 16;
  const int64_t floats = params.num_groups > 1 ? shape.batch * params.num_groups * shape.num_tokens * width : 0;
  Tensor sums = torch::stable::new_empty(lse, {floats});
  params.q_latent = heads_view(q_latent), params.q_rope = heads_view(q_rope), params.d_out = heads_view(d_out);
  params.c_kv = rows_view(c_kv), params.k_rope = rows_view(k_rope);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.d_q_latent = d_q_latent.mutable_data_ptr(), params.d_q_rope = d_q_rope.mutable_data_ptr();
  params.d_rows = static_cast<float*>(sums.mutable_data_ptr());
  gpu::SavedForward saved;
  saved.out = out.const_data_ptr(), saved.delta = static_cast<float*>(delta.mutable_data_ptr());
  if (dense_d_lse.has_value()) saved.d_lse = static_cast<const float*>(dense_d_lse->const_data_ptr());
  const gpu::TokenGradients to{d_c_kv.mutable_data_ptr(), d_k_rope.mutable_data_ptr()};
  (shape.dtype == Dtype::kBFloat16 ? gpu::backward_bfloat16 : gpu::backward_float16)(params, saved, to, queue.get());
  return {d_q_latent, d_q_rope, d_c_kv, d_k_rope};
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CUDA, m) {
  m.impl("latent_attention", TORCH_BOX(&xeco::latent_attention));
  m.impl("latent_attention_backward", TORCH_BOX(&xeco::latent_attention_backward));
  m.impl("latent_attention_decode", TORCH_BOX(&xeco::latent_attention_decode));
}
