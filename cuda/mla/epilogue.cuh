// The epilogue of attention: rows of O from accumulator fragments to global memory.
//
// A warpgroup holds some quarters (128 columns) of O for 64 rows, unnormalised. Writing a row means
// to multiply it by a factor, to round it and to store it. There are three forms:
//   WriteRows          the result
//   AddAndWriteQuarter the sum of this result and another one, given in shared memory
//   WriteHalfRows      a partial result: fp16 elements, with a scale for each quarter of a row
//
// A factor of exactly 0 means "this row sees no key: write 0, whatever O holds". O may hold NaN
// there, and 0 * NaN is NaN.
#pragma once

#include <cuda_fp16.h>

#include "mla/shapes.cuh"
#include "sm90/pipeline.cuh"

namespace jax_flashmla {

// The two powers of 2 that bring elements of up to `largest` near the upper end of fp16's
// range and back. The largest element lands in [2^14, 2^15), so elements down to 2^-28 of it
// stay normal fp16 numbers.
struct HalfScale {
  float to_half, from_half;

  __device__ __forceinline__ explicit HalfScale(float largest) {
    // 2^14 <= largest * to_half < 2^15, unless `largest` is so small that a scale
    // would be no normal number.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);  // biased by 127
    to_half = __uint_as_float((127 + 14 + 127 - exponent) << 23);
    from_half = __uint_as_float((exponent - 14) << 23);
  }
};

// One warpgroup's `kOwnQuarters` quarters of O. The quarters are first_quarter, and every
// (kQuarters / kOwnQuarters)th after it. All pointers to rows point to this thread's first row; its
// other row is 8 rows further. Only rows below `end_row` are written.
template <typename T, int kOwnQuarters>
class Epilogue {
 public:
  static constexpr int kAccumulators = kTileRows * kQuarterColumns / sm90::kWarpgroupSize;

  __device__ __forceinline__ Epilogue(const float (&o)[kOwnQuarters][kAccumulators],
                                      int first_quarter, int row, int end_row)
      : o_(o), first_quarter_(first_quarter), row_(row), end_row_(end_row) {}

