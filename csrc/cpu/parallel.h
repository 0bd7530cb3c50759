// How a kernel that is free of torch runs its work on several threads.
#pragma once

#include <cstdint>

namespace xeco {

// Runs body(item, context) for every item in [0, count), on several threads at once, in any order.
using ItemBody = void (*)(int64_t item, void* context);
using ParallelItems = void (*)(int64_t count, ItemBody body, void* context);

}  // namespace xeco
