// A tile of 64 rows by 64 two-byte elements in shared memory, in the 128-byte swizzle that the copy
// engine writes and the tensor cores read: a row has 128 bytes, and its 16-byte unit u is stored at
// position u ^ (row % 8). A tile must be aligned to 1024 bytes.
#pragma once

#include "sm90/wgmma.cuh"

namespace jax_flashmla::sm90 {

template <typename T>
struct alignas(1024) SmemTile {
  static_assert(sizeof(T) == 2, "tiles hold two-byte elements");
  static constexpr int kRows = 64, kColumns = 64;
  static constexpr int kRowBytes = kColumns * sizeof(T);
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kUnitsPerRow = kRowBytes / 16;

  T data[kRows * kColumns];

  // The shared-memory address of 16-byte unit `unit` of row `row`.
  __device__ __forceinline__ uint32_t UnitAddress(int row, int unit) const {
    return SharedAddress(data) + row * kRowBytes + ((unit ^ (row & 7)) << 4);
  }
  __device__ __forceinline__ const uint4& Unit(int row, int unit) const {
    return reinterpret_cast<const uint4*>(data)[row * kUnitsPerRow + (unit ^ (row & 7))];
  }
  // The tile as a wgmma operand whose K axis runs along the columns.
  __device__ __forceinline__ uint64_t DescriptorAlongColumns() const {
    return SwizzledDescriptor(SharedAddress(data), 8 * kRowBytes, 16);
  }
  // The tile as a wgmma operand whose K axis runs along the rows. Tiles that follow it in an
  // array continue it along N.
  __device__ __forceinline__ uint64_t DescriptorAlongRows() const {
    return SwizzledDescriptor(SharedAddress(data), 8 * kRowBytes, kBytes);
  }
  // What to add to a descriptor to move 16 elements along K.
  static constexpr uint64_t kStepAlongColumns = DescriptorStep(16 * sizeof(T));
  static constexpr uint64_t kStepAlongRows = DescriptorStep(16 * kRowBytes);
};

}  // namespace jax_flashmla::sm90
