// Combine: the result of a sequence with more splits than decode joins by itself.
//
// What   out = sum_s w_s o_s with w_s = 2^(lse_s - lse) and lse = log2 sum_s 2^lse_s, over the
//        splits s of a sequence. A split that saw no key has lse -inf and counts for nothing.
// Floor  At most 2 * parts * rows * 1 KB are read, mostly from the L2.
// How    A block first looks for a sequence to combine; most blocks find none and leave. It looks
//        at one sequence or, if that makes fewer blocks, at every second bound between parts
//        (kJoinedSplits): a sequence with three or more splits contains one.
//        Rows are cut into slices, a half or a quarter of a row each, whichever lets all blocks
//        run at once. A lane group of 16 lanes makes a slice, usually with all splits in flight.
//        If there are blocks to spare, several lane groups share the splits of a slice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "mla/softmax.cuh"
#include "sm90/fragment.cuh"
#include "split_kv/combine.h"

namespace jax_flashmla::split_kv {
namespace {

constexpr int kLaneElements = 8;  // a lane loads 16 bytes
constexpr int kGroupLanes = kQuarterColumns / kLaneElements;
static_assert(2 * kGroupLanes == sm90::kWarpSize);

// How rows are cut into slices.
enum class Cut {
  kFewQuarters,  // a block of 32 lane groups makes one slice; one block runs on an SM
  kQuarters,
  kHalves,
  kManyHalves,  // more blocks than run at once
};
constexpr int SliceQuarters(Cut cut) {
  return cut == Cut::kHalves || cut == Cut::kManyHalves ? 2 : 1;
}
// How many splits a lane group has in flight.
constexpr int SplitsAtOnce(Cut cut) {
  return cut == Cut::kQuarters ? 9 : cut == Cut::kManyHalves ? 3 : 5;
}
constexpr int BlockGroups(Cut cut) { return cut == Cut::kFewQuarters ? 32 : 16; }
constexpr int BlockThreads(Cut cut) { return BlockGroups(cut) * kGroupLanes; }
constexpr int BlockWarps(Cut cut) { return BlockThreads(cut) / sm90::kWarpSize; }
constexpr int BlocksPerSm(Cut cut) {
  return cut == Cut::kFewQuarters ? 1 : cut == Cut::kManyHalves ? 3 : 2;
}
// Whether several lane groups may share the splits of a slice.
constexpr bool IsShared(Cut cut) { return SliceQuarters(cut) == 1; }
// From this average number of splits a sequence on, kFewQuarters is faster
// where there are few rows.
constexpr int kFewQuartersSplits = 73;
constexpr int kGroupsAtOnce = kSms * BlocksPerSm(Cut::kQuarters) * BlockGroups(Cut::kQuarters);

// A sequence and its splits.
struct SplitSequence {
  int sequence, first_part, splits;

