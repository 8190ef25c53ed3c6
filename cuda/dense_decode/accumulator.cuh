// The value warpgroups of dense decode: O += P V, and the results.
#pragma once

#include "dense_decode/block.cuh"

namespace jax_flashmla::dense_decode {

template <typename T, int kClusterSize>
class ValueAccumulator {
 public:
  __device__ __forceinline__ ValueAccumulator(SharedMemoryPlan<T>& smem, const DecodeParams& params,
                                              int index)
      : smem_(smem), params_(params), index_(index) {
    v_.Advance(index);
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.piece_full[piece_.Slot()], piece_.Parity());
      const int num_tiles = ThisPiece().num_tiles;
      if (i == 0 || num_tiles > 0) v_.Advance(kQuerySlots);
      Clear();
      for (int t = 0; t < num_tiles; ++t) {
        RingCursor<kValueSlots> quarters[kBlocks] = {v_, v_};
        quarters[1].Advance(2);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Wait(&smem_.v_full[quarters[n].Slot()], quarters[n].Parity());
        }
        Wait(&smem_.message_full[message_.Slot()], message_.Parity());
        Rescale();
        if (t == num_tiles - 1) {
          const int valid = ThisPiece().length - (ThisPiece().first_tile + t) * kTileTokens;
          if (valid < kTileTokens) ClearRowsFrom(valid, quarters);
        }
        MultiplyAndAdd(quarters);
        v_.Advance(4);
      }
      const bool joins = ThisPiece().AddsOther();
      Wait(&smem_.message_full[message_.Slot()], message_.Parity());
      float factor[2];
      ReadFactors(factor);
      QuadBroadcast(factor);
      Write(work, factor, joins);
      ReleaseMessage();
      if (ThisPiece().joined && ThisPiece().slot >= 0) FlagPartial(params_, work);
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  static constexpr int kBlocks = 4 / kValueWarpgroups;  // quarters of a warpgroup
  static constexpr int kAccumulators = kTileRows * kQuarterColumns / kWarpgroupSize;

  __device__ __forceinline__ const Piece& ThisPiece() const { return smem_.pieces[piece_.Slot()]; }

  // Each lane arrives: all have cleared what they had to, and some have read factors.
  __device__ __forceinline__ void ReleaseMessage() {
    __syncwarp();
    Arrive(&smem_.message_empty[message_.Slot()]);
    message_.Advance();
  }

