// What every backend of latent attention checks before it runs, without reading data: shapes, dtypes, settings. One
// sentence each.
#pragma once

#include <limits>

#include "latent_attention/params.h"
#include "code_checks.h"

namespace xeco {

struct Inputs {
  const Tensor &q_latent, &q_rope, &c_kv, &k_rope;
};

// How cached numbers are stored: 16 bits stand for the dtype of the queries.
struct CacheBits {
  int64_t latent = 16, rope = 16;
};

inline void check_codes(const char* op, const char* name, const Tensor& rows, const char* bits_name, int64_t bits,
                        int64_t width, int64_t outer, int64_t tokens) {
  check_layout(op, name, bits_name, bits, width);
  check_tensor(op, name, rows, {outer, tokens, code_row_bytes(width, bits)});
  check_dtype(op, name, rows, ScalarType::Byte, "uint8");
}

// Shapes and dtypes of the four inputs. A paged cache has pages where a contiguous one has sequences.
inline AttentionShape check_inputs(const char* op, const Inputs& in, bool paged, CacheBits bits = {}) {
  AttentionShape shape;
  check_tensor(op, "q_latent", in.q_latent, {-1, -1, -1, -1});
  shape.dtype = float_dtype(op, "q_latent", in.q_latent);
  shape.batch = in.q_latent.size(0), shape.num_queries = in.q_latent.size(1);
  shape.num_heads = in.q_latent.size(2), shape.rank = in.q_latent.size(3);
  check_tensor(op, "q_rope", in.q_rope, {shape.batch, shape.num_queries, shape.num_heads, -1});
  shape.rope = in.q_rope.size(3);
  check_same_dtype(op, "q_rope", in.q_rope, "q_latent", in.q_latent);
  if (bits.latent != 16) {
    check_tensor(op, "c_kv", in.c_kv, {shape.batch, -1, -1});
    check_codes(op, "c_kv", in.c_kv, "latent_bits", bits.latent, shape.rank, shape.batch, -1);
    check_codes(op, "k_rope", in.k_rope, "rope_bits", bits.rope, shape.rope, shape.batch, in.c_kv.size(1));
    shape.latent_bits = bits.latent, shape.rope_bits = bits.rope;
  } else {
    check_tensor(op, "c_kv", in.c_kv, {paged ? -1 : shape.batch, -1, shape.rank});
    check_tensor(op, "k_rope", in.k_rope, {in.c_kv.size(0), in.c_kv.size(1), shape.rope});
    check_same_dtype(op, "c_kv", in.c_kv, "q_latent", in.q_latent);
    check_same_dtype(op, "k_rope", in.k_rope, "q_latent", in.q_latent);
  }
  require(shape.rank >= 1 && shape.rank <= kMaxRank, op, ": q_latent: expected a width (kv_lora_rank) from 1 to ",
          kMaxRank, ", got ", shape.rank);
  require(shape.rope >= 1 && shape.rope <= kMaxRope, op, ": q_rope: expected a width (qk_rope_head_dim) from 1 to ",
          kMaxRope, ", got ", shape.rope);
  shape.num_tokens = in.c_kv.size(1);
  return shape;
}

inline void set_rule(const char* op, AttentionShape& shape, double softmax_scale, int64_t window, double softcap) {
  require(window >= 0, op, ": window: expected 0 (none) or a number of tokens, got ", window);
  require(softcap >= 0, op, ": softcap: expected 0 (none) or a positive number, got ", softcap);
  // Token numbers are compared as int32 in the kernels.
  require(shape.num_tokens < std::numeric_limits<int32_t>::max(), op, ": c_kv: at most 2^31 - 2 tokens, got ",
          shape.num_tokens);
  shape.softmax_scale = static_cast<float>(softmax_scale);
  shape.softcap = static_cast<float>(softcap);
  shape.window = window;
}

inline void set_ranges(const char* op, AttentionShape& shape, bool causal, const OptionalTensor& starts,
                       const OptionalTensor& ends, const OptionalTensor& positions) {
  require(causal || shape.window == 0, op, ": window: needs causal attention");
  shape.causal = causal;
  shape.starts = int64_data(op, "starts", starts, shape.batch);
  shape.ends = int64_data(op, "ends", ends, shape.batch);
  shape.query_positions = int64_data(op, "query_positions", positions, shape.batch);
}

inline void set_pages(const char* op, AttentionShape& shape, const Inputs& in, const Tensor& block_table) {
  check_dtype(op, "block_table", block_table, ScalarType::Int, "int32");
  check_tensor(op, "block_table", block_table, {shape.batch, -1});
  shape.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  shape.block_table_stride = block_table.stride(0);
  shape.page_size = in.c_kv.size(1);
  require(shape.page_size > 0, op, ": c_kv: expected pages of at least one token, got ", shape_of(in.c_kv));
  shape.num_pages = in.c_kv.size(0);
  shape.num_tokens = block_table.size(1) * shape.page_size;
}

inline void check_saved(const char* op, const AttentionShape& shape, const Tensor& q_latent, const Tensor& d_out,
                        const OptionalTensor& d_lse, const Tensor& out, const Tensor& lse) {
  check_tensor(op, "d_out", d_out, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  check_tensor(op, "out", out, {shape.batch, shape.num_queries, shape.num_heads, shape.rank});
  check_tensor(op, "lse", lse, {shape.batch, shape.num_heads, shape.num_queries});
  check_same_dtype(op, "d_out", d_out, "q_latent", q_latent);
  check_same_dtype(op, "out", out, "q_latent", q_latent);
  check_dtype(op, "lse", lse, ScalarType::Float, "float32");
  require(out.is_contiguous() && lse.is_contiguous(), op,
          ": out and lse: expected them contiguous, as the forward op made them");
  if (!d_lse.has_value()) return;
  check_tensor(op, "d_lse", *d_lse, {shape.batch, shape.num_heads, shape.num_queries});
  check_dtype(op, "d_lse", *d_lse, ScalarType::Float, "float32");
}

}  // namespace xeco