  __device__ __forceinline__ int Index(int split) const {
    return PartialIndex(first_part + split, split == 0);
  }
};

// Whether `sequence` has splits that decode has not joined. Reads past the L1, see CombineKernel.
__device__ __forceinline__ bool FindBySequence(const TileSchedule& schedule, int sequence,
                                               SplitSequence* found) {
  found->sequence = sequence;
  // If the arrays of a schedule do not belong together, results may be wrong, but no address may
  // lie outside the scratch.
  found->first_part = max(__ldcg(schedule.first_part + sequence), 0);
  const int splits =
      __ldcg(schedule.num_splits + sequence + 1) - __ldcg(schedule.num_splits + sequence);
  found->splits = min(splits, schedule.num_parts - found->first_part);
  return found->splits > kJoinedSplits;
}

// Whether part `part` begins inside a sequence that decode has not joined. `part` is a multiple of
// kJoinedSplits; only the first such part of a sequence counts.
__device__ __forceinline__ bool FindByPart(const TileSchedule& schedule, int batch, int part,
                                           SplitSequence* found) {
  const int2 words = __ldcg(reinterpret_cast<const int2*>(schedule.part_bounds + part));
  const PartBound bound = ClampToBatch({words.x, words.y}, batch);
  return bound.tile > 0 && FindBySequence(schedule, bound.sequence, found) &&
         part <= found->first_part + kJoinedSplits;
}

// Does both of the above if the call was given no schedule: the block makes it, and looks at
// `sequence` or, if that is negative, at the sequence in which part `part` begins.
template <int kThreads>
__device__ __forceinline__ bool FindWithoutSchedule(const ScheduleInput& input, int sequence,
                                                    int part, SplitSequence* found) {
  using BlockScheduler = Scheduler<kThreads, /*kPastL1=*/true>;
  __shared__ int warp_sums[BlockScheduler::kWarps];
  __shared__ SplitSequence shared;
  if (threadIdx.x == 0) shared.splits = 0;
  const BlockScheduler scheduler(input, warp_sums);
  const auto compare = [&](const PlacedSequence& placed, int splits) {
    const int first_part = scheduler.FirstPart(placed);
    const bool is_first = part > first_part && part <= first_part + kJoinedSplits;
    if (sequence < 0 ? is_first : sequence == placed.sequence) {
      shared = {placed.sequence, first_part, splits};
    }
  };
  scheduler.ForOwnSequencesOfMoreSplits(kJoinedSplits, compare);
  __syncthreads();
  *found = shared;
  return found->splits > kJoinedSplits;
}

// The sum over some splits of a row, relative to 2^largest: a lane's elements of kCount quarters of
// sum_s 2^(lse_s - largest) o_s, and the sum of these weights.
template <int kCount>
struct WeightedSum {
  float o[kCount][kLaneElements];
  float largest, weight;
};

// What weights are relative to. It is finite, because -inf - -inf would be NaN.
__device__ __forceinline__ float WeightBase(float largest) {
  return largest == -INFINITY ? 0.f : largest;
}

// Adds `weight` times the elements in `packed`.
__device__ __forceinline__ void AddPacked(float (&sum)[kLaneElements], float weight, uint4 packed) {
  const uint32_t words[] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; ++i) {
    const float2 pair = sm90::Unpack<__half>(words[i]);
    sum[2 * i] = fmaf(weight, pair.x, sum[2 * i]);
    sum[2 * i + 1] = fmaf(weight, pair.y, sum[2 * i + 1]);
  }
}

// The sum of splits first, first + step, ..., from `element` of a row on. kAtOnce splits are in
// flight; that number does not change the result. The sum is not normalised yet: it can
// be as large as the largest element times the number of splits, so elements that close to the
// largest float32 overflow, as they do in decode.
template <int kCount, int kAtOnce>
__device__ __forceinline__ WeightedSum<kCount> AddSplits(const CombineParams& params,
                                                         const SplitSequence& sequence, int kv_head,
                                                         int row, int first, int step,
                                                         int element) {
  const PartialResults& partial = params.partial;
  const QueryShape& query = params.query;
  WeightedSum<kCount> sum = {};
  int begin = first;
  do {
    uint4 x[kAtOnce][kCount];
    float lse[kAtOnce], scale[kAtOnce][kCount];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = begin + i * step;
      lse[i] = -INFINITY;
      if (split >= sequence.splits) continue;
      const int index = sequence.Index(split);
      lse[i] = *partial.LseRow(query, index, kv_head, row);
      const __half* o = partial.ORow(query, index, kv_head, row) + element;
      const float* scales =
          partial.ScaleRow(query, index, kv_head, row) + element / kQuarterColumns * query.rows;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[i][j] = *reinterpret_cast<const uint4*>(o + j * kQuarterColumns);
        scale[i][j] = scales[j * query.rows];
      }
    }
    if (begin == first) {
      sum.largest = lse[0];
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) sum.largest = fmaxf(sum.largest, lse[i]);
      for (int split = first + kAtOnce * step; split < sequence.splits; split += step) {
        const float split_lse = *partial.LseRow(query, sequence.Index(split), kv_head, row);
        sum.largest = fmaxf(sum.largest, split_lse);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (lse[i] == -INFINITY) continue;
      const float weight = Exp2(lse[i] - sum.largest);
      sum.weight += weight;
#pragma unroll
      for (int j = 0; j < kCount; ++j) AddPacked(sum.o[j], weight * scale[i][j], x[i][j]);
    }
    begin += kAtOnce * step;
  } while (begin < sequence.splits);
  return sum;
}

// The sum over the two lane groups of a warp, in both of them.
__device__ __forceinline__ WeightedSum<1> SumOverWarp(const WeightedSum<1>& sum) {
  const auto other = [](float x) { return __shfl_xor_sync(sm90::kFullWarp, x, kGroupLanes); };
  WeightedSum<1> total;
  total.largest = fmaxf(sum.largest, other(sum.largest));
  const float factor = Exp2(sum.largest - WeightBase(total.largest));
  const float weight = factor * sum.weight;
  total.weight = weight + other(weight);
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    const float x = factor * sum.o[0][i];
    total.o[0][i] = x + other(x);
  }
  return total;
}

