// Dense decode: attention of a few queries a sequence over its paged latent cache.
//
// What: S = softmax_scale * Q K^T (64 query rows by 64 tokens by 576 columns), online softmax,
// O += P V, where V is the first 512 columns of the same K tile.
//
// Floor: max(2 * rows * tokens * (576 + 512) FLOP, tokens * 1152 bytes), by the chip's ceilings.
// A tile is 2176 clocks of tensor core per 64 rows, and 72 KB to load.
//
// Plan. One block an SM, each with one row tile (64 query rows); blocks walk the pieces (a run of
// key tiles of one request) that the tile schedule gives to their part. Four warpgroups:
//
//   load    one warp plans: reads schedule, lengths and block table. One thread loads: fills a
//           ring of shared memory with quarter tiles of V columns (11 slots of 64 x 128), rope
//           columns (64 x 64) and, at the head of a piece, its queries. Both run ahead
//           of everything else, across requests. One warp joins (below).
//   score   holds 2/3 of Q in registers, S = Q K^T, softmax, writes P.
//   value   two warpgroups, each holding O for two quarters of the 512 columns: rescale,
//           O += P V, output.
//
//   tensor cores:  | S(n+1)      | O(n)        | S(n+2)      | O(n+1)      |
//   score          | S(n+1)      | softmax n+1 | S(n+2)      | softmax n+2 |
//   value 0, 1     | rescale     | O(n)        | rescale     | O(n+1)      |
//
// The score warpgroup announces P(n) when it has issued 3/4 of S(n+1), so that the tensor cores
// always have one product queued while softmax runs, and S does not have to share them for long:
// where value multiplies too, S gets a fifth of them. If the tile of S(n+1) has not arrived yet, it
// announces P(n) at once. Keeping Q in registers makes room for 2.75 tiles in flight and takes a
// sixth off the shared-memory traffic, which would be the limit otherwise.
//
// Where there is an even number of row tiles and much to do, two blocks form a cluster, work on the
// same piece and share its tiles: each loads every other chunk and multicasts it to both.
//
// A request that is split has a partial result for each split (partial_result.cuh). Of two splits
// the first is the last piece of a part and the second the first piece of the next part, so that it
// is mostly written long before. Its block flags it in global memory; the join warp of the first
// one's block waits for that, the rows of the other split follow the last tile through the ring,
// and value adds them as it writes the result. Requests of more splits are left to the combine
// kernel: their middle parts end when all do, and there a launch costs less than a wait.
//
// Ordering. A ring of buffers has a full and an empty barrier a slot:
//   v, rope    load -> score (and value: v) -> load of both blocks of a cluster, as both write
//   q_tail     load -> score -> load
//   message    P and the row factors: score -> value -> score
//   pages      plan -> load -> plan
//   piece      plan -> load, score, value -> plan
// and for the other split, once a launch:
//   other_written  join -> load, score
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>

#include "dense_decode/accumulator.cuh"
#include "dense_decode/bounds.cuh"
#include "dense_decode/join.cuh"
#include "dense_decode/loader.cuh"
#include "dense_decode/planner.cuh"
#include "dense_decode/scorer.cuh"
#include "host/ffi.h"
#include "host/tensor_map.h"
#include "split_kv/combine.h"

