// Which instruction set the CPU kernels use: the best that was compiled, that the processor has and that the cap allows.
// Free of torch.
#pragma once

#include <string>
#include <vector>

namespace xeco {

enum class CpuLevel { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* level_name(CpuLevel level);
// Levels that this build has kernels for, lowest first.
std::vector<CpuLevel> compiled_levels();
// The highest compiled level that this processor and its operating system run.
CpuLevel detected_level();
// The level in force: detected_level(), or lower where capped by XECO_CPU_LEVEL or set_cpu_level().
CpuLevel cpu_level();
// Cap the level by name. Throws std::invalid_argument for an unknown name or one above detected_level().
void set_cpu_level(const std::string& name);

}  // namespace xeco
