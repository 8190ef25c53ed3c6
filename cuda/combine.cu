// Combine: the result of a request of more splits than decode joins by itself.
//
// What: out = sum_s w_s o_s with w_s = 2^(lse_s - lse), lse = log2 sum_s 2^lse_s, over the splits
// of a request; a split that saw no key has lse -inf and o 0.
//
// Floor: at most 2 * parts * rows * 1 KB are read, mostly from L2.
//
// Schedule: a block looks at one request, or, where that is less, at one of every kJoinedSplits
// bounds between parts: a request of that many splits and more contains one of them. Blocks that
// find nothing to do leave at once. A warp makes a row, a half or a quarter of it, whatever lets
// all blocks run at once, with all splits in flight; several warps share the splits where there are
// blocks to spare.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "combine.h"
#include "sm90/fragment.cuh"
#include "softmax.cuh"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kLaneElements = 4;  // a lane loads 8 bytes
static_assert(kWarpSize * kLaneElements == kQuarterColumns);

// How rows are cut into pieces, of which a warp, or several, make one.
enum class Cut {
  kFewQuarters,  // in blocks of 16 warps for one piece, of which an SM holds one
  kQuarters,
  kLongQuarters,  // of many splits
  kHalves,
  kRows,
  kManyRows,  // more than run at once
};
constexpr int PieceQuarters(Cut cut) {
  return cut == Cut::kRows || cut == Cut::kManyRows ? 4 : cut == Cut::kHalves ? 2 : 1;
}
// Splits that a warp has in flight.
constexpr int SplitsAtOnce(Cut cut) {
  switch (cut) {
    case Cut::kLongQuarters:
      return 17;
    case Cut::kRows:
      return 5;
    case Cut::kManyRows:
      return 3;
    default:
      return 9;
  }
}
constexpr int BlockWarps(Cut cut) { return cut == Cut::kFewQuarters ? 16 : 8; }
constexpr int BlocksPerSm(Cut cut) {
  return cut == Cut::kFewQuarters ? 1 : cut == Cut::kManyRows ? 3 : 2;
}
// Whether several warps may share the splits of a piece.
constexpr bool IsShared(Cut cut) { return PieceQuarters(cut) == 1; }
constexpr int kWarpsAtOnce = kSms * BlocksPerSm(Cut::kQuarters) * BlockWarps(Cut::kQuarters);

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
// request that decode has not joined.
__device__ __forceinline__ bool FindByPart(const TileSchedule& schedule, int part,
                                           SplitRequest* found) {
  const int2 bound = __ldcg(reinterpret_cast<const int2*>(schedule.part_bounds + part));
  return bound.y > 0 && FindByRequest(schedule, bound.x, found) &&
         part <= found->first_part + kJoinedSplits;
}

// log2 of the sum of 2^lse over the splits, by the 32 lanes of a warp; NaN if any is NaN.
__device__ __forceinline__ float TotalLse(const CombineParams& params, const SplitRequest& request,
                                          int kv_head, int row) {
  constexpr int kAtOnce = 5;  // so that 132 parts take one turn
  float total = -INFINITY;
  for (int begin = 0; begin < request.splits; begin += kAtOnce * kWarpSize) {
    float lse[kAtOnce];
    float largest = total;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = begin + i * kWarpSize + threadIdx.x % kWarpSize;
      lse[i] = split < request.splits
                   ? params.partial.lse[PartialRow(params, request.Slot(split), kv_head, row)]
                   : -INFINITY;
      largest = fmaxf(largest, lse[i]);
    }
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, step));
    }
    if (largest == -INFINITY) largest = 0.f;  // -inf - -inf is NaN
    float sum = threadIdx.x % kWarpSize == 0 ? Exp2(total - largest) : 0.f;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) sum += Exp2(lse[i] - largest);
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
      sum += __shfl_xor_sync(kFullWarp, sum, step);
    }
    total = log2f(sum) + largest;  // -inf where the sum is 0
  }
  return total;
}

