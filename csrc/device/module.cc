// The Python module xeco_convert._device: facts about the device library. Its import registers the GPU kernels of the
// ops that xeco_convert/ops/ defines; it is imported only where torch has that backend.
#include "python_module.h"

PYBIND11_MODULE(_device, m) {
  m.doc() = "GPU kernels of xeco-convert: facts about this build.";
  m.attr("version") = XECO_VERSION;
  m.attr("torch_target") = "2.10";
  m.attr("built_with_torch") = XECO_BUILT_WITH_TORCH;
  m.attr("backend") = XECO_DEVICE_BACKEND;
  m.attr("device_archs") = XECO_DEVICE_ARCHS;  // as given to the build, "" for the build's default
}
