// The tile schedule: which part (the share of one group of thread blocks) does which
// tiles of which sequence.
//
// The keys of a sequence are cut into tiles of 64 tokens. A sequence costs its tiles, plus
// kSequenceOverhead for its prologue and epilogue. All sequences are laid end to end on one
// line, and the line is cut into parts of equal cost (`payload`). Each part is the work of one
// group of thread blocks:
//
//   sequences  |ov| tiles of 0      |ov| 1 |ov| tiles of 2                       |
//   parts      |      0      |      1      |      2      |      3      |    4    |
//
// Part p runs from part_bounds[p] to part_bounds[p + 1]. A sequence that several parts share is
// split: part first_part[i] + s makes split s of sequence i, and num_splits is the running sum
// of the number of splits.
//
// Parts may instead be aligned to the sequences: each holds equally many whole sequences, or each
// sequence has equally many parts. That needs fewer splits. They are aligned if the largest aligned
// part is at most 1 / kAlignedTolerance larger than `payload`.
//
// How a thread block makes the schedule from the lengths: each thread has a run of sequences (as
// many as make whole aligned parts; where there are threads to spare, several threads share one
// part). It reads their lengths once, for the sum of their costs and for the largest aligned part.
// A scan over the threads gives the total, hence the payload, and where each run begins. From then
// on each thread finds by division which parts begin inside its sequences.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "mla/shapes.cuh"
#include "sm90/cta.cuh"

namespace jax_flashmla::split_kv {

constexpr int kSequenceOverhead = 2;
constexpr int kAlignedTolerance = 16;
// Sequences with at most this many splits are joined inside the decode
// kernel; others go to combine.
constexpr int kJoinedSplits = 2;
// Parts below a minimum size are not worth their partial results. With W units of work in all
// and parts of t tiles, the work takes W / t parts, and each costs its rows of 1 KB and
// kJoinRows more. Measured on an H200: the sum of both is smallest where kJoinCost * t * t =
// W * (rows + kJoinRows).
constexpr int kJoinCost = 4096, kJoinRows = 16;
// The minimum is never raised above this, in tiles. From there on the number of parts decides.
constexpr int kMaxMinPartTiles = 8;
// Keep the product of work and rows within int32. From kMaxJoinWork on the minimum is at its
// maximum anyway; more than kMaxJoinRows rows count as kMaxJoinRows.
constexpr int kMaxJoinWork = 1 << 17, kMaxJoinRows = 1 << 13;
// No sum of costs exceeds this.
constexpr int kTotalCostLimit = 1 << 30;

// Where a part begins: tile `tile` of sequence `sequence`. (i, 0) is before all of sequence i.
struct PartBound {
  int32_t sequence, tile;
};

// Bounds come from device memory and may be garbage. A bound outside the batch may give wrong
// results, but must not give wrong addresses.
__device__ __forceinline__ PartBound ClampToBatch(PartBound bound, int batch) {
  if (bound.sequence >= batch) return {batch, 0};
  return {max(bound.sequence, 0), max(bound.tile, 0)};
}

// The arrays of a schedule. They are null if the call was given none: then each thread block makes
// its share of the schedule from the lengths.
struct TileSchedule {
  const PartBound* part_bounds;  // [num_parts + 1]
  const int32_t* first_part;     // [batch]
  const int32_t* num_splits;     // [batch + 1], running sum
  int32_t num_parts;

  bool IsGiven() const { return part_bounds != nullptr; }
};

// Divides by a fixed number on the device with a multiplication (Granlund and Montgomery, "Division
// by invariant integers using multiplication", 1994).
struct Divisor {
  int32_t value;
  uint32_t multiplier;  // 2^(31 + shift) / value, rounded up
  int32_t shift;        // log2(value), rounded up

  explicit Divisor(int32_t value)
      : value(value), shift(std::bit_width(static_cast<uint32_t>(value - 1))) {
    multiplier =
        static_cast<uint32_t>(CeilDiv(uint64_t{1} << (31 + shift), static_cast<uint64_t>(value)));
  }
  // For n from 0 to 2^31 - 1. Rounding the multiplier up adds less than 1 / value to the quotient.
  __device__ __forceinline__ int Floor(int n) const {
    return __umulhi(2 * static_cast<uint32_t>(n), multiplier) >> shift;
  }
  __device__ __forceinline__ int Ceil(int n) const { return Floor(n + value - 1); }
};

// What a schedule is made from.
struct ScheduleInput {
  const int32_t* cache_seqlens;  // [batch]
  int32_t batch;
  int32_t rows;  // query rows of a sequence, over all KV heads
  Divisor num_parts;
  // An aligned part holds this many whole sequences, or a sequence has this many aligned parts. One
  // of the two numbers is 1.
  Divisor aligned_sequences, aligned_splits;
  int32_t aligned_runs;  // runs of aligned_sequences sequences
  int32_t max_tiles;     // of a sequence, as kTotalCostLimit allows

