// The one inner product that all kernels are made of, in float32:
//
//   C[i][n] (+)= sum over k of A(i, k) * B[k][n]        i < rows, n < panel width, k < depth
//
// B is a panel: `depth` rows of one or two vectors, packed. A is read as it lies, by broadcasting single numbers: along
// its rows (A(i, k) = a[i * stride + k], cached tokens times queries) or along its columns (A(i, k) = a[k * stride +
// i], the same tokens as values). So scores come out as [token][query row], the softmax runs down the vectors, and
// nothing is ever transposed but the queries and the output, once each.
//
// What is in C is added last: sums are short chains (a tile of tokens, kDepthPiece features) that are added up in turn,
// whose rounding errors do not grow with the length of a cache as those of one long chain would.

namespace xeco::XECO_ISA {

// Rows of A that share one pass over the panel: as many accumulators as the registers hold, and enough of them in
// flight to hide the latency of a multiply-add where the panel is one vector wide.
#if XECO_LANES == 16
constexpr int kRowBlocks[3] = {0, 12, 12};
#elif XECO_LANES == 8
constexpr int kRowBlocks[3] = {0, 12, 6};
#else
constexpr int kRowBlocks[3] = {0, 8, 4};
#endif

// Rows that will be needed next, `lines` cache lines each, to be asked for while a product of their predecessors runs:
// one line at a time, because the processor waits for few at once, and not left to it, because rows of a cache are
// short.
struct Ahead {
  const char* rows = nullptr;
  int64_t stride = 0;  // bytes
  int64_t lines = 0;

  Ahead from_row(int64_t row) const { return {rows + row * stride, stride, lines}; }
  Ahead from_line(int64_t line) const { return {rows + line * 64, stride, lines - line}; }
};

constexpr int64_t kStepsPerLine = 16;  // of the depth, in which the lines of a row block are asked for, a row a step

// Step k of the depth of a product of `rows` rows.
XECO_INLINE void ask_for(const Ahead& ahead, int64_t k, int64_t rows) {
  const int64_t row = k % kStepsPerLine, line = k / kStepsPerLine;
  if (row < rows && line < ahead.lines) __builtin_prefetch(ahead.rows + row * ahead.stride + line * 64, 0, 2);
}

template <int kRows, int kVectors, bool kColumns, bool kAhead>
XECO_INLINE void gemm_block(int64_t depth, const float* a, int64_t stride, const float* b, float* c, int64_t c_stride,
                            bool accumulate, const Ahead& ahead) {
  Vf sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vf{};
  for (int64_t k = 0; k < depth; ++k) {
    if constexpr (kAhead) ask_for(ahead, k, kRows);
    Vf right[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) right[j] = load(b + (k * kVectors + j) * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float left = kColumns ? a[k * stride + i] : a[i * stride + k];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + i * c_stride + j * kLanes;
      store(to, accumulate ? load(to) + sums[i][j] : sums[i][j]);
    }
}

// The last rows, fewer than a block: the block of the fitting size is found by counting down.
template <int kRows, int kVectors, bool kColumns, bool kAhead>
XECO_INLINE void gemm_last_rows(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c,
                                int64_t c_stride, bool accumulate, const Ahead& ahead) {
  if constexpr (kRows > 0) {
    if (rows == kRows)
      gemm_block<kRows, kVectors, kColumns, kAhead>(depth, a, stride, b, c, c_stride, accumulate, ahead);
    else
      gemm_last_rows<kRows - 1, kVectors, kColumns, kAhead>(rows, depth, a, stride, b, c, c_stride, accumulate, ahead);
  }
}

template <int kVectors, bool kColumns, bool kAhead>
static void gemm_panel(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b, float* c,
                       int64_t c_stride, bool accumulate, const Ahead& ahead) {
  const int64_t step = kColumns ? 1 : stride;
  constexpr int kRowBlock = kRowBlocks[kVectors];
  int64_t i = 0;
  for (; i + kRowBlock <= rows; i += kRowBlock)
    gemm_block<kRowBlock, kVectors, kColumns, kAhead>(depth, a + i * step, stride, b, c + i * c_stride, c_stride,
                                                      accumulate, ahead.from_row(i));
  gemm_last_rows<kRowBlock - 1, kVectors, kColumns, kAhead>(rows - i, depth, a + i * step, stride, b, c + i * c_stride,
                                                            c_stride, accumulate, ahead.from_row(i));
}

constexpr int64_t kDepthPiece = 128;

template <bool kColumns, bool kAhead = false>
static void gemm(int64_t rows, int64_t depth, const float* a, int64_t stride, const float* b, int vectors, float* c,
                 int64_t c_stride, bool accumulate, const Ahead& ahead = {}) {
  for (int64_t k = 0; k == 0 || k < depth; k += kDepthPiece) {
    const int64_t piece = min(kDepthPiece, depth - k);
    const float* columns = a + (kColumns ? k * stride : k);
    const float* panel = b + k * vectors * kLanes;
    const Ahead later = ahead.from_line(k / kStepsPerLine);
    if (vectors == 1)
      gemm_panel<1, kColumns, kAhead>(rows, piece, columns, stride, panel, c, c_stride, accumulate || k > 0, later);
    else
      gemm_panel<2, kColumns, kAhead>(rows, piece, columns, stride, panel, c, c_stride, accumulate || k > 0, later);
  }
}

}  // namespace xeco::XECO_ISA
