// How host code that is free of torch and of the vendor's runtime starts kernels: by the one function that launch.cu
// gives it.
#pragma once

#include <cstdint>

namespace xeco::gpu {

// The stream that kernels are started on, and what its device has.
struct Stream {
  void* handle = nullptr;
  int64_t max_shared_bytes = 0;     // that a block may have
  int64_t shared_bytes_per_sm = 0;  // that the blocks of one multiprocessor may have together
  int num_sms = 0;                  // multiprocessors, or compute units
  int max_stages = 4;
  // Starts a kernel with `arguments` (pointers to them) and throws where that fails.
  void (*start)(const Stream& stream, const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                void** arguments) = nullptr;
};

#if !defined(XECO_GPU_MACHINE)
template <class... Arguments>
void launch(const Stream& stream, void (*kernel)(Arguments...), int64_t blocks, int threads, int64_t shared_bytes,
            Arguments... arguments) {
  if (blocks == 0) return;
  void* pointers[] = {static_cast<void*>(&arguments)...};
  stream.start(stream, reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes, pointers);
}
#endif

}  // namespace xeco::gpu
