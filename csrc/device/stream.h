// The current stream of a tensor's device, and what that device has, for kernels that are free of torch. Included by
// launch.cu files alone. Written in CUDA's names: torch's hipify gives them HIP's.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <array>
#include <mutex>

#include "tensor_checks.h"
#include "xeco/gpu/launch.h"

namespace xeco {

// Makes a tensor's device the current one for as long as it lives, and knows its current stream.
class DeviceStream {
 public:
  DeviceStream(const char* op, const Tensor& tensor) : guard_(tensor.get_device_index()) {
    stream_ = facts(op, tensor.get_device_index());
    void* handle = nullptr;
    require(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &handle) == AOTI_TORCH_SUCCESS, op,
            ": torch has no current stream for this device");
    stream_.handle = handle;
    stream_.start = &start;
  }

  const gpu::Stream& get() const { return stream_; }

 private:
  static void check(cudaError_t error, const char* op, const char* what) {
    if (error != cudaSuccess) cudaGetLastError();  // or torch would report it again, of the next kernel that it starts
    require(error == cudaSuccess, op, ": ", what, " failed: ", cudaGetErrorString(error));
  }

  // Asked for once for each device: an attribute costs microseconds, more than a launch.
  static gpu::Stream facts(const char* op, int device) {
    constexpr int kMaxDevices = 64;
    static std::array<gpu::Stream, kMaxDevices> streams;
    static std::mutex mutex;
    require(device >= 0 && device < kMaxDevices, op, ": device ", device, ": at most ", kMaxDevices, " are supported");
    const std::lock_guard<std::mutex> lock(mutex);
    gpu::Stream& stream = streams[static_cast<size_t>(device)];
    if (stream.num_sms > 0) return stream;
    const auto attribute = [&](cudaDeviceAttr which) {
      int value = 0;
      check(cudaDeviceGetAttribute(&value, which, device), op, "asking what the device has");
      return value;
    };
    const int usual = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    stream.max_shared_bytes = std::max(usual, attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
    stream.shared_bytes_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    stream.num_sms = attribute(cudaDevAttrMultiProcessorCount);
    return stream;
  }

  static void start(const gpu::Stream& stream, const void* kernel, int64_t blocks, int threads, int64_t shared_bytes,
                    void** arguments) {
    constexpr const char* what = "starting a kernel";
    constexpr int64_t kWithoutAsking = 48 * 1024, kMaxBlocks = 0x7fffffff;
    require(blocks <= kMaxBlocks, what, ": ", blocks, " blocks are more than a grid can have; split the batch");
    if (shared_bytes > kWithoutAsking)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            what, "asking for shared memory");
    const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(threads));
    check(cudaLaunchKernel(kernel, grid, block, arguments, static_cast<size_t>(shared_bytes),
                           static_cast<cudaStream_t>(stream.handle)),
          what, "the launch");
    check(cudaGetLastError(), what, "the launch");
  }

  torch::stable::accelerator::DeviceGuard guard_;
  gpu::Stream stream_;
};

// The other tensors of a call lie where the first does.
inline void check_same_device(const char* op, const Tensor& first, std::initializer_list<NamedTensor> others) {
  for (const NamedTensor& other : others)
    require(other.tensor == nullptr || other.tensor->get_device_index() == first.get_device_index(), op, ": ",
            other.name, ": expected a tensor on device ", first.get_device_index(),
            " as the first one is, got one on device ", other.tensor == nullptr ? 0 : other.tensor->get_device_index());
}

}  // namespace xeco
