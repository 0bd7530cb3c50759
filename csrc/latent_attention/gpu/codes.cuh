// Cached rows in codes of few bits (xeco_convert/ops/packed_rows.py): how they come to shared memory and are widened
// there, a tile at a time.
//
// A row is its codes, then its scale s as bfloat16; with 4 bits byte i holds code i in its low half and code
// i + width / 2 in its high half. A code c of b bits stands for s · (c - (2^b - 1) / 2) = f · v, where
//   v = (2c - 2^b + 1) / 2^b, with at most 8 significant bits: exact in bfloat16 and float16, and what a tile holds,
//   f = s · 2^(b-1), about the row's largest number: it multiplies scores and weights, in float32.
// A row in bit planes is bytes c that stand for s · (c - 128), taken apart (xeco/views.h): v = (c - 128) / 128.
#pragma once

#include "latent_attention/gpu/rows.cuh"

namespace xeco::gpu {

// lies_in_planes, plane_bytes and code_row_bytes, for the device as well.
XECO_LAYOUT bool in_planes(int64_t bits) { return bits > 16; }

XECO_LAYOUT int bytes_of_plane(int64_t bits, int plane) { return static_cast<int>(bits >> 7 * plane) & 127; }

XECO_LAYOUT int code_bytes(int64_t width, int64_t bits) {
  int64_t bytes = in_planes(bits) ? 0 : width * bits / 8;
  if (in_planes(bits)) {
#pragma unroll 1
    for (int plane = 0; plane < kMostPlanes; ++plane) bytes += bytes_of_plane(bits, plane);
  }
  return static_cast<int>(bytes + kScaleBytes);
}

// Rows of any length begin at any byte, and copies take 16 bytes from a multiple of 16, to a place that lies as they
// do. Rows that follow one another are copied as one piece; others one by one, each with room for all that it touches.
XECO_LAYOUT int code_row_place(int64_t width, int64_t bits) { return (code_bytes(width, bits) + 30) / 16 * 16; }

// Of a token: latent, then rotary key. Where copies pass through registers rows are widened from global memory.
XECO_LAYOUT int code_places(const AttentionShape& shape) {
  if (!kCopiesAreAsynchronous) return 0;
  return code_row_place(shape.rank, shape.latent_bits) + code_row_place(shape.rope, shape.rope_bits);
}

XECO_DEVICE int behind_multiple(const uint8_t* from, int multiple) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(from) & static_cast<uintptr_t>(multiple - 1));
}

struct Bytes8 {
  uint32_t words[2];
};

// 8 bytes that begin anywhere; no word is read that holds none of them.
XECO_DEVICE Bytes8 bytes_at(const uint8_t* from) {
  const int behind = behind_multiple(from, 4);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(from - behind);
  const uint32_t first = words[0], second = words[1], third = behind == 0 ? 0 : words[2];
  const auto joined = [behind](uint32_t low, uint32_t high) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (behind * 8));
  };
  return {{joined(first, second), joined(second, third)}};
}

// c / 128 + 256 of the byte c at `at`, without a conversion: as second byte of 2^8 its unit counts 2^-7. Less these it
// is v of an 8-bit code, and of a byte from bit planes.
constexpr float kLessOfCode = 257.0f - 1.0f / 256, kLessOfByte = 257.0f;

XECO_DEVICE float number_in(uint32_t word, int at, float less) {
  return float_of(with_byte(0x43800000u, word, at)) - less;
}

// Four bits as the lowest of four bytes.
XECO_DEVICE uint32_t spread_bits(uint32_t bits) { return bits * 0x00204081u & 0x01010101u; }

struct alignas(16) Numbers8 {
  uint32_t words[4];
};

// Those of 8 bytes.
template <class Element>
XECO_DEVICE void write_bytes(uint16_t* to, const Bytes8& codes, float less) {
  Numbers8 numbers;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = codes.words[w / 2];
    numbers.words[w] = Element::pack(number_in(word, w % 2 * 2, less), number_in(word, w % 2 * 2 + 1, less));
  }
  *reinterpret_cast<Numbers8*>(to) = numbers;
}

// Those of the low halves of 8 bytes, and of the high halves.
template <class Element>
XECO_DEVICE void write_nibbles(uint16_t* low_to, uint16_t* high_to, const Bytes8& codes) {
  Numbers8 low, high;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    constexpr uint32_t kNibbles = 0x000f000fu;
    const uint32_t word = codes.words[w / 2] >> w % 2 * 16, apart = (word & 0xffu) | (word & 0xff00u) << 8;
    low.words[w] = Element::centered(apart & kNibbles);
    high.words[w] = Element::centered(apart >> 4 & kNibbles);
  }
  *reinterpret_cast<Numbers8*>(low_to) = low;
  *reinterpret_cast<Numbers8*>(high_to) = high;
}

