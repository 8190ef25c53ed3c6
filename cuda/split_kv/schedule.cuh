// How the threads of a block make the tile schedule (mla.cuh) from the lengths.
//
// cost_i = tiles_i + kRequestOverhead; exclusive sums of the costs place the requests on a line; a
// part is a stretch of `payload` of it. Every request then knows by division where it begins and
// ends, and which parts begin inside it.
//
// Each thread has a run of requests: as many as make whole aligned parts or, where there are
// threads to spare, a share of one such part. It reads their lengths once for the sum of their
// costs and the largest aligned part; a scan over the threads then gives the total and so the
// payload, and tells each thread where its run begins.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>

#include "host/ffi.h"
#include "mla/shapes.cuh"
#include "sm90/cta.cuh"

namespace jax_flashmla {

// A number that others are divided by on the device, by multiplication (Granlund and Montgomery,
// "Division by invariant integers using multiplication", 1994).
struct Divisor {
  int32_t value;
  uint32_t multiplier;  // 2^(31 + shift) / value, rounded up
  int32_t shift;        // log2(value), rounded up

  explicit Divisor(int32_t value)
      : value(value), shift(std::bit_width(static_cast<uint32_t>(value - 1))) {
    multiplier =
        static_cast<uint32_t>(CeilDiv(uint64_t{1} << (31 + shift), static_cast<uint64_t>(value)));
  }
  // Of n from 0 to 2^31 - 1. Rounding the multiplier adds less than 1 / value to the quotient.
  __device__ __forceinline__ int Floor(int n) const {
    return __umulhi(2 * static_cast<uint32_t>(n), multiplier) >> shift;
  }
  __device__ __forceinline__ int Ceil(int n) const { return Floor(n + value - 1); }
};

// What a schedule is made from.
struct ScheduleInput {
  const int32_t* cache_seqlens;  // [batch]
  int32_t batch;
  int32_t rows;  // query rows of a request, those of all KV heads
  Divisor num_parts;
  // Aligned parts hold so many whole requests each, or are so many a request; the other one is 1.
  Divisor aligned_requests, aligned_splits;
  int32_t aligned_runs;  // of aligned_requests each
  int32_t most_tiles;    // of a request, so that no sum of costs exceeds 2^30

  // `batch` from 1 on.
  ScheduleInput(const int32_t* cache_seqlens, int32_t batch, int32_t num_parts, int32_t rows)
      : cache_seqlens(cache_seqlens),
        batch(batch),
        rows(rows),
        num_parts(num_parts),
        aligned_requests(CeilDiv(batch, num_parts)),
        aligned_splits(std::max(num_parts / batch, 1)),
        aligned_runs(CeilDiv(batch, aligned_requests.value)),
        most_tiles((1 << 30) / batch - kRequestOverhead) {}
};

// Success if a schedule can be made for this batch and these query rows, else an error.
inline ffi::Error CheckScheduleInput(const char* op, int64_t batch, int64_t rows) {
  constexpr int64_t kMaxBatch = 1 << 24, kMaxRows = std::numeric_limits<int32_t>::max() / 2;
  JAX_FLASHMLA_CHECK(CheckArgument(batch >= 1 && batch <= kMaxBatch, op,
                                   "the batch must be from 1 to " + std::to_string(kMaxBatch) +
                                       ", got " + std::to_string(batch)));
  return CheckArgument(rows >= 1 && rows <= kMaxRows, op,
                       "the query rows of a request must be from 1 to " + std::to_string(kMaxRows) +
                           ", got " + std::to_string(rows));
}

// A request on the line.
struct PlacedRequest {
  int32_t request, begin, tiles;

  __device__ __forceinline__ int End() const { return begin + kRequestOverhead + tiles; }
};

// A schedule as the `kThreads` threads of a block know it, who make it together: after that each
// can tell of its own requests, and, where parts are aligned, of any. With `kPastL1` the lengths
// are read from the L2, for a kernel that reads them before it waits.
template <int kThreads, bool kPastL1 = false>
class Scheduler {
 public:
  static constexpr int kWarps = kThreads / sm90::kWarpSize;
  static_assert(kWarps <= sm90::kWarpSize && std::has_single_bit<unsigned>(kThreads));

