// The join warp of dense decode: awaits the other split of a request that two blocks share.
#pragma once

#include "dense_decode/bounds.cuh"

namespace jax_flashmla::dense_decode {

// One warp. Where the last piece of this block is the first of two splits, it waits until the block
// of the second one, which begins with it, has written it, and reads what score needs of it.
template <typename T, bool kMakesSchedule>
class Joiner {
 public:
  __device__ __forceinline__ Joiner(SharedMemoryPlan<T>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    if (work.end.tile == 0) return;
    constexpr int kNext = kOwnBegin + 1;
    if (!BeginsInSecondOfTwo<kMakesSchedule>(smem_, params_, work.part, kNext)) return;
    AwaitFlags(FlagsOf(params_, work, work.part + 1));
    ReadRowFactors(work);
    Arrive(&smem_.other_written);
  }

 private:
  // A lane a flag, cleared for the next launch.
  __device__ __forceinline__ void AwaitFlags(Flag* flags) const {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kWritingWarps) {
      while (ReadFlag(flags + lane) != params_.flag_value) __nanosleep(kPollNanoseconds);
      SetFlag(flags + lane, 0);
    }
    AcquireGlobalWrites();
  }

  __device__ __forceinline__ int NumRows(const BlockWork& work) const {
    return min(params_.rows - work.row_tile * kTileRows, kTileRows);
  }

  // A lane every 32nd row. Past the L1, which does not know of other blocks' writes.
  __device__ __forceinline__ void ReadRowFactors(const BlockWork& work) const {
    const int first = work.row_tile * kTileRows, slot = PartialSlot(work.part + 1, false);
    const float* lse = params_.partial.lse + PartialRow(params_, slot, work.kv_head, first);
    const float* scale =
        params_.partial.scale + PartialQuarter(params_, slot, work.kv_head, first, 0);
#pragma unroll 1
    for (int row = threadIdx.x % kWarpSize; row < NumRows(work); row += kWarpSize) {
      smem_.other_lse[row] = __ldcg(lse + row);
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) {
        smem_.other_weight[q][row] = __ldcg(scale + q * params_.rows + row);
      }
    }
  }

  static constexpr unsigned kPollNanoseconds = 100;

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
};

}  // namespace jax_flashmla::dense_decode
