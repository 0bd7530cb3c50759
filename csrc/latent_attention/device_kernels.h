// The device kernels, by dtype: what launch.cu calls. Free of torch.
#pragma once

#include "xeco/gpu/launch.h"
#include "xeco/params.h"

namespace xeco::gpu {

// Unnormalised results of the parts that the tokens are divided into: sums [B, Q·H, num_splits, R], and (m, l) of each
// [B, Q·H, num_splits, 2]. Null where they are not divided.
struct Parts {
  float* sums = nullptr;
  float* states = nullptr;
};

// Gradients of the cached rows, in the dtype of the inputs. Where the query rows are divided into groups, float32 sums of
// each are in BackwardParams::d_rows [B, num_groups, T, padded R + padded P].
struct TokenGradients {
  void* d_c_kv = nullptr;    // [B, T, R]
  void* d_k_rope = nullptr;  // [B, T, P]
};

// What backward needs besides: out [B, Q, H, R] contiguous, d_lse [B, H, Q] or null; delta is written first.
struct SavedForward {
  const void* out = nullptr;
  const float* d_lse = nullptr;
  float* delta = nullptr;
};

void forward_bfloat16(const ForwardParams& params, const Parts& parts, const Queue& queue);
void forward_float16(const ForwardParams& params, const Parts& parts, const Queue& queue);
void backward_bfloat16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to, const Queue& queue);
void backward_float16(const BackwardParams& params, const SavedForward& saved, const TokenGradients& to, const Queue& queue);

}  // namespace xeco::gpu
