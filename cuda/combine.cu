// Combine: the result of a request of more splits than decode joins by itself.
//
// What: out = sum_s w_s o_s with w_s = 2^(lse_s - lse), lse = log2 sum_s 2^lse_s, over the splits
// of a request; a split that saw no key has lse -inf and o 0.
//
// Floor: at most 2 * parts * rows * 1 KB are read, mostly from L2.
//
// Schedule: a block looks at one request, or, where that is less, at one of every kJoinedSplits
// bounds between parts: a request of that many splits and more contains one of them. Blocks that
// find nothing to do leave at once. One or several warps make a quarter of a row, sharing the
// splits, all of which are in flight at once. How many warps that takes is only seen on the device;
// the fewer, the fewer blocks have anything to do.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine.h"
#include "sm90/fragment.cuh"
#include "softmax.cuh"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kSplitsAtOnce = 9;     // of a quarter of a row, that a warp has in flight
constexpr int kRowSplitsAtOnce = 3;  // of a whole row
constexpr int kLaneElements = 4;     // a lane loads 8 bytes
static_assert(kWarpSize * kLaneElements == kQuarterColumns);

// How the work is cut.
enum class Shape {
  kRows,         // a warp makes a row
  kQuarters,     // up to 8 warps make a quarter of a row, as many as its splits take
  kFewQuarters,  // 16 warps do, in blocks of which an SM holds one
};
constexpr int BlockWarps(Shape shape) { return shape == Shape::kFewQuarters ? 16 : 8; }
constexpr int BlocksPerSm(Shape shape) { return shape == Shape::kFewQuarters ? 1 : 3; }

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

// Elements `element` .. + 3 of a partial row (partial_result.cuh) are columns c, c + 1, c + 8, c
// + 9.
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

// A warp a row.
template <typename T>
__device__ __forceinline__ void CombineRow(const CombineParams& params, const SplitRequest& request,
                                           int kv_head, int row) {
  const int element = threadIdx.x % kWarpSize * kLaneElements;
  float4 sum[kQuarters] = {};
  const float total =
      AddSplits<kQuarters, kRowSplitsAtOnce>(params, request, kv_head, row, 0, 1, element, sum);
#pragma unroll
  for (int j = 0; j < kQuarters; ++j) {
    WriteElements<T>(params, request.request, kv_head, row, j * kQuarterColumns + element, sum[j]);
  }
  if (element == 0) WriteLse(params, request.request, kv_head, row, total);
}

// `warps` warps, a power of 2, make quarter `quarter` of all rows' quarters, if there is one.
template <typename T, int kBlockWarps>
__device__ __forceinline__ void CombineQuarterRow(const CombineParams& params,
                                                  const SplitRequest& request, int kv_head,
                                                  int quarter, int warps) {
  __shared__ float4 partial[kBlockWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = quarter / kQuarters;
  const int element = quarter % kQuarters * kQuarterColumns + lane * kLaneElements;
  const int share = warp & (warps - 1);
  float4 sum[1] = {};
  float total = 0.f;
  if (row < params.rows) {
    total = AddSplits<1, kSplitsAtOnce>(params, request, kv_head, row, share, warps, element, sum);
  }
  partial[warp][lane] = sum[0];
  __syncthreads();
  if (share != 0 || row >= params.rows) return;
#pragma unroll 4
  for (int w = 1; w < warps; ++w) {
    const float4 other = partial[warp + w][lane];
    sum[0].x += other.x;
    sum[0].y += other.y;
    sum[0].z += other.z;
    sum[0].w += other.w;
  }
  WriteElements<T>(params, request.request, kv_head, row, element, sum[0]);
  if (element == 0) WriteLse(params, request.request, kv_head, row, total);
}

// Warps for a quarter of a row, so that each has all of its splits in flight at once.
template <Shape kShape>
__device__ __forceinline__ int WarpsFor(int splits, int most) {
  if constexpr (kShape == Shape::kFewQuarters) return BlockWarps(kShape);
  int warps = 1;
  while (warps < most && warps * kSplitsAtOnce < splits) warps *= 2;
  return warps;
}

// Grid: candidates * h_kv * units, unit fastest: enough units for `most_warps` warps a quarter row.
template <typename T, Shape kShape>
__global__ void __launch_bounds__(BlockWarps(kShape) * kWarpSize, BlocksPerSm(kShape))
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
  const int warp = unit * BlockWarps(kShape) + threadIdx.x / kWarpSize;
  if constexpr (kShape == Shape::kRows) {
    if (warp < params.rows) CombineRow<T>(params, request, kv_head, warp);
  } else {
    const int warps = WarpsFor<kShape>(request.splits, most_warps);
    CombineQuarterRow<T, BlockWarps(kShape)>(params, request, kv_head, warp / warps, warps);
  }
}

struct LaunchPlan {
  Shape shape;
  int most_warps;  // for a quarter of a row
};

// By the number of splits of a request, on average.
LaunchPlan PlanLaunch(const CombineParams& params) {
  const int64_t parts = params.schedule.num_parts, batch = params.batch;
  const int64_t quarters = batch * params.num_kv_heads * params.rows * kQuarters;
  if (parts > 8 * kSplitsAtOnce * batch && quarters <= parts) return {Shape::kFewQuarters, 16};
  for (const int warps : {8, 4, 2}) {
    if (2 * parts > warps * kSplitsAtOnce * batch) return {Shape::kQuarters, warps};
  }
  return {Shape::kRows, 0};
}

template <typename T>
auto KernelOf(Shape shape) {
  switch (shape) {
    case Shape::kFewQuarters:
      return CombineKernel<T, Shape::kFewQuarters>;
    case Shape::kQuarters:
      return CombineKernel<T, Shape::kQuarters>;
    default:
      return CombineKernel<T, Shape::kRows>;
  }
}

}  // namespace

template <typename T>
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  constexpr const char* kOp = "flash_mla_with_kvcache";
  const int bounds = (params.schedule.num_parts - 1) / kJoinedSplits;
  if (bounds == 0) return ffi::Error::Success();  // no request has so many splits
  const LaunchPlan plan = PlanLaunch(params);
  const int block_warps = BlockWarps(plan.shape);
  const bool by_request = params.batch <= bounds;
  const int warps =
      plan.shape == Shape::kRows ? params.rows : params.rows * kQuarters * plan.most_warps;
  const int units = CeilDiv(warps, block_warps);
  const int64_t candidates = by_request ? params.batch : bounds;
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = block_warps * kWarpSize},
                          KernelOf<T>(plan.shape), params, units, plan.most_warps, by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