// The sum over the lane groups that share a slice, in the first of them. `groups` is a power of 2.
template <int kBlockWarps>
__device__ __forceinline__ WeightedSum<1> SumOverGroups(const WeightedSum<1>& own, int groups) {
  __shared__ float4 o[2][kBlockWarps][kGroupLanes];
  __shared__ float largest[kBlockWarps], weight[kBlockWarps];
  if (groups == 1) return own;
  const WeightedSum<1> sum = SumOverWarp(own);
  const int lane = threadIdx.x % sm90::kWarpSize, warp = threadIdx.x / sm90::kWarpSize;
  const int warps = groups / 2;
  if (lane < kGroupLanes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* x = sum.o[0] + 4 * i;
      o[i][warp][lane] = make_float4(x[0], x[1], x[2], x[3]);
    }
  }
  if (lane == 0) {
    largest[warp] = sum.largest;
    weight[warp] = sum.weight;
  }
  __syncthreads();
  if (warp % warps != 0 || lane >= kGroupLanes) return sum;
  WeightedSum<1> total = {.largest = -INFINITY};
  for (int w = 0; w < warps; ++w) total.largest = fmaxf(total.largest, largest[warp + w]);
#pragma unroll 4
  for (int w = 0; w < warps; ++w) {
    const float factor = Exp2(largest[warp + w] - WeightBase(total.largest));
    total.weight = fmaf(factor, weight[warp + w], total.weight);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x = o[i][warp + w][lane];
      float* e = total.o[0] + 4 * i;
      e[0] = fmaf(factor, x.x, e[0]);
      e[1] = fmaf(factor, x.y, e[1]);
      e[2] = fmaf(factor, x.z, e[2]);
      e[3] = fmaf(factor, x.w, e[3]);
    }
  }
  return total;
}

// A lane's elements times `factor`, rounded, as 8 neighbouring columns. The lanes of a quad hold
// them in the order in which partial results are stored (mla/epilogue.cuh).
template <typename T>
__device__ __forceinline__ uint4 RoundedColumns(const float (&x)[kLaneElements], float factor) {
  uint32_t words[kLaneElements / 2];
#pragma unroll
  for (int i = 0; i < kLaneElements / 2; ++i) {
    words[i] = sm90::Pack<T>(x[2 * i] * factor, x[2 * i + 1] * factor);
  }
  sm90::QuadTranspose(words);
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// `groups` lane groups make slice `slice`, counted over all rows, if there is such a slice.
template <typename T, Cut kCut>
__device__ __forceinline__ void CombineSlice(const CombineParams& params,
                                             const SplitSequence& sequence, int kv_head, int slice,
                                             int groups) {
  constexpr int kCount = SliceQuarters(kCut);
  const int row = slice * kCount / kQuarters;
  const int element =
      slice * kCount % kQuarters * kQuarterColumns + threadIdx.x % kGroupLanes * kLaneElements;
  const int share = threadIdx.x / kGroupLanes % groups;
  WeightedSum<kCount> sum = {};
  if (row < params.query.rows) {
    sum = AddSplits<kCount, SplitsAtOnce(kCut)>(params, sequence, kv_head, row, share, groups,
                                                element);
  }
  if constexpr (IsShared(kCut)) sum = SumOverGroups<BlockWarps(kCut)>(sum, groups);
  const float lse2 = log2f(sum.weight) + WeightBase(sum.largest);  // -inf where no key was seen
  float factor = sum.weight == 0.f ? 0.f : 1.f / sum.weight;
  if (params.sink.IsGiven() && row < params.query.rows) {
    factor *= params.sink.ShareOfKeys(params.query, sequence.sequence, kv_head, row, lse2);
  }
  const int64_t out_row = params.query.Row(sequence.sequence, kv_head, row);
  T* out = static_cast<T*>(params.out) + out_row * kHeadDimV + element;
  const bool writes = share == 0 && row < params.query.rows;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const uint4 columns = RoundedColumns<T>(sum.o[j], factor);
    if (writes) *reinterpret_cast<uint4*>(out + j * kQuarterColumns) = columns;
  }
  if (writes && element == 0) {
    params.lse[params.query.LseRow(sequence.sequence, kv_head, row)] = NaturalLse(lse2);
  }
}

// How many lane groups make a slice: as many as there are blocks for, with at least 4 splits each.
// Where there are few rows, all lane groups of a block.
template <Cut kCut>
__device__ __forceinline__ int GroupsFor(int splits, int max_groups) {
  if constexpr (!IsShared(kCut)) return 1;
  if constexpr (kCut == Cut::kFewQuarters) return BlockGroups(kCut);
  int groups = 1;
  while (groups < max_groups && 2 * groups * 4 <= splits) groups *= 2;
  return groups;
}