namespace jax_flashmla {
namespace {

using namespace dense_decode;  // NOLINT: this file is what it is for

constexpr const char* kOp = "flash_mla_with_kvcache";
constexpr int kMinPage = 16, kMaxPage = 256;  // page_block_size

// ---------------------------------------------------------------------------------------- kernel

template <typename T, int kClusterSize>
__device__ __forceinline__ void InitBarriers(SharedMemoryPlan<T>& smem) {
  for (int i = 0; i < kValueSlots; ++i) {
    BarrierInit(&smem.v_full[i], 1);
    BarrierInit(&smem.v_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kRopeSlots; ++i) {
    BarrierInit(&smem.rope_full[i], 1);
    BarrierInit(&smem.rope_empty[i], kWarpsPerWarpgroup * kClusterSize);
  }
  for (int i = 0; i < kMessageSlots; ++i) {
    BarrierInit(&smem.message_full[i], kWarpgroupSize);
    BarrierInit(&smem.message_empty[i], kWarpgroupSize * kValueWarpgroups);
  }
  for (int i = 0; i < kPieceSlots; ++i) {
    BarrierInit(&smem.piece_full[i], 1);
    BarrierInit(&smem.piece_empty[i], 1 + kWarpgroupSize * (1 + kValueWarpgroups));
  }
  for (int i = 0; i < kPageBatches; ++i) {
    BarrierInit(&smem.pages_full[i], kWarpSize);
    BarrierInit(&smem.pages_empty[i], 1);
  }
  BarrierInit(&smem.other_written, kWarpSize);
  BarrierInit(&smem.q_full, 1);
  BarrierInit(&smem.q_empty, kWarpsPerWarpgroup);
  FenceBarrierInit();
}

template <int kClusterSize>
__device__ __forceinline__ void AwaitCluster() {
  if constexpr (kClusterSize > 1) ClusterWait();
}

template <typename T, int kClusterSize, bool kMakesSchedule>
__global__ void __launch_bounds__(kThreads, 1)
    DenseDecodeKernel(const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap k_short_map,
                      const __grid_constant__ CUtensorMap o_map,
                      const __grid_constant__ DecodeParams params) {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  auto& smem = *reinterpret_cast<SharedMemoryPlan<T>*>(shared_memory);
  if (threadIdx.x == 0) InitBarriers<T, kClusterSize>(smem);
  if (threadIdx.x == kWarpSize) {
    PrefetchTensorMap(&q_map);
    PrefetchTensorMap(&k_map);
  }
  WaitForPriorKernels();
  BlockWork work(params);
  if constexpr (kMakesSchedule) {
    MakeBounds(smem, params, work.part);
  } else {
    work.SetBounds(params.schedule.part_bounds + work.part);  // on their way while the block meets
  }
  // The other block of a cluster is not awaited here, but by each role before it first touches it.
  if constexpr (kClusterSize > 1) {
    __syncwarp();
    ClusterArrive();
  }
  __syncthreads();
  AllowNextKernel();  // behind the wait: combine counts on it
  if constexpr (kMakesSchedule) {
    work.SetBounds(smem.bounds + kOwnBegin);
  } else {
    work.KeepInside(params.batch);
  }

  const int warpgroup = WarpUniform(threadIdx.x / kWarpgroupSize);
  if (warpgroup == kLoadWarpgroup) {
    ShrinkRegisters<kLoadRegisters>();
    const int warp = WarpUniform(threadIdx.x / kWarpSize) % kWarpsPerWarpgroup;
    if (warp == kPlanWarp) {
      Planner<T, kMakesSchedule>(smem, params).Run(work);
      __syncwarp();
      AwaitCluster<kClusterSize>();
    } else if (warp == kLoadWarp) {
      Loader<T, kClusterSize> loader(smem, q_map, k_map, k_short_map, o_map, params);
      const bool elected = IsElected();
      if (elected) loader.LoadFirstQueries(work);
      __syncwarp();
      AwaitCluster<kClusterSize>();
      if (elected) loader.Run(work);
    } else {
      AwaitCluster<kClusterSize>();
      if (warp == kJoinWarp) Joiner<T, kMakesSchedule>(smem, params).Run(work);
    }
    __syncwarp();
  } else if (warpgroup == kScoreWarpgroup) {
    GrowRegisters<kScoreRegisters>();
    AwaitCluster<kClusterSize>();
    Scorer<T, kClusterSize>(smem, params).Run(work);
  } else {
    GrowRegisters<kValueRegisters>();
    AwaitCluster<kClusterSize>();
    ValueAccumulator<T, kClusterSize>(smem, params, warpgroup).Run(work);
  }
  // No block of a cluster may leave while another one still writes to its memory.
  if constexpr (kClusterSize > 1) ClusterArrive();
  AwaitCluster<kClusterSize>();
}

// The tensor maps of the operands and of the partial results.
struct DecodeMaps {
  CUtensorMap q, k, k_short, o_partial;
};

template <typename T, int kClusterSize, bool kMakesSchedule>
ffi::Error LaunchKernel(const DecodeMaps& maps, const DecodeParams& params, cudaStream_t stream) {
  const int64_t blocks =
      int64_t{params.schedule.num_parts} * params.num_kv_heads * params.row_tiles;
  JAX_FLASHMLA_CHECK(CheckGrid(kOp, blocks));
  return LaunchOverlapped(kOp, stream,
                          {.grid = dim3(blocks),
                           .block = kThreads,
                           .shared_bytes = sizeof(SharedMemoryPlan<T>),
                           .cluster = kClusterSize},
                          DenseDecodeKernel<T, kClusterSize, kMakesSchedule>, maps.q, maps.k,
                          maps.k_short, maps.o_partial, params);
}

// Whether two blocks share pages. They must start together and wait for each other, which pays when
// there is enough to read. What there is at most, the table tells.
bool SharesPages(const DecodeParams& params) {
  constexpr int64_t kLeastTokens = 1 << 16;  // times row tiles; measured on an H200
  const int64_t tokens = (int64_t{params.max_blocks} << params.page_shift) * params.batch;
  return params.row_tiles % 2 == 0 && tokens * params.row_tiles > kLeastTokens;
}

template <typename T, bool kMakesSchedule>
ffi::Error LaunchDecode(const DecodeMaps& maps, const DecodeParams& params, cudaStream_t stream) {
  return SharesPages(params) ? LaunchKernel<T, 2, kMakesSchedule>(maps, params, stream)
                             : LaunchKernel<T, 1, kMakesSchedule>(maps, params, stream);
}

template <typename T>
ffi::Error Launch(const DecodeMaps& maps, const DecodeParams& params, cudaStream_t stream) {
  JAX_FLASHMLA_CHECK(params.schedule.IsGiven() ? (LaunchDecode<T, false>(maps, params, stream))
                                               : (LaunchDecode<T, true>(maps, params, stream)));
  return LaunchCombine<T>({.schedule = params.schedule,
                           .partial = params.partial,
                           .out = params.out,
                           .lse = params.lse,
                           .batch = params.batch,
                           .num_kv_heads = params.num_kv_heads,
                           .rows = params.rows,
                           .group = params.group,
                           .s_q = params.s_q,
                           .schedule_input = params.schedule_input},
                          stream);
}

// --------------------------------------------------------------------------------------- handler

// Another value in each call, from a random one on. A captured call is replayed with its own.
Flag NextFlagValue() {
  static const auto seed = [] {
    std::random_device random;
    return Flag{random()} << 32 | random();
  }();
  static std::atomic<Flag> calls{0};
  // Of the increments of SplitMix64 (Steele et al., 2014): odd, so that no value comes back soon.
  const Flag value = seed + 0x9e3779b97f4a7c15u * ++calls;
  return value != 0 ? value : NextFlagValue();
}

// The blocks that load keys where parts are aligned to the requests; otherwise a few more do. Each
// part has `blocks`.
int32_t LoadingBlocks(const ScheduleInput& input, int64_t blocks) {
  if (input.num_parts.value * blocks > kSms) return 0;
  return static_cast<int32_t>(input.aligned_runs * input.aligned_splits.value * blocks);
}

// Tensor maps of q [b, h_kv, rows, d_k], k_cache [num_blocks, page_block_size, h_kv, d_k] and
// o_partial [2 * num_parts, h_kv, rows, d_v].
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
  if (k_shape[3] == 0) {  // an empty pool: every page is outside of it, and nothing is read
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

ffi::Error CheckOperands(ffi::AnyBuffer q, ffi::AnyBuffer k_cache) {
  JAX_FLASHMLA_CHECK(CheckArgument(
      q.element_type() == ffi::DataType::BF16 || q.element_type() == ffi::DataType::F16, kOp,
      "q must be bf16 or fp16"));
  JAX_FLASHMLA_CHECK(CheckArgument(q.element_type() == k_cache.element_type(), kOp,
                                   "q and k_cache must have one dtype"));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  JAX_FLASHMLA_CHECK(CheckArgument(q_dims.size() == 4 && k_dims.size() == 4, kOp,
                                   "q and k_cache must have rank 4"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "q", q_dims, {q_dims[0], k_dims[2], q_dims[2], kHeadDimK}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "k_cache", k_dims, {k_dims[0], k_dims[1], k_dims[2], kHeadDimK}));
  const int64_t page = k_dims[1];
  JAX_FLASHMLA_CHECK(
      CheckArgument(page >= kMinPage && page <= kMaxPage && (page & (page - 1)) == 0, kOp,
                    "page_block_size must be 16, 32, 64, 128 or 256, got " + std::to_string(page)));
  const int64_t largest = std::max({q_dims[0], q_dims[2], k_dims[0]});
  return CheckArgument(largest <= std::numeric_limits<int32_t>::max() / 2, kOp,
                       "an axis of q or k_cache is too long: " + std::to_string(largest));
}

struct GivenSchedule {
  I32<2> part_bounds;
  I32<1> first_part, num_splits;
};

// The schedule of `num_parts` parts that a call is given, null where it is given none.
ffi::Error ReadSchedule(std::optional<GivenSchedule> given, int64_t batch, int64_t num_parts,
                        TileSchedule* schedule) {
  JAX_FLASHMLA_CHECK(CheckArgument(num_parts >= 1, kOp, "there must be an SM part"));
  *schedule = {.num_parts = static_cast<int32_t>(num_parts)};
  if (!given) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "part_bounds", given->part_bounds.dimensions(), {num_parts + 1, 2}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "first_part", given->first_part.dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "num_splits", given->num_splits.dimensions(), {batch + 1}));
  schedule->part_bounds = reinterpret_cast<const PartBound*>(given->part_bounds.typed_data());
  schedule->first_part = given->first_part.typed_data();
  schedule->num_splits = given->num_splits.typed_data();
  return ffi::Error::Success();
}

ffi::Error Decode(cudaStream_t stream, int32_t device, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                  I32<2> block_table, I32<1> cache_seqlens, std::optional<GivenSchedule> given,
                  std::optional<I32<1>> causal_offset, ffi::Result<ffi::AnyBuffer> out,
                  F32Result<3> lse, ffi::Result<ffi::AnyBuffer> o_partial,
                  F32Result<4> scale_partial, F32Result<3> lse_partial, I32Result<4> flags,
                  float softmax_scale, bool causal) {
  JAX_FLASHMLA_CHECK(CheckOperands(q, k_cache));
  const Dims q_dims = q.dimensions(), k_dims = k_cache.dimensions();
  const int64_t batch = q_dims[0], kv_heads = q_dims[1], rows = q_dims[2];
  if (batch == 0) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  const int64_t num_parts = flags->dimensions()[0];
  const int64_t max_blocks = block_table.dimensions()[1], s_q = lse->dimensions()[2];
  TileSchedule schedule;
  JAX_FLASHMLA_CHECK(ReadSchedule(given, batch, num_parts, &schedule));
  if (!given) JAX_FLASHMLA_CHECK(CheckScheduleInput(kOp, batch, kv_heads * rows));
  JAX_FLASHMLA_CHECK(
      CheckArgument(s_q >= 1 && rows % s_q == 0, kOp, "the rows of q must be a multiple of s_q"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "block_table", block_table.dimensions(), {batch, max_blocks}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "cache_seqlens", cache_seqlens.dimensions(), {batch}));
  if (causal_offset) {
    JAX_FLASHMLA_CHECK(CheckShape(kOp, "causal_offset", causal_offset->dimensions(), {batch}));
  }
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "out", out->dimensions(), {batch, kv_heads, rows, kHeadDimV}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "softmax_lse", lse->dimensions(), {batch, kv_heads * (rows / s_q), s_q}));
  constexpr int64_t kFlagWords = kFlagsPerTile * sizeof(Flag) / sizeof(int32_t);
  const int64_t row_tiles = CeilDiv<int64_t>(rows, kTileRows);
  JAX_FLASHMLA_CHECK(CheckArgument(o_partial->element_type() == ffi::DataType::F16, kOp,
                                   "o_partial must be fp16"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "o_partial", o_partial->dimensions(),
                                {2 * num_parts, kv_heads, rows, kHeadDimV}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "scale_partial", scale_partial->dimensions(),
                                {2 * num_parts, kv_heads, kQuarters, rows}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "lse_partial", lse_partial->dimensions(), {2 * num_parts, kv_heads, rows}));
  JAX_FLASHMLA_CHECK(
      CheckShape(kOp, "flags", flags->dimensions(), {num_parts, kv_heads, row_tiles, kFlagWords}));

