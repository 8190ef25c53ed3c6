// The FFI handlers of dense decode: they check the operands and launch decode and combine.
#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "decode/operands.h"
#include "dense_decode/kernel.cuh"
#include "host/launch.h"
#include "host/tensor_map.h"

namespace jax_flashmla::dense_decode {
namespace {

constexpr const char* kOp = "flash_mla_with_kvcache";
constexpr int kMinPage = 16, kMaxPage = 256;  // page_block_size

// ---------------------------------------------------------------------------------------- launch

// The tensor maps of the operands and of the partial results.
struct DecodeMaps {
  CUtensorMap q, k, k_short, o_partial;
};

template <typename Config, bool kMakesSchedule>
ffi::Error LaunchKernel(const DecodeMaps& maps, const DenseParams& params, cudaStream_t stream) {
  const QueryShape& query = params.decode.query;
  const int64_t blocks =
      int64_t{params.decode.schedule.num_parts} * query.num_kv_heads * query.row_tiles;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(blocks),
                           .block = kThreads,
                           .shared_bytes = sizeof(SharedMemoryPlan<Config>),
                           .cluster = Config::kClusterSize},
                          DenseDecodeKernel<Config, kMakesSchedule>, maps.q, maps.k, maps.k_short,
                          maps.o_partial, params);
}

// Whether two blocks form a cluster and share their pages. They must start together and wait for
// each other, which pays only if there is much to read. The host knows just an upper bound of that:
// the size of the block table.
bool UsesCluster(const DenseParams& params) {
  constexpr int64_t kMinTokens = 1 << 16;  // times row tiles; measured on an H200
  const PageTable& table = params.table;
  const int row_tiles = params.decode.query.row_tiles;
  const int64_t tokens = (int64_t{table.max_pages} << table.page_shift) * params.decode.batch;
  return row_tiles % 2 == 0 && tokens * row_tiles > kMinTokens;
}

template <typename T, int kHeadDim, bool kMakesSchedule>
ffi::Error LaunchDecode(const DecodeMaps& maps, const DenseParams& params, cudaStream_t stream) {
  using Alone = Config<T, kHeadDim, Keys::kPaged, 1>;
  using Paired = Config<T, kHeadDim, Keys::kPaged, 2>;
  return UsesCluster(params) ? LaunchKernel<Paired, kMakesSchedule>(maps, params, stream)
                             : LaunchKernel<Alone, kMakesSchedule>(maps, params, stream);
}

template <typename T, int kHeadDim>
ffi::Error Launch(const DecodeMaps& maps, const DenseParams& params, cudaStream_t stream) {
  JAX_FLASHMLA_CHECK(params.decode.schedule.IsGiven()
                         ? (LaunchDecode<T, kHeadDim, false>(maps, params, stream))
                         : (LaunchDecode<T, kHeadDim, true>(maps, params, stream)));
  return LaunchCombine<T>(kOp, CombineParamsOf(params.decode), stream);
}

// About how many blocks load keys, by which their loaders set their pace. It is exact if parts are
// aligned to the sequences and none is empty. 0 if not all blocks of the launch run at once.
int32_t LoadingBlocks(const ScheduleInput& input, const QueryShape& query) {
  const int64_t blocks_of_part = int64_t{query.num_kv_heads} * query.row_tiles;
  if (input.num_parts.value * blocks_of_part > kSms) return 0;
  return static_cast<int32_t>(input.aligned_runs * input.aligned_splits.value * blocks_of_part);
}

// The tensor maps of q [b, h_kv, rows, d_k], of k_cache [num_blocks, page_block_size, h_kv, d_k]
// and of o_partial [2 * num_parts, h_kv, rows, d_v].
ffi::Error EncodeMaps(ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer o_partial,
                      DecodeMaps* maps) {
  const auto type = q.element_type() == ffi::DataType::BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                            : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto shape = [](Dims dims) {
    return std::array<uint64_t, 4>{static_cast<uint64_t>(dims[3]), static_cast<uint64_t>(dims[2]),
                                   static_cast<uint64_t>(dims[1]), static_cast<uint64_t>(dims[0])};
  };
  const auto encode_rows = [&](ffi::AnyBuffer rows, CUtensorMapDataType rows_type,
                               CUtensorMap* map) {
    return EncodeTensorMap({.data = rows.untyped_data(),
                            .type = rows_type,
                            .shape = shape(rows.dimensions()),
                            .box = {kChunkColumns, kTileRows, 1, 1}},
                           map);
  };
  JAX_FLASHMLA_CHECK(encode_rows(q, type, &maps->q));
  JAX_FLASHMLA_CHECK(encode_rows(o_partial, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, &maps->o_partial));
  std::array<uint64_t, 4> k_shape = shape(k_cache.dimensions());
  const void* k_data = k_cache.untyped_data();
  if (k_shape[3] == 0) {  // an empty pool: every page id is outside it, and nothing is read
    k_shape[3] = 1;
    k_data = q.untyped_data();
  }
  const auto encode_keys = [&](uint32_t tokens, CUtensorMap* map) {
    return EncodeTensorMap(
        {.data = k_data, .type = type, .shape = k_shape, .box = {kChunkColumns, 1, tokens, 1}},
        map);
  };
  const auto page = static_cast<uint32_t>(std::min<uint64_t>(k_shape[2], kTileTokens));
  JAX_FLASHMLA_CHECK(encode_keys(page, &maps->k));
  return encode_keys(kShortBoxTokens, &maps->k_short);
}

