// The ops xeco::latent_attention, latent_attention_backward and latent_attention_decode on any backend: check -> params
// -> run. Schemas, references and autograd are in xeco_convert/ops/.
//
// A Backend (cpu/launch.cpp, gpu/launch.cu) has
//   check_limits(op, shape)                    what its kernels take less of than these checks allow
//   check_same_device(op, first, tensors)      where it has several devices
//   check_values(op, shape)                    ranges and pages, where the host can read them
// without a call's device, and for one call, as Backend(op, q_latent),
//   num_splits(shape), num_groups(shape)       how work is divided where nobody says
//   forward(params, lse), backward(params, saved, to, lse)
//                                              run; lse is a tensor to make scratch like
#pragma once

#include <tuple>

#include "latent_attention/checks.h"

namespace xeco {

inline void view_inputs(const Inputs& in, HeadsView& q_latent, HeadsView& q_rope, RowsView& c_kv, RowsView& k_rope) {
  q_latent = heads_view(in.q_latent), q_rope = heads_view(in.q_rope);
  c_kv = rows_view(in.c_kv), k_rope = rows_view(in.k_rope);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes);
}

template <class Backend>
AttentionShape check_call(const char* op, const Inputs& in, const OptionalTensor& block_table, CacheBits bits = {}) {
  AttentionShape shape = check_inputs(op, in, block_table.has_value(), bits);
  Backend::check_same_device(op, in.q_latent, {{"q_rope", in.q_rope}, {"c_kv", in.c_kv}, {"k_rope", in.k_rope}});
  if (block_table.has_value()) set_pages(op, shape, in, *block_table);
  Backend::check_limits(op, shape);
  return shape;
}

// Which tokens each query sees, where the queries stand: int64 [B] each, or none.
struct RangeInputs {
  const OptionalTensor &starts, &ends, &query_positions;
};

// The arguments that the two passes of latent_attention have in common.
template <class Backend>
AttentionShape check_attention(const char* op, const Inputs& in, const RangeInputs& ranges, double softmax_scale,
                               bool causal, int64_t window, double softcap, CacheBits bits = {}) {
  const auto& [starts, ends, query_positions] = ranges;
  AttentionShape shape = check_call<Backend>(op, in, {}, bits);
  set_rule(op, shape, softmax_scale, window, softcap);
  set_ranges(op, shape, causal, starts, ends, query_positions);
  Backend::check_same_device(op, in.q_latent,
                             {{"starts", starts}, {"ends", ends}, {"query_positions", query_positions}});
  Backend::check_values(op, shape);
  return shape;
}

