// Host side of the copy engine: tensor maps.
#pragma once

#include <cuda.h>  // types only: the driver's function is looked up at run time, no link to libcuda

#include <array>

#include "host/ffi.h"

namespace jax_flashmla {

// A row-major tensor of two-byte elements, fastest axis first, read in boxes that land in shared
// memory under the 128-byte swizzle (so box[0] is 64 elements).
struct TensorBoxes {
  const void* data;
  CUtensorMapDataType type;
  std::array<uint64_t, 4> shape;
  std::array<uint32_t, 4> box;
};

inline ffi::Error EncodeTensorMap(const TensorBoxes& tensor, CUtensorMap* map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                                12000, cudaEnableDefault, &found);
    return status == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<Encode>(function)
               : nullptr;
  }();
  if (encode == nullptr) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_flashmla: the CUDA driver has no cuTensorMapEncodeTiled; it must "
                      "support CUDA 12.0 or newer");
  }
  constexpr uint64_t kElementBytes = 2;
  std::array<uint64_t, 3> strides;
  uint64_t stride = kElementBytes;
  for (size_t i = 0; i < strides.size(); ++i) strides[i] = stride *= tensor.shape[i];
  const std::array<uint32_t, 4> element_strides = {1, 1, 1, 1};
  const CUresult status =
      encode(map, tensor.type, tensor.shape.size(), const_cast<void*>(tensor.data),
             tensor.shape.data(), strides.data(), tensor.box.data(), element_strides.data(),
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status == CUDA_SUCCESS) return ffi::Error::Success();
  return ffi::Error::Internal("jax_flashmla: cuTensorMapEncodeTiled failed with CUresult " +
                              std::to_string(static_cast<int>(status)));
}

}  // namespace jax_flashmla