  DecodeMaps maps;
  JAX_FLASHMLA_CHECK(EncodeMaps(q, k_cache, *o_partial, &maps));
  const ScheduleInput schedule_input(cache_seqlens.typed_data(), batch, num_parts, kv_heads * rows);
  const DecodeParams params = {
      .block_table = block_table.typed_data(),
      .cache_seqlens = cache_seqlens.typed_data(),
      .causal_offset = causal_offset ? causal_offset->typed_data() : nullptr,
      .schedule = schedule,
      .out = out->untyped_data(),
      .lse = lse->typed_data(),
      .partial = {.o = static_cast<__half*>(o_partial->untyped_data()),
                  .scale = scale_partial->typed_data(),
                  .lse = lse_partial->typed_data()},
      .flags = reinterpret_cast<Flag*>(flags->typed_data()),
      .flag_value = NextFlagValue(),
      // No flag of the first part is used, as it begins with no second split.
      .progress = reinterpret_cast<uint32_t*>(flags->typed_data()),
      .loading_blocks = LoadingBlocks(schedule_input, kv_heads * row_tiles),
      .batch = static_cast<int32_t>(batch),
      .num_kv_heads = static_cast<int32_t>(kv_heads),
      .rows = static_cast<int32_t>(rows),
      .group = static_cast<int32_t>(rows / s_q),
      .s_q = static_cast<int32_t>(s_q),
      .row_tiles = static_cast<int32_t>(row_tiles),
      .num_blocks = static_cast<int32_t>(k_dims[0]),
      .max_blocks = static_cast<int32_t>(max_blocks),
      .page_shift = std::countr_zero(static_cast<uint64_t>(k_dims[1])),
      .scale_log2 = softmax_scale * kLog2e,
      .causal = causal,
      .schedule_input = schedule_input,
  };
  return q.element_type() == ffi::DataType::BF16 ? Launch<__nv_bfloat16>(maps, params, stream)
                                                 : Launch<__half>(maps, params, stream);
}

