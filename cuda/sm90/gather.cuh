// Gathering rows from global into shared memory, 16 bytes at a time, without passing through
// registers (cp.async). For rows at random places: the copy engine (tma.cuh) would need one
// instruction for every 128 bytes of each row.
#pragma once

#include "sm90/mbarrier.cuh"

namespace jax_flashmla::sm90 {

// Copies 16 bytes past the L1, or writes 16 zeros and reads nothing if not `valid`. The L2 is asked
// to fetch the 128 bytes around them. (With 256 it fetches more than rows of 1152 bytes have: 6%
// slower where memory is the limit.)
__device__ __forceinline__ void CopyUnitAsync(uint32_t shared_address, const void* source,
                                              bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

// Arrives at a barrier when all copies that this thread has begun so far are done.
__device__ __forceinline__ void ArriveAfterCopies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(SharedAddress(barrier))
               : "memory");
}

// Copies shared memory of this block to the same place in block `rank` of the cluster, and counts
// the bytes on that block's barrier. A copy by the copy engine.
__device__ __forceinline__ void CopyToRank(void* data, uint32_t bytes, Barrier* barrier,
                                           uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 to, counts;\n"
      "mapa.shared::cluster.u32 to, %0, %3;\n"
      "mapa.shared::cluster.u32 counts, %2, %3;\n"
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [to], [%0], %1, "
      "[counts];\n"
      "}" ::"r"(SharedAddress(data)),
      "r"(bytes), "r"(SharedAddress(barrier)), "r"(rank)
      : "memory");
}

// Waits until all copies that this thread has begun are done.
__device__ __forceinline__ void AwaitCopies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace jax_flashmla::sm90
