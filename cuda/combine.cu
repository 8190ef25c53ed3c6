// Combine: the result of a request that several parts share.
//
// What: out = sum_s w_s o_s with w_s = 2^(lse_s - lse), lse = log2 sum_s 2^lse_s, over the splits
// of a request; a split that saw no key has lse -inf and o 0.
//
// Floor: split requests number fewer than the parts, so at most 2 * parts * rows * 2 KB are read,
// mostly from L2.
//
// Schedule: a block looks at one request, or, where there are more requests than parts, at one
// boundary between parts: it lies inside a request, and is the first to do so, or not. Blocks that
// find nothing to do leave at once. The shape of the work is chosen by what is known at launch:
// with many requests each has few splits, and a warp makes a whole row; with few requests several
// warps make a quarter of a row, sharing the splits, all of which are in flight at once. How many
// warps that takes is only seen on the device; the fewer, the fewer blocks have anything to do.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine.h"
#include "sm90/fragment.cuh"
#include "softmax.cuh"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kSplitsAtOnce = 9;                         // that a warp has in flight
constexpr int kLaneColumns = 4;                          // a lane loads 16 bytes
constexpr int kWarpColumns = kWarpSize * kLaneColumns;   // 128
constexpr int kColumnBlocks = kHeadDimV / kWarpColumns;  // 4

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

  // The slot of a split's partial result, as a row of [2 * num_parts, h_kv, rows].
  __device__ __forceinline__ int64_t PartialRow(const CombineParams& params, int split, int kv_head,
                                                int row) const {
    const int64_t slot = PartialSlot(first_part + split, split);
    return (slot * params.num_kv_heads + kv_head) * params.rows + row;
  }
};

// Whether `request` is split.
__device__ __forceinline__ bool FindByRequest(const TileSchedule& schedule, int request,
                                              SplitRequest* found) {
  found->request = request;
  found->first_part = schedule.first_part[request];
  found->splits = schedule.num_splits[request + 1] - schedule.num_splits[request];
  return found->splits > 1;
}

// Whether part `part` is the second of the parts that share a request.
__device__ __forceinline__ bool FindByPart(const TileSchedule& schedule, int part,
                                           SplitRequest* found) {
  const PartBound bound = schedule.part_bounds[part];
  return bound.tile > 0 && FindByRequest(schedule, bound.request, found) &&
         part == found->first_part + 1;
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
                   ? params.lse_partial[request.PartialRow(params, split, kv_head, row)]
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

// Adds to `sum` the shares of splits first, first + step, ... in columns `column` .. + 3 of each
// block of 128, and gives the total log-sum-exp. kAtOnce splits are in flight, the first of them
// before the total is known. A split that saw no key counts for nothing.
template <int kBlocks, int kAtOnce>
__device__ __forceinline__ float AddSplits(const CombineParams& params, const SplitRequest& request,
                                           int kv_head, int row, int first, int step, int column,
                                           float4 (&sum)[kBlocks]) {
  float total = 0.f;
  int begin = first;
  do {
    float4 x[kAtOnce][kBlocks];
    float lse[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int split = begin + i * step;
      lse[i] = -INFINITY;
      if (split >= request.splits) continue;
      const int64_t partial = request.PartialRow(params, split, kv_head, row);
      lse[i] = params.lse_partial[partial];
      const float* o = params.o_partial + partial * kHeadDimV + column;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        x[i][j] = *reinterpret_cast<const float4*>(o + j * kWarpColumns);
      }
    }
    if (begin == first) total = TotalLse(params, request, kv_head, row);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (lse[i] == -INFINITY) continue;
      const float weight = Exp2(lse[i] - total);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        sum[j].x = fmaf(weight, x[i][j].x, sum[j].x);
        sum[j].y = fmaf(weight, x[i][j].y, sum[j].y);
        sum[j].z = fmaf(weight, x[i][j].z, sum[j].z);
        sum[j].w = fmaf(weight, x[i][j].w, sum[j].w);
      }
    }
    begin += kAtOnce * step;
  } while (begin < request.splits);
  return total;
}