  // The factors of this thread's two rows, 1 in all but the first lane of a quad.
  __device__ __forceinline__ void ReadFactors(float (&factor)[2]) const {
    factor[0] = factor[1] = 1.f;
    if (!IsFirstOfQuad()) return;
    factor[0] = smem_.row_factor[message_.Slot()][FragmentRow()];
    factor[1] = smem_.row_factor[message_.Slot()][FragmentRow() + 8];
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; ++j) o_[n][j] = 0.f;
    }
  }

  __device__ __forceinline__ void Rescale() {
    float factor[2];
    ReadFactors(factor);
    if (!__any_sync(kFullWarp, factor[0] != 1.f || factor[1] != 1.f)) return;
    QuadBroadcast(factor);
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; j += 4) {
        o_[n][j] *= factor[0];
        o_[n][j + 1] *= factor[0];
        o_[n][j + 2] *= factor[1];
        o_[n][j + 3] *= factor[1];
      }
    }
  }

  // Slots of the last page past the sequence's end may hold NaN, and 0 * NaN is NaN.
  __device__ __forceinline__ void ClearRowsFrom(
      int row, const RingCursor<kValueSlots> (&quarters)[kBlocks]) {
    const int units = (kTileTokens - row) * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
    for (int c = 0; c < kBlocks * kQuarterChunks; ++c) {
      const int slot = c < kQuarterChunks ? quarters[0].Slot() : quarters[1].Slot();
      uint4* rows = reinterpret_cast<uint4*>(smem_.v[slot][c % kQuarterChunks].data) +
                    row * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
      for (int i = Opaque(threadIdx.x % kWarpgroupSize); i < units; i += kWarpgroupSize) {
        rows[i] = make_uint4(0, 0, 0, 0);
      }
    }
    FenceAsyncProxy();
    NamedBarrierSync(1 + index_, kWarpgroupSize);
  }

  // O += P V. The first quarter is handed back while the second one is multiplied.
  __device__ __forceinline__ void MultiplyAndAdd(
      const RingCursor<kValueSlots> (&quarters)[kBlocks]) {
    const uint64_t a = smem_.p[message_.Slot()].DescriptorAlongColumns();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
    WgmmaFence();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      const uint64_t b = smem_.v[quarters[n].Slot()][0].DescriptorAlongRows();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        WgmmaM64N128TransposedB<T>(o_[n], a + k * SmemTile<T>::kStepAlongColumns,
                                   b + k * SmemTile<T>::kStepAlongRows, 1);
      }
      WgmmaCommit();
    }
    WgmmaWait<1>();
    Release<kClusterSize>(&smem_.v_empty[quarters[0].Slot()]);
    WgmmaWait<0>();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) KeepInRegisters(o_[n]);
    Release<kClusterSize>(&smem_.v_empty[quarters[1].Slot()]);
    ReleaseMessage();
  }

  __device__ __forceinline__ void Write(const BlockWork& work, const float (&factor)[2],
                                        bool joins) {
    const Piece& piece = ThisPiece();
    const int row = Opaque(work.row_tile * kTileRows + FragmentRow());
    if (!__any_sync(kFullWarp, row < params_.rows)) return;
    if (piece.slot >= 0) {
      WritePartialRows(work, piece.slot, row, factor);
    } else {
      const int64_t head =
          static_cast<int64_t>(piece.request) * params_.num_kv_heads + work.kv_head;
      T* out = static_cast<T*>(params_.out) + (head * params_.rows + row) * kHeadDimV;
      if (joins) {
        WriteJoinedRows(out, row, factor);
      } else {
        WriteRows(out, row, factor);
      }
    }
  }

  // A quad holds 2 neighbouring columns a lane in each group of 8; a transpose makes that 8, so
  // that each lane stores 16 bytes and a quad 64 in a row.
  __device__ __forceinline__ void WriteRows(T* out, int row, const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        T* quarter = out + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns;
#pragma unroll
        for (int j = 0; j < kQuarterColumns; j += 32) {
          uint32_t words[4];
          PackGroups<T>(words, n, j, i, factor[i]);
          QuadTranspose(words);
          if (row + 8 * i < params_.rows) StoreUnit(quarter + j, words);
        }
      }
    }
  }

  // The same of the sum of both splits. The other one's quarters come after the last tile's.
  __device__ __forceinline__ void WriteJoinedRows(T* out, int row, const float (&factor)[2]) {
    const int tile_row = Opaque(FragmentRow());
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
      Wait(&smem_.v_full[v_.Slot()], v_.Parity());
      const SmemTile<T>* other = smem_.v[v_.Slot()];
      v_.Advance(2);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float weight = smem_.other_weight[Quarter(n)][tile_row + 8 * i];
        T* quarter = out + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns;
#pragma unroll
        for (int j = 0; j < kQuarterColumns; j += 32) {
          const uint4 unit = other[j / kChunkColumns].Unit(tile_row + 8 * i,
                                                           j % kChunkColumns / 8 + threadIdx.x % 4);
          uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
          AddAndPackGroups(words, n, j, i, factor[i], weight);
          QuadTranspose(words);
          if (row + 8 * i < params_.rows) StoreUnit(quarter + j, words);
        }
      }
    }
  }

  // As partial_result.cuh says.
  __device__ __forceinline__ void WritePartialRows(const BlockWork& work, int slot, int row,
                                                   const float (&factor)[2]) {
    float largest[2 * kBlocks], scaled[2 * kBlocks];
    LargestFinite(largest);
    QuadMax(largest);
    WriteScales(params_.partial.scale + PartialQuarter(params_, slot, work.kv_head, row, 0), row,
                largest, factor, scaled);
    __half* o = params_.partial.o + PartialRow(params_, slot, work.kv_head, row) * kHeadDimV;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
        for (int j = 0; j < kQuarterColumns; j += 32) {
          uint32_t words[4];
          PackGroups<__half>(words, n, j, i, scaled[2 * n + i]);
          if (row + 8 * i >= params_.rows) continue;
          StoreUnit(o + 8 * i * kHeadDimV + Quarter(n) * kQuarterColumns + j, words);
        }
      }
    }
  }

  // Writes the scales of this thread's quarters, and says what elements are to be multiplied with.
  __device__ __forceinline__ void WriteScales(float* scales, int row,
                                              const float (&largest)[2 * kBlocks],
                                              const float (&factor)[2],
                                              float (&scaled)[2 * kBlocks]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int n = 0; n < kBlocks; ++n) {
        const HalfScale scale(largest[2 * n + i] * factor[i]);
        scaled[2 * n + i] = factor[i] * scale.forth;
        if (!IsFirstOfQuad() || row + 8 * i >= params_.rows) continue;
        scales[Quarter(n) * params_.rows + 8 * i] = scale.back;
      }
    }
  }

  // Of this thread's elements of row i in quarter n, the largest magnitude that is finite.
  __device__ __forceinline__ void LargestFinite(float (&largest)[2 * kBlocks]) const {
    bool infinite = false;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
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
    if (!__any_sync(kFullWarp, infinite)) return;
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
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

  // The quarter of the columns that block n of this warpgroup is.
  __device__ __forceinline__ int Quarter(int n) const { return index_ + n * kValueWarpgroups; }

  // Of row i, this thread's pairs in the 4 groups of 8 columns from j on. A row that sees no key is
  // 0, also where a value that it does not see is not finite.
  template <typename Out>
  __device__ __forceinline__ void PackGroups(uint32_t (&words)[4], int n, int j, int i,
                                             float factor) const {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
      words[g] = factor == 0.f ? 0 : Pack<Out>(e[0] * factor, e[1] * factor);
    }
  }

  // The same with `weight` times what the words hold of the other split added.
  __device__ __forceinline__ void AddAndPackGroups(uint32_t (&words)[4], int n, int j, int i,
                                                   float factor, float weight) const {
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
      const float2 other = Unpack<__half>(words[g]);
      words[g] = Pack<T>(fmaf(weight, other.x, Normalised(e[0], factor)),
                         fmaf(weight, other.y, Normalised(e[1], factor)));
    }
  }

  // This lane's 16 bytes of the quad's 64.
  template <typename Out>
  __device__ __forceinline__ static void StoreUnit(Out* columns, const uint32_t (&words)[4]) {
    reinterpret_cast<uint4*>(columns)[threadIdx.x % 4] =
        make_uint4(words[0], words[1], words[2], words[3]);
  }

  // As in PackGroups.
  __device__ __forceinline__ static float Normalised(float x, float factor) {
    return factor == 0.f ? 0.f : x * factor;
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  const int index_;
  float o_[kBlocks][kAccumulators];
  RingCursor<kPieceSlots> piece_;
  RingCursor<kValueSlots> v_;
  RingCursor<kMessageSlots> message_;
};

}  // namespace jax_flashmla::dense_decode