  // `batch` must be at least 1.
  ScheduleInput(const int32_t* cache_seqlens, int32_t batch, int32_t num_parts, int32_t rows)
      : cache_seqlens(cache_seqlens),
        batch(batch),
        rows(rows),
        num_parts(num_parts),
        aligned_sequences(CeilDiv(batch, num_parts)),
        aligned_splits(std::max(num_parts / batch, 1)),
        aligned_runs(CeilDiv(batch, aligned_sequences.value)),
        max_tiles(kTotalCostLimit / batch - kSequenceOverhead) {}
};

// A sequence and where it begins on the line.
struct PlacedSequence {
  int32_t sequence, begin, tiles;

  __device__ __forceinline__ int End() const { return begin + kSequenceOverhead + tiles; }
};

// The schedule as the `kThreads` threads of a block know it after they have made it together. A
// thread can answer for its own sequences and, where parts are aligned, for every part. With
// `kPastL1` the lengths are read from the L2: for a kernel that reads them before it has waited for
// the kernels ahead of it.
template <int kThreads, bool kPastL1 = false>
class Scheduler {
 public:
  static constexpr int kWarps = kThreads / sm90::kWarpSize;
  static_assert(kWarps <= sm90::kWarpSize && std::has_single_bit<unsigned>(kThreads));

  // All threads call this. `warp_sums` is shared memory that this constructor and Scan() use.
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

  // The inclusive prefix sum of `value` over the threads. `total` returns the sum over all threads.
  __device__ __forceinline__ int Scan(int value, int* total) {
    // Opaque: else some kernels would keep the lane in a register, or spill it, from here on.
    const int lane = sm90::Opaque(threadIdx.x) % sm90::kWarpSize;
    const int warp = threadIdx.x / sm90::kWarpSize;
    value = WarpScan(value);
    if (lane == sm90::kWarpSize - 1) warp_sums_[warp] = value;
    __syncthreads();
    const int until = WarpScan(lane < kWarps ? warp_sums_[lane] : 0);
    *total = __shfl_sync(sm90::kFullWarp, until, kWarps - 1);
    const int before = __shfl_sync(sm90::kFullWarp, until, max(warp - 1, 0));
    __syncthreads();  // the next call writes warp_sums_
    return value + (warp == 0 ? 0 : before);
  }

  __device__ __forceinline__ bool IsAligned() const { return aligned_; }
  // Where parts are not aligned: the cost of a part, and of the whole line.
  __device__ __forceinline__ int Payload() const { return payload_; }
  __device__ __forceinline__ int Total() const { return total_; }

  // Calls visit(PlacedSequence) for each sequence of this thread's run.
  template <typename Visit>
  __device__ __forceinline__ void ForOwnSequences(Visit&& visit) const {
    PlacedSequence placed = {.sequence = first_, .begin = begin_};
#pragma unroll 1
    for (; placed.sequence < end_; ++placed.sequence) {
      placed.tiles = Tiles(placed.sequence);
      visit(placed);
      placed.begin = placed.End();
    }
  }

  // Calls visit(PlacedSequence, number of splits) for each own sequence with more than `splits`
  // splits (at least 2). Usually there is none, which is found without placing the sequences.
  template <typename Visit>
  __device__ __forceinline__ void ForOwnSequencesOfMoreSplits(int splits, Visit&& visit) const {
    if (!MayHaveMoreSplits(largest_sequence_, splits)) return;
    ForOwnSequences([&](const PlacedSequence& placed) {
      if (!MayHaveMoreSplits(placed.tiles, splits)) return;
      const int own_splits = NumSplits(placed);
      if (own_splits > splits) visit(placed, own_splits);
    });
  }

  // The part that makes the first split of a sequence.
  __device__ __forceinline__ int FirstPart(const PlacedSequence& placed) const {
    if (aligned_) {
      return input_.aligned_sequences.Floor(placed.sequence) * input_.aligned_splits.value;
    }
    // The part of its first tile, or of the end of its overhead if it has no tile.
    return min(placed.begin + kSequenceOverhead, placed.End() - 1) / payload_;
  }
  __device__ __forceinline__ int NumSplits(const PlacedSequence& placed) const {
    if (!aligned_) return (placed.End() - 1) / payload_ - FirstPart(placed) + 1;
    return placed.tiles == 0 ? 1 : CeilDiv(placed.tiles, SplitTiles(placed.tiles));
  }

  // Where part p begins if parts are aligned: before whole sequences, or at one of the equal splits
  // of a sequence. A short sequence does not fill its parts; the rest of them are empty.
  __device__ __forceinline__ PartBound AlignedBound(int p) const {
    const int run = input_.aligned_splits.Floor(p);
    const int split = p - run * input_.aligned_splits.value;
    const int sequence = run * input_.aligned_sequences.value;
    if (sequence >= input_.batch) return {input_.batch, 0};
    if (split == 0) return {sequence, 0};
    const int tiles = Tiles(sequence);
    const int first = split * SplitTiles(tiles);
    return first < tiles ? PartBound{sequence, first} : PartBound{sequence + 1, 0};
  }
  // Where part p begins if parts are not aligned and it begins inside this sequence.
  __device__ __forceinline__ PartBound BoundInside(const PlacedSequence& placed, int p) const {
    return {placed.sequence, max(0, p * payload_ - placed.begin - kSequenceOverhead)};
  }