  // `warp_sums`, in shared memory, is used here and by Scan() alone.
  __device__ __forceinline__ Scheduler(const ScheduleInput& input, int (&warp_sums)[kWarps])
      : input_(input), warp_sums_(warp_sums) {
    const int log2_sharing = Log2Sharing();
    SetRun(log2_sharing);
    int largest_part = 0;
    const int cost = CostOfRun(1 << log2_sharing, &largest_part);
    begin_ = Scan(cost, &total_) - cost;
    min_tiles_ = MinPartTiles();
    payload_ = max(input.num_parts.Ceil(total_), min_tiles_);
    aligned_ = !__syncthreads_or(largest_part - payload_ > payload_ / kAlignedTolerance);
  }

  // The inclusive prefix sum of `value` over the threads; `total` is the sum of all.
  __device__ __forceinline__ int Scan(int value, int* total) {
    const int lane = threadIdx.x % sm90::kWarpSize, warp = threadIdx.x / sm90::kWarpSize;
    value = WarpScan(value);
    if (lane == sm90::kWarpSize - 1) warp_sums_[warp] = value;
    __syncthreads();
    const int until = WarpScan(lane < kWarps ? warp_sums_[lane] : 0);
    *total = __shfl_sync(sm90::kFullWarp, until, kWarps - 1);
    const int before = __shfl_sync(sm90::kFullWarp, until, max(warp - 1, 0));
    __syncthreads();  // before the next call writes warp_sums_
    return value + (warp == 0 ? 0 : before);
  }

  __device__ __forceinline__ bool IsAligned() const { return aligned_; }
  // Where parts are not aligned: the size of a part, and of all of the line.
  __device__ __forceinline__ int Payload() const { return payload_; }
  __device__ __forceinline__ int Total() const { return total_; }

  // Calls visit(PlacedRequest) for each request of this thread's run.
  template <typename Visit>
  __device__ __forceinline__ void ForOwnRequests(Visit&& visit) const {
    PlacedRequest placed = {.request = first_, .begin = begin_};
#pragma unroll 1
    for (; placed.request < last_; ++placed.request) {
      placed.tiles = Tiles(placed.request);
      visit(placed);
      placed.begin = placed.End();
    }
  }

  // Calls visit(PlacedRequest, its splits) for those of more than `splits`, at least 2. Mostly
  // there are none, which is told without placing them.
  template <typename Visit>
  __device__ __forceinline__ void ForOwnRequestsOfMoreSplits(int splits, Visit&& visit) const {
    if (!MayHaveMoreSplits(largest_request_, splits)) return;
    ForOwnRequests([&](const PlacedRequest& placed) {
      if (!MayHaveMoreSplits(placed.tiles, splits)) return;
      const int own_splits = NumSplits(placed);
      if (own_splits > splits) visit(placed, own_splits);
    });
  }

  // The part that makes the first split of a request.
  __device__ __forceinline__ int FirstPart(const PlacedRequest& placed) const {
    if (aligned_) {
      return input_.aligned_requests.Floor(placed.request) * input_.aligned_splits.value;
    }
    return min(placed.begin + kRequestOverhead, placed.End() - 1) / payload_;
  }
  __device__ __forceinline__ int NumSplits(const PlacedRequest& placed) const {
    if (!aligned_) return (placed.End() - 1) / payload_ - FirstPart(placed) + 1;
    return placed.tiles == 0 ? 1 : CeilDiv(placed.tiles, SplitTiles(placed.tiles));
  }

  // Where parts are aligned, where part p begins: whole requests, or one of the equal splits of a
  // request. The parts that a short request leaves over are empty.
  __device__ __forceinline__ PartBound AlignedBound(int p) const {
    const int run = input_.aligned_splits.Floor(p);
    const int split = p - run * input_.aligned_splits.value;
    const int request = run * input_.aligned_requests.value;
    if (request >= input_.batch) return {input_.batch, 0};
    if (split == 0) return {request, 0};
    const int tiles = Tiles(request);
    const int first = split * SplitTiles(tiles);
    return first < tiles ? PartBound{request, first} : PartBound{request + 1, 0};
  }
  // Where they are not, where part p begins if that is in this request.
  __device__ __forceinline__ PartBound BoundInside(const PlacedRequest& placed, int p) const {
    return {placed.request, max(0, p * payload_ - placed.begin - kRequestOverhead)};
  }

 private:
  // Smaller parts take less time, but leave more partial results to join. With W units of work in
  // all and parts of t, that is a microsecond a unit against W / t splits, each of which costs as
  // much as its rows of 1 KB and kJoinRows more: the sum is least where kJoinCost * t * t is
  // W * (rows + kJoinRows). Measured on an H200.
  static constexpr int kJoinCost = 4096, kJoinRows = 16;
  static constexpr int kLargestMinimum = 8;  // beyond it the SMs set the size of a part, not this

