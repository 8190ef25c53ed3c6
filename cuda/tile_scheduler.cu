// Tile scheduler: cuts the key tiles of a batch into equal parts (mla.cuh says how).
//
// What: integers only. cost_i = tiles_i + kRequestOverhead; exclusive sums of the costs place the
// requests on a line; a part is a stretch of `payload` of it. Every request then knows by division
// where it begins and ends, and which parts begin inside it.
//
// Floor: one launch; 4 bytes read and 8 written a request.
//
// Schedule: one block. A pass over the batch for the total and for the cost of the largest aligned
// part, then one that writes the aligned parts, or scans the costs, writes what follows from them,
// and scans the split counts.
#include <cstdint>
#include <limits>

#include "ffi.h"
#include "mla.cuh"
#include "sm90/cta.cuh"
#include "tile_scheduler.h"

namespace jax_flashmla {
namespace {

using sm90::kFullWarp;
using sm90::kWarpSize;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr const char* kOp = "get_mla_metadata";

// Smaller parts take less time, but leave more partial results to join. With W units of work in all
// and parts of t, that is a microsecond a unit against W / t splits, each of which costs as much as
// its rows of 1 KB and kJoinRows more: the sum is least where kJoinCost * t * t is
// W * (rows + kJoinRows). Measured on an H200.
constexpr int kJoinCost = 4096, kJoinRows = 16;
constexpr int kLargestMinimum = 8;  // beyond it the SMs set the size of a part, not this

struct SchedulerParams {
  const int32_t* cache_seqlens;  // [batch]
  PartBound* part_bounds;        // [num_parts + 1]
  int32_t* first_part;           // [batch]
  int32_t* num_splits;           // [batch + 1]
  int32_t batch, num_parts;
  int32_t rows;  // query rows of a request, those of all KV heads
};

// The inclusive prefix sum of `value` over the block's threads; `total` is the sum of all.
__device__ int BlockScan(int value, int* total) {
  __shared__ int warp_sums[kWarps];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, value, step);
    if (lane >= step) value += before;
  }
  if (lane == kWarpSize - 1) warp_sums[warp] = value;
  __syncthreads();
  int warp_sum = lane < kWarps ? warp_sums[lane] : 0;
#pragma unroll
  for (int step = 1; step < kWarps; step *= 2) {
    const int before = __shfl_up_sync(kFullWarp, warp_sum, step);
    if (lane >= step) warp_sum += before;
  }
  *total = __shfl_sync(kFullWarp, warp_sum, kWarps - 1);
  const int before = __shfl_sync(kFullWarp, warp_sum, max(warp - 1, 0));
  __syncthreads();  // before the next call writes warp_sums
  return value + (warp == 0 ? 0 : before);
}

// Capped so that no sum of costs exceeds 2^30.
__device__ __forceinline__ int Tiles(int length, int batch) {
  length = max(length, 0);
  const int tiles = length / kTileTokens + (length % kTileTokens != 0);
  return min(tiles, (1 << 30) / batch - kRequestOverhead);
}

// Request `i` lies at begin .. begin + kRequestOverhead + tiles; returns its number of splits.
__device__ __forceinline__ int PlaceRequest(const SchedulerParams& params, int i, int begin,
                                            int tiles, int payload) {
  const int end = begin + kRequestOverhead + tiles;
  const int first = min(begin + kRequestOverhead, end - 1) / payload;
  params.first_part[i] = first;
  for (int p = CeilDiv(begin, payload); p < params.num_parts && p * payload < end; ++p) {
    params.part_bounds[p] = {i, max(0, p * payload - begin - kRequestOverhead)};
  }
  return (end - 1) / payload - first + 1;
}

// Aligned parts: of `requests` whole requests each, or `splits` parts for each request.
struct Alignment {
  int requests, splits;
  int min_tiles = 1;  // of a split

  __device__ __forceinline__ explicit Alignment(const SchedulerParams& params)
      : requests(AlignedRequests(params.batch, params.num_parts)),
        splits(AlignedSplits(params.batch, params.num_parts)) {}

  // The tiles of each split of a request of `tiles`; the last one may have fewer. Of two splits,
  // which decode joins, the first one has a tile more, so that it finds the second one written.
  __device__ __forceinline__ int SplitTiles(int tiles) const {
    return max(CeilDiv(tiles, splits), min_tiles) + (splits == kJoinedSplits ? 1 : 0);
  }
};

// The smallest part that is worth its partial results, where all requests cost `total`.
__device__ __forceinline__ int MinPartTiles(int total, int rows) {
  const int work = min(total, 1 << 17) * min(rows + kJoinRows, 1 << 13);  // no more changes nothing
  int tiles = 1;
  while (tiles < kLargestMinimum && kJoinCost * tiles * tiles < work) ++tiles;
  return tiles;
}

// The sum of the costs of part p's requests, and the cost of part p if no split is made larger than
// it must be: min_tiles makes none larger than the payload, which is as large.
__device__ int RequestsCost(const SchedulerParams& params, Alignment aligned, int p, int* part) {
  const int first = min(p * aligned.requests, params.batch);
  const int last = min(first + aligned.requests, params.batch);
  int sum = 0;
  *part = 0;
#pragma unroll 4
  for (int i = first; i < last; ++i) {
    const int tiles = Tiles(params.cache_seqlens[i], params.batch);
    sum += tiles + kRequestOverhead;
    *part += aligned.splits == 1 ? tiles + kRequestOverhead : CeilDiv(tiles, aligned.splits);
  }
  return sum;
}