// The latents of a sequence, or its rotary keys.
struct CodeRows {
  const uint8_t* rows;
  int64_t stride;
  int width;
  int64_t bits;

  XECO_DEVICE CodeRows(const RowsView& view, int64_t batch, int64_t width_, int64_t bits_)
      : rows(static_cast<const uint8_t*>(view.data) + batch * view.outer_stride),
        stride(view.row_stride),
        width(static_cast<int>(width_)),
        bits(bits_) {}

  XECO_DEVICE bool follow_one_another() const { return stride == code_bytes(width, bits); }

  // `count` rows from `first` on, as they lie.
  template <int kThreads>
  XECO_DEVICE void copy(uint8_t* to, int first, int count) const {
    const uint8_t* from = rows + first * stride;
    const int bytes = code_bytes(width, bits);
    if (follow_one_another()) {
      const int behind = behind_multiple(from, 16), end = behind + count * bytes;
      from -= behind;
      for (int at = thread_index() * 16; at < end; at += kThreads * 16)
        copy_async_16(to + at, from + at, min(16, end - at));
      return;
    }
    for (int row = thread_index() / kCopyLanes; row < count; row += kThreads / kCopyLanes) {
      const uint8_t* of_row = from + row * stride;
      const int behind = behind_multiple(of_row, 16), end = behind + bytes;
      for (int at = thread_index() % kCopyLanes * 16; at < end; at += kCopyLanes * 16)
        copy_async_16(to + row * code_row_place(width, bits) + at, of_row - behind + at, min(16, end - at));
    }
  }

  // What copy() has brought, as numbers v with the factor f of each row; zeros in rows from `count` on, of which there
  // are kCount.
  template <class Element, int kCount, int kThreads>
  XECO_DEVICE void widen(uint16_t* to, int to_stride, float* factors, const uint8_t* copied, int first,
                         int count) const {
    const Source source(*this, copied, first);
    if (bits == 8)
      widen_bits<Element, 8, kCount, kThreads>(to, to_stride, source, count);
    else if (bits == 4)
      widen_bits<Element, 4, kCount, kThreads>(to, to_stride, source, count);
    else
      widen_planes<Element, kCount, kThreads>(to, to_stride, source, count);
    for (int row = thread_index(); row < kCount; row += kThreads) {
      float factor = 0.0f;
      if (row < count) {
        const uint8_t* scale = source.row(row) + code_bytes(width, bits) - kScaleBytes;
        factor = BFloat16::widen(static_cast<uint16_t>(scale[0] | scale[1] << 8)) * (bits == 4 ? 8.0f : 128.0f);
      }
      factors[row] = factor;
    }
  }

 private:
  // Where rows are read from: copied ones, or those in global memory.
  struct Source {
    const uint8_t* base;
    int behind;       // a multiple of 16, the first row
    int pitch, slip;  // of copied rows: how far apart they are, and how much further behind each one lies
    int64_t stride;

    XECO_DEVICE Source(const CodeRows& of, const uint8_t* copied, int first)
        : base(kCopiesAreAsynchronous ? copied : of.rows + first * of.stride),
          behind(behind_multiple(of.rows + first * of.stride, 16)),
          pitch(of.follow_one_another() ? static_cast<int>(of.stride) : code_row_place(of.width, of.bits)),
          slip(of.follow_one_another() ? 0 : static_cast<int>(of.stride & 15)),
          stride(of.stride) {}

    XECO_DEVICE const uint8_t* row(int number) const {
      if constexpr (!kCopiesAreAsynchronous) return base + number * stride;
      return base + number * pitch + ((behind + number * slip) & 15);
    }
  };

  template <class Element, int kBits, int kCount, int kThreads>
  XECO_DEVICE void widen_bits(uint16_t* to, int to_stride, const Source& source, int count) const {
    if (width % (64 / kBits) != 0) return widen_singly<Element, kBits, kCount, kThreads>(to, to_stride, source, count);
    // Groups of 8 bytes, as many threads for each row as it has groups, or 8.
    const int groups = width * kBits / 64, all = kBits == 8 ? padded(width) / 8 : groups;
    const int lanes = all > 4 ? 8 : all > 2 ? 4 : all, shift = lanes == 8 ? 3 : lanes / 2;
    const int step = kThreads >> shift;
#pragma unroll 1
    for (int row = thread_index() >> shift; row < kCount; row += step) {
      const uint8_t* from = source.row(row);
      uint16_t* numbers = to + row * to_stride;
      for (int group = thread_index() & (lanes - 1); group < all; group += lanes) {
        Bytes8 codes = {
            {0, 0}};  // any number: the queries have zeros behind the width, and hidden rows a weight of zero
        if (row < count && group < groups) codes = bytes_at(from + group * 8);
        if constexpr (kBits == 8)
          write_bytes<Element>(numbers + group * 8, codes, kLessOfCode);
        else
          write_nibbles<Element>(numbers + group * 8, numbers + width / 2 + group * 8, codes);
      }
    }
  }