ffi::Error DenseDecodeImpl(cudaStream_t stream, int32_t device, ffi::AnyBuffer q,
                           ffi::AnyBuffer k_cache, I32<2> block_table, I32<1> cache_seqlens,
                           I32<2> part_bounds, I32<1> first_part, I32<1> num_splits,
                           std::optional<I32<1>> causal_offset, ffi::Result<ffi::AnyBuffer> out,
                           F32Result<3> lse, ffi::Result<ffi::AnyBuffer> o_partial,
                           F32Result<4> scale_partial, F32Result<3> lse_partial, I32Result<4> flags,
                           float softmax_scale, bool causal) {
  return Decode(stream, device, q, k_cache, block_table, cache_seqlens,
                GivenSchedule{part_bounds, first_part, num_splits}, causal_offset, out, lse,
                o_partial, scale_partial, lse_partial, flags, softmax_scale, causal);
}

ffi::Error ScheduleAndDecodeImpl(cudaStream_t stream, int32_t device, ffi::AnyBuffer q,
                                 ffi::AnyBuffer k_cache, I32<2> block_table, I32<1> cache_seqlens,
                                 std::optional<I32<1>> causal_offset,
                                 ffi::Result<ffi::AnyBuffer> out, F32Result<3> lse,
                                 ffi::Result<ffi::AnyBuffer> o_partial, F32Result<4> scale_partial,
                                 F32Result<3> lse_partial, I32Result<4> flags, float softmax_scale,
                                 bool causal) {
  return Decode(stream, device, q, k_cache, block_table, cache_seqlens, std::nullopt, causal_offset,
                out, lse, o_partial, scale_partial, lse_partial, flags, softmax_scale, causal);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_dense_decode, DenseDecodeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32<2>>()
                                  .Arg<I32<1>>()
                                  .Arg<I32<2>>()
                                  .Arg<I32<1>>()
                                  .Arg<I32<1>>()
                                  .OptionalArg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<3>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<4>>()
                                  .Ret<F32<3>>()
                                  .Ret<I32<4>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_schedule_and_decode, ScheduleAndDecodeImpl,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<I32<2>>()
                                  .Arg<I32<1>>()
                                  .OptionalArg<I32<1>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<3>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32<4>>()
                                  .Ret<F32<3>>()
                                  .Ret<I32<4>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla
