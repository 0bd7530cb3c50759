// The op xeco::pack_rows on the CPU: rows of a cache as codes with a scale. Schema and reference are in
// xeco_convert/ops/_pack_rows.py; both give the same bytes.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>

#include "pack_rows/checks.h"

namespace xeco {
inline float nearest(float x) { return std::nearbyint(x); }
inline float whole(float x) { return std::floor(x); }
inline double root(double x) { return std::sqrt(x); }
}  // namespace xeco

#define XECO_ROW inline
#include "pack_rows/row-inl.h"

namespace xeco {
namespace {

uint16_t to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fc0;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The scale of a row as it is stored: of the two that its runs ask for the one with the smaller error.
uint16_t scale_of(const float* row, const PackParams& params) {
  Scales wanted{0, 0};
  for (int bits = 1; bits <= 8; ++bits) {
    const Run run = run_of(params.bits, params.width, bits);
    if (run.first >= run.end) continue;
    const Scales scales = scales_for(row, run, params.bits);
    wanted = {larger_scale(wanted.clipped, scales.clipped), larger_scale(wanted.whole, scales.whole)};
  }
  const uint16_t clipped = to_bfloat16(static_cast<float>(least_scale(wanted.clipped)));
  const uint16_t whole = to_bfloat16(static_cast<float>(least_scale(wanted.whole)));
  if (clipped == whole) return clipped;
  double lost = 0, lost_whole = 0;
  for (int bits = 1; bits <= 8; ++bits) {
    const Run run = run_of(params.bits, params.width, bits);
    lost += error_of(row, run, from_bfloat16(clipped), params.bits);
    lost_whole += error_of(row, run, from_bfloat16(whole), params.bits);
  }
  return lost_whole < lost ? whole : clipped;
}

void pack_row(const float* row, const PackParams& params, uint8_t* to) {
  const uint16_t stored = scale_of(row, params);
  const float scale = from_bfloat16(stored);
  const int64_t pieces = num_pieces(params.bits, params.width);
  for (int64_t piece = 0; piece < pieces; ++piece) write_piece(row, params.width, params.bits, scale, piece, to);
  to += code_row_bytes(params.width, params.bits) - kScaleBytes;
  to[0] = static_cast<uint8_t>(stored & 255);
  to[1] = static_cast<uint8_t>(stored >> 8);
}

template <class T>
void pack(const PackParams& params) {
  const int64_t bytes = code_row_bytes(params.width, params.bits);
  torch::stable::parallel_for(0, params.batch * params.num_queries, 64, [&](int64_t first, int64_t last) {
    float numbers[kMostPlaneNumbers];
    for (int64_t i = first; i < last; ++i) {
      const int64_t b = i / params.num_queries, q = i % params.num_queries;
      const T* row =
          static_cast<const T*>(params.rows.data) + b * params.rows.outer_stride + q * params.rows.row_stride;
      for (int64_t k = 0; k < params.width; ++k) numbers[k] = static_cast<float>(row[k]);
      pack_row(numbers, params, params.out + i * bytes);
    }
  });
}

Tensor pack_rows(Tensor rows, int64_t layout) {
  const PackCall call = check_pack(rows, layout);
  if (call.dtype == Dtype::kFloat32) pack<float>(call.params);
  if (call.dtype == Dtype::kBFloat16) pack<torch::headeronly::BFloat16>(call.params);
  if (call.dtype == Dtype::kFloat16) pack<torch::headeronly::Half>(call.params);
  return call.out;
}

}  // namespace
}  // namespace xeco

STABLE_TORCH_LIBRARY_IMPL(xeco, CPU, m) { m.impl("pack_rows", TORCH_BOX(&xeco::pack_rows)); }
