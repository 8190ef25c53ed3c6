// Attention sinks: a logit of each head that takes part in the softmax and has no value.
//
// The sum over the keys is exp(lse), so the sink leaves the keys the share
//
//   exp(lse) / (exp(lse) + exp(sink)) = 1 / (1 + exp(sink - lse))
//
// of the weight. The result is multiplied by it once, where it is normalised; partial results are
// without it, and so is the log-sum-exp that users get.
#pragma once

#include "mla/shapes.cuh"
#include "mla/softmax.cuh"

namespace jax_flashmla {

struct AttnSink {
  const float* logits;  // [h_q] or [b, h_q], natural logarithm; null: no sink
  int32_t stride;       // from one sequence of the batch to the next: h_q or 0

  __host__ __device__ bool IsGiven() const { return logits != nullptr; }

  // The share of the weight that the sink leaves to the keys of a row, whose log-sum-exp is `lse2`
  // (base 2). 1 for a row that sees no key: its result is 0 anyway.
  __device__ __forceinline__ float ShareOfKeys(const QueryShape& query, int sequence, int kv_head,
                                               int row, float lse2) const {
    if (lse2 == -INFINITY) return 1.f;
    const int64_t first = static_cast<int64_t>(query.BatchIndex(sequence)) * stride;
    const float sink = logits[first + query.Head(kv_head, row)];
    return 1.f / (1.f + Exp2(fmaf(sink, kLog2e, -lse2)));
  }
};

}  // namespace jax_flashmla
