// Checks of the tensors that an op is given: one sentence each, naming the op, the argument, what was expected and what
// it is. Uses libtorch's stable ABI alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "xeco/views.h"

namespace xeco {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

// Where the tensors of this library lie: the CPU for _C, an accelerator for _device (setup.py defines the macro there).
#if defined(XECO_DEVICE_LIBRARY)
inline bool is_served(const Tensor& tensor) { return tensor.is_cuda(); }
constexpr const char* kServedDevice = "a GPU";
constexpr const char* kServedDtypes =
    "the fused GPU kernels take bfloat16 and float16, and float32 where they only copy rows";
#else
inline bool is_served(const Tensor& tensor) { return tensor.is_cpu(); }
constexpr const char* kServedDevice = "the CPU";
constexpr const char* kServedDtypes = "the fused CPU kernels take float32, bfloat16 and float16";
#endif

// A tensor that an op is given, by the name that sentences have for it; null where it may be left out and is.
struct NamedTensor {
  NamedTensor(const char* name_, const Tensor& tensor_) : name(name_), tensor(&tensor_) {}
  NamedTensor(const char* name_, const OptionalTensor& tensor_)
      : name(name_), tensor(tensor_.has_value() ? &*tensor_ : nullptr) {}
  const char* name;
  const Tensor* tensor;
};

// Shape as given (-1: any size), on the library's device, last dimension dense.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool fits = tensor.dim() == static_cast<int64_t>(shape.size());
  std::string expected = "[";
  int64_t dim = 0;
  for (const int64_t size : shape) {
    fits = fits && (size < 0 || tensor.size(dim) == size);
    expected += (dim++ ? ", " : "") + (size < 0 ? std::string("any") : std::to_string(size));
  }
  require(fits, op, ": ", name, ": expected shape ", expected, "], got ", shape_of(tensor));
  require(is_served(tensor), op, ": ", name, ": expected a tensor on ", kServedDevice,
          ", as the others are, got one on another device");
  require(tensor.dim() == 0 || tensor.size(dim - 1) <= 1 || tensor.stride(dim - 1) == 1, op, ": ", name,
          ": expected a dense last dimension (stride 1), got stride ", tensor.stride(dim - 1),
          "; call .contiguous() first");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType expected,
                        const char* words) {
  require(tensor.scalar_type() == expected, op, ": ", name, ": expected dtype ", words, ", got another");
}

inline Dtype float_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::BFloat16) return Dtype::kBFloat16;
  require(dtype == ScalarType::Half, op, ": ", name, ": ", kServedDtypes, ", got another dtype");
  return Dtype::kFloat16;
}

inline void check_same_dtype(const char* op, const char* name, const Tensor& tensor, const char* other_name,
                             const Tensor& other) {
  require(tensor.scalar_type() == other.scalar_type(), op, ": ", name, ": expected the dtype of ", other_name,
          ", got another; one call takes one dtype");
}

// An int64 [B] tensor, or none. Returns its data; values are checked by the caller.
inline const int64_t* int64_data(const char* op, const char* name, const OptionalTensor& tensor, int64_t batch) {
  if (!tensor.has_value()) return nullptr;
  check_dtype(op, name, *tensor, ScalarType::Long, "int64");
  check_tensor(op, name, *tensor, {batch});
  return static_cast<const int64_t*>(tensor->const_data_ptr());
}

inline HeadsView heads_view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

inline RowsView rows_view(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

}  // namespace xeco
