// The op xeco::pack_rows on the CPU: rows of a cache as codes with a scale. Schema and reference are in
// xeco_convert/ops/_pack_rows.py; both give the same bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "code_checks.h"

namespace xeco {
namespace {

constexpr const char* kOp = "pack_rows";
// Largest number that has a code of its own, in units of the row's rms, by bits: CLIP of packed_rows.py.
constexpr double kClip[9] = {0, 0.8, 1.55, 2.2, 2.75, 3.1, 3.4, 3.7, 4.0};
constexpr double kLeastScale = 0x1p-126;

uint16_t to_bfloat16(double value) {
  const float single = static_cast<float>(value);
  if (std::isnan(single)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest number of a run that is to have a code of its own; NaN where one of them is.
double reach(const float* row, int64_t count, int bits) {
  double largest = 0, squares = 0, odd = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double value = row[i];
    largest = std::max(largest, std::abs(value));
    squares += value * value;
    odd += value - value;  // NaN for what is not finite
  }
  if (std::isnan(odd) && std::isnan(squares)) return std::numeric_limits<double>::quiet_NaN();
  return std::min(largest, kClip[bits] * std::sqrt(squares / static_cast<double>(count)));
}

uint8_t clamped(float code, float most) {
  return std::isnan(code) ? 0 : static_cast<uint8_t>(std::min(std::max(code, 0.0f), most));
}

// Codes of 8 or 4 bits, and the scale.
uint16_t write_codes(const float* row, int64_t width, int bits, uint8_t* to) {
  const float most = static_cast<float>((1 << bits) - 1), middle = most / 2;
  const double wanted = reach(row, width, bits) / middle;
  const uint16_t stored = to_bfloat16(wanted < kLeastScale ? kLeastScale : wanted);
  const float scale = from_bfloat16(stored);
  const auto code = [&](int64_t i) { return clamped(std::nearbyint(row[i] / scale + middle), most); };
  if (bits == 8)
    for (int64_t i = 0; i < width; ++i) to[i] = code(i);
  else
    for (int64_t i = 0; i < width / 2; ++i) to[i] = static_cast<uint8_t>(code(i) | code(i + width / 2) << 4);
  return stored;
}

// Numbers [first, end) that as many planes reach.
struct Run {
  int bits;
  int64_t first, end;
};

std::vector<Run> runs_of(int64_t layout) {
  std::vector<Run> runs;
  for (int bits = kMostPlanes; bits > 0; --bits) {
    const int64_t first = bits < kMostPlanes ? plane_bytes(layout, bits) * 8 : 0;
    const int64_t end = plane_bytes(layout, bits - 1) * 8;
    if (first < end) runs.push_back({bits, first, end});
  }
  return runs;
}

// Bit planes, one behind the other, and the scale: large enough for each run.
uint16_t write_planes(const float* row, int64_t layout, const std::vector<Run>& runs, uint8_t* to) {
  double wanted = 0;
  for (const Run& run : runs) {
    const double of_run = reach(row + run.first, run.end - run.first, run.bits) / (128 - std::ldexp(1.0, 7 - run.bits));
    wanted = std::isnan(of_run) || of_run > wanted ? of_run : wanted;
    if (std::isnan(wanted)) break;
  }
  const uint16_t stored = to_bfloat16(wanted < kLeastScale ? kLeastScale : wanted);
  const float scale = from_bfloat16(stored);
  std::memset(to, 0, static_cast<size_t>(code_row_bytes(0, layout) - kScaleBytes));
  for (const Run& run : runs) {
    const float step = std::ldexp(1.0f, 8 - run.bits), half = std::ldexp(1.0f, run.bits - 1);
    for (int64_t i = run.first; i < run.end; ++i) {
      const int code = clamped(std::floor(row[i] / scale / step) + half, 2 * half - 1);
      uint8_t* plane = to;
      for (int p = 0; p < run.bits; ++p) {
        plane[i / 8] = static_cast<uint8_t>(plane[i / 8] | (code >> (run.bits - 1 - p) & 1) << i % 8);
        plane += plane_bytes(layout, p);
      }
    }
  }
  return stored;
}

template <class T>
void pack(const Tensor& rows, int64_t layout, uint8_t* out) {
  const int64_t width = rows.size(2), tokens = rows.size(1), bytes = code_row_bytes(width, layout);
  const T* data = static_cast<const T*>(rows.const_data_ptr());
  const int64_t steps[2] = {rows.stride(0), rows.stride(1)};
  const std::vector<Run> runs = lies_in_planes(layout) ? runs_of(layout) : std::vector<Run>();
  torch::stable::parallel_for(0, rows.size(0) * tokens, 64, [&](int64_t first, int64_t last) {
    std::vector<float> numbers(static_cast<size_t>(width));
    for (int64_t i = first; i < last; ++i) {
      const T* row = data + i / tokens * steps[0] + i % tokens * steps[1];
      for (int64_t k = 0; k < width; ++k) numbers[static_cast<size_t>(k)] = static_cast<float>(row[k]);
      uint8_t* to = out + i * bytes;
      const uint16_t scale = lies_in_planes(layout) ? write_planes(numbers.data(), layout, runs, to)
                                                    : write_codes(numbers.data(), width, static_cast<int>(layout), to);
      to[bytes - 2] = static_cast<uint8_t>(scale & 255);
      to[bytes - 1] = static_cast<uint8_t>(scale >> 8);
    }
  });
}

Tensor pack_rows(Tensor rows, int64_t layout) {
  check_tensor(kOp, "rows", rows, {-1, -1, -1});
  const Dtype dtype = float_dtype(kOp, "rows", rows);
  const int64_t width = rows.size(2);
  require(width > 0, kOp, ": rows: expected at least one number in a row, got ", shape_of(rows));
  check_layout(kOp, "rows", "layout", layout, width);
  Tensor out =
      torch::stable::new_empty(rows, {rows.size(0), rows.size(1), code_row_bytes(width, layout)}, ScalarType::Byte);
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data_ptr());
  if (dtype == Dtype::kFloat32) pack<float>(rows, layout, to);
  if (dtype == Dtype::kBFloat16) pack<torch::headeronly::BFloat16>(rows, layout, to);
  if (dtype == Dtype::kFloat16) pack<torch::headeronly::Half>(rows, layout, to);
  return out;
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) { m.impl("pack_rows", TORCH_BOX(&xeco::pack_rows)); }
