// What FFI handlers share: short names for XLA's FFI, and argument checks
// that return an ffi::Error.
//
// A handler runs on the host while XLA enqueues work: it checks, launches and returns. It neither
// allocates nor synchronises, so it may be recorded into a CUDA graph. It reports every failure as
// an error, which Python raises.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace jax_flashmla {

namespace ffi = ::xla::ffi;

using Stream = ffi::PlatformStream<cudaStream_t>;

// Arguments and results of a given rank.
template <size_t rank>
using I32 = ffi::Buffer<ffi::S32, rank>;
template <size_t rank>
using I32Result = ffi::ResultBuffer<ffi::S32, rank>;
template <size_t rank>
using F32 = ffi::Buffer<ffi::F32, rank>;
template <size_t rank>
using F32Result = ffi::ResultBuffer<ffi::F32, rank>;
using Dims = ffi::Span<const int64_t>;

// Returns from the calling function if `expression` is an error.
#define JAX_FLASHMLA_CHECK(expression)                                            \
  do {                                                                            \
    if (::xla::ffi::Error error_ = (expression); error_.failure()) return error_; \
  } while (false)

// Success, or an error that names what was done and what CUDA reports.
inline ffi::Error CheckCuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal, std::string("jax_flashmla: ") + what + ": " +
                                                   cudaGetErrorString(status) + " (" +
                                                   cudaGetErrorName(status) + ")");
}

// Success on a device of compute capability 9.0, the only one that the machine code runs on.
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

// Success if `dims` equals `expected`, else an error that shows both.
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

}  // namespace jax_flashmla
