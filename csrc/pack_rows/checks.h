// What every backend of pack_rows checks before it runs, without reading data; and its result.
#pragma once

#include "code_checks.h"
#include "pack_rows/params.h"

namespace xeco {

constexpr const char* kPackOp = "pack_rows";

struct PackCall {
  PackParams params;
  Dtype dtype;
  Tensor out;
};

inline PackCall check_pack(const Tensor& rows, int64_t layout) {
  check_tensor(kPackOp, "rows", rows, {-1, -1, -1});
  PackParams params;
  params.batch = rows.size(0), params.num_queries = rows.size(1), params.width = rows.size(2), params.bits = layout;
  const Dtype dtype = float_dtype(kPackOp, "rows", rows);
  require(params.width > 0, kPackOp, ": rows: expected at least one number in a row, got ", shape_of(rows));
  check_layout(kPackOp, "rows", "bits", layout, params.width);
  require(params.width <= kMostPlaneNumbers, kPackOp, ": rows: expected at most ", kMostPlaneNumbers,
          " numbers in a row, got ", params.width);
  Tensor out = torch::stable::new_empty(rows, {params.batch, params.num_queries, code_row_bytes(params.width, layout)},
                                        ScalarType::Byte);
  params.rows = rows_view(rows);
  params.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  return {params, dtype, out};
}

}  // namespace xeco
