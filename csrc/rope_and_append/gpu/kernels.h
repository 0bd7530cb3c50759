// The GPU kernel of rope_and_append, by dtype: what launch.cu calls. Free of torch.
#pragma once

#include "rope_and_append/params.h"
#include "xeco/gpu/launch.h"

namespace xeco::gpu {

// dtype: of the rows and caches. wide_angles: cos and sin are float32, else in that dtype.
void rope_and_append(const AppendParams& params, Dtype dtype, bool wide_angles, const Stream& stream);

}  // namespace xeco::gpu
