// How handlers launch kernels.
#pragma once

#include <utility>

#include "host/ffi.h"

namespace jax_flashmla {

constexpr int64_t kMaxGrid = 0x7fffffff;  // thread blocks along x

// Success if a grid may have this many blocks along x.
inline ffi::Error CheckGrid(const char* op, int64_t blocks) {
  return CheckArgument(blocks <= kMaxGrid, op,
                       "the shapes need " + std::to_string(blocks) +
                           " thread blocks, more than one launch can have; split the batch");
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
  unsigned cluster = 1;     // blocks of a cluster, along x
};

// Launches `kernel` as a programmatic dependent launch: its blocks may start while the kernel
// before it in the stream still runs. It must wait for that kernel (sm90::WaitForPriorKernels)
// before it touches what that one writes or reads, and must not end before it.
template <typename... Parameters, typename... Arguments>
ffi::Error LaunchOverlapped(const char* op, cudaStream_t stream, const LaunchShape& shape,
                            void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kDefaultMaxSharedBytes = 48 * 1024;
  if (shape.shared_bytes > kDefaultMaxSharedBytes) {
    JAX_FLASHMLA_CHECK(
        CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(shape.shared_bytes)),
                  op));
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {shape.cluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  return CheckCuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), op);
}

}  // namespace jax_flashmla
