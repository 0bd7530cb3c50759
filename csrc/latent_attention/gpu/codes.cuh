// Cached rows in codes of 8 or 4 bits (xeco_convert/ops/packed_rows.py): how they come to shared memory and are widened
// there, a tile at a time.
//
// A row is its codes, then its scale s as bfloat16; with 4 bits byte i holds code i in its low half and code
// i + width / 2 in its high half. A code c of b bits stands for s · (c - (2^b - 1) / 2) = f · v, where
//   v = (2c - 2^b + 1) / 2^b, with at most 8 significant bits: exact in bfloat16 and float16, and what a tile holds,
//   f = s · 2^(b-1), about the row's largest number: it multiplies scores and weights, in float32.
#pragma once

#include "latent_attention/gpu/rows.cuh"

namespace xeco::gpu {

// code_row_bytes, for the device as well.
XECO_LAYOUT int code_bytes(int64_t width, int64_t bits) { return static_cast<int>(width * bits / 8 + kScaleBytes); }

// Rows of any length begin at any byte, and copies take 16 bytes from a multiple of 16: a row's place in shared memory
// has room for all that it touches, and the row lies in it as it lies in global memory.
XECO_LAYOUT int code_row_place(int64_t width, int64_t bits) {
  return (code_bytes(width, bits) + 30) / 16 * 16;
}

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

// v of the code whose lowest bit is bit `at`, without a conversion: behind 2^15 a float32 counts in steps of 2^-8.
template <int kBits>
XECO_DEVICE float number_at(uint32_t word, int at) {
  constexpr uint32_t kBase = 0x47000000u, kMask = (1u << kBits) - 1;
  return float_of(kBase | (word >> at & kMask) << (9 - kBits)) - (32769.0f - 1.0f / (1 << kBits));
}

// Eight numbers to 16 bytes: of each byte, the code from bit kFrom on.
template <class Element, int kBits, int kFrom>
XECO_DEVICE void write_numbers(uint16_t* to, const Bytes8& codes) {
  struct alignas(16) Words {
    uint32_t words[4];
  } numbers;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t word = codes.words[w / 2];
    const int at = w % 2 * 16 + kFrom;
    numbers.words[w] = Element::pack(number_at<kBits>(word, at), number_at<kBits>(word, at + 8));
  }
  *reinterpret_cast<Words*>(to) = numbers;
}

// This thread's share of one row; zeros behind its width, and all of it where it is not `there`. Returns f.
template <class Element, int kBits>
XECO_DEVICE float widen_row(uint16_t* to, const uint8_t* from, bool there, int width) {
  const int bytes = width * kBits / 8, half = width / 2, first = thread_index() % kCopyLanes * 8;
  constexpr int kStep = kCopyLanes * 8;
  // whole groups of eight alone, in 4 bits on both sides of the half
  if (there && width % (64 / kBits) == 0) {
    for (int at = first; at < bytes; at += kStep) {
      const Bytes8 codes = bytes_at(from + at);
      write_numbers<Element, kBits, 0>(to + at, codes);
      if constexpr (kBits == 4) write_numbers<Element, kBits, 4>(to + half + at, codes);
    }
    for (int at = width + first; at < padded(width); at += kStep)
      write_numbers<Element, kBits, 0>(to + at, {{0, 0}});  // any number: the queries have zeros there
  } else {
    for (int group = first; group < padded(width); group += kStep)
      for (int column = group; column < group + 8; ++column) {
        const int byte = kBits == 8 || column < half ? column : column - half;
        const bool is_code = there && column < width;
        const float number = is_code ? number_at<kBits>(from[byte], kBits == 8 || column < half ? 0 : 4) : 0.0f;
        to[column] = static_cast<uint16_t>(Element::pack(number, 0.0f));
      }
  }
  if (!there) return 0.0f;
  const uint32_t scale = from[bytes] | static_cast<uint32_t>(from[bytes + 1]) << 8;
  return BFloat16::widen(static_cast<uint16_t>(scale)) * (1 << (kBits - 1));
}

