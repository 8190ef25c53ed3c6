// append_kv: new tokens into the paged cache, in place.
//
// What     cache[slot_mapping[t]] = new_kv[t], the cache seen as [num_blocks * page_block_size]
//          rows of h_kv * d_k elements. A slot outside the cache writes nothing; of two equal slots
//          either may win, in each 16 bytes by itself. The result is the cache operand: XLA aliases
//          the two.
// Floor    2 * tokens * row bytes of memory traffic: 100,000 tokens of 1,152 bytes take 54 us at
//          the 4.28 TB/s of a copy; a decode step's few hundred take a kernel's latency, 2 to 3 us.
// Schedule A warp copies one segment, up to 2 KiB of one row, and no work is shared:
//
//            row t     |---- segment 0 ----|---- segment 1 ----|- 2 -|     (an MLA row is 1,152
//            warp            3t                  3t + 1         3t + 2      bytes: one segment)
//
//          A lane loads all its vectors and the slot at once and then stores, so that a warp waits
//          for memory once. The data is only moved: a dtype is its size, and the vector is the
//          widest (16 bytes or less) that the row's size and the two addresses are multiples of.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "host/ffi.h"
#include "mla/shapes.cuh"
#include "sm90/cta.cuh"

namespace jax_flashmla {
namespace {

constexpr char kOp[] = "append_kv_cache";
using sm90::kWarpSize;

constexpr int kWarps = 4;           // a block; few, so that a small append spreads over many SMs
constexpr int kVectorsPerLane = 4;  // 64 bytes in flight a lane saturate HBM
constexpr int kSegmentVectors = kWarpSize * kVectorsPerLane;
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a grid's x; beyond it the warps loop

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
  // The kernel before this one may still be writing new_kv or reading the cache. For the same
  // reason the loads below must not take the path for data that is constant during the kernel:
  // the pointers are not declared __restrict__.
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

template <typename Vector>
ffi::Error LaunchWith(cudaStream_t stream, const AppendParams& params) {
  const int64_t row_vectors = params.row_bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t segments = CeilDiv<int64_t>(row_vectors, kSegmentVectors);
  const int64_t blocks = CeilDiv<int64_t>(params.num_tokens * segments, kWarps);
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(std::min(blocks, kMaxBlocks)), .block = kWarps * kWarpSize},
                          AppendKvKernel<Vector>, params, row_vectors, segments);
}

ffi::Error Launch(cudaStream_t stream, const AppendParams& params) {
  // The lowest set bit is the largest power of two that divides all three.
  const uint64_t alignment = static_cast<uint64_t>(params.row_bytes) |
                             reinterpret_cast<uintptr_t>(params.cache) |
                             reinterpret_cast<uintptr_t>(params.new_kv);
  if (alignment % 16 == 0) return LaunchWith<uint4>(stream, params);
  if (alignment % 8 == 0) return LaunchWith<uint2>(stream, params);
  if (alignment % 4 == 0) return LaunchWith<uint32_t>(stream, params);
  if (alignment % 2 == 0) return LaunchWith<uint16_t>(stream, params);
  return LaunchWith<uint8_t>(stream, params);
}

// k_cache [num_blocks, page_block_size, h_kv, d_k], new_kv [tokens, h_kv, d_k],
// slot_mapping [tokens] -> k_cache
ffi::Error AppendKvImpl(cudaStream_t stream, int32_t device, ffi::AnyBuffer k_cache,
                        ffi::AnyBuffer new_kv, I32<1> slot_mapping,
                        ffi::Result<ffi::AnyBuffer> out) {
  const Dims dims = k_cache.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(dims.size() == 4, kOp, "k_cache must have rank 4"));
  JAX_FLASHMLA_CHECK(CheckArgument(new_kv.element_type() == k_cache.element_type(), kOp,
                                   "new_kv and k_cache must have one dtype"));
  const int64_t num_tokens = slot_mapping.dimensions()[0];
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "new_kv", new_kv.dimensions(), {num_tokens, dims[2], dims[3]}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "the result", out->dimensions(), {dims[0], dims[1], dims[2], dims[3]}));

  const int64_t element_bytes = static_cast<int64_t>(ffi::ByteWidth(k_cache.element_type()));
  const AppendParams params{out->untyped_data(),
                            new_kv.untyped_data(),
                            slot_mapping.typed_data(),
                            dims[0] * dims[1],
                            num_tokens,
                            dims[2] * dims[3] * element_bytes};
  if (params.num_slots == 0 || params.num_tokens == 0 || params.row_bytes == 0) {
    return ffi::Error::Success();
  }
  JAX_FLASHMLA_CHECK(CheckArgument(k_cache.untyped_data() == out->untyped_data(), kOp,
                                   "the result must be the k_cache operand"));
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  return Launch(stream, params);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_append_kv, AppendKvImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
