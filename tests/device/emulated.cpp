// The device kernels on the emulated GPU behind a C interface, for ctypes (tests/device/emulated.py).
#include <cstdio>
#include <exception>

#include "latent_attention/gpu/heuristics.cuh"
#include "latent_attention/gpu/kernels.h"
#include "pack_rows/gpu/kernels.h"
#include "rope_and_append/gpu/kernels.h"

namespace {

using namespace xeco;

// As ctypes sees it: plain numbers, in this order.
struct Shape {
  int64_t float16, batch, num_queries, num_tokens, num_heads, rank, rope, causal, window;
  const int64_t *starts, *ends, *query_positions;
  const int32_t* block_table;
  int64_t block_table_stride, page_size, num_pages, queries_end_at_ends, latent_bits, rope_bits;
  double softmax_scale, softcap;
};

// A tensor: where it lies, and the strides of all dimensions but the last.
struct View {
  const void* data;
  int64_t strides[3];
};

struct Limits {
  int64_t max_shared_bytes, shared_bytes_per_sm, max_stages;
};

AttentionShape shape_of(const Shape& from) {
  AttentionShape shape;
  shape.dtype = from.float16 ? Dtype::kFloat16 : Dtype::kBFloat16;
  shape.batch = from.batch, shape.num_queries = from.num_queries, shape.num_tokens = from.num_tokens;
  shape.num_heads = from.num_heads, shape.rank = from.rank, shape.rope = from.rope;
  shape.causal = from.causal != 0, shape.window = from.window;
  shape.starts = from.starts, shape.ends = from.ends, shape.query_positions = from.query_positions;
  shape.block_table = from.block_table, shape.block_table_stride = from.block_table_stride;
  shape.page_size = from.page_size, shape.num_pages = from.num_pages;
  shape.queries_end_at_ends = from.queries_end_at_ends != 0;
  shape.latent_bits = from.latent_bits, shape.rope_bits = from.rope_bits;
  shape.softmax_scale = static_cast<float>(from.softmax_scale), shape.softcap = static_cast<float>(from.softcap);
  return shape;
}

HeadsView heads(const View& view) { return {view.data, view.strides[0], view.strides[1], view.strides[2]}; }
RowsView rows(const View& view) { return {view.data, view.strides[0], view.strides[1]}; }

gpu::Stream stream_of(const Limits& limits) {
  gpu::Stream stream;
  stream.max_shared_bytes = limits.max_shared_bytes, stream.shared_bytes_per_sm = limits.shared_bytes_per_sm;
  stream.max_stages = static_cast<int>(limits.max_stages), stream.num_sms = 4;
  return stream;
}

// 0, or 1 where a thread stopped the kernel or the launch was refused.
template <class Run>
int guarded(const Run& run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulated GPU: %s\n", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

int64_t emulated_lanes() { return gpu::kLanes; }

void emulated_schedule(int64_t seed, int64_t without_barrier) {
  gpu::machine::set_schedule(static_cast<uint32_t>(seed), without_barrier);
}

int64_t emulated_barriers(int64_t launch) { return gpu::machine::num_barriers(static_cast<int>(launch)); }

// Of a block that needs `fixed` bytes of shared memory, and `each` more for every stage.
int64_t stages_of_block(int64_t fixed, int64_t each, const Limits* limits) {
  return gpu::stages_that_fit(stream_of(*limits), 2, [&](int stages) { return fixed + stages * each; });
}

// Query rows of a block of the forward pass, times 100, and how many blocks a multiprocessor holds.
int64_t blocks_of_forward(const Shape* shape, const Limits* limits) {
  const gpu::ForwardBlocks blocks = gpu::forward_blocks(shape_of(*shape), stream_of(*limits));
  return blocks.rows * 100 + blocks.resident;
}

int emulated_forward(const Shape* shape, const View* q_latent, const View* q_rope, const View* c_kv, const View* k_rope,
                     void* out, float* lse, int64_t num_splits, float* part_sums, float* part_states,
                     const Limits* limits) {
  ForwardParams params;
  params.shape = shape_of(*shape);
  params.q_latent = heads(*q_latent), params.q_rope = heads(*q_rope);
  params.c_kv = rows(*c_kv), params.k_rope = rows(*k_rope);
  params.out = out, params.lse = lse, params.num_splits = num_splits;
  const gpu::Parts parts{part_sums, part_states};
  const auto bfloat16 = is_packed(params.shape) ? gpu::packed_bfloat16 : gpu::forward_bfloat16;
  const auto float16 = is_packed(params.shape) ? gpu::packed_float16 : gpu::forward_float16;
  return guarded([&] { (shape->float16 ? float16 : bfloat16)(params, parts, stream_of(*limits)); });
}

int emulated_backward(const Shape* shape, const View* d_out, const float* d_lse, const View* q_latent,
                      const View* q_rope, const View* c_kv, const View* k_rope, const void* out, const float* lse,
                      float* delta, int64_t num_groups, float* sums, void* d_q_latent, void* d_q_rope, void* d_c_kv,
                      void* d_k_rope, const Limits* limits) {
  BackwardParams params;
  params.shape = shape_of(*shape);
  params.q_latent = heads(*q_latent), params.q_rope = heads(*q_rope), params.d_out = heads(*d_out);
  params.c_kv = rows(*c_kv), params.k_rope = rows(*k_rope);
  params.lse = lse, params.delta = delta, params.d_q_latent = d_q_latent, params.d_q_rope = d_q_rope;
  params.d_rows = sums, params.num_groups = num_groups;
  const SavedForward saved{out, d_lse, delta};
  const TokenGradients to{d_c_kv, d_k_rope};
  return guarded([&] {
    (shape->float16 ? gpu::backward_float16 : gpu::backward_bfloat16)(params, saved, to, stream_of(*limits));
  });
}

int emulated_append(int64_t dtype, int64_t wide_angles, const int64_t* sizes, const View* views,
                    const int64_t* positions, const int32_t* block_table, const int64_t* pages, const Limits* limits) {
  AppendParams params;
  params.batch = sizes[0], params.num_queries = sizes[1], params.rank = sizes[2], params.rope = sizes[3];
  params.c_kv = rows(views[0]), params.k_rope = rows(views[1]), params.cos = rows(views[2]),
  params.sin = rows(views[3]);
  params.c_kv_cache = rows(views[4]), params.k_rope_cache = rows(views[5]);
  params.positions = positions, params.block_table = block_table;
  params.block_table_stride = pages[0], params.page_size = pages[1], params.capacity = pages[2],
  params.num_pages = pages[3];
  return guarded(
      [&] { gpu::rope_and_append(params, static_cast<Dtype>(dtype), wide_angles != 0, stream_of(*limits)); });
}

int emulated_pack(int64_t dtype, const int64_t* sizes, const View* view, int64_t layout, uint8_t* out,
                  const Limits* limits) {
  PackParams params;
  params.batch = sizes[0], params.num_queries = sizes[1], params.width = sizes[2];
  params.rows = rows(*view), params.bits = layout, params.out = out;
  return guarded([&] { gpu::pack_rows(params, static_cast<Dtype>(dtype), stream_of(*limits)); });
}

// Tests of the layouts by themselves: C [16, 16] = A [16, 16] · Bᵀ, then C as an operand times another; a and b [16,
// 16] of bfloat16, `transposed` says that b lies as [k][column].

int emulated_product(const uint16_t* a, const uint16_t* b, int64_t transposed, int64_t again, float* c) {
  using namespace xeco::gpu;
  return guarded([&] {
    machine::run(1, kLanes, 2 * 16 * 24 * 2, [&] {
      uint16_t *left = reinterpret_cast<uint16_t*>(shared_memory()), *right = left + 16 * 24;
      for (int i = thread_index(); i < 256; i += kLanes) {
        left[i / 16 * 24 + i % 16] = a[i];
        right[i / 16 * 24 + i % 16] = b[i];
      }
      sync_block();
      Accumulator sums, out;
      clear(sums), clear(out);
      const Operand columns = transposed ? load_columns(right, 24) : load_rows(right, 24);
      multiply<BFloat16>(sums, load_rows(left, 24), columns);
      if (again) multiply<BFloat16>(out, as_operand<BFloat16>(sums), columns);
      const Accumulator& from = again ? out : sums;
      for (int e = 0; e < Layout::kFloats; ++e)
        c[Layout::row(lane_index(), Layout::slot(e)) * 16 + Layout::column(lane_index(), e)] = from.values[e];
    });
  });
}

// Where the layout says that element `element` of lane `lane` lies: of an operand {index, k}, of an accumulator {row,
// column}.
void layout_of_operand(int64_t lane, int64_t element, int64_t* at) {
  at[0] = gpu::Layout::operand_index(static_cast<int>(lane), static_cast<int>(element));
  at[1] = gpu::Layout::operand_k(static_cast<int>(lane), static_cast<int>(element));
}

void layout_of_accumulator(int64_t lane, int64_t element, int64_t* at) {
  at[0] = gpu::Layout::row(static_cast<int>(lane), gpu::Layout::slot(static_cast<int>(element)));
  at[1] = gpu::Layout::column(static_cast<int>(lane), static_cast<int>(element));
}

float widened(int64_t float16, int64_t bits) {
  return float16 ? gpu::Float16::widen(static_cast<uint16_t>(bits)) : gpu::BFloat16::widen(static_cast<uint16_t>(bits));
}

int64_t rounded(int64_t float16, float value) {
  return float16 ? gpu::Float16::round(value) : gpu::BFloat16::round(value);
}

}  // extern "C"
