// What the handlers share: names for XLA's FFI, and argument checks that end in an ffi::Error.
//
// A handler runs on the host while XLA enqueues work: it checks, launches and returns. It neither
// allocates nor synchronises, so that every handler may be recorded into a CUDA graph, and it
// reports every failure as an error that Python raises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace jax_flashmla {

namespace ffi = ::xla::ffi;

using Stream = ffi::PlatformStream<cudaStream_t>;

// Arguments and results by rank.
template <size_t rank>
using I32 = ffi::Buffer<ffi::S32, rank>;
template <size_t rank>
using I32Result = ffi::ResultBuffer<ffi::S32, rank>;
template <size_t rank>
using F32 = ffi::Buffer<ffi::F32, rank>;
template <size_t rank>
using F32Result = ffi::ResultBuffer<ffi::F32, rank>;
using Dims = ffi::Span<const int64_t>;

// Returns from the calling handler with the error of `expression`, if there is one.
#define JAX_FLASHMLA_CHECK(expression)                                            \
  do {                                                                            \
    if (::xla::ffi::Error error_ = (expression); error_.failure()) return error_; \
  } while (false)

// Success, or an error that says what was being done and what CUDA says about it.
inline ffi::Error CheckCuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_flashmla: ") + what + ": " +
                                                   cudaGetErrorString(status) + " (" +
                                                   cudaGetErrorName(status) + ")");
}

// The machine code is for compute capability 9.0 alone.
inline ffi::Error CheckDevice(const char* op, int32_t device) {
  int major = 0;
  int minor = 0;
  JAX_FLASHMLA_CHECK(
      CheckCuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), op));
  JAX_FLASHMLA_CHECK(
      CheckCuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), op));
  if (major == 9 && minor == 0) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kUnimplemented,
                    "jax_flashmla: " + std::string(op) +
                        " has a kernel for compute capability 9.0 only, device " +
                        std::to_string(device) + " has " + std::to_string(major) + "." +
                        std::to_string(minor));
}

inline std::string ShapeString(const int64_t* dims, size_t rank) {
  std::string text = "[";
  for (size_t i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

// Success if `dims` is `expected`, else an error with both.
inline ffi::Error CheckShape(const char* op, const char* name, Dims dims,
                             std::initializer_list<int64_t> expected) {
  bool equal = dims.size() == expected.size();
  for (size_t i = 0; equal && i < dims.size(); ++i) equal = dims[i] == expected.begin()[i];
  if (equal) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_flashmla: " + std::string(op) + ": " + name +
                                     " must have shape " +
                                     ShapeString(expected.begin(), expected.size()) + ", got " +
                                     ShapeString(dims.begin(), dims.size()));
}

// Success if `condition` holds, else an error with `message`.
inline ffi::Error CheckArgument(bool condition, const char* op, const std::string& message) {
  if (condition) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("jax_flashmla: " + std::string(op) + ": " + message);
}

// Success if a grid of this many blocks along x can be launched.
inline ffi::Error CheckGrid(const char* op, int64_t blocks) {
  constexpr int64_t kMaxBlocks = 0x7fffffff;
  return CheckArgument(blocks <= kMaxBlocks, op,
                       "the shapes need " + std::to_string(blocks) +
                           " thread blocks, more than one launch can have; split the batch");
}

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic; a kernel gets more than 48 KB only here
  unsigned cluster = 1;     // blocks along x
};

// Launches `kernel` so that its blocks may start while the kernel before it in the stream still
// runs: it must wait for that one (griddepcontrol.wait) before it touches what that one writes or
// reads, and must not end before it.
template <typename... Parameters, typename... Arguments>
ffi::Error LaunchOverlapped(const char* op, cudaStream_t stream, const LaunchShape& shape,
                            void (*kernel)(Parameters...), Arguments&&... arguments) {
  constexpr size_t kSharedBytesWithoutAsking = 48 * 1024;
  if (shape.shared_bytes > kSharedBytesWithoutAsking) {
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
