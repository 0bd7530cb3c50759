// Products of rows of codes with a panel, in integers, a block of rows after the other as gemm_panel in cpu/gemm-inl.h
// has them. Products says what a Code and a Panel are, and multiplies a block: ByteProducts (cpu/vnni_engine-inl.h),
// PairProducts (cpu/madd_engine-inl.h).
//
// The other factor, a query or the softmax weights of a tile, is rounded to integers of 15 bits in units of its largest
// number / kLargest. Its relative error of 3e-5 is far below that of the codes (2e-3 with 8 bits). Codes are unsigned;
// what their middle adds to each sum is taken off at the end:
//
//   sum over k of scale * (code_k - middle) * x_k = scale * (unit * sum of code_k * n_k - middle * unit * sum of n_k)

namespace xeco::XECO_ISA {

constexpr float kLargest = 127.0f * 128.0f;

template <class Products, int kRows, int kVectors, bool kAhead>
XECO_INLINE void code_last_rows(int64_t rows, int64_t depth, const typename Products::Code* a, int64_t row_step,
                                int64_t depth_step, const typename Products::Panel& b, float middle,
                                const float* scales, float* c, bool accumulate, const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      Products::template block<kRows, kVectors, kAhead>(depth, a, row_step, depth_step, b, middle, scales, c,
                                                        accumulate, ahead);
    else
      code_last_rows<Products, kRows - 1, kVectors, kAhead>(rows, depth, a, row_step, depth_step, b, middle, scales, c,
                                                            accumulate, ahead);
  }
}

template <class Products, int kVectors, bool kAhead>
static void code_rows(int64_t rows, int64_t depth, const typename Products::Code* a, int64_t row_step,
                      int64_t depth_step, const typename Products::Panel& b, float middle, const float* scales,
                      float* c, bool accumulate, const Ahead& ahead) {
  constexpr int kRowBlock = kRowBlocks[kVectors];
  constexpr int64_t kWidth = kVectors * kLanes;
  const auto scales_from = [&](int64_t i) { return scales == nullptr ? nullptr : scales + i; };
  int64_t i = 0;
  for (; i + kRowBlock <= rows; i += kRowBlock)
    Products::template block<kRowBlock, kVectors, kAhead>(depth, a + i * row_step, row_step, depth_step, b, middle,
                                                          scales_from(i), c + i * kWidth, accumulate,
                                                          ahead.from_row(i));
  code_last_rows<Products, kRowBlock - 1, kVectors, kAhead>(rows - i, depth, a + i * row_step, row_step, depth_step, b,
                                                            middle, scales_from(i), c + i * kWidth, accumulate,
                                                            ahead.from_row(i));
}

template <class Products, bool kAhead = false>
static void code_product(int64_t rows, int64_t depth, const typename Products::Code* a, int64_t row_step,
                         int64_t depth_step, const typename Products::Panel& b, int vectors, float middle,
                         const float* scales, float* c, bool accumulate, const Ahead& ahead = {}) {
  if (vectors == 1)
    code_rows<Products, 1, kAhead>(rows, depth, a, row_step, depth_step, b, middle, scales, c, accumulate, ahead);
  else
    code_rows<Products, 2, kAhead>(rows, depth, a, row_step, depth_step, b, middle, scales, c, accumulate, ahead);
}

}  // namespace xeco::XECO_ISA