// ---------------------------------------------------------------------------------------- handler

ffi::Error CheckOperands(ffi::AnyBuffer q, ffi::AnyBuffer k_cache) {
  JAX_FLASHMLA_CHECK(CheckElementType(kOp, q));
  JAX_FLASHMLA_CHECK(CheckArgument(q.element_type() == k_cache.element_type(), kOp,
                                   "q and k_cache must have the same dtype"));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(q_dims.size() == 4 && k_dims.size() == 4, kOp,
                                   "q and k_cache must have rank 4"));
  JAX_FLASHMLA_CHECK(CheckHeadDim(kOp, q_dims[3]));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "q", q_dims, {q_dims[0], k_dims[2], q_dims[2], q_dims[3]}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "k_cache", k_dims, {k_dims[0], k_dims[1], k_dims[2], q_dims[3]}));
  const int64_t page = k_dims[1];
  JAX_FLASHMLA_CHECK(
      CheckArgument(page >= kMinPage && page <= kMaxPage && (page & (page - 1)) == 0, kOp,
                    "page_block_size must be 16, 32, 64, 128 or 256, got " + std::to_string(page)));
  const int64_t largest = std::max({q_dims[0], q_dims[2], k_dims[0]});
  return CheckArgument(largest <= std::numeric_limits<int32_t>::max() / 2, kOp,
                       "an axis of q or k_cache is too long: " + std::to_string(largest));
}

// What may follow the first four operands: the three arrays of a schedule, causal_offset,
// attn_sink.
struct OptionalOperands {
  std::optional<ScheduleOperands> schedule;
  std::optional<I32<1>> causal_offset;
  AttnSink sink{};
};

// `has_sink` says whether the last operand is attn_sink. The number of the others tells which they
// are.
ffi::Error ReadOptionalOperands(ffi::RemainingArgs rest, bool has_sink, int64_t batch,
                                int64_t heads, OptionalOperands* operands) {
  size_t next = 0;
  const size_t others = rest.size() - std::min<size_t>(rest.size(), has_sink ? 1 : 0);
  if (others >= 3) JAX_FLASHMLA_CHECK(ReadScheduleOperands(rest, &next, &operands->schedule));
  if (others > next) JAX_FLASHMLA_CHECK(ReadOperand(rest, &next, &operands->causal_offset));
  if (has_sink) {
    JAX_FLASHMLA_CHECK(ReadSink(kOp, rest, &next, batch, heads, &operands->sink));
  }
  return CheckArgument(
      rest.size() == next, kOp,
      "must have 4 operands, or 7 with a schedule, one more with causal_offset and one more with "
      "attn_sink, got " +
          std::to_string(4 + rest.size()));
}

// The attributes of a call. has_attn_sink is there only where it is true.
struct Attributes {
  float softmax_scale;
  bool causal, has_attn_sink;
};

ffi::Error ReadAttributes(const ffi::Dictionary& given, Attributes* attributes) {
  const auto softmax_scale = given.get<float>("softmax_scale");
  if (softmax_scale.has_error()) return softmax_scale.error();
  const auto causal = given.get<bool>("causal");
  if (causal.has_error()) return causal.error();
  *attributes = {*softmax_scale, *causal, given.contains("has_attn_sink")};
  return ffi::Error::Success();
}

