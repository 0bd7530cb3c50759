#include "xeco/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace xeco {
namespace {

#if defined(XECO_X86_KERNELS)
// The kernel hands out the 8 KiB of tile registers only to processes that ask for them, once.
bool request_amx() {
#if defined(XECO_EMULATE_AMX)
  return true;
#elif defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool amx_bf16 = edx & (1u << 22), amx_tile = edx & (1u << 24);
  constexpr long kArchReqXcompPerm = 0x1023, kXtileData = 18;
  return amx_bf16 && amx_tile && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXtileData) == 0;
#else
  return false;
#endif
}

CpuLevel detect() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuLevel::kBaseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuLevel::kAvx2;
  if (!__builtin_cpu_supports("avx512vnni")) return CpuLevel::kAvx512;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuLevel::kAvx512Vnni;
  return request_amx() ? CpuLevel::kAmx : CpuLevel::kAvx512Bf16;
}
#else
CpuLevel detect() { return CpuLevel::kBaseline; }
#endif

CpuLevel level_by_name(const std::string& name) {
  std::string names;
  for (int i = 0; i < kNumCpuLevels; ++i) {
    if (name == kCpuLevelNames[i]) return static_cast<CpuLevel>(i);
    names += (i == 0 ? "" : i + 1 < kNumCpuLevels ? ", " : " or ") + std::string(kCpuLevelNames[i]);
  }
  throw std::invalid_argument("CPU level: expected " + names + ", found '" + name + "'");
}

// The environment can only lower the level: a machine without an instruction set cannot be told to use it.
CpuLevel initial_level() {
  const char* cap = std::getenv("XECO_CPU_LEVEL");
  if (cap == nullptr || *cap == '\0') return detected_level();
  return std::min(level_by_name(cap), detected_level());
}

std::atomic<CpuLevel>& current() {
  static std::atomic<CpuLevel> level{initial_level()};
  return level;
}

}  // namespace

const char* level_name(CpuLevel level) { return kCpuLevelNames[static_cast<int>(level)]; }

int num_compiled_levels() {
#if defined(XECO_X86_KERNELS)
  return kNumCpuLevels;
#else
  return 1;
#endif
}

CpuLevel detected_level() {
  static const CpuLevel level = detect();
  return level;
}

CpuLevel cpu_level() { return current().load(std::memory_order_relaxed); }

void set_cpu_level(const std::string& name) {
  const CpuLevel level = level_by_name(name);
  if (level > detected_level())
    throw std::invalid_argument("CPU level: '" + name + "' asked for, but this processor goes up to '" +
                                level_name(detected_level()) + "'");
  current().store(level, std::memory_order_relaxed);
}

}  // namespace xeco
