// Flags and counters in global memory, by which the blocks of one launch talk to each other.
//
// To hand data over: all lanes of the writing warp call ReleaseGlobalWrites(), then one lane sets
// the flag. Lanes of the reading warp poll the flag; then all its lanes call AcquireGlobalWrites().
// Only after that may they read the data, or let the copy engine (TMA) read it.
#pragma once

#include "sm90/cta.cuh"

namespace jax_flashmla::sm90 {

using Flag = uint64_t;

__device__ __forceinline__ void SetFlag(Flag* flag, Flag value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(value) : "memory");
}
__device__ __forceinline__ Flag ReadFlag(const Flag* flag) {
  Flag value;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(flag) : "memory");
  return value;
}

// A counter in global memory. It orders no other access.
__device__ __forceinline__ void CountRelaxed(uint32_t* count, uint32_t by) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(count), "r"(by) : "memory");
}
__device__ __forceinline__ uint32_t ReadRelaxed(const uint32_t* count) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(count) : "memory");
  return value;
}

// Orders global memory between the copy engine and ordinary accesses of this thread.
__device__ __forceinline__ void FenceAsyncProxyGlobal() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void FenceDevice() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void ReleaseGlobalWrites() {
  FenceAsyncProxyGlobal();
  __syncwarp();
  FenceDevice();
}
__device__ __forceinline__ void AcquireGlobalWrites() {
  FenceDevice();
  __syncwarp();
  FenceAsyncProxyGlobal();
}

}  // namespace jax_flashmla::sm90
