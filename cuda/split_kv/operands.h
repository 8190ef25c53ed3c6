// Host side of a split decode: the operands of its FFI call that every such op has in common.
#pragma once

#include <atomic>
#include <limits>
#include <optional>
#include <random>
#include <string>

#include "host/ffi.h"
#include "split_kv/work.cuh"

namespace jax_flashmla::split_kv {

// The schedule that a call may be given.
struct ScheduleOperands {
  I32<2> part_bounds;             // [num_parts + 1, 2]
  I32<1> first_part, num_splits;  // [batch], [batch + 1]
};

// Success if a schedule can be made for this batch and these query rows, else an error.
inline ffi::Error CheckScheduleInput(const char* op, int64_t batch, int64_t rows) {
  constexpr int64_t kMaxBatch = 1 << 24, kMaxRows = std::numeric_limits<int32_t>::max() / 2;
  JAX_FLASHMLA_CHECK(CheckArgument(batch >= 1 && batch <= kMaxBatch, op,
                                   "the batch must be from 1 to " + std::to_string(kMaxBatch) +
                                       ", got " + std::to_string(batch)));
  return CheckArgument(rows >= 1 && rows <= kMaxRows, op,
                       "the query rows of a sequence must be from 1 to " +
                           std::to_string(kMaxRows) + ", got " + std::to_string(rows));
}

// Checks the schedule, and sets it to null if the call was given none.
inline ffi::Error ReadSchedule(const char* op, const std::optional<ScheduleOperands>& given,
                               int64_t batch, int64_t num_parts, TileSchedule* schedule) {
  JAX_FLASHMLA_CHECK(CheckArgument(num_parts >= 1, op, "there must be at least one part"));
  *schedule = {.num_parts = static_cast<int32_t>(num_parts)};
  if (!given) return ffi::Error::Success();
  JAX_FLASHMLA_CHECK(
      CheckShape(op, "part_bounds", given->part_bounds.dimensions(), {num_parts + 1, 2}));
  JAX_FLASHMLA_CHECK(CheckShape(op, "first_part", given->first_part.dimensions(), {batch}));
  JAX_FLASHMLA_CHECK(CheckShape(op, "num_splits", given->num_splits.dimensions(), {batch + 1}));
  schedule->part_bounds = reinterpret_cast<const PartBound*>(given->part_bounds.typed_data());
  schedule->first_part = given->first_part.typed_data();
  schedule->num_splits = given->num_splits.typed_data();
  return ffi::Error::Success();
}

// The scratch of a call: results that the Python side drops. Partial results, their scales and
// log-sum-exps, and the flags, which also tell the number of parts.
struct Scratch {
  ffi::AnyBuffer o;  // fp16 [2 * num_parts, h_kv, rows, d_v]
  F32<4> scale;      // [2 * num_parts, h_kv, 4, rows]
  F32<3> lse;        // [2 * num_parts, h_kv, rows]
  I32<4> flags;      // [num_parts, h_kv, row_tiles, 2 * kFlagsPerRowTile]

  int64_t NumParts() const { return flags.dimensions()[0]; }

  ffi::Error Check(const char* op, const QueryShape& query) const {
    constexpr int64_t kFlagWords = kFlagsPerRowTile * sizeof(Flag) / sizeof(int32_t);
    const int64_t partials = kPartialsPerPart * NumParts();
    const int64_t kv_heads = query.num_kv_heads, rows = query.rows;
    JAX_FLASHMLA_CHECK(
        CheckArgument(o.element_type() == ffi::DataType::F16, op, "o_partial must be fp16"));
    JAX_FLASHMLA_CHECK(
        CheckShape(op, "o_partial", o.dimensions(), {partials, kv_heads, rows, kHeadDimV}));
    JAX_FLASHMLA_CHECK(
        CheckShape(op, "scale_partial", scale.dimensions(), {partials, kv_heads, kQuarters, rows}));
    JAX_FLASHMLA_CHECK(CheckShape(op, "lse_partial", lse.dimensions(), {partials, kv_heads, rows}));
    return CheckShape(op, "flags", flags.dimensions(),
                      {NumParts(), kv_heads, query.row_tiles, kFlagWords});
  }

  PartialResults Partials() const {
    return {static_cast<__half*>(o.untyped_data()), scale.typed_data(), lse.typed_data()};
  }
  Flag* Flags() const { return reinterpret_cast<Flag*>(flags.typed_data()); }
  uint32_t* Progress() const { return reinterpret_cast<uint32_t*>(Flags() + kProgressWord); }
};

// A value that is different in every call, starting from a random one. A call captured in a CUDA
// graph is replayed with the value that it was captured with.
inline Flag NextFlagValue() {
  static const auto seed = [] {
    std::random_device random;
    return Flag{random()} << 32 | random();
  }();
  static std::atomic<Flag> calls{0};
  // The increment of SplitMix64 (Steele et al., 2014) is odd, so a value comes
  // back after 2^64 calls.
  const Flag value = seed + 0x9e3779b97f4a7c15u * ++calls;
  return value != 0 ? value : NextFlagValue();
}

}  // namespace jax_flashmla::split_kv
