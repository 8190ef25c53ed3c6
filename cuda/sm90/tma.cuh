// Loads by the copy engine (TMA): boxes of a tensor in global memory, described by a tensor map,
// land in shared memory and complete bytes on a barrier. A box that lies outside of the tensor, at
// a negative coordinate too, arrives as zeros.
#pragma once

#include <cuda.h>  // types only

#include "mbarrier.cuh"

namespace jax_flashmla::sm90 {

__device__ __forceinline__ void TmaLoad4d(void* destination, const CUtensorMap* map,
                                          Barrier* barrier, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(SharedAddress(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(SharedAddress(barrier)), "r"(c0), "r"(c1), "r"(c2),
      "r"(c3)
      : "memory");
}

// The same box to the same place in each block of `block_mask`, completing on each block's barrier.
__device__ __forceinline__ void TmaLoadMulticast4d(void* destination, const CUtensorMap* map,
                                                   Barrier* barrier, uint16_t block_mask, int c0,
                                                   int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(
          SharedAddress(destination)),
      "l"(reinterpret_cast<uint64_t>(map)), "r"(SharedAddress(barrier)), "h"(block_mask), "r"(c0),
      "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

}  // namespace jax_flashmla::sm90
