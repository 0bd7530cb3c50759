// The GPU kernels of latent attention, by dtype: what launch.cu calls. Free of torch.
#pragma once

#include "latent_attention/params.h"
#include "xeco/gpu/launch.h"

namespace xeco::gpu {

// Unnormalised results of the parts that the tokens are divided into: sums [B, Q·H, num_splits, R], and (m, l) of each
// [B, Q·H, num_splits, 2]. Null where they are not divided.
struct Parts {
  float* sums = nullptr;
  float* states = nullptr;
};

// The blocks of a forward call: query rows of each, and how many of them a multiprocessor holds at once.
struct ForwardBlocks {
  int64_t rows = 1, resident = 1;
};

// The same for both dtypes; packed: rows of codes.
ForwardBlocks forward_blocks(const AttentionShape& shape, const Stream& stream);
ForwardBlocks packed_blocks(const AttentionShape& shape, const Stream& stream);

// backward: where the query rows are divided into groups, params.d_rows takes float32 sums of each.
void forward_bfloat16(const ForwardParams& params, const Parts& parts, const Stream& stream);
void forward_float16(const ForwardParams& params, const Parts& parts, const Stream& stream);
void packed_bfloat16(const ForwardParams& params, const Parts& parts, const Stream& stream);
void packed_float16(const ForwardParams& params, const Parts& parts, const Stream& stream);
void backward_bfloat16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                       const Stream& stream);
void backward_float16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to,
                      const Stream& stream);

}  // namespace xeco::gpu
