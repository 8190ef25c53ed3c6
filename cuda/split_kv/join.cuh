// Joining the two splits of a sequence inside the decode kernel.
//
// The first split is the last piece of part p, the second one is the first piece of part p + 1,
// so the second is usually written long before the first one ends. Its block writes a partial
// result and sets flags. In the block of the first split the join warp waits for these flags and
// reads the log-sum-exps and scales of the rows; the loader brings the rows through the ring;
// the score warpgroup turns the scales into weights; the value warpgroups add the weighted rows
// as they write the result. Rows of the tile beyond the last query row are not set; their
// results are not written.
#pragma once

#include <limits>

#include "mla/softmax.cuh"
#include "split_kv/work.cuh"

namespace jax_flashmla::split_kv {

// What a block knows of the other split, in shared memory.
struct OtherSplit {
  float lse[kTileRows];                // base 2
  float weight[kQuarters][kTileRows];  // first the scales of the quarters, later their weights
  Barrier written;                     // completed at most once a launch, by the join warp

  __device__ __forceinline__ void Init() { BarrierInit(&written, kWarpSize); }

  // Joins two rows of this thread with the other split: `factor` and `lse2`
  // become those of the sum.
  __device__ __forceinline__ void AddOther(float (&factor)[2], float (&lse2)[2]) {
    Wait(&written, 0);
    const int first_row = Opaque(FragmentRow());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 8 * i;
      const float other_lse2 = lse[row];
      float largest = fmaxf(lse2[i], other_lse2);
      if (largest == -INFINITY) largest = 0.f;  // -inf - -inf is NaN
      const float own = Exp2(lse2[i] - largest), other = Exp2(other_lse2 - largest);
      const float sum = own + other;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      // A factor of exactly 0 means "no visible key: write 0 whatever O holds". Keep a tiny
      // non-zero factor, so that an underflowed weight is not mistaken for it.
      constexpr float kMin = std::numeric_limits<float>::denorm_min();
      const float weighed = factor[i] * own * inverse;
      factor[i] = factor[i] != 0.f && weighed == 0.f ? kMin : weighed;
      lse2[i] = log2f(sum) + largest;  // -inf where the sum is 0
      if (IsFirstOfQuad()) {
#pragma unroll
        for (int q = 0; q < kQuarters; ++q) weight[q][row] *= other * inverse;
      }
    }
  }

  // Multiplies the weights of a row of this thread.
  __device__ __forceinline__ void ScaleWeights(int row, float by) {
    if (!IsFirstOfQuad()) return;
#pragma unroll
    for (int q = 0; q < kQuarters; ++q) weight[q][row] *= by;
  }
};

// The join warp. `kWritingWarps`: how many warps of the other block set a flag.
template <int kWritingWarps, bool kMakesSchedule>
class Joiner {
 public:
  static_assert(kWritingWarps <= kProgressWord);

  __device__ __forceinline__ Joiner(OtherSplit& other, const BlockBounds<kMakesSchedule>& bounds,
                                    const QueryShape& query, const PartialResults& partial,
                                    const PartialFlags& flags)
      : other_(other), bounds_(bounds), query_(query), partial_(partial), flags_(flags) {}

  // If the block's last piece is the first of two splits, waits for the other one and reads the
  // log-sum-exps and scales of its rows.
  __device__ __forceinline__ void Run(const BlockWork& work) {
    if (work.end.tile == 0) return;  // shares no sequence with the next part: spares reading bounds
    if (!bounds_.BeginsInSecondOfTwo(work.part, kOwnBegin + 1)) return;
    AwaitFlags(flags_.Of(query_, work, work.part + 1));
    ReadLseAndScales(work);
    Arrive(&other_.written);
  }

 private:
  // Each lane waits for one flag, and clears it for the next launch.
  __device__ __forceinline__ void AwaitFlags(Flag* flags) const {
    const int lane = threadIdx.x % kWarpSize;
    if (lane < kWritingWarps) {
      while (ReadFlag(flags + lane) != flags_.value) __nanosleep(kPollNanoseconds);
      SetFlag(flags + lane, 0);
    }
    AcquireGlobalWrites();
  }

  __device__ __forceinline__ int NumRows(const BlockWork& work) const {
    return min(query_.rows - work.row_tile * kTileRows, kTileRows);
  }

  // Each lane reads every 32nd row, past the L1, which does not see the writes of other blocks.
  __device__ __forceinline__ void ReadLseAndScales(const BlockWork& work) const {
    const int first = work.row_tile * kTileRows, index = PartialIndex(work.part + 1, false);
    const float* lse = partial_.LseRow(query_, index, work.kv_head, first);
    const float* scale = partial_.ScaleRow(query_, index, work.kv_head, first);
#pragma unroll 1
    for (int row = threadIdx.x % kWarpSize; row < NumRows(work); row += kWarpSize) {
      other_.lse[row] = __ldcg(lse + row);
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) {
        other_.weight[q][row] = __ldcg(scale + q * query_.rows + row);
      }
    }
  }

  static constexpr unsigned kPollNanoseconds = 100;

  OtherSplit& other_;
  const BlockBounds<kMakesSchedule>& bounds_;
  const QueryShape& query_;
  const PartialResults& partial_;
  const PartialFlags& flags_;
};

}  // namespace jax_flashmla::split_kv
