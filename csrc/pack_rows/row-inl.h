// How a row of numbers becomes codes (xeco_convert/ops/packed_rows.py), for the CPU and for GPUs: whoever includes this
// says in XECO_ROW what makes a function theirs, and has nearest(x) (to even), whole(x) (not above x) and root(x). A
// row's pieces are independent once its scale is known: a byte of codes, or in bit planes eight numbers.

namespace xeco {

// Largest number that has a code of its own, in units of a run's rms: CLIP of packed_rows.py.
XECO_ROW double clip_of(int bits) {
  switch (bits) {  // no table: it would lie in a GPU's slow memory
    case 1:
      return 0.8;
    case 2:
      return 1.55;
    case 3:
      return 2.2;
    case 4:
      return 2.75;
    case 5:
      return 3.1;
    case 6:
      return 3.4;
    case 7:
      return 3.7;
    default:
      return 4.0;
  }
}

// Numbers [first, end) of as many bits; none where first >= end.
struct Run {
  int bits;
  int64_t first, end;
};

XECO_ROW int64_t bytes_in_plane(int64_t layout, int plane) { return plane < 7 ? layout >> 7 * plane & 127 : 0; }

XECO_ROW Run run_of(int64_t layout, int64_t width, int bits) {
  if (layout <= 16) return {bits, 0, layout == bits ? width : 0};
  return {bits, bytes_in_plane(layout, bits) * 8, bytes_in_plane(layout, bits - 1) * 8};
}

// What scale a run asks for: by CLIP, and by its largest number. NaN where a number of it is none.
struct Scales {
  double clipped, whole;
};

XECO_ROW Scales scales_for(const float* row, const Run& run, int64_t layout) {
  double largest = 0, squares = 0, odd = 0;
  for (int64_t i = run.first; i < run.end; ++i) {
    const double value = row[i], size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
    squares += value * value;
    odd += value - value;  // NaN for what is not finite
  }
  const double by_rms = clip_of(run.bits) * root(squares / static_cast<double>(run.end - run.first));
  const double most = layout <= 16 ? ((1 << run.bits) - 1) / 2.0 : 128.0 - (1 << (7 - run.bits));
  return {((largest < by_rms ? largest : by_rms) + odd) / most, (largest + odd) / most};
}

// The larger one, NaN where one is.
XECO_ROW double larger_scale(double a, double b) { return a + b != a + b ? a + b : a > b ? a : b; }

XECO_ROW double least_scale(double scale) { return scale < 0x1p-126 ? 0x1p-126 : scale; }

XECO_ROW int within(float code, float most) {
  return code >= 0 ? static_cast<int>(code > most ? most : code) : 0;  // NaN: 0
}

// The code of a number of `bits` bits.
XECO_ROW int code_of(float value, float scale, int bits, int64_t layout) {
  const float most = static_cast<float>((1 << bits) - 1);
  if (layout <= 16) return within(nearest(value / scale + most / 2), most);
  const float step = static_cast<float>(1 << (8 - bits)), half = static_cast<float>(1 << (bits - 1));
  return within(whole(value / scale / step) + half, most);
}

// Squared error of a run's numbers at a scale.
XECO_ROW double error_of(const float* row, const Run& run, float scale, int64_t layout) {
  double error = 0;
  for (int64_t i = run.first; i < run.end; ++i) {
    const int code = code_of(row[i], scale, run.bits, layout);
    const float found = layout <= 16 ? static_cast<float>(code) - static_cast<float>((1 << run.bits) - 1) / 2
                                     : static_cast<float>(((2 * code + 1) << (7 - run.bits)) - 128);
    const double lost = static_cast<double>(found * scale) - static_cast<double>(row[i]);
    error += lost * lost;
  }
  return error;
}

XECO_ROW int64_t num_pieces(int64_t layout, int64_t width) {
  return layout == 8 ? width : layout == 4 ? width / 2 : width / 8;
}

XECO_ROW void write_piece(const float* row, int64_t width, int64_t layout, float scale, int64_t piece, uint8_t* to) {
  if (layout == 8) {
    to[piece] = static_cast<uint8_t>(code_of(row[piece], scale, 8, layout));
    return;
  }
  if (layout == 4) {
    const int low = code_of(row[piece], scale, 4, layout), high = code_of(row[piece + width / 2], scale, 4, layout);
    to[piece] = static_cast<uint8_t>(low | high << 4);
    return;
  }
  int bits = 0;
  while (piece < bytes_in_plane(layout, bits)) ++bits;
  int codes[8];
  for (int i = 0; i < 8; ++i) codes[i] = code_of(row[piece * 8 + i], scale, bits, layout);
  for (int plane = 0; plane < bits; ++plane) {
    int byte = 0;
    for (int i = 0; i < 8; ++i) byte |= (codes[i] >> (bits - 1 - plane) & 1) << i;
    to[piece] = static_cast<uint8_t>(byte);
    to += bytes_in_plane(layout, plane);
  }
}

}  // namespace xeco
