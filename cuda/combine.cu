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
// requests each has few splits, and a warp makes a whole row; with few requests 2 to 16 warps make
// a quarter of a row, sharing the splits, all of which are in flight at once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "combine.h"
#include "sm90/fragment.cuh"
#include "softmax.cuh"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kLaneColumns = 4;                          // a lane loads 16 bytes
constexpr int kWarpColumns = kWarpSize * kLaneColumns;   // 128
constexpr int kColumnBlocks = kHeadDimV / kWarpColumns;  // 4

// Warps of a block of the kernel in which kWarps warps make a quarter row, or one a row (0).
constexpr int BlockWarps(int warps) { return warps > 8 ? warps : 8; }

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

// kWarps warps a quarter of a row.
template <typename T, int kWarps>
__device__ __forceinline__ void CombineQuarterRow(const CombineParams& params,
                                                  const SplitRequest& request, int kv_head, int row,
                                                  int quarter) {
  __shared__ float4 partial[BlockWarps(kWarps)][kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int column = quarter * kWarpColumns + lane * kLaneColumns;
  float4 sum[1] = {};
  const float total =
      AddSplits<1, 9>(params, request, kv_head, row, warp % kWarps, kWarps, column, sum);
  partial[warp][lane] = sum[0];
  __syncthreads();
  if (warp % kWarps != 0) return;
#pragma unroll
  for (int w = 1; w < kWarps; ++w) {
    sum[0].x += partial[warp + w][lane].x;
    sum[0].y += partial[warp + w][lane].y;
    sum[0].z += partial[warp + w][lane].z;
    sum[0].w += partial[warp + w][lane].w;
  }
  WriteColumns<T>(params, request.request, kv_head, row, column, sum[0]);
  if (lane == 0 && quarter == 0) WriteLse(params, request.request, kv_head, row, total);
}

// Grid: candidates * h_kv * units, unit fastest. A unit is what the block's warps make: a row each
// (kWarps 0), or a quarter of a row by kWarps of them.
template <typename T, int kWarps>
__global__ void __launch_bounds__(BlockWarps(kWarps) * kWarpSize, BlockWarps(kWarps) > 8 ? 1 : 3)
    CombineKernel(const __grid_constant__ CombineParams params, int units, bool by_request) {
  const int unit = blockIdx.x % units;
  const int kv_head = blockIdx.x / units % params.num_kv_heads;
  const int candidate = blockIdx.x / units / params.num_kv_heads;
  SplitRequest request;
  const bool found = by_request ? FindByRequest(params.schedule, candidate, &request)
                                : FindByPart(params.schedule, candidate + 1, &request);
  // The schedule comes from before decode, which has waited for it before it let this kernel start.
  sm90::WaitForPriorKernels();
  if (!found) return;
  const int warp = threadIdx.x / kWarpSize;
  if constexpr (kWarps > 0) {
    const int quarter = unit * (BlockWarps(kWarps) / kWarps) + warp / kWarps;
    CombineQuarterRow<T, kWarps>(params, request, kv_head, quarter / kColumnBlocks,
                                 quarter % kColumnBlocks);
  } else {
    const int row = unit * BlockWarps(kWarps) + warp;
    if (row < params.rows) CombineRow<T>(params, request, kv_head, row);
  }
}

// How many warps make a quarter row (0: one makes a row), so that few of them load more than the
// 9 splits that a warp has in flight; by the number of splits of a request, on average.
int WarpsPerQuarterRow(const CombineParams& params) {
  const int64_t parts = params.schedule.num_parts, batch = params.batch;
  const int64_t quarters = batch * params.num_kv_heads * params.rows * kColumnBlocks;
  if (parts > 72 * batch && quarters <= parts) return 16;  // blocks of which an SM holds one
  return parts > 36 * batch ? 8 : parts > 18 * batch ? 4 : parts > 8 * batch ? 2 : 0;
}

template <typename T>
auto KernelFor(int warps) {
  switch (warps) {
    case 16:
      return CombineKernel<T, 16>;
    case 8:
      return CombineKernel<T, 8>;
    case 4:
      return CombineKernel<T, 4>;
    case 2:
      return CombineKernel<T, 2>;
    default:
      return CombineKernel<T, 0>;
  }
}

}  // namespace

template <typename T>
ffi::Error LaunchCombine(const CombineParams& params, cudaStream_t stream) {
  constexpr const char* kOp = "flash_mla_with_kvcache";
  const int boundaries = params.schedule.num_parts - 1;
  if (boundaries == 0) return ffi::Error::Success();
  const int warps = WarpsPerQuarterRow(params), block_warps = BlockWarps(warps);
  const bool by_request = params.batch <= boundaries;
  const int units =
      CeilDiv(warps == 0 ? params.rows : params.rows * kColumnBlocks * warps, block_warps);
  const int64_t candidates = by_request ? params.batch : boundaries;
  const int64_t blocks = candidates * params.num_kv_heads * units;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream, {.grid = dim3(blocks), .block = block_warps * kWarpSize},
                          KernelFor<T>(warps), params, units, by_request);
}

template ffi::Error LaunchCombine<__nv_bfloat16>(const CombineParams&, cudaStream_t);
template ffi::Error LaunchCombine<__half>(const CombineParams&, cudaStream_t);

}  // namespace jax_flashmla
