// Which instruction set the CPU kernels use: the best that was compiled, that the processor has and that the cap
// allows. Free of torch.
#pragma once

#include <string>

namespace xeco {

// The one list of levels, lowest first: number and name. A level's kernels are in <op>/cpu/<name>.cpp, its name is that
// of XECO_CPU_LEVEL and of CPU_LEVELS in xeco_convert/ops/extension.py (tests/csrc/ compares them).
enum class CpuLevel { kBaseline = 0, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };
constexpr const char* kCpuLevelNames[] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr int kNumCpuLevels = sizeof(kCpuLevelNames) / sizeof(kCpuLevelNames[0]);
static_assert(kNumCpuLevels == static_cast<int>(CpuLevel::kAmx) + 1, "a name for each level");

const char* level_name(CpuLevel level);
// This build has kernels for the first so many levels: all of them for x86-64, the first for anything else.
int num_compiled_levels();
// The highest compiled level that this processor and its operating system run.
CpuLevel detected_level();
// The level in force: detected_level(), or lower where capped by XECO_CPU_LEVEL or set_cpu_level().
CpuLevel cpu_level();
// Cap the level by name. Throws std::invalid_argument for an unknown name or one above detected_level().
void set_cpu_level(const std::string& name);

}  // namespace xeco
