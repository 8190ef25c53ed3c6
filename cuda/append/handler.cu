// The FFI handler of append_kv_cache.
#include <algorithm>
#include <cstdint>

#include "append/kernel.cuh"
#include "host/launch.h"
#include "mla/shapes.cuh"

namespace jax_flashmla::append {
namespace {

constexpr char kOp[] = "append_kv_cache";

template <typename Vector>
ffi::Error LaunchWith(cudaStream_t stream, const AppendParams& params) {
  const int64_t row_vectors = params.row_bytes / static_cast<int64_t>(sizeof(Vector));
  const int64_t segments = CeilDiv<int64_t>(row_vectors, kSegmentVectors);
  const int64_t blocks = CeilDiv<int64_t>(params.num_tokens * segments, kWarps);
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(std::min(blocks, kMaxGrid)), .block = kWarps * kWarpSize},
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
ffi::Error AppendKv(cudaStream_t stream, int32_t device, ffi::AnyBuffer k_cache,
                    ffi::AnyBuffer new_kv, I32<1> slot_mapping, ffi::Result<ffi::AnyBuffer> out) {
  const Dims dims = k_cache.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(dims.size() == 4, kOp, "k_cache must have rank 4"));
  JAX_FLASHMLA_CHECK(CheckArgument(new_kv.element_type() == k_cache.element_type(), kOp,
                                   "new_kv and k_cache must have the same dtype"));
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_append_kv, AppendKv,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace
}  // namespace jax_flashmla::append