// Adds to `sum` the shares of splits first, first + step, ... in elements `element` .. + 3 of
// kCount quarters of a row, and gives the total log-sum-exp. kAtOnce splits are in flight, the
// first of them before the total is known. A split that saw no key counts for nothing.
template <int kCount, int kAtOnce>
__device__ __forceinline__ float AddSplits(const CombineParams& params, const SplitRequest& request,
                                           int kv_head, int row, int first, int step, int element,
                                           float4 (&sum)[kCount]) {
  float total = 0.f;
  int begin = first;
  do {
    uint2 x[kAtOnce][kCount];
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
        x[i][j] = *reinterpret_cast<const uint2*>(o + j * kQuarterColumns);
        scale[i][j] = scales[j * params.rows];
      }
    }
    if (begin == first) total = TotalLse(params, request, kv_head, row);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (lse[i] == -INFINITY) continue;
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float weight = Exp2(lse[i] - total) * scale[i][j];
        const float2 low = sm90::Unpack<__half>(x[i][j].x), high = sm90::Unpack<__half>(x[i][j].y);
        sum[j].x = fmaf(weight, low.x, sum[j].x);
        sum[j].y = fmaf(weight, low.y, sum[j].y);
        sum[j].z = fmaf(weight, high.x, sum[j].z);
        sum[j].w = fmaf(weight, high.y, sum[j].w);
      }
    }
    begin += kAtOnce * step;
  } while (begin < request.splits);
  return total;
}

// Elements `element` .. + 3 of a partial row (partial_result.cuh) are columns c, c + 1, c + 8 and
// c + 9 of it, of which this is c.
__device__ __forceinline__ int FirstColumn(int element) {
  return element / 32 * 32 + element % 8 / 4 * 16 + element % 32 / 8 * 2;
}

template <typename T>
__device__ __forceinline__ void WriteElements(const CombineParams& params, int request, int kv_head,
                                              int row, int element, float4 x) {
  const int64_t base =
      (static_cast<int64_t>(request) * params.num_kv_heads + kv_head) * params.rows + row;
  T* out = static_cast<T*>(params.out) + base * kHeadDimV + FirstColumn(element);
  *reinterpret_cast<uint32_t*>(out) = sm90::Pack<T>(x.x, x.y);
  *reinterpret_cast<uint32_t*>(out + 8) = sm90::Pack<T>(x.z, x.w);
}

__device__ __forceinline__ void WriteLse(const CombineParams& params, int request, int kv_head,
                                         int row, float total) {
  params.lse[LseOffset(params, request, kv_head, row)] = NaturalLse(total);
}

// The sum over the `warps` warps, a power of 2, that share a piece, for the first one of them.
template <int kBlockWarps>
__device__ __forceinline__ float4 SumOverWarps(float4 sum, int warps) {
  __shared__ float4 partial[kBlockWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp % warps != 0) return sum;
#pragma unroll 4
  for (int w = 1; w < warps; ++w) {
    const float4 other = partial[warp + w][lane];
    sum.x += other.x;
    sum.y += other.y;
    sum.z += other.z;
    sum.w += other.w;
  }
  return sum;
}

// `warps` warps make piece `piece` of all rows' pieces, if there is one.
template <typename T, Cut kCut>
__device__ __forceinline__ void CombinePiece(const CombineParams& params,
                                             const SplitRequest& request, int kv_head, int piece,
                                             int warps) {
  constexpr int kCount = PieceQuarters(kCut);
  const int row = piece * kCount / kQuarters;
  const int element =
      piece * kCount % kQuarters * kQuarterColumns + threadIdx.x % kWarpSize * kLaneElements;
  const int share = threadIdx.x / kWarpSize % warps;
  float4 sum[kCount] = {};
  float total = 0.f;
  if (row < params.rows) {
    total = AddSplits<kCount, SplitsAtOnce(kCut)>(params, request, kv_head, row, share, warps,
                                                  element, sum);
  }
  if constexpr (IsShared(kCut)) sum[0] = SumOverWarps<BlockWarps(kCut)>(sum[0], warps);
  if (share != 0 || row >= params.rows) return;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    WriteElements<T>(params, request.request, kv_head, row, element + j * kQuarterColumns, sum[j]);
  }
  if (element == 0) WriteLse(params, request.request, kv_head, row, total);
}

// Warps for a piece: as many as there are blocks for, with at least 4 splits each.
template <Cut kCut>
__device__ __forceinline__ int WarpsFor(int splits, int most) {
  if constexpr (!IsShared(kCut)) return 1;
  if constexpr (kCut == Cut::kFewQuarters) return BlockWarps(kCut);
  int warps = 1;
  while (warps < most && 2 * warps * 4 <= splits) warps *= 2;
  return warps;
}

