// The FFI handler of sparse decode: it checks the operands and launches decode and combine.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "decode/operands.h"
#include "host/launch.h"
#include "sparse_decode/kernel.cuh"

namespace jax_flashmla::sparse_decode {
namespace {

constexpr const char* kOp = "flash_mla_with_kvcache";
// No axis is longer, so that sums of two tile counts or lengths stay within int32.
constexpr int64_t kMaxAxis = std::numeric_limits<int32_t>::max() / 4;

// ---------------------------------------------------------------------------------------- launch

template <typename Config, bool kMakesSchedule>
ffi::Error LaunchKernel(const SparseParams& params, cudaStream_t stream) {
  const int64_t blocks = int64_t{params.decode.schedule.num_parts} * params.decode.query.row_tiles;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(blocks),
                           .block = kThreads,
                           .shared_bytes = sizeof(SharedMemoryPlan<Config>),
                           .cluster = Config::kClusterSize},
                          SparseDecodeKernel<Config, kMakesSchedule>, params);
}

// Whether two blocks form a cluster and share the tokens that they gather. They must start together
// and wait for each other, which pays only if there is much to gather. The host knows an upper
// bound of that.
bool UsesCluster(const SparseParams& params) {
  constexpr int64_t kMinTokens = 1 << 16;  // times row tiles; as in dense decode
  const int row_tiles = params.decode.query.row_tiles;
  const int64_t tokens = (int64_t{params.main.topk} + params.extra.topk) * params.decode.batch;
  return row_tiles % 2 == 0 && tokens * row_tiles > kMinTokens;
}

template <typename T, int kHeadDim, bool kMakesSchedule>
ffi::Error LaunchDecode(const SparseParams& params, cudaStream_t stream) {
  using Alone = Config<T, kHeadDim, Keys::kListed, 1>;
  using Paired = Config<T, kHeadDim, Keys::kListed, 2>;
  return UsesCluster(params) ? LaunchKernel<Paired, kMakesSchedule>(params, stream)
                             : LaunchKernel<Alone, kMakesSchedule>(params, stream);
}

template <typename T, int kHeadDim>
ffi::Error Launch(const SparseParams& params, cudaStream_t stream) {
  JAX_FLASHMLA_CHECK(params.decode.schedule.IsGiven()
                         ? (LaunchDecode<T, kHeadDim, false>(params, stream))
                         : (LaunchDecode<T, kHeadDim, true>(params, stream)));
  return LaunchCombine<T>(kOp, CombineParamsOf(params.decode), stream);
}

// ---------------------------------------------------------------------------------------- handler

// Checks a pool [num_blocks, page_block_size, 1, d_k] and the lists of its slots.
ffi::Error ReadLists(const std::string& prefix, ffi::AnyBuffer q, ffi::AnyBuffer pool,
                     I32<2> indices, I32<1> lengths, TokenLists* lists) {
  const Dims q_dims = q.dimensions(), pool_dims = pool.dimensions();
  const std::string pool_name = prefix + "k_cache";
  JAX_FLASHMLA_CHECK(CheckArgument(pool.element_type() == q.element_type(), kOp,
                                   "q and " + pool_name + " must have the same dtype"));
  JAX_FLASHMLA_CHECK(CheckArgument(pool_dims.size() == 4, kOp, pool_name + " must have rank 4"));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, pool_name.c_str(), pool_dims, {pool_dims[0], pool_dims[1], 1, q_dims[2]}));
  const int64_t topk = indices.dimensions()[1];
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, (prefix + "indices").c_str(), indices.dimensions(), {q_dims[0], topk}));
  JAX_FLASHMLA_CHECK(CheckArgument(topk >= 1 && topk <= kMaxAxis, kOp,
                                   "a list must have from 1 to " + std::to_string(kMaxAxis) +
                                       " entries, got " + std::to_string(topk)));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, (prefix + "topk_length").c_str(), lengths.dimensions(), {q_dims[0]}));
  constexpr int64_t kMaxSlots = int64_t{1} << 31;  // indices are int32
  *lists = {.pool = pool.untyped_data(),
            .slots = static_cast<uint32_t>(std::min(pool_dims[0] * pool_dims[1], kMaxSlots)),
            .indices = indices.typed_data(),
            .lengths = lengths.typed_data(),
            .topk = static_cast<int32_t>(topk)};
  return ffi::Error::Success();
}

// The operands that follow the first four, where the attributes say that they are there.
struct OptionalOperands {
  TokenLists extra{};
  AttnSink sink{};
  std::optional<ScheduleOperands> schedule;
  std::optional<I32<1>> seqlens;  // the schedule is made from these where none is given
};

struct Attributes {
  bool has_extra, has_attn_sink, has_schedule;
};