  // Eight numbers at a time, a byte of each plane that reaches them.
  template <class Element, int kCount, int kThreads>
  XECO_DEVICE void widen_planes(uint16_t* to, int to_stride, const Source& source, int count) const {
    const int groups = width / 8, all = padded(width) / 8;
    const int lanes = all > 4 ? 8 : all > 2 ? 4 : all, shift = lanes == 8 ? 3 : lanes / 2;
    const int step = kThreads >> shift;
#pragma unroll 1
    for (int row = thread_index() >> shift; row < kCount; row += step)
      for (int group = thread_index() & (lanes - 1); group < all; group += lanes) {
        const bool is_there = row < count && group < groups;  // else any number, as above
        const Bytes8 codes = is_there ? bytes_of_planes(source.row(row), group) : Bytes8{{0, 0}};
        write_bytes<Element>(to + row * to_stride + group * 8, codes, kLessOfByte);
      }
  }

  // The bytes of the numbers from 8 * group on.
  XECO_DEVICE Bytes8 bytes_of_planes(const uint8_t* planes, int group) const {
    Bytes8 codes = {{0, 0}};
    int behind = 7;  // place of the bit behind the lowest one that these numbers have, which is set as well
#pragma unroll 1
    for (int plane = 0; plane < kMostPlanes; ++plane) {
      const int bytes = bytes_of_plane(bits, plane);
      if (group >= bytes) break;
      const uint32_t byte = planes[group];
      codes.words[0] |= spread_bits(byte & 15) << behind;
      codes.words[1] |= spread_bits(byte >> 4) << behind;
      planes += bytes;
      --behind;
    }
    codes.words[0] |= 0x01010101u << behind;
    codes.words[1] |= 0x01010101u << behind;
    return codes;
  }

  // Widths of which groups of 8 bytes make no whole.
  template <class Element, int kBits, int kCount, int kThreads>
  XECO_DEVICE void widen_singly(uint16_t* to, int to_stride, const Source& source, int count) const {
    for (int row = thread_index() / kCopyLanes; row < kCount; row += kThreads / kCopyLanes)
      for (int column = thread_index() % kCopyLanes; column < padded(width); column += kCopyLanes) {
        uint32_t number = 0;
        if (row < count && column < width) {
          const bool is_low = kBits == 8 || column < width / 2;
          const uint32_t byte = source.row(row)[is_low ? column : column - width / 2];
          number = kBits == 8 ? Element::pack(number_in(byte, 0, kLessOfCode), 0.0f)
                              : Element::centered(is_low ? byte & 15 : byte >> 4);
        }
        to[row * to_stride + column] = static_cast<uint16_t>(number);
      }
  }
};

// Cached tokens of a sequence.
struct CodeTiles {
  CodeRows latents, keys;
  int stride, latent_width;  // of a widened row
  int latent_place;          // bytes of a copied latent, at most

  XECO_DEVICE CodeTiles(const AttentionShape& shape, const RowsView& c_kv, const RowsView& k_rope, int64_t batch)
      : latents(c_kv, batch, shape.rank, shape.latent_bits),
        keys(k_rope, batch, shape.rope, shape.rope_bits),
        stride(row_stride(shape)),
        latent_width(padded(shape.rank)),
        latent_place(code_row_place(shape.rank, shape.latent_bits)) {}

  // kCount tokens from `first` on, which is seen; those behind seen.high are not read.
  template <int kCount, int kThreads>
  XECO_DEVICE void load(uint8_t* to, int first, const Seen& seen) const {
    if constexpr (!kCopiesAreAsynchronous) return;
    const int count = min(kCount, seen.high - first);
    latents.copy<kThreads>(to, first, count);
    keys.copy<kThreads>(to + kCount * latent_place, first, count);
  }

  // What load() has brought, as a tile of numbers v, and the factors f of its latents and then of its keys.
  template <class Element, int kCount, int kThreads>
  XECO_DEVICE void widen(uint16_t* to, float* factors, const uint8_t* from, int first, const Seen& seen) const {
    const int count = min(kCount, seen.high - first);
    latents.widen<Element, kCount, kThreads>(to, stride, factors, from, first, count);
    keys.widen<Element, kCount, kThreads>(to + latent_width, stride, factors + kCount, from + kCount * latent_place,
                                          first, count);
  }
};

}  // namespace xeco::gpu