template <typename T>
__device__ __forceinline__ void WriteColumns(const CombineParams& params, int request, int kv_head,
                                             int row, int column, float4 x) {
  const int64_t base =
      ((static_cast<int64_t>(request) * params.num_kv_heads + kv_head) * params.rows + row) *
          kHeadDimV +
      column;
  *reinterpret_cast<uint2*>(static_cast<T*>(params.out) + base) =
      make_uint2(sm90::Pack<T>(x.x, x.y), sm90::Pack<T>(x.z, x.w));
}

__device__ __forceinline__ void WriteLse(const CombineParams& params, int request, int kv_head,
                                         int row, float total) {
  params.lse[LseOffset(params, request, kv_head, row)] = NaturalLse(total);
}

// A warp a row.
template <typename T>
__device__ __forceinline__ void CombineRow(const CombineParams& params, const SplitRequest& request,
                                           int kv_head, int row) {
  const int lane = threadIdx.x % kWarpSize;
  float4 sum[kColumnBlocks] = {};
  const float total =
      AddSplits<kColumnBlocks, 2>(params, request, kv_head, row, 0, 1, lane * kLaneColumns, sum);
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
    WriteColumns<T>(params, request.request, kv_head, row, j * kWarpColumns + lane * kLaneColumns,
                    sum[j]);
  }
  if (lane == 0) WriteLse(params, request.request, kv_head, row, total);
}

// `warps` warps, a power of 2, make quarter `quarter` of all rows' quarters, if there is one.
template <typename T, int kBlockWarps>
__device__ __forceinline__ void CombineQuarterRow(const CombineParams& params,
                                                  const SplitRequest& request, int kv_head,
                                                  int quarter, int warps) {
  __shared__ float4 partial[kBlockWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int row = quarter / kColumnBlocks;
  const int column = quarter % kColumnBlocks * kWarpColumns + lane * kLaneColumns;
  const int share = warp & (warps - 1);
  float4 sum[1] = {};
  float total = 0.f;
  if (row < params.rows) {
    total = AddSplits<1, kSplitsAtOnce>(params, request, kv_head, row, share, warps, column, sum);
  }
  partial[warp][lane] = sum[0];
  __syncthreads();
  if (share != 0 || row >= params.rows) return;
  for (int w = 1; w < warps; ++w) {
    sum[0].x += partial[warp + w][lane].x;
    sum[0].y += partial[warp + w][lane].y;
    sum[0].z += partial[warp + w][lane].z;
    sum[0].w += partial[warp + w][lane].w;
  }
  WriteColumns<T>(params, request.request, kv_head, row, column, sum[0]);
  if (lane == 0 && quarter % kColumnBlocks == 0) {
    WriteLse(params, request.request, kv_head, row, total);
  }
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
  sm90::WaitForPriorKernels();
  SplitRequest request;
  const bool found = by_request ? FindByRequest(params.schedule, candidate, &request)
                                : FindByPart(params.schedule, candidate + 1, &request);
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
  const int64_t quarters = batch * params.num_kv_heads * params.rows * kColumnBlocks;
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
  const int boundaries = params.schedule.num_parts - 1;
  if (boundaries == 0) return ffi::Error::Success();
  const LaunchPlan plan = PlanLaunch(params);
  const int block_warps = BlockWarps(plan.shape);
  const bool by_request = params.batch <= boundaries;
  const int warps =
      plan.shape == Shape::kRows ? params.rows : params.rows * kColumnBlocks * plan.most_warps;
  const int units = CeilDiv(warps, block_warps);
  const int64_t candidates = by_request ? params.batch : boundaries;
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = block_warps * kWarpSize},
                          KernelOf<T>(plan.shape), params, units, plan.most_warps, by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
