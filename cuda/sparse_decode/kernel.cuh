// Sparse decode: attention of each query to the tokens of a list.
#pragma once

#include "decode/roles.cuh"
#include "sparse_decode/loader.cuh"

namespace jax_flashmla::sparse_decode {

template <typename Config, bool kMakesSchedule>
__global__ void __launch_bounds__(kThreads, 1)
    SparseDecodeKernel(const __grid_constant__ SparseParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<Config>*>(shared_memory);
  RunBlock<Config, kMakesSchedule>(
      smem, params.decode, [&](const BlockBounds<kMakesSchedule>& bounds, const BlockWork& work) {
        GatherLoader<Config, kMakesSchedule>(smem, params, bounds).Run(work);
      });
}

}  // namespace jax_flashmla::sparse_decode
