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
// find nothing to do leave at once. Two shapes of work, by what is known at launch: with many
// requests a part has few splits of each, and a warp makes a whole row; with few requests a block
// makes a quarter of one row, its warps sharing the splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine.h"
#include "sm90/fragment.cuh"
#include "softmax.cuh"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kLaneColumns = 4;                          // a lane loads 16 bytes
constexpr int kWarpColumns = kWarpSize * kLaneColumns;   // 128
constexpr int kColumnBlocks = kHeadDimV / kWarpColumns;  // 4

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
  const int lane = threadIdx.x % kWarpSize;
  float largest = -INFINITY, sum = 0.f;
  for (int split = lane; split < request.splits; split += kWarpSize) {
    const float lse = params.lse_partial[request.PartialRow(params, split, kv_head, row)];
    const float reference = fmaxf(largest, lse);
    if (lse == -INFINITY) continue;  // and not where it is NaN
    sum = sum * Exp2(largest - reference) + Exp2(lse - reference);
    largest = reference;
  }
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    const float other = __shfl_xor_sync(kFullWarp, largest, step);
    const float other_sum = __shfl_xor_sync(kFullWarp, sum, step);
    const float reference = fmaxf(largest, other);
    if (reference != -INFINITY) {
      sum = sum * Exp2(largest - reference) + other_sum * Exp2(other - reference);
    } else {
      sum += other_sum;  // 0, or NaN
    }
    largest = reference;
  }
  return sum == 0.f ? -INFINITY : log2f(sum) + (largest == -INFINITY ? 0.f : largest);
}

// Adds to `sum` the share of splits first, first + step, ... in columns `column` .. + 3 of each
// block of 128. A split that saw no key holds zeros.
template <int kBlocks>
__device__ __forceinline__ void AddSplits(const CombineParams& params, const SplitRequest& request,
                                          int kv_head, int row, float total, int first, int step,
                                          int column, float4 (&sum)[kBlocks]) {
#pragma unroll 2
  for (int split = first; split < request.splits; split += step) {
    const int64_t partial = request.PartialRow(params, split, kv_head, row);
    const float* o = params.o_partial + partial * kHeadDimV + column;
    float4 x[kBlocks];
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      x[j] = *reinterpret_cast<const float4*>(o + j * kWarpColumns);
    }
    const float lse = params.lse_partial[partial];
    const float weight = lse == -INFINITY ? 0.f : Exp2(lse - total);
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) {
      sum[j].x = fmaf(weight, x[j].x, sum[j].x);
      sum[j].y = fmaf(weight, x[j].y, sum[j].y);
      sum[j].z = fmaf(weight, x[j].z, sum[j].z);
      sum[j].w = fmaf(weight, x[j].w, sum[j].w);
    }
  }
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
  const int64_t head =
      (static_cast<int64_t>(request) * params.num_kv_heads + kv_head) * params.group +
      row % params.group;
  params.lse[head * params.s_q + row / params.group] = NaturalLse(total);
}

// A warp a row.
template <typename T>
__device__ __forceinline__ void CombineRow(const CombineParams& params, const SplitRequest& request,
                                           int kv_head, int row) {
  const int lane = threadIdx.x % kWarpSize;
  const float total = TotalLse(params, request, kv_head, row);
  float4 sum[kColumnBlocks] = {};
  AddSplits(params, request, kv_head, row, total, 0, 1, lane * kLaneColumns, sum);
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
    WriteColumns<T>(params, request.request, kv_head, row, j * kWarpColumns + lane * kLaneColumns,
                    sum[j]);
  }
  if (lane == 0) WriteLse(params, request.request, kv_head, row, total);
}

// A block a quarter of a row.
template <typename T>
__device__ __forceinline__ void CombineQuarterRow(const CombineParams& params,
                                                  const SplitRequest& request, int kv_head, int row,
                                                  int quarter) {
  __shared__ float4 partial[kWarps][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int column = quarter * kWarpColumns + lane * kLaneColumns;
  const float total = TotalLse(params, request, kv_head, row);
  float4 sum[1] = {};
  AddSplits(params, request, kv_head, row, total, warp, kWarps, column, sum);
  partial[warp][lane] = sum[0];
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    sum[0].x += partial[w][lane].x;
    sum[0].y += partial[w][lane].y;
    sum[0].z += partial[w][lane].z;
    sum[0].w += partial[w][lane].w;
  }
  WriteColumns<T>(params, request.request, kv_head, row, column, sum[0]);
  if (lane == 0 && quarter == 0) WriteLse(params, request.request, kv_head, row, total);
}

// Grid: candidates * h_kv * units, unit fastest: 8 rows, of a warp each, or a quarter of a row.
template <typename T, bool kQuarterRows>
__global__ void __launch_bounds__(kThreads)
    CombineKernel(const __grid_constant__ CombineParams params, int units, bool by_request) {
  sm90::WaitForPriorKernels();
  const int unit = blockIdx.x % units;
  const int kv_head = blockIdx.x / units % params.num_kv_heads;
  const int candidate = blockIdx.x / units / params.num_kv_heads;
  SplitRequest request;
  const bool found = by_request ? FindByRequest(params.schedule, candidate, &request)
                                : FindByPart(params.schedule, candidate + 1, &request);
  if (!found) return;
  if constexpr (kQuarterRows) {
    CombineQuarterRow<T>(params, request, kv_head, unit / kColumnBlocks, unit % kColumnBlocks);
  } else {
    const int row = unit * kWarps + threadIdx.x / kWarpSize;
    if (row < params.rows) CombineRow<T>(params, request, kv_head, row);
  }
}

}  // namespace

template <typename T>
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  constexpr const char* kOp = "flash_mla_with_kvcache";
  const int boundaries = params.schedule.num_parts - 1;
  if (boundaries == 0) return ffi::Error::Success();
  constexpr int kManySplits = 8;  // a request, on average
  const bool quarter_rows = params.schedule.num_parts > kManySplits * params.batch;
  const bool by_request = params.batch <= boundaries;
  const int units = quarter_rows ? params.rows * kColumnBlocks : CeilDiv(params.rows, kWarps);
  const int64_t candidates = by_request ? params.batch : boundaries;
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = kThreads},
                          quarter_rows ? CombineKernel<T, true> : CombineKernel<T, false>, params,
                          units, by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
