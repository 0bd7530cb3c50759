// The GPU kernel of pack_rows, by dtype: what launch.cu calls. Free of torch.
#pragma once

#include "pack_rows/params.h"
#include "xeco/gpu/launch.h"

namespace xeco::gpu {

void pack_rows(const PackParams& params, Dtype dtype, const Stream& stream);

}  // namespace xeco::gpu
