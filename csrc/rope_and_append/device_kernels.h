// The device kernel of rope_and_append, by dtype: what launch.cu calls. Free of torch.
#pragma once

#include "xeco/gpu/launch.h"
#include "xeco/params.h"

namespace xeco::gpu {

// dtype: of the rows and caches. wide_angles: cos and sin are float32, else in that dtype.
void rope_and_append(const AppendParams& params, Dtype dtype, bool wide_angles, const Queue& queue);

}  // namespace xeco::gpu
