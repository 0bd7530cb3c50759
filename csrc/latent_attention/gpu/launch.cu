// The ops of latent attention on a GPU: what is a GPU's own in latent_attention/ops.h, on the current stream. Nothing
// waits for the device, so a call can be captured in a CUDA graph; values that only the device knows (ranges, pages)
// are checked by the kernels, which trap where one is wrong.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>

#include "device/stream.h"
#include "latent_attention/gpu/kernels.h"
#include "latent_attention/ops.h"

namespace xeco {
namespace {

int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Gpu {
  Gpu(const char* op, const Tensor& q_latent) : stream(op, q_latent) {}

  static void check_limits(const char* op, const AttentionShape& shape) {
    require(
        shape.dtype != Dtype::kFloat32, op,
        ": q_latent: the fused GPU kernels take bfloat16 and float16, got float32; the plain-torch reference takes it");
    // Numbers of rows and tokens are int32 in the kernels, and so are those behind them that a tile is filled up with.
    constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max() - 1024;
    const int64_t rows = shape.num_queries * shape.num_heads;
    require(rows <= kMaxRows, op, ": q_latent: at most ", kMaxRows,
            " query rows (tokens times heads) of one sequence, got ", rows);
    require(shape.num_tokens <= kMaxRows, op, ": c_kv: at most ", kMaxRows, " tokens of one sequence, got ",
            shape.num_tokens);
  }

  static void check_same_device(const char* op, const Tensor& first, std::initializer_list<NamedTensor> tensors) {
    xeco::check_same_device(op, first, tensors);
  }

  static void check_values(const char*, const AttentionShape&) {}  // the kernels do

  // As many parts as fill the multiprocessors once, none shorter than 256 tokens. Shapes alone decide, since lengths
  // are on the device; the number of multiprocessors too, so results are the same on every run of one kind of device.
  int64_t num_splits(const AttentionShape& shape) const {
    constexpr int64_t kLeastTokens = 256;
    const gpu::ForwardBlocks fit = (is_packed(shape) ? gpu::packed_blocks : gpu::forward_blocks)(shape, stream.get());
    const int64_t rows = shape.num_queries * shape.num_heads;
    const int64_t blocks = std::max<int64_t>(1, shape.batch * divided_up(rows, fit.rows));
    return std::clamp<int64_t>(fit.resident * stream.get().num_sms / blocks, 1,
                               std::clamp<int64_t>(shape.num_tokens / kLeastTokens, 1, kMaxSplits));
  }

  // Enough groups of query rows to give every multiprocessor two blocks of the token gradient; their float32 sums take
  // no more memory than the gradient of the queries does.
  int64_t num_groups(const AttentionShape& shape) const {
    constexpr int64_t kTokens = 64, kRows = 64, kMaxGroups = 16;
    const int64_t rows = shape.num_queries * shape.num_heads;
    const int64_t blocks = std::max<int64_t>(1, shape.batch * divided_up(shape.num_tokens, kTokens));
    const int64_t for_all_sms = std::min(kMaxGroups, 2 * stream.get().num_sms / blocks);
    const int64_t affordable = std::min(rows / std::max<int64_t>(1, shape.num_tokens), divided_up(rows, kRows));
    return std::max<int64_t>(1, std::min(for_all_sms, affordable));
  }

  void forward(const ForwardParams& params, const Tensor& lse) const {
    const AttentionShape& shape = params.shape;
    const int64_t row_parts = shape.batch * shape.num_queries * shape.num_heads * params.num_splits;
    gpu::Parts parts;
    // One allocation: sums, then states. It may be freed when this returns: the allocator hands it out again in stream
    // order.
    Tensor scratch = torch::stable::new_empty(lse, {params.num_splits > 1 ? row_parts * (shape.rank + 2) : 0});
    if (params.num_splits > 1) {
      parts.sums = static_cast<float*>(scratch.mutable_data_ptr());
      parts.states = parts.sums + row_parts * shape.rank;
    }
    const bool is_bfloat16 = shape.dtype == Dtype::kBFloat16;
    if (is_packed(shape))
      (is_bfloat16 ? gpu::packed_bfloat16 : gpu::packed_float16)(params, parts, stream.get());
    else
      (is_bfloat16 ? gpu::forward_bfloat16 : gpu::forward_float16)(params, parts, stream.get());
  }

  void backward(BackwardParams& params, const SavedForward& saved, const TokenGradients& to, const Tensor& lse) const {
    const AttentionShape& shape = params.shape;
    const int64_t width = padded_width(shape.rank) + padded_width(shape.rope);
    const int64_t rows = shape.batch * params.num_groups * shape.num_tokens;
    Tensor sums = torch::stable::new_empty(lse, {params.num_groups > 1 ? rows * width : 0});
    params.d_rows = static_cast<float*>(sums.mutable_data_ptr());
    (shape.dtype == Dtype::kBFloat16 ? gpu::backward_bfloat16 : gpu::backward_float16)(params, saved, to, stream.get());
  }

  DeviceStream stream;
};

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CUDA, m) {
  m.impl("latent_attention", TORCH_BOX(&xeco::latent_attention<xeco::Gpu>));
  m.impl("latent_attention_backward", TORCH_BOX(&xeco::latent_attention_backward<xeco::Gpu>));
  m.impl("latent_attention_decode", TORCH_BOX(&xeco::latent_attention_decode<xeco::Gpu>));
  m.impl("latent_attention_packed", TORCH_BOX(&xeco::latent_attention_packed<xeco::Gpu>));
}
