// The threads of a block and a cluster: who am I, named barriers, register budgets, and the
// dependence of a launch on the one before it.
#pragma once

#include <cstdint>

namespace jax_flashmla::sm90 {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr unsigned kFullWarp = 0xffffffffu;

// A value that is the same in all lanes, told so to the compiler (branches on it stay uniform).
__device__ __forceinline__ int WarpUniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// The rank of this block in its cluster (0 in a launch without clusters).
__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of all blocks of the cluster meet: none leaves ClusterWait() before all have come to
// ClusterArrive(). Shared memory written before the one is seen after the other.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// True in one lane of a warp that is complete, always the same. As the compiler knows that it is
// one, it issues what takes its operands from uniform registers, such as the copies of tma.cuh,
// once. Behind `lane == 0` it makes a loop over the lanes of each.
__device__ __forceinline__ bool IsElected() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(elected));
  return elected != 0;
}

// `threads` threads (a multiple of 32) meet at hardware barrier `id`; id 0 is __syncthreads().
__device__ __forceinline__ void NamedBarrierSync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// The register budget of the calling warpgroup from here on; a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch. Until WaitForPriorKernels() returns, nothing that an earlier
// kernel of the stream may still be writing may be read, and nothing that it reads may be written.
__device__ __forceinline__ void WaitForPriorKernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Lets the next kernel of the stream start its prologue as soon as blocks leave.
__device__ __forceinline__ void AllowNextKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace jax_flashmla::sm90
