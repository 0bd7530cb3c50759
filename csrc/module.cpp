// The Python module xeco_convert._C: facts about this build, and the level of the CPU kernels. Its import registers the
// kernels of the ops that xeco_convert/ops/ defines.
#include "python_module.h"

#include <map>
#include <string>
#include <vector>

#include "latent_attention/params.h"
#include "xeco/dispatch.h"

namespace {

std::vector<std::string> level_names(int count) { return {xeco::kCpuLevelNames, xeco::kCpuLevelNames + count}; }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of xeco-convert: facts about this build.";
  m.attr("version") = XECO_VERSION;
  m.attr("torch_target") = "2.10";
  m.attr("built_with_torch") = XECO_BUILT_WITH_TORCH;
  m.attr("cpu_levels") = level_names(xeco::kNumCpuLevels);
  m.attr("compiled_levels") = level_names(xeco::num_compiled_levels());
  m.attr("detected_level") = xeco::level_name(xeco::detected_level());
  m.attr("limits") = std::map<std::string, int64_t>{{"rank", xeco::kMaxRank},
                                                    {"rope", xeco::kMaxRope},
                                                    {"splits", xeco::kMaxSplits},
                                                    {"position", xeco::kMaxPosition}};
  m.attr("device_archs") = std::vector<std::string>{};  // the CPU module holds no device code
#if defined(XECO_EMULATE_AMX)
  m.attr("emulated") = std::vector<std::string>{"amx"};
#else
  m.attr("emulated") = std::vector<std::string>{};
#endif
  m.def(
      "cpu_level", [] { return std::string(xeco::level_name(xeco::cpu_level())); },
      "The level in force: what this processor has, or lower where capped.");
  m.def("set_cpu_level", &xeco::set_cpu_level, pybind11::arg("name"),
        "Cap the level of the CPU kernels. Raises ValueError for an unknown name or one above detected_level.");
  xeco::cpu_level();  // an XECO_CPU_LEVEL that names no level fails the import, not the first call
}
