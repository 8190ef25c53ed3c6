// The threads of a block and of a cluster: who am I, named barriers, register budgets, and how a
// launch waits for the one before it.
#pragma once

#include <cstdint>

namespace jax_flashmla::sm90 {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr unsigned kFullWarp = 0xffffffffu;

// Hides from the compiler how a value was computed. The compiler then recomputes it where it is
// used, instead of keeping it in a register across a loop that has none to spare.
__device__ __forceinline__ int Opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// Tells the compiler that a value is the same in all lanes, so that branches on it stay uniform.
__device__ __forceinline__ int WarpUniform(int value) { return __shfl_sync(kFullWarp, value, 0); }

// The rank of this block in its cluster (0 in a launch without clusters).
__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// A barrier for all threads of all blocks of a cluster. ClusterWait() returns when every thread has
// called ClusterArrive(). It then sees the shared memory that they wrote before.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// elect.sync: true in one lane of a converged warp, always the same one. Unlike `lane == 0`, ptxas
// knows that it is a single lane, and emits a TMA instruction once instead of in a loop over lanes.
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

// Sets the register budget of the calling warpgroup, a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void GrowRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void ShrinkRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Programmatic dependent launch: this kernel may start while the kernels before it in the stream
// still run. Before WaitForPriorKernels() returns it must not read what they may still write, nor
// write what they may still read.
__device__ __forceinline__ void WaitForPriorKernels() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
// Lets the next kernel of the stream start when all blocks have called this or have ended.
__device__ __forceinline__ void AllowNextKernel() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace jax_flashmla::sm90
