// Rings of buffers in shared memory, through which the warps of a thread block hand data over.
//
// A ring has a fixed number of stages. A producer fills a stage and completes its `full` barrier;
// the consumers read it and complete its `empty` barrier. Producer and consumers each keep a
// cursor and must advance it in the same way: a cursor that skips a stage which another one counts
// makes both wait forever.
#pragma once

#include "sm90/fragment.cuh"

namespace jax_flashmla::sm90 {

constexpr int kWarpsPerWarpgroup = kWarpgroupSize / kWarpSize;

// The two barriers of each stage of a ring.
template <int kStages>
struct RingBarriers {
  Barrier full[kStages], empty[kStages];

  // `producers` and `consumers`: how many arrivals complete a `full` and an `empty` barrier.
  __device__ __forceinline__ void Init(int producers, int consumers) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(&full[i], producers);
      BarrierInit(&empty[i], consumers);
    }
  }
};

// The position in a ring and the parity of the current round, in one register.
template <int kStages>
class RingCursor {
 public:
  RingCursor() = default;
  // After `count` stages.
  __device__ __forceinline__ explicit RingCursor(uint32_t count) : n_(count % (2 * kStages)) {}
  __device__ __forceinline__ int Stage() const { return n_ < kStages ? n_ : n_ - kStages; }
  __device__ __forceinline__ uint32_t Parity() const { return n_ >= kStages; }
  __device__ __forceinline__ void Advance(int by = 1) {
    n_ += by;
    if (n_ >= 2 * kStages) n_ -= 2 * kStages;
  }
  __device__ __forceinline__ RingCursor Before(int by) const {
    RingCursor earlier;
    earlier.n_ = n_ >= by ? n_ - by : n_ - by + 2 * kStages;
    return earlier;
  }

 private:
  int n_ = 0;
};

__device__ __forceinline__ bool IsFirstLane() { return threadIdx.x % kWarpSize == 0; }
// Whether this is the first of the four lanes that share two rows of a fragment.
__device__ __forceinline__ bool IsFirstOfQuad() { return threadIdx.x % 4 == 0; }

// One warp tells the producers of all blocks of the cluster that it has finished reading a stage.
template <int kClusterSize>
__device__ __forceinline__ void Release(Barrier* empty) {
  __syncwarp();
  const int lane = threadIdx.x % kWarpSize;
  if constexpr (kClusterSize == 1) {
    if (lane == 0) Arrive(empty);
  } else {
    if (lane < kClusterSize) ArriveAtRank(empty, lane);
  }
}

}  // namespace jax_flashmla::sm90