 private:
  // The smallest part that is worth its partial results.
  __device__ __forceinline__ int MinPartTiles() const {
    const int work = min(total_, kMaxJoinWork) * min(input_.rows + kJoinRows, kMaxJoinRows);
    int tiles = 1;
#pragma unroll
    for (int t = 1; t < kMaxMinPartTiles; ++t) tiles += kJoinCost * t * t < work ? 1 : 0;
    return tiles;
  }

  static __device__ __forceinline__ int WarpScan(int value) {
    const int lane = sm90::Opaque(threadIdx.x) % sm90::kWarpSize;
#pragma unroll
    for (int step = 1; step < sm90::kWarpSize; step *= 2) {
      const int before = __shfl_up_sync(sm90::kFullWarp, value, step);
      if (lane >= step) value += before;
    }
    return value;
  }

  __device__ __forceinline__ int Tiles(int sequence) const {
    const int32_t* seqlen = input_.cache_seqlens + sequence;
    const uint32_t length = max(kPastL1 ? __ldcg(seqlen) : *seqlen, 0);
    return min(static_cast<int>(CeilDiv<uint32_t>(length, kTileTokens)), input_.max_tiles);
  }

  // Whether a sequence of `tiles` tiles may have more than `splits` splits (at least 2). May say
  // yes too often, but never no. It costs less than the exact number.
  __device__ __forceinline__ bool MayHaveMoreSplits(int tiles, int splits) const {
    if (aligned_) return input_.aligned_splits.value > splits;
    return tiles > (splits - 1) * payload_;
  }

  static __device__ __forceinline__ int CeilLog2(int n) { return 32 - __clz(n - 1); }

  // The logarithm of the number of threads, neighbours in a warp, that share an aligned run.
  __device__ __forceinline__ int Log2Sharing() const {
    constexpr int kLog2Threads = std::bit_width<unsigned>(kThreads) - 1;
    constexpr int kLog2Lanes = std::bit_width<unsigned>(sm90::kWarpSize) - 1;
    const int spare = max(kLog2Threads - CeilLog2(input_.aligned_runs), 0);
    return min(min(spare, kLog2Lanes), CeilLog2(input_.aligned_sequences.value));
  }

  // Sets this thread's run of sequences: whole aligned runs, or its share of one.
  __device__ __forceinline__ void SetRun(int log2_sharing) {
    const int run = CeilDiv(input_.aligned_runs, kThreads) * input_.aligned_sequences.value;
    const int sharing = 1 << log2_sharing, thread = threadIdx.x;
    const int share = (run + sharing - 1) >> log2_sharing;
    const int begin = (thread >> log2_sharing) * run, end = min(begin + run, input_.batch);
    first_ = min(begin + (thread & (sharing - 1)) * share, end);
    end_ = min(first_ + share, end);
  }

  // The sum of the costs of this thread's sequences. `largest_part` returns the cost of its largest
  // aligned part. If a sequence has several parts, only tiles are counted: neither
  // kSequenceOverhead nor the tile more of SplitTiles(). min_tiles_ is ignored too. It may make a
  // split larger, but not larger than the payload, which has the same minimum.
  __device__ __forceinline__ int CostOfRun(int sharing, int* largest_part) {
    int sum = 0, part = 0;
    largest_sequence_ = 0;
#pragma unroll 4
    for (int i = first_, left = input_.aligned_sequences.value; i < end_; ++i) {
      const int tiles = Tiles(i);
      largest_sequence_ = max(largest_sequence_, tiles);
      sum += tiles + kSequenceOverhead;
      part += input_.aligned_splits.value == 1 ? tiles + kSequenceOverhead
                                               : input_.aligned_splits.Ceil(tiles);
      *largest_part = max(*largest_part, part);
      if (--left == 0) {
        left = input_.aligned_sequences.value;
        part = 0;
      }
    }
    for (int step = 1; step < sharing; step *= 2) {
      part += __shfl_xor_sync(sm90::kFullWarp, part, step);
    }
    *largest_part = max(*largest_part, part);
    return sum;
  }

  // The tiles of each split of a sequence of `tiles` tiles where parts are aligned; the last split
  // may have fewer. If there are two splits, decode joins them in the block of the first one. That
  // split gets one tile more, so that the second one is already written when it ends.
  __device__ __forceinline__ int SplitTiles(int tiles) const {
    const int equal = max(input_.aligned_splits.Ceil(tiles), min_tiles_);
    return equal + (input_.aligned_splits.value == kJoinedSplits ? 1 : 0);
  }

  const ScheduleInput& input_;
  int (&warp_sums_)[kWarps];
  int first_, end_;       // this thread's run of sequences
  int largest_sequence_;  // of the run, in tiles
  int begin_;             // where the run begins on the line
  int total_, payload_, min_tiles_;
  bool aligned_;
};

}  // namespace jax_flashmla::split_kv
