// Combine: the result of a request of more splits than decode joins by itself.
//
// What: out = sum_s w_s o_s with w_s = 2^(lse_s - lse), lse = log2 sum_s 2^lse_s, over the splits
// of a request; a split that saw no key has lse -inf and o 0.
//
// Floor: at most 2 * parts * rows * 1 KB are read, mostly from L2.
//
// Schedule: a block looks at one request, or, where that is less, at one of every kJoinedSplits
// bounds between parts: a request of that many splits and more contains one of them. Blocks that
// find nothing to do leave at once. A group of 16 lanes makes a half or a quarter of a row,
// whatever lets all blocks run at once, mostly with all splits in flight; several groups share the
// splits where there are blocks to spare.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "mla/softmax.cuh"
#include "sm90/fragment.cuh"
#include "split_kv/combine.h"

namespace jax_flashmla {
namespace {

constexpr int kLaneElements = 8;  // a lane loads 16 bytes
constexpr int kGroupLanes = kQuarterColumns / kLaneElements;
static_assert(2 * kGroupLanes == sm90::kWarpSize);

// How rows are cut into pieces, of which a group of lanes, or several, make one.
enum class Cut {
  kFewQuarters,  // in blocks of 32 groups for one piece, of which an SM holds one
  kQuarters,
  kHalves,
  kManyHalves,  // more than run at once
};
constexpr int PieceQuarters(Cut cut) {
  return cut == Cut::kHalves || cut == Cut::kManyHalves ? 2 : 1;
}
// Splits that a group has in flight.
constexpr int SplitsAtOnce(Cut cut) {
  return cut == Cut::kQuarters ? 9 : cut == Cut::kManyHalves ? 3 : 5;
}
constexpr int BlockGroups(Cut cut) { return cut == Cut::kFewQuarters ? 32 : 16; }
constexpr int BlockThreads(Cut cut) { return BlockGroups(cut) * kGroupLanes; }
constexpr int BlockWarps(Cut cut) { return BlockThreads(cut) / sm90::kWarpSize; }
constexpr int BlocksPerSm(Cut cut) {
  return cut == Cut::kFewQuarters ? 1 : cut == Cut::kManyHalves ? 3 : 2;
}
// Whether several groups may share the splits of a piece.
constexpr bool IsShared(Cut cut) { return PieceQuarters(cut) == 1; }
// From so many splits a request on average on, and if these have few rows, kFewQuarters is faster.
constexpr int kFewQuartersSplits = 73;
constexpr int kGroupsAtOnce = kSms * BlocksPerSm(Cut::kQuarters) * BlockGroups(Cut::kQuarters);

// The splits of one request.
struct SplitRequest {
  int request, first_part, splits;