template <class Backend>
std::tuple<Tensor, Tensor> run_forward(const Backend& backend, const Inputs& in, ForwardParams& params) {
  const AttentionShape& shape = params.shape;
  Tensor out = empty(in.q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor lse =
      torch::stable::new_empty(in.q_latent, {shape.batch, shape.num_heads, shape.num_queries}, ScalarType::Float);
  view_inputs(in, params.q_latent, params.q_rope, params.c_kv, params.k_rope);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (out.numel() > 0) backend.forward(params, lse);
  return {out, lse};
}

template <class Backend>
std::tuple<Tensor, Tensor> latent_attention(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                            OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions,
                                            double softmax_scale, bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  const RangeInputs ranges{starts, ends, query_positions};
  params.shape = check_attention<Backend>(op, in, ranges, softmax_scale, causal, window, softcap);
  const Backend backend(op, q_latent);
  params.num_splits = backend.num_splits(params.shape);
  return run_forward(backend, in, params);
}

// latent_attention over rows of codes: c_kv and k_rope are uint8 [B, T, bytes].
template <class Backend>
std::tuple<Tensor, Tensor> latent_attention_packed(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                                   OptionalTensor starts, OptionalTensor ends,
                                                   OptionalTensor query_positions, double softmax_scale, bool causal,
                                                   int64_t window, double softcap, int64_t latent_bits,
                                                   int64_t rope_bits) {
  constexpr const char* op = "latent_attention_packed";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  const RangeInputs ranges{starts, ends, query_positions};
  require(latent_bits != 16 && rope_bits != 16, op, ": latent_bits and rope_bits: expected 8 or 4, got ", latent_bits,
          " and ", rope_bits);
  params.shape = check_attention<Backend>(op, in, ranges, softmax_scale, causal, window, softcap,
                                          CacheBits{latent_bits, rope_bits});
  const Backend backend(op, q_latent);
  params.num_splits = backend.num_splits(params.shape);
  return run_forward(backend, in, params);
}

template <class Backend>
std::tuple<Tensor, Tensor> latent_attention_decode(Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                                   OptionalTensor block_table, OptionalTensor starts,
                                                   OptionalTensor lengths, double softmax_scale, int64_t window,
                                                   double softcap, int64_t num_splits) {
  constexpr const char* op = "latent_attention_decode";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  ForwardParams params;
  AttentionShape& shape = params.shape;
  shape = check_call<Backend>(op, in, block_table);
  set_rule(op, shape, softmax_scale, window, softcap);
  shape.starts = int64_data(op, "starts", starts, shape.batch);
  shape.ends = int64_data(op, "lengths", lengths, shape.batch);
  shape.queries_end_at_ends = true;
  require(shape.ends != nullptr || shape.block_table == nullptr, op, ": lengths: needed with a block_table, got none");
  Backend::check_same_device(op, q_latent, {{"block_table", block_table}, {"starts", starts}, {"lengths", lengths}});
  Backend::check_values(op, shape);
  require(num_splits >= 0 && num_splits <= kMaxSplits, op, ": num_splits: expected 0 (automatic) to ", kMaxSplits,
          ", got ", num_splits);
  const Backend backend(op, q_latent);
  params.num_splits = num_splits > 0 ? num_splits : backend.num_splits(shape);
  return run_forward(backend, in, params);
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> latent_attention_backward(
    Tensor d_out, OptionalTensor d_lse, Tensor q_latent, Tensor q_rope, Tensor c_kv, Tensor k_rope, Tensor out,
    Tensor lse, OptionalTensor starts, OptionalTensor ends, OptionalTensor query_positions, double softmax_scale,
    bool causal, int64_t window, double softcap) {
  constexpr const char* op = "latent_attention_backward";
  const Inputs in{q_latent, q_rope, c_kv, k_rope};
  BackwardParams params;
  const RangeInputs ranges{starts, ends, query_positions};
  params.shape = check_attention<Backend>(op, in, ranges, softmax_scale, causal, window, softcap);
  const AttentionShape& shape = params.shape;
  check_saved(op, shape, q_latent, d_out, d_lse, out, lse);
  Backend::check_same_device(op, q_latent, {{"d_out", d_out}, {"d_lse", d_lse}, {"out", out}, {"lse", lse}});
  const Backend backend(op, q_latent);
  if (d_lse.has_value()) d_lse = torch::stable::contiguous(*d_lse);
  Tensor delta = torch::stable::new_empty(lse, lse.sizes());
  Tensor d_q_latent = empty(q_latent, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  Tensor d_q_rope = empty(q_rope, {shape.batch, shape.num_queries, shape.num_heads, shape.rope});
  Tensor d_c_kv = empty(c_kv, {shape.batch, shape.num_tokens, shape.rank});
  Tensor d_k_rope = empty(k_rope, {shape.batch, shape.num_tokens, shape.rope});
  view_inputs(in, params.q_latent, params.q_rope, params.c_kv, params.k_rope);
  params.d_out = heads_view(d_out);
  params.lse = static_cast<const float*>(lse.const_data_ptr());
  params.d_q_latent = d_q_latent.mutable_data_ptr(), params.d_q_rope = d_q_rope.mutable_data_ptr();
  params.num_groups = backend.num_groups(shape);
  SavedForward saved;
  saved.out = out.const_data_ptr();
  if (d_lse.has_value()) saved.d_lse = static_cast<const float*>(d_lse->const_data_ptr());
  saved.delta = static_cast<float*>(delta.mutable_data_ptr());
  params.delta = saved.delta;
  backend.backward(params, saved, TokenGradients{d_c_kv.mutable_data_ptr(), d_k_rope.mutable_data_ptr()}, lse);
  return {d_q_latent, d_q_rope, d_c_kv, d_k_rope};
}

}  // namespace xeco