// Where part p begins: whole requests, or one of the equal splits of a request. The parts that a
// short request leaves over are empty.
__device__ __forceinline__ PartBound AlignedBound(const SchedulerParams& params, Alignment aligned,
                                                  int p) {
  const int request = p / aligned.splits * aligned.requests, split = p % aligned.splits;
  if (request >= params.batch) return {params.batch, 0};
  if (split == 0) return {request, 0};
  const int tiles = Tiles(params.cache_seqlens[request], params.batch);
  const int first = split * aligned.SplitTiles(tiles);
  return first < tiles ? PartBound{request, first} : PartBound{request + 1, 0};
}

__device__ void PlaceAlignedParts(const SchedulerParams& params, Alignment aligned) {
  for (int p = threadIdx.x; p <= params.num_parts; p += kThreads) {
    params.part_bounds[p] = AlignedBound(params, aligned, p);
  }
  int splits_before = 0;
  for (int base = 0; base < params.batch; base += kThreads) {
    const int i = base + threadIdx.x;
    int splits = 0;
    if (i < params.batch) {
      const int tiles = Tiles(params.cache_seqlens[i], params.batch);
      splits = tiles == 0 ? 1 : CeilDiv(tiles, aligned.SplitTiles(tiles));
      params.first_part[i] = i / aligned.requests * aligned.splits;
    }
    int strip_splits;
    const int splits_until = splits_before + BlockScan(splits, &strip_splits);
    if (i < params.batch) params.num_splits[i + 1] = splits_until;
    splits_before += strip_splits;
  }
  if (threadIdx.x == 0) params.num_splits[0] = 0;
}

// Every part gets `payload` units of the line, of `total` in all.
__device__ void PlaceEqualParts(const SchedulerParams& params, int payload, int total) {
  const int batch = params.batch;
  int placed = 0, splits_before = 0;
  for (int base = 0; base < batch; base += kThreads) {
    const int i = base + threadIdx.x;
    const int tiles = i < batch ? Tiles(params.cache_seqlens[i], batch) : 0;
    const int cost = i < batch ? tiles + kRequestOverhead : 0;
    int strip_cost, strip_splits;
    const int begin = placed + BlockScan(cost, &strip_cost) - cost;
    const int splits = i < batch ? PlaceRequest(params, i, begin, tiles, payload) : 0;
    const int splits_until = splits_before + BlockScan(splits, &strip_splits);
    if (i < batch) params.num_splits[i + 1] = splits_until;
    placed += strip_cost;
    splits_before += strip_splits;
  }
  if (threadIdx.x == 0) params.num_splits[0] = 0;
  for (int p = CeilDiv(total, payload) + threadIdx.x; p <= params.num_parts; p += kThreads) {
    params.part_bounds[p] = {batch, 0};
  }
}

__global__ void __launch_bounds__(kThreads)
    TileSchedulerKernel(const __grid_constant__ SchedulerParams params) {
  sm90::AllowNextKernel();
  sm90::WaitForPriorKernels();
  Alignment aligned(params);
  int cost = 0, largest = 0;
  for (int p = threadIdx.x; p * aligned.requests < params.batch; p += kThreads) {
    int part_cost;
    cost += RequestsCost(params, aligned, p, &part_cost);
    largest = max(largest, part_cost);
  }
  int total;
  BlockScan(cost, &total);
  aligned.min_tiles = MinPartTiles(total, params.rows);
  const int payload = max(CeilDiv(total, params.num_parts), aligned.min_tiles);
  if (__syncthreads_or(largest - payload > payload / kAlignedTolerance)) {
    PlaceEqualParts(params, payload, total);
  } else {
    PlaceAlignedParts(params, aligned);
  }
}

ffi::Error TileSchedulerImpl(cudaStream_t stream, int32_t device, I32<1> cache_seqlens,
                             I32Result<2> part_bounds, I32Result<1> first_part,
                             I32Result<1> num_splits, int64_t rows) {
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  return LaunchTileScheduler(stream, cache_seqlens, *part_bounds, *first_part, *num_splits, rows);
}

}  // namespace

ffi::Error LaunchTileScheduler(cudaStream_t stream, I32<1> cache_seqlens, I32<2> part_bounds,
                               I32<1> first_part, I32<1> num_splits, int64_t rows) {
  const int64_t batch = cache_seqlens.dimensions()[0];
  const int64_t num_parts = part_bounds.dimensions()[0] - 1;
  JAX_FLASHMLA_CHECK(CheckArgument(num_parts >= 1, kOp, "there must be an SM part"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "part_bounds", part_bounds.dimensions(), {num_parts + 1, 2}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "first_part", first_part.dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "num_splits", num_splits.dimensions(), {batch + 1}));
  constexpr int64_t kMaxBatch = 1 << 24;
  JAX_FLASHMLA_CHECK(CheckArgument(batch <= kMaxBatch, kOp, "the batch must be at most 2^24"));
  JAX_FLASHMLA_CHECK(CheckArgument(rows >= 1 && rows <= std::numeric_limits<int32_t>::max(), kOp,
                                   "the query rows must fit into int32"));
  const SchedulerParams params = {
      .cache_seqlens = cache_seqlens.typed_data(),
      .part_bounds = reinterpret_cast<PartBound*>(part_bounds.typed_data()),
      .first_part = first_part.typed_data(),
      .num_splits = num_splits.typed_data(),
      .batch = static_cast<int32_t>(batch),
      .num_parts = static_cast<int32_t>(num_parts),
      .rows = static_cast<int32_t>(rows),
  };
  return LaunchOverlapped(kOp, stream, {.grid = 1, .block = kThreads}, TileSchedulerKernel, params);
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(TileScheduler, TileSchedulerImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<I32<1>>()
                                  .Ret<I32<2>>()
                                  .Ret<I32<1>>()
                                  .Ret<I32<1>>()
                                  .Attr<int64_t>("rows"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