  __device__ __forceinline__ int Slot(int split) const {
    return PartialSlot(first_part + split, split == 0);
  }
};

// Whether `request` has splits that decode has not joined. Reads past the L1, see CombineKernel.
__device__ __forceinline__ bool FindByRequest(const TileSchedule& schedule, int request,
                                              SplitRequest* found) {
  found->request = request;
  // Arrays that do not belong together may give wrong results, but must not lead out of the
  // scratch.
  found->first_part = max(__ldcg(schedule.first_part + request), 0);
  const int splits =
      __ldcg(schedule.num_splits + request + 1) - __ldcg(schedule.num_splits + request);
  found->splits = min(splits, schedule.num_parts - found->first_part);
  return found->splits > kJoinedSplits;
}

// Whether part `part`, a multiple of kJoinedSplits, is the first such part to begin inside a
// request, one of `batch`, that decode has not joined.
__device__ __forceinline__ bool FindByPart(const TileSchedule& schedule, int batch, int part,
                                           SplitRequest* found) {
  const int2 words = __ldcg(reinterpret_cast<const int2*>(schedule.part_bounds + part));
  const PartBound bound = Inside({words.x, words.y}, batch);
  return bound.tile > 0 && FindByRequest(schedule, bound.request, found) &&
         part <= found->first_part + kJoinedSplits;
}

// The same where no schedule is given: the block makes it, and looks for `request`, or, where that
// is negative, for the request that part `part` stands for.
template <int kThreads>
__device__ __forceinline__ bool FindInMade(const ScheduleInput& input, int request, int part,
                                           SplitRequest* found) {
  using BlockScheduler = Scheduler<kThreads, /*kPastL1=*/true>;
  __shared__ int warp_sums[BlockScheduler::kWarps];
  __shared__ SplitRequest shared;
  if (threadIdx.x == 0) shared.splits = 0;
  const BlockScheduler scheduler(input, warp_sums);
  scheduler.ForOwnRequestsOfMoreSplits(kJoinedSplits, [&](const PlacedRequest& placed, int splits) {
    const int first_part = scheduler.FirstPart(placed);
    const bool is_first = part > first_part && part <= first_part + kJoinedSplits;
    if (request < 0 ? is_first : request == placed.request) {
      shared = {placed.request, first_part, splits};
    }
  });
  __syncthreads();
  *found = shared;
  return found->splits > kJoinedSplits;
}

// What some of a row's splits add up to: the sums of 2^(lse_s - largest) o_s, in a lane's elements
// of kCount quarters, and of these weights alone.
template <int kCount>
struct WeighedSum {
  float o[kCount][kLaneElements];
  float largest, weight;
};

// What weights are relative to.
__device__ __forceinline__ float WeightBase(float largest) {
  return largest == -INFINITY ? 0.f : largest;  // -inf - -inf is NaN
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

// The sum of splits first, first + step, ... from `element` of a row on. kAtOnce of them are in
// flight, which changes no bits. A split that saw no key counts for nothing. The weights add up to
// as much as there are splits, so elements that near to float32's largest overflow, as in decode.
template <int kCount, int kAtOnce>
__device__ __forceinline__ WeighedSum<kCount> AddSplits(const CombineParams& params,
                                                        const SplitRequest& request, int kv_head,
                                                        int row, int first, int step, int element) {
  WeighedSum<kCount> sum = {};
  int begin = first;
  do {
    uint4 x[kAtOnce][kCount];
    float lse[kAtOnce], scale[kAtOnce][kCount];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = begin + i * step;
      lse[i] = -INFINITY;
      if (split >= request.splits) continue;
      const int64_t partial_row = PartialRow(params, request.Slot(split), kv_head, row);
      lse[i] = params.partial.lse[partial_row];
      const __half* o = params.partial.o + partial_row * kHeadDimV + element;
      const float* scales =
          params.partial.scale +
          PartialQuarter(params, request.Slot(split), kv_head, row, element / kQuarterColumns);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        x[i][j] = *reinterpret_cast<const uint4*>(o + j * kQuarterColumns);
        scale[i][j] = scales[j * params.rows];
      }
    }
    if (begin == first) {
      sum.largest = lse[0];
#pragma unroll
      for (int i = 1; i < kAtOnce; ++i) sum.largest = fmaxf(sum.largest, lse[i]);
      for (int split = first + kAtOnce * step; split < request.splits; split += step) {
        const int64_t partial_row = PartialRow(params, request.Slot(split), kv_head, row);
        sum.largest = fmaxf(sum.largest, params.partial.lse[partial_row]);
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
  } while (begin < request.splits);
  return sum;
}

// The sum of the two groups of a warp, for both.
__device__ __forceinline__ WeighedSum<1> SumOverWarp(const WeighedSum<1>& sum) {
  const auto other = [](float x) { return __shfl_xor_sync(sm90::kFullWarp, x, kGroupLanes); };
  WeighedSum<1> total;
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

// The sum over the `groups` groups, a power of 2, that share a piece, for the first one of them.
template <int kBlockWarps>
__device__ __forceinline__ WeighedSum<1> SumOverGroups(const WeighedSum<1>& own, int groups) {
  __shared__ float4 o[2][kBlockWarps][kGroupLanes];
  __shared__ float largest[kBlockWarps], weight[kBlockWarps];
  if (groups == 1) return own;
  const WeighedSum<1> sum = SumOverWarp(own);
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
  WeighedSum<1> total = {.largest = -INFINITY};
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

// A lane's elements times `factor`, rounded, as 8 columns in a row: a quad has them as the partial
// results have them (partial_result.cuh).
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

// `groups` groups make piece `piece` of all rows' pieces, if there is one.
template <typename T, Cut kCut>
__device__ __forceinline__ void CombinePiece(const CombineParams& params,
                                             const SplitRequest& request, int kv_head, int piece,
                                             int groups) {
  constexpr int kCount = PieceQuarters(kCut);
  const int row = piece * kCount / kQuarters;
  const int element =
      piece * kCount % kQuarters * kQuarterColumns + threadIdx.x % kGroupLanes * kLaneElements;
  const int share = threadIdx.x / kGroupLanes % groups;
  WeighedSum<kCount> sum = {};
  if (row < params.rows) {
    sum = AddSplits<kCount, SplitsAtOnce(kCut)>(params, request, kv_head, row, share, groups,
                                                element);
  }
  if constexpr (IsShared(kCut)) sum = SumOverGroups<BlockWarps(kCut)>(sum, groups);
  const float factor = sum.weight == 0.f ? 0.f : 1.f / sum.weight;
  const int64_t head = static_cast<int64_t>(request.request) * params.num_kv_heads + kv_head;
  T* out = static_cast<T*>(params.out) + (head * params.rows + row) * kHeadDimV + element;
  const bool writes = share == 0 && row < params.rows;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const uint4 columns = RoundedColumns<T>(sum.o[j], factor);
    if (writes) *reinterpret_cast<uint4*>(out + j * kQuarterColumns) = columns;
  }
  if (writes && element == 0) {
    const float lse = log2f(sum.weight) + WeightBase(sum.largest);  // -inf where no key was seen
    params.lse[LseOffset(params, request.request, kv_head, row)] = NaturalLse(lse);
  }
}

// Groups for a piece: as many as there are blocks for, with at least 4 splits each; where rows are
// few, all of a block.
template <Cut kCut>
__device__ __forceinline__ int GroupsFor(int splits, int most) {
  if constexpr (!IsShared(kCut)) return 1;
  if constexpr (kCut == Cut::kFewQuarters) return BlockGroups(kCut);
  int groups = 1;
  while (groups < most && 2 * groups * 4 <= splits) groups *= 2;
  return groups;
}

// Grid: candidates * h_kv * units, unit fastest: enough units for `most_groups` groups a piece.
template <typename T, Cut kCut, bool kMakesSchedule>
__global__ void __launch_bounds__(BlockThreads(kCut), BlocksPerSm(kCut))
    CombineKernel(const __grid_constant__ CombineParams params, int units, int most_groups,
                  bool by_request) {
  const int unit = blockIdx.x % units;
  const int kv_head = blockIdx.x / units % params.num_kv_heads;
  const int candidate = blockIdx.x / units / params.num_kv_heads;
  // The schedule, or what it is made from, is read before the wait, past the L1: decode lets this
  // kernel start only when it has itself waited for all that came before. Blocks without work so
  // leave while decode still runs; one waits, so that this kernel does not end before decode.
  SplitRequest request;
  bool found;
  const int part = (candidate + 1) * kJoinedSplits;
  if constexpr (kMakesSchedule) {
    found = FindInMade<BlockThreads(kCut)>(params.schedule_input, by_request ? candidate : -1, part,
                                           &request);
  } else {
    found = by_request ? FindByRequest(params.schedule, candidate, &request)
                       : FindByPart(params.schedule, params.batch, part, &request);
  }
  if (!found) {
    if (blockIdx.x == 0) sm90::WaitForPriorKernels();
    return;
  }
  const int groups = GroupsFor<kCut>(request.splits, most_groups);
  const int piece = (unit * BlockGroups(kCut) + threadIdx.x / kGroupLanes) / groups;
  sm90::WaitForPriorKernels();
  CombinePiece<T, kCut>(params, request, kv_head, piece, groups);
}

struct LaunchPlan {
  Cut cut;
  int most_groups;  // for a piece
};

// How many groups share a piece decides in which order its splits are added, so it must not follow
// from the batch where the splits have a fixed size, and there are equally many parts for each
// request. So it follows from the splits of a request on average, as if the parts were those of all
// SMs; and the rest, which changes no bits, from the `rows` of all requests that may have to be
// combined.
LaunchPlan PlanLaunch(const CombineParams& params, int64_t rows) {
  const int64_t rows_each = int64_t{params.num_kv_heads} * params.rows;
  const int64_t splits = std::max(params.schedule.num_parts / params.batch, 1);
  if (splits >= kFewQuartersSplits && rows_each * kQuarters <= splits) {
    return {Cut::kFewQuarters, BlockGroups(Cut::kFewQuarters)};
  }
  const int64_t parts_of_sms =
      kSms / (int64_t{params.num_kv_heads} * CeilDiv(params.rows, kTileRows));
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
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  constexpr const char* kOp = "flash_mla_with_kvcache";
  const int bounds = (params.schedule.num_parts - 1) / kJoinedSplits;
  if (bounds == 0) return ffi::Error::Success();  // no request has so many splits
  const bool by_request = params.batch <= bounds;
  const int64_t candidates = by_request ? params.batch : bounds;
  const auto [cut, most_groups] =
      PlanLaunch(params, candidates * params.num_kv_heads * params.rows);
  const int64_t groups = int64_t{params.rows} * kQuarters / PieceQuarters(cut) * most_groups;
  const int64_t units = CeilDiv<int64_t>(groups, BlockGroups(cut));
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  const auto kernel = params.schedule.IsGiven() ? KernelOf<T, false>(cut) : KernelOf<T, true>(cut);
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = BlockThreads(cut)}, kernel,
                          params, static_cast<int>(units), most_groups, by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
