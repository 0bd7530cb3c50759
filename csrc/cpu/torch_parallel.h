// Work items on torch's threads, each taken by whichever thread is free.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "cpu/parallel.h"

namespace xeco {

inline void parallel_items(int64_t count, ItemBody body, void* context) {
  if (count == 1) return body(0, context);
  std::atomic<int64_t> next{0};
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads < count ? threads : count, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker)
      for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item, context);
  });
}

}  // namespace xeco