  // In a fragment each lane of a quad holds 2 neighbouring columns of every 8. A transpose gives
  // each lane 8 neighbouring ones, so that it stores 16 bytes and the quad 64 bytes in a row.
  __device__ __forceinline__ void WriteRows(T* out, const float (&factor)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kOwnQuarters; ++n) {
        T* quarter = out + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns;
#pragma unroll
        for (int j = 0; j < kQuarterColumns; j += 32) {
          uint32_t words[4];
          PackGroups<T>(words, n, j, i, factor[i]);
          sm90::QuadTranspose(words);
          if (row_ + 8 * i < end_row_) StoreUnit(quarter + j, words);
        }
      }
    }
  }

  // Writes quarter `n` of the sum of this result and another one. `other` holds the other one's
  // elements, tiles of 64 columns in the order of WriteHalfRows: fp16 numbers, whatever T is,
  // because they are a partial result in a stage made for T. `weights` are the weights of its rows.
  __device__ __forceinline__ void AddAndWriteQuarter(T* out, int n, const float (&factor)[2],
                                                     const sm90::SmemTile<T>* other,
                                                     const float* weights) const {
    const int tile_row = sm90::Opaque(sm90::FragmentRow());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float weight = weights[tile_row + 8 * i];
      T* quarter = out + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns;
#pragma unroll
      for (int j = 0; j < kQuarterColumns; j += 32) {
        const uint4 unit =
            other[j / kTileColumns].Unit(tile_row + 8 * i, j % kTileColumns / 8 + threadIdx.x % 4);
        uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
        AddAndPackGroups(words, n, j, i, factor[i], weight);
        sm90::QuadTranspose(words);
        if (row_ + 8 * i < end_row_) StoreUnit(quarter + j, words);
      }
    }
  }

  // Writes fp16 elements, scaled by a power of 2 for each quarter of a row. Within each group of 32
  // columns lane q of a quad writes what it holds, columns 8g + 2q and 8g + 2q + 1 for g = 0 .. 3,
  // as 16 bytes. `scales`: [4, end_row], from this thread's first row on.
  __device__ __forceinline__ void WriteHalfRows(__half* out, float* scales,
                                                const float (&factor)[2]) const {
    float largest[2 * kOwnQuarters], scaled[2 * kOwnQuarters];
    LargestFinite(largest);
    sm90::QuadMax(largest);
    WriteScales(scales, largest, factor, scaled);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kOwnQuarters; ++n) {
#pragma unroll
        for (int j = 0; j < kQuarterColumns; j += 32) {
          uint32_t words[4];
          PackGroups<__half>(words, n, j, i, scaled[2 * n + i]);
          if (row_ + 8 * i >= end_row_) continue;
          StoreUnit(out + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns + j, words);
        }
      }
    }
  }

 private:
  static constexpr int kTileColumns = sm90::SmemTile<T>::kColumns;

  // Which quarter of the columns o_[n] holds.
  __device__ __forceinline__ int Quarter(int n) const {
    return first_quarter_ + n * (kQuarters / kOwnQuarters);
  }

  // Writes the scales of this thread's quarters. `scaled` returns what the elements of each
  // must be multiplied by.
  __device__ __forceinline__ void WriteScales(float* scales,
                                              const float (&largest)[2 * kOwnQuarters],
                                              const float (&factor)[2],
                                              float (&scaled)[2 * kOwnQuarters]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kOwnQuarters; ++n) {
        const HalfScale scale(largest[2 * n + i] * factor[i]);
        scaled[2 * n + i] = factor[i] * scale.to_half;
        if (!sm90::IsFirstOfQuad() || row_ + 8 * i >= end_row_) continue;
        scales[Quarter(n) * end_row_ + 8 * i] = scale.from_half;
      }
    }
  }

  // The largest finite magnitude among this thread's elements of row i in quarter n. The second
  // pass is for the rare warp that holds an infinity.
  __device__ __forceinline__ void LargestFinite(float (&largest)[2 * kOwnQuarters]) const {
    bool infinite = false;
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = largest[2 * n + i] = 0.f;
#pragma unroll
        for (int j = 2 * i; j < kAccumulators; j += 4) {
          x = fmaxf(x, fmaxf(fabsf(o_[n][j]), fabsf(o_[n][j + 1])));
        }
        infinite |= x == INFINITY;
      }
    }
    if (!__any_sync(sm90::kFullWarp, infinite)) return;
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = largest[2 * n + i] = 0.f;
#pragma unroll
        for (int j = 2 * i; j < kAccumulators; j += j % 2 == 0 ? 1 : 3) {
          if (fabsf(o_[n][j]) < INFINITY) x = fmaxf(x, fabsf(o_[n][j]));
        }
      }
    }
  }

  // Packs this thread's pairs of row i in the 4 groups of 8 columns from column j on.
  template <typename Out>
  __device__ __forceinline__ void PackGroups(uint32_t (&words)[4], int n, int j, int i,
                                             float factor) const {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
      words[g] = factor == 0.f ? 0 : sm90::Pack<Out>(e[0] * factor, e[1] * factor);
    }
  }

  // The same, plus `weight` times the elements that `words` holds.
  __device__ __forceinline__ void AddAndPackGroups(uint32_t (&words)[4], int n, int j, int i,
                                                   float factor, float weight) const {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
      const float2 other = sm90::Unpack<__half>(words[g]);
      words[g] = sm90::Pack<T>(fmaf(weight, other.x, Normalised(e[0], factor)),
                               fmaf(weight, other.y, Normalised(e[1], factor)));
    }
  }

  __device__ __forceinline__ static float Normalised(float x, float factor) {
    return factor == 0.f ? 0.f : x * factor;
  }

  // Stores this lane's 16 of the quad's 64 bytes.
  template <typename Out>
  __device__ __forceinline__ static void StoreUnit(Out* columns, const uint32_t (&words)[4]) {
    reinterpret_cast<uint4*>(columns)[threadIdx.x % 4] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  const float (&o_)[kOwnQuarters][kAccumulators];
  const int first_quarter_, row_, end_row_;
};

}  // namespace jax_flashmla
