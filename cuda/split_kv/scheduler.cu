// get_mla_metadata: the tile schedule of a batch, made once for all layers of a step.
//
// What   Integers only; schedule.cuh defines them. A decode call that is given no schedule makes
//        the same one for itself.
// Floor  One launch; 4 bytes read and 8 written per sequence, 8 written per part.
// How    One thread block. If parts are aligned, each thread writes the bounds of some parts.
//        Otherwise the thread that has a sequence writes the bounds of the parts that begin in it.
//        A scan of the split counts gives num_splits.
#include <cstdint>

#include "host/launch.h"
#include "split_kv/operands.h"
#include "split_kv/schedule.cuh"

namespace jax_flashmla::split_kv {
namespace {

constexpr int kThreads = 256;
constexpr const char* kOp = "get_mla_metadata";

using BlockScheduler = Scheduler<kThreads>;

__device__ void WriteBounds(const BlockScheduler& scheduler, const ScheduleInput& input,
                            PartBound* part_bounds) {
  if (scheduler.IsAligned()) {
    for (int p = threadIdx.x; p <= input.num_parts.value; p += kThreads) {
      part_bounds[p] = scheduler.AlignedBound(p);
    }
    return;
  }
  const int payload = scheduler.Payload();
  scheduler.ForOwnSequences([&](const PlacedSequence& placed) {
    const int end = placed.End();
    for (int p = CeilDiv(placed.begin, payload); p < input.num_parts.value && p * payload < end;
         ++p) {
      part_bounds[p] = scheduler.BoundInside(placed, p);
    }
  });
  const int empty = CeilDiv(scheduler.Total(), payload);
  for (int p = empty + threadIdx.x; p <= input.num_parts.value; p += kThreads) {
    part_bounds[p] = {input.batch, 0};
  }
}

__device__ void WriteSplits(BlockScheduler& scheduler, int32_t* first_part, int32_t* num_splits) {
  int own = 0, all;
  scheduler.ForOwnSequences(
      [&](const PlacedSequence& placed) { own += scheduler.NumSplits(placed); });
  int until = scheduler.Scan(own, &all) - own;
  scheduler.ForOwnSequences([&](const PlacedSequence& placed) {
    until += scheduler.NumSplits(placed);
    first_part[placed.sequence] = scheduler.FirstPart(placed);
    num_splits[placed.sequence + 1] = until;
  });
  if (threadIdx.x == 0) num_splits[0] = 0;
}

__global__ void __launch_bounds__(kThreads)
    TileSchedulerKernel(const __grid_constant__ ScheduleInput input, PartBound* part_bounds,
                        int32_t* first_part, int32_t* num_splits) {
  sm90::AllowNextKernel();
  sm90::WaitForPriorKernels();
  __shared__ int warp_sums[BlockScheduler::kWarps];
  BlockScheduler scheduler(input, warp_sums);
  WriteBounds(scheduler, input, part_bounds);
  WriteSplits(scheduler, first_part, num_splits);
}

ffi::Error TileScheduler(cudaStream_t stream, int32_t device, I32<1> cache_seqlens,
                         I32Result<2> part_bounds, I32Result<1> first_part, I32Result<1> num_splits,
                         int64_t rows) {
  JAX_FLASHMLA_CHECK(CheckDevice(kOp, device));
  const int64_t batch = cache_seqlens.dimensions()[0];
  const int64_t num_parts = part_bounds->dimensions()[0] - 1;
  JAX_FLASHMLA_CHECK(CheckArgument(num_parts >= 1, kOp, "there must be at least one part"));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "part_bounds", part_bounds->dimensions(), {num_parts + 1, 2}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "first_part", first_part->dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(kOp, "num_splits", num_splits->dimensions(), {batch + 1}));
  JAX_FLASHMLA_CHECK(CheckScheduleInput(kOp, batch, rows));
  const ScheduleInput input(cache_seqlens.typed_data(), batch, num_parts, rows);
  return LaunchOverlapped(kOp, stream, {.grid = 1, .block = kThreads}, TileSchedulerKernel, input,
                          reinterpret_cast<PartBound*>(part_bounds->typed_data()),
                          first_part->typed_data(), num_splits->typed_data());
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_flashmla_tile_scheduler, TileScheduler,
                              ffi::Ffi::Bind()
                                  .Ctx<Stream>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Arg<I32<1>>()
                                  .Ret<I32<2>>()
                                  .Ret<I32<1>>()
                                  .Ret<I32<1>>()
                                  .Attr<int64_t>("rows"),
                              {ffi::Traits::kCmdBufferCompatible});

}  // namespace jax_flashmla::split_kv