// q [b, h_kv, rows, d_k], k_cache [num_blocks, page_block_size, h_kv, d_k], block_table
// [b, max_blocks], cache_seqlens [b], optional operands -> out [b, h_kv, rows, d_v],
// softmax_lse [b, h_q, s_q], scratch
ffi::Error DenseDecode(cudaStream_t stream, int32_t device, ffi::AnyBuffer q,
                       ffi::AnyBuffer k_cache, I32<2> block_table, I32<1> cache_seqlens,
                       ffi::RemainingArgs rest, ffi::Result<ffi::AnyBuffer> out, F32Result<3> lse,
                       ffi::Result<ffi::AnyBuffer> o_partial, F32Result<4> scale_partial,
                       F32Result<3> lse_partial, I32Result<4> flags, const ffi::Dictionary& given) {
  JAX_FLASHMLA_CHECK(CheckOperands(q, k_cache));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  const int64_t batch = q_dims[0], kv_heads = q_dims[1], rows = q_dims[2];
  if (batch == 0) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  const int64_t max_blocks = block_table.dimensions()[1], s_q = lse->dimensions()[2];
  JAX_FLASHMLA_CHECK(
      CheckArgument(s_q >= 1 && rows % s_q == 0, kOp, "the rows of q must be a multiple of s_q"));
  const QueryShape query(kv_heads, rows, s_q);
  Attributes attributes;
  JAX_FLASHMLA_CHECK(ReadAttributes(given, &attributes));
  const Scratch scratch{*o_partial, *scale_partial, *lse_partial, *flags};
  OptionalOperands optional;
  JAX_FLASHMLA_CHECK(ReadOptionalOperands(rest, attributes.has_attn_sink, batch,
                                          kv_heads * query.group, &optional));
  TileSchedule schedule;
  JAX_FLASHMLA_CHECK(ReadSchedule(kOp, optional.schedule, batch, scratch.NumParts(), &schedule));
  if (!schedule.IsGiven()) JAX_FLASHMLA_CHECK(CheckScheduleInput(kOp, batch, kv_heads * rows));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "block_table", block_table.dimensions(), {batch, max_blocks}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "cache_seqlens", cache_seqlens.dimensions(), {batch}));
  if (optional.causal_offset) {
    JAX_FLASHMLA_CHECK(
        CheckShape(kOp, "causal_offset", optional.causal_offset->dimensions(), {batch}));
  }
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "out", out->dimensions(), {batch, kv_heads, rows, kHeadDimV}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "softmax_lse", lse->dimensions(), {batch, kv_heads * query.group, s_q}));
  JAX_FLASHMLA_CHECK(scratch.Check(kOp, query));

  DecodeMaps maps;
  JAX_FLASHMLA_CHECK(EncodeMaps(q, k_cache, *o_partial, &maps));
  const ScheduleInput schedule_input(cache_seqlens.typed_data(), batch, scratch.NumParts(),
                                     kv_heads * rows);
  const DenseParams params = {
      .decode = {.schedule = schedule,
                 .out = out->untyped_data(),
                 .lse = lse->typed_data(),
                 .partial = scratch.Partials(),
                 .flags = {scratch.Flags(), NextFlagValue()},
                 .sink = optional.sink,
                 .batch = static_cast<int32_t>(batch),
                 .query = query,
                 .scale_log2 = attributes.softmax_scale * kLog2e,
                 .causal = attributes.causal,
                 .schedule_input = schedule_input},
      .table = {.block_table = block_table.typed_data(),
                .num_pages = static_cast<int32_t>(k_dims[0]),
                .max_pages = static_cast<int32_t>(max_blocks),
                .page_shift = std::countr_zero(static_cast<uint64_t>(k_dims[1]))},
      .cache_seqlens = cache_seqlens.typed_data(),
      .causal_offset = optional.causal_offset ? optional.causal_offset->typed_data() : nullptr,
      .progress = scratch.Progress(),
      .loading_blocks = LoadingBlocks(schedule_input, query),
  };
  const auto launch = [&]<typename T>() {
    return q_dims[3] == kHeadDimK ? Launch<T, kHeadDimK>(maps, params, stream)
                                  : Launch<T, kHeadDimKWithoutRope>(maps, params, stream);
  };
  return q.element_type() == ffi::DataType::BF16 ? launch.operator()<__nv_bfloat16>()
                                                 : launch.operator()<__half>();
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<Stream>()
      .Ctx<ffi::DeviceOrdinal>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<I32<2>>()
      .Arg<I32<1>>()
      .RemainingArgs()
      .Ret<ffi::AnyBuffer>()
      .Ret<F32<3>>()
      .Ret<ffi::AnyBuffer>()
      .Ret<F32<4>>()
      .Ret<F32<3>>()
      .Ret<I32<4>>()
      .Attrs();
}

}  // namespace
}  // namespace jax_flashmla::dense_decode

// Two names for one handler: a program shows by the name whether the call was given a schedule.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_dense_decode, jax_flashmla::dense_decode::DenseDecode,
                              jax_flashmla::dense_decode::Binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_schedule_and_decode,
                              jax_flashmla::dense_decode::DenseDecode,
                              jax_flashmla::dense_decode::Binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
