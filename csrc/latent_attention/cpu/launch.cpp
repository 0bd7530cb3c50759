// The ops of latent attention on the CPU: what is the CPU's own in latent_attention/ops.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "cpu/torch_parallel.h"
#include "latent_attention/cpu/kernels.h"
#include "latent_attention/ops.h"
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
  return baseline_kernels(shape.dtype);
}

CpuKernels choose_code_kernels(const AttentionShape& shape) {
#if defined(XECO_X86_KERNELS)
  const CpuLevel level = cpu_level();
  if (level >= CpuLevel::kAvx512Vnni) return avx512_vnni_code_kernels(shape.dtype);
  if (level >= CpuLevel::kAvx512) return avx512_code_kernels(shape.dtype);
  if (level >= CpuLevel::kAvx2) return avx2_code_kernels(shape.dtype);
#endif
  return baseline_code_kernels(shape.dtype);
}

// Calls body(T{}) with the type of a dtype's numbers.
template <class Body>
void with_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kFloat32) return body(float{});
  if (dtype == Dtype::kBFloat16) return body(torch::headeronly::BFloat16{});
  body(torch::headeronly::Half{});
}

// Values within [low, high] keep the kernels' sums of them far from overflow.
void check_range(const char* op, const char* name, const int64_t* values, int64_t count, int64_t low, int64_t high) {
  for (int64_t b = 0; values != nullptr && b < count; ++b)
    require(values[b] >= low && values[b] <= high, op, ": ", name, ": expected values from ", low, " to ", high,
            ", got ", values[b], " for sequence ", b);
}

// Every page that a sequence uses must exist. starts and ends: the tokens that are read.
void check_pages(const char* op, const AttentionShape& shape) {
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t first = shape.starts == nullptr ? 0 : shape.starts[b];
    for (int64_t index = first / shape.page_size; index * shape.page_size < shape.ends[b]; ++index) {
      const int32_t page = shape.block_table[b * shape.block_table_stride + index];
      require(page >= 0 && page < shape.num_pages, op, ": block_table: expected pages from 0 to ", shape.num_pages - 1,
              ", got ", page, " at [", b, ", ", index, "]");
    }
  }
}

template <class T>
void fill_delta(const BackwardParams& params, const SavedForward& saved) {
  const AttentionShape& shape = params.shape;
  const HeadsView& d_out = params.d_out;
  const int64_t heads = shape.num_heads, queries = shape.num_queries;
  torch::stable::parallel_for(0, shape.batch * queries, 64, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t b = i / queries, q = i % queries;
        const T* left =
            static_cast<const T*>(d_out.data) + b * d_out.batch_stride + q * d_out.query_stride + h * d_out.head_stride;
        const T* right = static_cast<const T*>(saved.out) + (i * heads + h) * shape.rank;
        float sum = 0.0f;
        for (int64_t r = 0; r < shape.rank; ++r) sum += static_cast<float>(left[r]) * static_cast<float>(right[r]);
        const int64_t at = (b * heads + h) * queries + q;
        saved.delta[at] = sum - (saved.d_lse == nullptr ? 0.0f : saved.d_lse[at]);
      }
  });
}

// Columns [offset, offset + width) of the float32 sums, the groups added in their order and rounded once.
template <class T>
void write_rows(const BackwardParams& params, int64_t offset, int64_t width, void* out) {
  const int64_t tokens = params.shape.num_tokens, groups = params.num_groups;
  const int64_t stride = padded_width(params.shape.rank) + padded_width(params.shape.rope);
  T* to = static_cast<T*>(out);
  torch::stable::parallel_for(0, params.shape.batch * tokens, 64, [&](int64_t first, int64_t last) {
    std::vector<float> row(static_cast<size_t>(width));
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / tokens, t = i % tokens;
      std::fill(row.begin(), row.end(), 0.0f);
      for (int64_t g = 0; g < groups; ++g) {
        const float* from = params.d_rows + ((b * groups + g) * tokens + t) * stride + offset;
        for (int64_t r = 0; r < width; ++r) row[static_cast<size_t>(r)] += from[r];
      }
      for (int64_t r = 0; r < width; ++r) to[i * width + r] = static_cast<T>(row[static_cast<size_t>(r)]);
    }
  });
}

struct Cpu {
  Cpu(const char*, const Tensor&) {}

  static void check_limits(const char*, const AttentionShape&) {}
  static void check_same_device(const char*, const Tensor&, std::initializer_list<NamedTensor>) {}  // there is one

  static void check_values(const char* op, const AttentionShape& shape) {
    const char* ends = shape.queries_end_at_ends ? "lengths" : "ends";
    check_range(op, "starts", shape.starts, shape.batch, 0, shape.num_tokens);
    check_range(op, ends, shape.ends, shape.batch, 0, shape.num_tokens);
    check_range(op, "query_positions", shape.query_positions, shape.batch, -kMaxPosition, kMaxPosition);
    if (shape.block_table != nullptr) check_pages(op, shape);
  }

  // Enough parts to keep many threads busy where there are few query rows, none shorter than 512 tokens. It depends on
  // the shapes alone, so that the result does not depend on the number of threads.
  int64_t num_splits(const AttentionShape& shape) const {
    constexpr int64_t kItems = 32, kLeastTokens = 512;
    const int64_t blocks = std::max<int64_t>(1, shape.batch * num_blocks(shape));
    return std::clamp<int64_t>(shape.num_tokens / kLeastTokens, 1, std::max<int64_t>(1, kItems / blocks));
  }

  // As many groups as rows of the queries outnumber the tokens, so that their sums take no more memory than the
  // gradient of the queries does; at most 16 items.
  int64_t num_groups(const AttentionShape& shape) const {
    constexpr int64_t kItems = 16;
    const int64_t for_all_threads = std::max<int64_t>(1, kItems / std::max<int64_t>(1, shape.batch));
    const int64_t affordable = shape.num_queries * shape.num_heads / std::max<int64_t>(1, shape.num_tokens);
    return std::max<int64_t>(1, std::min({for_all_threads, affordable, num_blocks(shape)}));
  }

  void forward(const ForwardParams& params, const Tensor&) const {
    (is_packed(params.shape) ? choose_code_kernels(params.shape) : choose_kernels(params.shape))
        .forward(params, parallel_items);
  }

  void backward(BackwardParams& params, const SavedForward& saved, const TokenGradients& to, const Tensor& lse) const {
    const AttentionShape& shape = params.shape;
    const int64_t padded_rank = padded_width(shape.rank), width = padded_rank + padded_width(shape.rope);
    Tensor sums = torch::stable::new_zeros(lse, {shape.batch, params.num_groups, shape.num_tokens, width});
    params.d_rows = static_cast<float*>(sums.mutable_data_ptr());
    with_type(shape.dtype, [&](auto number) {
      using T = decltype(number);
      fill_delta<T>(params, saved);
      if (lse.numel() > 0) choose_kernels(shape).backward(params, parallel_items);
      write_rows<T>(params, 0, shape.rank, to.d_c_kv);
      write_rows<T>(params, padded_rank, shape.rope, to.d_k_rope);
    });
  }
};

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) {
  m.impl("latent_attention", TORCH_BOX(&xeco::latent_attention<xeco::Cpu>));
  m.impl("latent_attention_backward", TORCH_BOX(&xeco::latent_attention_backward<xeco::Cpu>));
  m.impl("latent_attention_decode", TORCH_BOX(&xeco::latent_attention_decode<xeco::Cpu>));
  m.impl("latent_attention_packed", TORCH_BOX(&xeco::latent_attention_packed<xeco::Cpu>));
}
