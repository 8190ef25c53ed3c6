// append_kv_cache: writes new tokens into the paged cache, in place.
//
// What   cache[slot_mapping[t]] = new_kv[t]. The cache is seen as rows of h_kv * d_k elements, one
//        for each of its num_blocks * page_block_size slots. A slot outside the pool writes
//        nothing. If two tokens have the same slot, either may win, separately for every 16 bytes.
//        The result is the cache operand: XLA aliases the two.
// Floor  2 * tokens * row bytes of memory traffic. 100,000 tokens of 1,152 bytes take 54 us at the
//        4.28 TB/s of a copy. A decode step's few hundred tokens take 2 to 3 us, the latency of a
//        kernel.
// How    A warp copies one segment, up to 2 KiB of one row. Warps share no work:
//
//          row t     |---- segment 0 ----|---- segment 1 ----|- 2 -|     (an MLA row has 1,152
//          warp            3t                  3t + 1         3t + 2      bytes: one segment)
//
//        A lane loads the slot and all its vectors at once and then stores them, so a warp waits
//        for memory once. Data is only moved, so a dtype is just its size. The vector is the widest
//        (16 bytes or less) of which the row's size and both addresses are multiples.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "sm90/cta.cuh"

namespace jax_flashmla::append {

using sm90::kWarpSize;

constexpr int kWarps = 4;           // of a block; few, so that a small append spreads over many SMs
constexpr int kVectorsPerLane = 4;  // 64 bytes in flight a lane saturate the memory
constexpr int kSegmentVectors = kWarpSize * kVectorsPerLane;

struct AppendParams {
  void* cache;
  const void* new_kv;
  const int32_t* slot_mapping;
  int64_t num_slots;
  int64_t num_tokens;
  int64_t row_bytes;
};

template <typename Vector>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    AppendKvKernel(const AppendParams params, const int64_t row_vectors, const int64_t segments) {
  // The kernel before this one may still be writing new_kv or reading the cache. For that reason
  // the pointers are not declared __restrict__ either: the loads below must not take the path for
  // data that is constant during the kernel.
  sm90::WaitForPriorKernels();
  sm90::AllowNextKernel();

  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int64_t num_segments = params.num_tokens * segments;
#pragma unroll 1
  for (int64_t index = int64_t{blockIdx.x} * kWarps + warp; index < num_segments;
       index += int64_t{gridDim.x} * kWarps) {
    const int64_t token = segments == 1 ? index : index / segments;
    const int64_t first = (index - token * segments) * kSegmentVectors + lane;
    const int64_t slot = params.slot_mapping[token];
    const Vector* source = static_cast<const Vector*>(params.new_kv) + token * row_vectors;
    Vector* target = static_cast<Vector*>(params.cache) + slot * row_vectors;

    Vector vectors[kVectorsPerLane];
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      if (first + i * kWarpSize < row_vectors) vectors[i] = source[first + i * kWarpSize];
    }
    if (slot < 0 || slot >= params.num_slots) continue;
#pragma unroll
    for (int i = 0; i < kVectorsPerLane; ++i) {
      if (first + i * kWarpSize < row_vectors) target[first + i * kWarpSize] = vectors[i];
    }
  }
}

}  // namespace jax_flashmla::append