  // The smallest part that is worth its partial results.
  __device__ __forceinline__ int MinPartTiles() const {
    // No more changes nothing.
    const int work = min(total_, 1 << 17) * min(input_.rows + kJoinRows, 1 << 13);
    int tiles = 1;
#pragma unroll
    for (int t = 1; t < kLargestMinimum; ++t) tiles += kJoinCost * t * t < work ? 1 : 0;
    return tiles;
  }

  static __device__ __forceinline__ int WarpScan(int value) {
    const int lane = threadIdx.x % sm90::kWarpSize;
#pragma unroll
    for (int step = 1; step < sm90::kWarpSize; step *= 2) {
      const int before = __shfl_up_sync(sm90::kFullWarp, value, step);
      if (lane >= step) value += before;
    }
    return value;
  }

  __device__ __forceinline__ int Tiles(int request) const {
    const int32_t* seqlen = input_.cache_seqlens + request;
    const uint32_t length = max(kPastL1 ? __ldcg(seqlen) : *seqlen, 0);
    return min(static_cast<int>(CeilDiv<uint32_t>(length, kTileTokens)), input_.most_tiles);
  }

  // Whether a request of `tiles` may have more than so many splits, at least 2; told faster than
  // how many it has.
  __device__ __forceinline__ bool MayHaveMoreSplits(int tiles, int splits) const {
    if (aligned_) return input_.aligned_splits.value > splits;
    return tiles > (splits - 1) * payload_;
  }

  static __device__ __forceinline__ int CeilLog2(int n) { return 32 - __clz(n - 1); }

  // The logarithm of how many threads, neighbours in a warp, share an aligned run.
  __device__ __forceinline__ int Log2Sharing() const {
    constexpr int kLog2Threads = std::bit_width<unsigned>(kThreads) - 1;
    constexpr int kLog2Lanes = std::bit_width<unsigned>(sm90::kWarpSize) - 1;
    const int spare = max(kLog2Threads - CeilLog2(input_.aligned_runs), 0);
    return min(min(spare, kLog2Lanes), CeilLog2(input_.aligned_requests.value));
  }

  __device__ __forceinline__ void SetRun(int log2_sharing) {
    const int run = CeilDiv(input_.aligned_runs, kThreads) * input_.aligned_requests.value;
    const int sharing = 1 << log2_sharing, thread = threadIdx.x;
    const int share = (run + sharing - 1) >> log2_sharing;
    const int begin = (thread >> log2_sharing) * run, end = min(begin + run, input_.batch);
    first_ = min(begin + (thread & (sharing - 1)) * share, end);
    last_ = min(first_ + share, end);
  }

  // The sum of the costs of this thread's requests, and the cost of its largest aligned part if no
  // split is made larger than it must be: min_tiles_ makes none larger than the payload, which is
  // as large.
  __device__ __forceinline__ int CostOfRun(int sharing, int* largest_part) {
    int sum = 0, part = 0;
    largest_request_ = 0;
#pragma unroll 4
    for (int i = first_, left = input_.aligned_requests.value; i < last_; ++i) {
      const int tiles = Tiles(i);
      largest_request_ = max(largest_request_, tiles);
      sum += tiles + kRequestOverhead;
      part += input_.aligned_splits.value == 1 ? tiles + kRequestOverhead
                                               : input_.aligned_splits.Ceil(tiles);
      *largest_part = max(*largest_part, part);
      if (--left == 0) {
        left = input_.aligned_requests.value;
        part = 0;
      }
    }
    for (int step = 1; step < sharing; step *= 2) {
      part += __shfl_xor_sync(sm90::kFullWarp, part, step);
    }
    *largest_part = max(*largest_part, part);
    return sum;
  }

  // The tiles of each split of a request of `tiles`, where parts are aligned; the last one may have
  // fewer. Of two splits, which decode joins, the first one has a tile more, so that it finds the
  // second one written.
  __device__ __forceinline__ int SplitTiles(int tiles) const {
    const int equal = max(input_.aligned_splits.Ceil(tiles), min_tiles_);
    return equal + (input_.aligned_splits.value == kJoinedSplits ? 1 : 0);
  }

  const ScheduleInput& input_;
  int (&warp_sums_)[kWarps];
  int first_, last_;     // this thread's run of requests
  int largest_request_;  // of them, in tiles
  int begin_;            // where it lies on the line
  int total_, payload_, min_tiles_;
  bool aligned_;
};

}  // namespace jax_flashmla
