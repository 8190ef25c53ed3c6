// The shapes of multi-head latent attention (MLA) and the tile schedule that every kernel shares.
//
// Shapes: b sequences; h_kv KV heads; rows = s_q * h_q / h_kv query rows per KV head, row r being
// query r / g of head k * g + r % g with g = h_q / h_kv; d_k = 576 columns of K, of which the first
// d_v = 512 are V.
//
// Schedule. The keys of a sequence are cut into tiles of 64 tokens; a request costs its tiles and
// kRequestOverhead more. The costs of all requests lie end to end on one line, which is cut into
// equal parts, one for each group of SMs. A part works from part_bounds[p] to part_bounds[p + 1];
// the bound (i, 0) stands for all of the requests before i. A request that parts share is split:
// split s is made by part first_part[i] + s, and num_splits[i] counts the splits before request i.
// Where parts that are aligned to the requests (equally many whole requests each, or equally many
// parts a request) are at most 1 / kAlignedTolerance larger, they are taken: they need fewer
// splits.
#pragma once

#include <cstdint>

namespace jax_flashmla {

constexpr int kHeadDimK = 576;
constexpr int kHeadDimV = 512;
constexpr int kTileTokens = 64;  // tokens of a key tile
constexpr int kTileRows = 64;    // query rows of a row tile
constexpr int kRequestOverhead = 2;
constexpr int kAlignedTolerance = 16;
// A request of two splits is joined inside decode, one of more splits by the combine kernel.
constexpr int kJoinedSplits = 2;

// Where a part begins: tile `tile` of request `request`.
struct PartBound {
  int32_t request, tile;
};

// A bound as it is used: one that leads out of the batch, as no schedule of this batch does, may
// give wrong results, but not wrong addresses.
__device__ __forceinline__ PartBound Inside(PartBound bound, int batch) {
  if (bound.request >= batch) return {batch, 0};
  return {max(bound.request, 0), max(bound.tile, 0)};
}

// What every kernel may count on for speed, never for results: the SMs of an H100 or H200.
constexpr int kSms = 132;

// All null where none is given: each block then makes it from the lengths (schedule.cuh).
struct TileSchedule {
  const PartBound* part_bounds;  // [num_parts + 1]
  const int32_t* first_part;     // [batch]
  const int32_t* num_splits;     // [batch + 1], running sum
  int32_t num_parts;

  bool IsGiven() const { return part_bounds != nullptr; }
};

// Where row `row` of a KV head stands in softmax_lse [b, h_q, s_q].
template <typename Params>
__device__ __forceinline__ int64_t LseOffset(const Params& params, int request, int kv_head,
                                             int row) {
  const int64_t head =
      (static_cast<int64_t>(request) * params.num_kv_heads + kv_head) * params.group +
      row % params.group;
  return head * params.s_q + row / params.group;
}

template <typename Int>
__host__ __device__ constexpr Int CeilDiv(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace jax_flashmla
