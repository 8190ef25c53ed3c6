// Host side of a decode kernel: the operands of its FFI call that dense and sparse decode have in
// common.
#pragma once

#include "decode/block.cuh"
#include "split_kv/combine.h"
#include "split_kv/operands.h"

namespace jax_flashmla::decode {

inline CombineParams CombineParamsOf(const DecodeParams& params) {
  return {.schedule = params.schedule,
          .partial = params.partial,
          .out = params.out,
          .lse = params.lse,
          .batch = params.batch,
          .query = params.query,
          .sink = params.sink,
          .schedule_input = params.schedule_input};
}

inline ffi::Error CheckElementType(const char* op, ffi::AnyBuffer q) {
  const ffi::DataType type = q.element_type();
  return CheckArgument(type == ffi::DataType::BF16 || type == ffi::DataType::F16, op,
                       "q must be bf16 or fp16");
}

// Whether the kernels know this d_k.
inline ffi::Error CheckHeadDim(const char* op, int64_t head_dim) {
  return CheckArgument(head_dim == kHeadDimK || head_dim == kHeadDimKWithoutRope, op,
                       "d_k must be " + std::to_string(kHeadDimK) + " or " +
                           std::to_string(kHeadDimKWithoutRope) + ", got " +
                           std::to_string(head_dim));
}

// The next operand after those that every call has, or an error if it has another type or rank.
template <typename Buffer>
ffi::Error ReadOperand(ffi::RemainingArgs rest, size_t* next, std::optional<Buffer>* operand) {
  const auto read = rest.get<Buffer>((*next)++);
  if (read.has_error()) return read.error();
  *operand = read.value();
  return ffi::Error::Success();
}

// Reads the three arrays of a schedule.
inline ffi::Error ReadScheduleOperands(ffi::RemainingArgs rest, size_t* next,
                                       std::optional<ScheduleOperands>* schedule) {
  std::optional<I32<2>> part_bounds;
  std::optional<I32<1>> first_part, num_splits;
  JAX_FLASHMLA_CHECK(ReadOperand(rest, next, &part_bounds));
  JAX_FLASHMLA_CHECK(ReadOperand(rest, next, &first_part));
  JAX_FLASHMLA_CHECK(ReadOperand(rest, next, &num_splits));
  *schedule = {*part_bounds, *first_part, *num_splits};
  return ffi::Error::Success();
}

// Reads attn_sink [1, heads], or [batch, heads] if each sequence of the batch has its own.
inline ffi::Error ReadSink(const char* op, ffi::RemainingArgs rest, size_t* next, int64_t batch,
                           int64_t heads, AttnSink* sink) {
  std::optional<F32<2>> operand;
  JAX_FLASHMLA_CHECK(ReadOperand(rest, next, &operand));
  const int64_t rows = operand->dimensions()[0];
  JAX_FLASHMLA_CHECK(
      CheckShape(op, "attn_sink", operand->dimensions(), {rows == 1 ? int64_t{1} : batch, heads}));
  *sink = {operand->typed_data(), rows == 1 ? 0 : static_cast<int32_t>(heads)};
  return ffi::Error::Success();
}

}  // namespace jax_flashmla::decode