// Grid: candidates * h_kv * units, the unit running fastest. A candidate is a sequence or a bound
// that may have something to combine. There are enough units for `max_groups` lane groups a slice.
template <typename T, Cut kCut, bool kMakesSchedule>
__global__ void __launch_bounds__(BlockThreads(kCut), BlocksPerSm(kCut))
    CombineKernel(const __grid_constant__ CombineParams params, int units, int max_groups,
                  bool by_sequence) {
  const int unit = blockIdx.x % units;
  const int kv_head = blockIdx.x / units % params.query.num_kv_heads;
  const int candidate = blockIdx.x / units / params.query.num_kv_heads;
  // The schedule, or the lengths it is made from, are read before the wait, past the L1. That is
  // safe because decode lets this kernel start only after it has itself waited for all earlier
  // kernels. So blocks without work leave while decode still runs. One of them waits all the same:
  // this kernel must not end before decode does.
  SplitSequence sequence;
  bool found;
  const int part = (candidate + 1) * kJoinedSplits;
  if constexpr (kMakesSchedule) {
    found = FindWithoutSchedule<BlockThreads(kCut)>(params.schedule_input,
                                                    by_sequence ? candidate : -1, part, &sequence);
  } else {
    found = by_sequence ? FindBySequence(params.schedule, candidate, &sequence)
                        : FindByPart(params.schedule, params.batch, part, &sequence);
  }
  if (!found) {
    if (blockIdx.x == 0) sm90::WaitForPriorKernels();
    return;
  }
  const int groups = GroupsFor<kCut>(sequence.splits, max_groups);
  const int slice = (unit * BlockGroups(kCut) + threadIdx.x / kGroupLanes) / groups;
  sm90::WaitForPriorKernels();
  CombineSlice<T, kCut>(params, sequence, kv_head, slice, groups);
}

struct LaunchPlan {
  Cut cut;
  int max_groups;  // for a slice
};

// The number of lane groups fixes the summation order, hence the bits. For batch invariance (splits
// of a fixed size, equally many parts for each sequence) it may depend only on the splits of a
// sequence: it is computed from their average number, as if there were as many parts as SMs. The
// cut changes no bits; it depends on `rows`, the rows of all candidates.
LaunchPlan PlanLaunch(const CombineParams& params, int64_t rows) {
  const int64_t rows_each = int64_t{params.query.num_kv_heads} * params.query.rows;
  const int64_t splits = std::max(params.schedule.num_parts / params.batch, 1);
  if (splits >= kFewQuartersSplits && rows_each * kQuarters <= splits) {
    return {Cut::kFewQuarters, BlockGroups(Cut::kFewQuarters)};
  }
  const int64_t parts_of_sms = kSms / (int64_t{params.query.num_kv_heads} * params.query.row_tiles);
  const int64_t rows_of_sms = std::max<int64_t>(parts_of_sms / splits, 1) * rows_each;
  int groups = BlockGroups(Cut::kQuarters);
  while (groups > 1 && rows_of_sms * kQuarters * groups > kGroupsAtOnce) groups /= 2;
  if (groups > 1 || rows * kQuarters <= kGroupsAtOnce) return {Cut::kQuarters, groups};
  return {rows * kQuarters / 2 <= kGroupsAtOnce ? Cut::kHalves : Cut::kManyHalves, 1};
}

template <typename T, bool kMakesSchedule>
auto KernelOf(Cut cut) {
  switch (cut) {
    case Cut::kFewQuarters:
      return CombineKernel<T, Cut::kFewQuarters, kMakesSchedule>;
    case Cut::kQuarters:
      return CombineKernel<T, Cut::kQuarters, kMakesSchedule>;
    case Cut::kHalves:
      return CombineKernel<T, Cut::kHalves, kMakesSchedule>;
    default:
      return CombineKernel<T, Cut::kManyHalves, kMakesSchedule>;
  }
}

}  // namespace

template <typename T>
ffi::Error LaunchCombine(const char* op, const CombineParams& params, cudaStream_t stream) {
  const QueryShape& query = params.query;
  const int bounds = (params.schedule.num_parts - 1) / kJoinedSplits;
  if (bounds == 0) return ffi::Error::Success();  // no sequence can have that many splits
  const bool by_sequence = params.batch <= bounds;
  const int64_t candidates = by_sequence ? params.batch : bounds;
  const auto [cut, max_groups] = PlanLaunch(params, candidates * query.num_kv_heads * query.rows);
  const int64_t groups = int64_t{query.rows} * kQuarters / SliceQuarters(cut) * max_groups;
  const int64_t units = CeilDiv<int64_t>(groups, BlockGroups(cut));
  const int64_t blocks = candidates * query.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(op, blocks));
  const auto kernel = params.schedule.IsGiven() ? KernelOf<T, false>(cut) : KernelOf<T, true>(cut);
  return LaunchOverlapped(op, stream, {.grid = dim3(blocks), .block = BlockThreads(cut)}, kernel,
                          params, static_cast<int>(units), max_groups, by_sequence);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const char*, const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const char*, const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla::split_kv