// Grid: candidates * h_kv * units, unit fastest: enough units for `most_warps` warps a piece.
template <typename T, Cut kCut>
__global__ void __launch_bounds__(BlockWarps(kCut) * kWarpSize, BlocksPerSm(kCut))
    CombineKernel(const __grid_constant__ CombineParams params, int units, int most_warps,
                  bool by_request) {
  const int unit = blockIdx.x % units;
  const int kv_head = blockIdx.x / units % params.num_kv_heads;
  const int candidate = blockIdx.x / units / params.num_kv_heads;
  // The schedule is read before the wait, past the L1: decode lets this kernel start only when it
  // has itself waited for all that came before. Blocks without work so leave while decode still
  // runs; one waits, so that this kernel does not end before decode.
  SplitRequest request;
  const bool found = by_request
                         ? FindByRequest(params.schedule, candidate, &request)
                         : FindByPart(params.schedule, (candidate + 1) * kJoinedSplits, &request);
  if (!found && blockIdx.x > 0) return;
  sm90::WaitForPriorKernels();
  if (!found) return;
  const int warps = WarpsFor<kCut>(request.splits, most_warps);
  const int warp = unit * BlockWarps(kCut) + threadIdx.x / kWarpSize;
  CombinePiece<T, kCut>(params, request, kv_head, warp / warps, warps);
}

struct LaunchPlan {
  Cut cut;
  int most_warps;  // for a piece
};

// How many warps share a piece decides in which order its splits are added, so it must not follow
// from the batch where the splits have a fixed size, and there are equally many parts for each
// request. So it follows from the splits of a request on average, as if the parts were those of all
// SMs; and the rest, which changes no bits, from the `rows` of all requests that may have to be
// combined.
LaunchPlan PlanLaunch(const CombineParams& params, int64_t rows) {
  const int64_t rows_each = int64_t{params.num_kv_heads} * params.rows;
  const int64_t splits = std::max(params.schedule.num_parts / params.batch, 1);
  constexpr int kMostWarps = BlockWarps(Cut::kQuarters);
  if (splits > kMostWarps * SplitsAtOnce(Cut::kQuarters) && rows_each * kQuarters <= splits) {
    return {Cut::kFewQuarters, BlockWarps(Cut::kFewQuarters)};
  }
  const int64_t parts_of_sms =
      kSms / (int64_t{params.num_kv_heads} * CeilDiv(params.rows, kTileRows));
  const int64_t rows_of_sms = std::max<int64_t>(parts_of_sms / splits, 1) * rows_each;
  int warps = kMostWarps;
  while (warps > 1 && rows_of_sms * kQuarters * warps > kWarpsAtOnce) warps /= 2;
  if (warps > 1 || rows * kQuarters <= kWarpsAtOnce) {
    const bool are_many = splits > warps * SplitsAtOnce(Cut::kQuarters);
    return {are_many ? Cut::kLongQuarters : Cut::kQuarters, warps};
  }
  if (rows * kQuarters / 2 <= kWarpsAtOnce) return {Cut::kHalves, 1};
  return {rows <= kWarpsAtOnce ? Cut::kRows : Cut::kManyRows, 1};
}

template <typename T>
auto KernelOf(Cut cut) {
  switch (cut) {
    case Cut::kFewQuarters:
      return CombineKernel<T, Cut::kFewQuarters>;
    case Cut::kQuarters:
      return CombineKernel<T, Cut::kQuarters>;
    case Cut::kLongQuarters:
      return CombineKernel<T, Cut::kLongQuarters>;
    case Cut::kHalves:
      return CombineKernel<T, Cut::kHalves>;
    case Cut::kRows:
      return CombineKernel<T, Cut::kRows>;
    default:
      return CombineKernel<T, Cut::kManyRows>;
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
  const auto [cut, most_warps] = PlanLaunch(params, candidates * params.num_kv_heads * params.rows);
  const int64_t warps = int64_t{params.rows} * kQuarters / PieceQuarters(cut) * most_warps;
  const int64_t units = CeilDiv<int64_t>(warps, BlockWarps(cut));
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = BlockWarps(cut) * kWarpSize},
                          KernelOf<T>(cut), params, static_cast<int>(units), most_warps,
                          by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
