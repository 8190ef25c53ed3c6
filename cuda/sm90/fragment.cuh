// Register fragments of wgmma: which thread holds which element, and how fragments move between
// registers and swizzled tiles in shared memory.
//
// Accumulator D[64 x N] of a warpgroup: warp w holds rows 16w .. 16w+15; lane l holds, for each
// group j of 8 columns, d[4j], d[4j+1] at row l/4 and d[4j+2], d[4j+3] at row l/4 + 8, columns
// 8j + 2(l%4) and the next. The four lanes of a row are a "quad".
#pragma once

#include "sm90/smem_tile.cuh"

namespace jax_flashmla::sm90 {

// The row of this thread's d[4j] in the tile of its warpgroup. d[4j+2] is 8 rows below.
__device__ __forceinline__ int FragmentRow() {
  return (threadIdx.x % kWarpgroupSize) / kWarpSize * 16 + threadIdx.x % kWarpSize / 4;
}
// The column of this thread's d[0].
__device__ __forceinline__ int FragmentColumn() { return threadIdx.x % 4 * 2; }

template <int kCount>
__device__ __forceinline__ void QuadMax(float (&x)[kCount]) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    float other[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) other[i] = __shfl_xor_sync(kFullWarp, x[i], step);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = fmaxf(x[i], other[i]);
  }
}
__device__ __forceinline__ float QuadSum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Gives all lanes of a quad the values of its first lane.
__device__ __forceinline__ void QuadBroadcast(float (&x)[2]) {
  x[0] = __shfl_sync(kFullWarp, x[0], 0, 4);
  x[1] = __shfl_sync(kFullWarp, x[1], 0, 4);
}

// The two elements of type T in a word, as floats.
template <typename T>
__device__ __forceinline__ float2 Unpack(uint32_t packed) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(packed));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(packed));
  }
}

// Two floats rounded to T, `low` in the low half.
template <typename T>
__device__ __forceinline__ uint32_t Pack(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The A fragment [64 x 16] at columns 16k .. 16k+15 of a tile.
template <typename T>
__device__ __forceinline__ void LoadFragmentA(uint32_t (&a)[4], const SmemTile<T>& tile, int k) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = (threadIdx.x % kWarpgroupSize) / kWarpSize * 16 + lane % 16;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(tile.UnitAddress(row, 2 * k + lane / 16))
               : "memory");
}

// Writes columns 16k .. 16k+15 of an accumulator [64 x 64], rounded to T, into a tile.
template <typename T>
__device__ __forceinline__ void StoreFragment(SmemTile<T>& tile, const float (&d)[32], int k) {
  const int lane = threadIdx.x % kWarpSize;
  const int row = (threadIdx.x % kWarpgroupSize) / kWarpSize * 16 + lane % 16;
  const float* e = d + 8 * k;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   tile.UnitAddress(row, 2 * k + lane / 16)),
               "r"(Pack<T>(e[0], e[1])), "r"(Pack<T>(e[2], e[3])), "r"(Pack<T>(e[4], e[5])),
               "r"(Pack<T>(e[6], e[7]))
               : "memory");
}

// Transposes a 4 x 4 matrix of words whose row q is held by lane q of a quad.
__device__ __forceinline__ void QuadTranspose(uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? w[i] : w[i + 1], 1);
    w[i] = odd ? other : w[i];
    w[i + 1] = odd ? w[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? w[i] : w[i + 2], 2);
    w[i] = upper ? other : w[i];
    w[i + 2] = upper ? w[i + 2] : other;
  }
}

}  // namespace jax_flashmla::sm90
