// Loads by the copy engine (TMA). A tensor map describes a tensor in global memory; a load copies a
// box of it into shared memory and counts the bytes on a barrier. What lies outside the tensor, at
// a negative coordinate too, arrives as zeros.
#pragma once

#include <cuda.h>  // types only

#include "sm90/mbarrier.cuh"

namespace jax_flashmla::sm90 {

// Fetches a tensor map ahead of its first use. No earlier kernel writes it, so no wait is needed.
__device__ __forceinline__ void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(reinterpret_cast<uint64_t>(map)) : "memory");
}

// How the L2 treats what a load brings: the constants that `createpolicy` would return for a whole
// access. Running that instruction for each load made short calls 4 us longer.
using CachePolicy = uint64_t;
constexpr CachePolicy kEvictNormal = 0x1000000000000000;
constexpr CachePolicy kEvictFirst = 0x12f0000000000000;  // for data that is read once

__device__ __forceinline__ void TmaLoad4d(void* destination, const CUtensorMap* map,
                                          Barrier* barrier, CachePolicy policy, int c0, int c1,
                                          int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(SharedAddress(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(SharedAddress(barrier)), "l"(policy), "r"(c0),
      "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Loads the box to the same place in each block of `block_mask`, and counts
// on each block's barrier.
__device__ __forceinline__ void TmaLoadMulticast4d(void* destination, const CUtensorMap* map,
                                                   Barrier* barrier, CachePolicy policy,
                                                   uint16_t block_mask, int c0, int c1, int c2,
                                                   int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster.L2::cache_hint [%0], [%1, {%5, %6, %7, %8}], [%2], %3, %4;" ::"r"(
          SharedAddress(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(SharedAddress(barrier)), "h"(block_mask),
      "l"(policy), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Loads a box into the L2 alone.
__device__ __forceinline__ void TmaPrefetch4d(const CUtensorMap* map, int c0, int c1, int c2,
                                              int c3) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];" ::"l"(
                   reinterpret_cast<uint64_t>(map)),
               "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

}  // namespace jax_flashmla::sm90