template <class Element>
XECO_DEVICE float widen_row(uint16_t* to, const uint8_t* from, bool there, int width, int bits) {
  return bits == 8 ? widen_row<Element, 8>(to, from, there, width) : widen_row<Element, 4>(to, from, there, width);
}

// The latents of a sequence, or its rotary keys.
struct CodeRows {
  const uint8_t* rows;
  int64_t stride;
  int width, bits, place;

  XECO_DEVICE CodeRows(const RowsView& view, int64_t batch, int64_t width_, int64_t bits_)
      : rows(static_cast<const uint8_t*>(view.data) + batch * view.outer_stride),
        stride(view.row_stride),
        width(static_cast<int>(width_)),
        bits(static_cast<int>(bits_)),
        place(code_row_place(width_, bits_)) {}

  XECO_DEVICE void copy(uint8_t* to, int token) const {
    const uint8_t *row = rows + token * stride, *end = row + code_bytes(width, bits);
    const int at = thread_index() % kCopyLanes * 16;
    const uint8_t* from = row - behind_multiple(row, 16) + at;
    for (int i = at; from < end; i += kCopyLanes * 16, from += kCopyLanes * 16)
      copy_async_16(to + i, from, static_cast<int>(min<int64_t>(16, end - from)));
  }

  // Of a token whose row was copied to `place`, or of one in global memory.
  XECO_DEVICE const uint8_t* copied(const uint8_t* to, int token) const {
    const uint8_t* row = rows + token * stride;
    return kCopiesAreAsynchronous ? to + behind_multiple(row, 16) : row;
  }
};

// Cached tokens of a sequence.
struct CodeTiles {
  CodeRows latents, keys;
  int stride, latent_width;  // of a widened row

  XECO_DEVICE CodeTiles(const AttentionShape& shape, const RowsView& c_kv, const RowsView& k_rope, int64_t batch)
      : latents(c_kv, batch, shape.rank, shape.latent_bits),
        keys(k_rope, batch, shape.rope, shape.rope_bits),
        stride(row_stride(shape)),
        latent_width(padded(shape.rank)) {}

  // kCount tokens from `first` on, as they lie; those outside [low, high) are not read.
  template <int kCount, int kThreads>
  XECO_DEVICE void load(uint8_t* to, int first, const Seen& seen) const {
    if constexpr (!kCopiesAreAsynchronous) return;
    for (int row = thread_index() / kCopyLanes; row < kCount; row += kThreads / kCopyLanes) {
      const int token = first + row;
      if (token < seen.low || token >= seen.high) continue;
      uint8_t* place = to + row * (latents.place + keys.place);
      latents.copy(place, token);
      keys.copy(place + latents.place, token);
    }
  }

  // What load() has brought, as a tile of numbers v, and the factors f of its latents and then of its keys.
  template <class Element, int kCount, int kThreads>
  XECO_DEVICE void widen(uint16_t* to, float* factors, const uint8_t* from, int first, const Seen& seen) const {
    for (int row = thread_index() / kCopyLanes; row < kCount; row += kThreads / kCopyLanes) {
      const int token = first + row;
      const bool there = token >= seen.low && token < seen.high;
      const uint8_t* place = from + row * (latents.place + keys.place);
      uint16_t* numbers = to + row * stride;
      const int read = there ? token : 0;
      const float of_latent =
          widen_row<Element>(numbers, latents.copied(place, read), there, latents.width, latents.bits);
      const float of_key = widen_row<Element>(numbers + latent_width, keys.copied(place + latents.place, read), there,
                                              keys.width, keys.bits);
      if (thread_index() % kCopyLanes == 0) factors[row] = of_latent, factors[kCount + row] = of_key;
    }
  }
};

}  // namespace xeco::gpu
