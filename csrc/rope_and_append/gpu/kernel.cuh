// rope_and_append on a GPU: a block for each new token rotates its key and writes it and its latent into the cache.
#pragma once

#include "rope_and_append/gpu/kernels.h"
#include "xeco/gpu/elements.h"

namespace xeco::gpu {

XECO_DEVICE void store_rounded(Float32, float* to, float value) { *to = value; }
template <class Element>
XECO_DEVICE void store_rounded(Element, uint16_t* to, float value) {
  *to = static_cast<uint16_t>(Element::pack(value, 0.0f));
}

// Where a token goes: its sequence or page, and the row in it. Stops the kernel for a slot or page that is not there.
struct Slot {
  int64_t outer, row;
};

XECO_DEVICE Slot slot_of(const AppendParams& params, int64_t batch, int64_t query) {
  const int64_t slot = params.positions[batch] + query;
  if (slot < 0 || slot >= params.capacity) trap();
  if (params.block_table == nullptr) return {batch, slot};
  const int64_t page = params.block_table[batch * params.block_table_stride + slot / params.page_size];
  if (page < 0 || page >= params.num_pages) trap();
  return {page, slot % params.page_size};
}

XECO_DEVICE bool all_on_16_bytes(const void* from, const void* to, int64_t bytes) {
  return ((reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(bytes)) & 15) ==
         0;
}

struct alignas(16) Sixteen {
  uint32_t words[4];
};

constexpr int kAppendThreads = 64;

// Grid: B × Q. Half-split pairs (RoFormer, arXiv 2104.09864), in float32, rounded once.
template <class Element, class Angle>
XECO_KERNEL(kAppendThreads, 1)
rope_and_append_kernel(const AppendParams params) {
  using Storage = typename Element::Storage;
  const int64_t batch = block_index() / params.num_queries, query = block_index() % params.num_queries;
  const Slot slot = slot_of(params, batch, query);
  const Storage* latent = row_of<Storage>(params.c_kv, batch, query);
  Storage* to = row_of<Storage>(params.c_kv_cache, slot.outer, slot.row);
  const int64_t bytes = params.rank * static_cast<int64_t>(sizeof(Storage));
  if (all_on_16_bytes(latent, to, bytes)) {
    for (int64_t i = thread_index(); i < bytes / 16; i += kAppendThreads)
      reinterpret_cast<Sixteen*>(to)[i] = reinterpret_cast<const Sixteen*>(latent)[i];
  } else {
    for (int64_t i = thread_index(); i < params.rank; i += kAppendThreads) to[i] = latent[i];
  }
  const Storage* key = row_of<Storage>(params.k_rope, batch, query);
  const auto* cos = row_of<typename Angle::Storage>(params.cos, batch, query);
  const auto* sin = row_of<typename Angle::Storage>(params.sin, batch, query);
  Storage* rotated = row_of<Storage>(params.k_rope_cache, slot.outer, slot.row);
  const int64_t half = params.rope / 2;
  for (int64_t i = thread_index(); i < half; i += kAppendThreads) {
    const float first = Element::widen(key[i]), second = Element::widen(key[i + half]);
    store_rounded(Element{}, rotated + i, first * Angle::widen(cos[i]) - second * Angle::widen(sin[i]));
    store_rounded(Element{}, rotated + i + half,
                  second * Angle::widen(cos[i + half]) + first * Angle::widen(sin[i + half]));
  }
}

}  // namespace xeco::gpu
