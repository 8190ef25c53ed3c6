// The shapes of multi-head latent attention (MLA).
//
// A batch of sequences attends with h_q query heads over h_kv KV heads. The g = h_q / h_kv heads
// that share a KV head, times the s_q queries of a sequence, are its `rows`: row r is query r / g
// of head k * g + r % g, where k is the KV head. K has 576 columns, or 512 in models without rope
// columns; V is the first 512 of them.
//
// In sparse attention each query has a list of tokens of its own. There a "sequence" of the kernels
// is a list: a single query, whose rows are its heads. `lists` of them in a row are those of one
// sequence of the batch.
#pragma once

#include <cstdint>

namespace jax_flashmla {

constexpr int kHeadDimK = 576, kHeadDimKWithoutRope = 512;
constexpr int kHeadDimV = 512;
constexpr int kTileTokens = 64;  // tokens of a tile of keys
constexpr int kTileRows = 64;    // query rows of a row tile
constexpr int kQuarters = 4;     // a row of O is written in quarters
constexpr int kQuarterColumns = kHeadDimV / kQuarters;

// The SMs of an H100 or H200. Kernels are tuned for this number. It also fixes the order in which
// combine adds splits, so that the bits there do not depend on the SMs of the card.
constexpr int kSms = 132;

template <typename Int>
__host__ __device__ constexpr Int CeilDiv(Int a, Int b) {
  return (a + b - 1) / b;
}

// The queries of a call, the same for every sequence.
struct QueryShape {
  int32_t num_kv_heads;
  int32_t rows;   // per KV head, s_q * group
  int32_t group;  // query heads per KV head
  int32_t s_q;
  int32_t row_tiles;  // per KV head
  int32_t lists;      // per sequence of the batch; 1 where attention is not sparse

  QueryShape(int64_t num_kv_heads, int64_t rows, int64_t s_q, int64_t lists = 1)
      : num_kv_heads(static_cast<int32_t>(num_kv_heads)),
        rows(static_cast<int32_t>(rows)),
        group(static_cast<int32_t>(rows / s_q)),
        s_q(static_cast<int32_t>(s_q)),
        row_tiles(static_cast<int32_t>(CeilDiv<int64_t>(rows, kTileRows))),
        lists(static_cast<int32_t>(lists)) {}

  // The index of a row in an array [b, h_kv, rows].
  __device__ __forceinline__ int64_t Row(int sequence, int kv_head, int row) const {
    return (static_cast<int64_t>(sequence) * num_kv_heads + kv_head) * rows + row;
  }
  // The query head of a row.
  __device__ __forceinline__ int Head(int kv_head, int row) const {
    return kv_head * group + row % group;
  }
  // The sequence of the batch to which a sequence or list belongs.
  __device__ __forceinline__ int BatchIndex(int sequence) const {
    return lists == 1 ? sequence : sequence / lists;
  }
  // The index of a row in softmax_lse [b, h_q, s_q]; with lists, these are the s_q queries.
  __device__ __forceinline__ int64_t LseRow(int sequence, int kv_head, int row) const {
    const int batch_index = BatchIndex(sequence);
    const int64_t head =
        static_cast<int64_t>(batch_index) * num_kv_heads * group + Head(kv_head, row);
    if (lists == 1) return head * s_q + row / group;
    return head * lists + (sequence - batch_index * lists);
  }
};

}  // namespace jax_flashmla