ffi::Error ReadOptionalOperands(ffi::RemainingArgs rest, const Attributes& attributes,
                                ffi::AnyBuffer q, int64_t batch, OptionalOperands* operands) {
  size_t next = 0;
  if (attributes.has_extra) {
    std::optional<ffi::AnyBuffer> pool;
    std::optional<I32<2>> indices;
    std::optional<I32<1>> lengths;
    JAX_FLASHMLA_CHECK(ReadOperand(rest, &next, &pool));
    JAX_FLASHMLA_CHECK(ReadOperand(rest, &next, &indices));
    JAX_FLASHMLA_CHECK(ReadOperand(rest, &next, &lengths));
    JAX_FLASHMLA_CHECK(ReadLists("extra_", q, *pool, *indices, *lengths, &operands->extra));
  }
  if (attributes.has_attn_sink) {
    JAX_FLASHMLA_CHECK(ReadSink(kOp, rest, &next, batch, q.dimensions()[1], &operands->sink));
  }
  if (attributes.has_schedule) {
    JAX_FLASHMLA_CHECK(ReadScheduleOperands(rest, &next, &operands->schedule));
  } else {
    JAX_FLASHMLA_CHECK(ReadOperand(rest, &next, &operands->seqlens));
    JAX_FLASHMLA_CHECK(
        CheckShape(kOp, "seqlens", operands->seqlens->dimensions(), {q.dimensions()[0]}));
  }
  return CheckArgument(rest.size() == next, kOp,
                       "must have " + std::to_string(4 + next) +
                           " operands by its attributes, got " + std::to_string(4 + rest.size()));
}

// q [lists, h_q, d_k], k_cache [num_blocks, page_block_size, 1, d_k], indices [lists, topk],
// topk_length [lists], optional operands -> out [lists, h_q, d_v], softmax_lse [b, h_q, s_q],
// scratch. There are lists = b * s_q lists.
ffi::Error SparseDecode(cudaStream_t stream, int32_t device, ffi::AnyBuffer q,
                        ffi::AnyBuffer k_cache, I32<2> indices, I32<1> topk_length,
                        ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, F32Result<3> lse,
                        ffi::Result<ffi::AnyBuffer> o_partial, F32Result<4> scale_partial,
                        F32Result<3> lse_partial, I32Result<4> flags, float softmax_scale,
                        bool has_extra, bool has_attn_sink, bool has_schedule) {
  JAX_FLASHMLA_CHECK(CheckElementType(kOp, q));
  const Dims q_dims = q.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(q_dims.size() == 3, kOp, "q must have rank 3"));
  const int64_t lists = q_dims[0], heads = q_dims[1], head_dim = q_dims[2];
  if (lists == 0) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  JAX_FLASHMLA_CHECK(CheckHeadDim(kOp, head_dim));
  JAX_FLASHMLA_CHECK(CheckScheduleInput(kOp, lists, heads));
  const int64_t batch = lse->dimensions()[0], s_q = lse->dimensions()[2];
  JAX_FLASHMLA_CHECK(CheckArgument(batch * s_q == lists, kOp, "there must be b * s_q lists"));
  SparseParams params = {
      .decode = {.query = QueryShape(1, heads, 1, s_q),
                 .schedule_input = ScheduleInput(topk_length.typed_data(), 1, 1, 1)},
      .q = q.untyped_data()};
  JAX_FLASHMLA_CHECK(ReadLists("", q, k_cache, indices, topk_length, &params.main));
  OptionalOperands optional;
  JAX_FLASHMLA_CHECK(
      ReadOptionalOperands(rest, {has_extra, has_attn_sink, has_schedule}, q, batch, &optional));
  const Scratch scratch{*o_partial, *scale_partial, *lse_partial, *flags};
  TileSchedule schedule;
  JAX_FLASHMLA_CHECK(ReadSchedule(kOp, optional.schedule, lists, scratch.NumParts(), &schedule));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "out", out->dimensions(), {lists, heads, kHeadDimV}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "softmax_lse", lse->dimensions(), {batch, heads, s_q}));
  const QueryShape query(1, heads, 1, s_q);
  JAX_FLASHMLA_CHECK(scratch.Check(kOp, query));

  const int32_t* seqlens =
      optional.seqlens ? optional.seqlens->typed_data() : topk_length.typed_data();
  params.extra = optional.extra;
  params.decode = {
      .schedule = schedule,
      .out = out->untyped_data(),
      .lse = lse->typed_data(),
      .partial = scratch.Partials(),
      .flags = {scratch.Flags(), NextFlagValue()},
      .sink = optional.sink,
      .batch = static_cast<int32_t>(lists),
      .query = query,
      .scale_log2 = softmax_scale * kLog2e,
      .causal = false,
      .schedule_input = ScheduleInput(seqlens, lists, scratch.NumParts(), heads),
  };
  // Longer lengths count as a whole list, also where the schedule is made from them as they are.
  ScheduleInput& input = params.decode.schedule_input;
  input.max_tiles = std::min(input.max_tiles, CeilDiv(params.main.topk, kTileTokens) +
                                                  CeilDiv(params.extra.topk, kTileTokens));
  const auto launch = [&]<typename T>() {
    return head_dim == kHeadDimK ? Launch<T, kHeadDimK>(params, stream)
                                 : Launch<T, kHeadDimKWithoutRope>(params, stream);
  };
  return q.element_type() == ffi::DataType::BF16 ? launch.operator()<__nv_bfloat16>()
                                                 : launch.operator()<__half>();
}

}  // namespace
}  // namespace jax_flashmla::sparse_decode

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_sparse_decode, jax_flashmla::sparse_decode::SparseDecode,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<jax_flashmla::Stream>()
                                  .Ctx<xla::ffi::DeviceOrdinal>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<jax_flashmla::I32<2>>()
                                  .Arg<jax_flashmla::I32<1>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_flashmla::F32<3>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<jax_flashmla::F32<4>>()
                                  .Ret<jax_flashmla::F32<3>>()
                                  .Ret<jax_flashmla::I32<4>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("has_extra")
                                  .Attr<bool>("has_attn_sink")
                                  .Attr<bool>("has_schedule"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
