// The value warpgroups of dense decode: O += P V, and the results.
#pragma once

#include "block.cuh"

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
      Wait(&smem_.message_full[message_.Slot()], message_.Parity());
      const int num_tiles = ThisPiece().num_tiles;
      if (num_tiles > 0) v_.Advance(kQuerySlots);
      Clear();
      for (int t = 0; t < num_tiles; ++t) {
        RingCursor<kValueSlots> quarters[kBlocks] = {v_, v_};
        quarters[1].Advance(2);
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
          Wait(&smem_.v_full[quarters[n].Slot()], quarters[n].Parity());
        }
        if (t > 0) Wait(&smem_.message_full[message_.Slot()], message_.Parity());
        Rescale();
        if (t == num_tiles - 1) {
          const int valid = ThisPiece().length - (ThisPiece().first_tile + t) * kTileTokens;
          if (valid < kTileTokens) ClearRowsFrom(valid, quarters);
        }
        MultiplyAndAdd(quarters);
        v_.Advance(4);
      }
      if (num_tiles > 0) Wait(&smem_.message_full[message_.Slot()], message_.Parity());
      float factor[2];
      ReadFactors(factor);
      QuadBroadcast(factor);
      Write(work, factor);
      ReleaseMessage();
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  static constexpr int kBlocks = 4 / kValueWarpgroups;  // quarters of a warpgroup
  static constexpr int kAccumulators = kTileRows * kQuarterColumns / kWarpgroupSize;

  __device__ __forceinline__ const Piece& ThisPiece() const { return smem_.pieces[piece_.Slot()]; }

  // Each lane that read factors arrives, for P with the rest of its warp behind a __syncwarp.
  __device__ __forceinline__ void ReleaseMessage() {
    __syncwarp();
    if (IsFirstOfQuad()) Arrive(&smem_.message_empty[message_.Slot()]);
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

  __device__ __forceinline__ void Write(const BlockWork& work, const float (&factor)[2]) {
    const Piece& piece = ThisPiece();
    const bool split = piece.slot >= 0;
    const int64_t head =
        static_cast<int64_t>(split ? piece.slot : piece.request) * params_.num_kv_heads +
        work.kv_head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Opaque(work.row_tile * kTileRows + FragmentRow() + 8 * i);
      const int64_t offset = (head * params_.rows + row) * kHeadDimV + index_ * kQuarterColumns;
      if (split) {
        WritePartialRow(params_.o_partial + offset, i, factor[i], row < params_.rows);
      } else {
        WriteRow(static_cast<T*>(params_.out) + offset, i, factor[i], row < params_.rows);
      }
    }
  }

  // A quad holds 2 neighbouring columns a lane in each group of 8; a transpose makes that 8, so
  // that each lane stores 16 bytes and a quad 64 in a row.
  __device__ __forceinline__ void WriteRow(T* row, int i, float factor, bool store) {
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kQuarterColumns; j += 32) {
        uint32_t words[4];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const float* e = o_[n] + (j + 8 * g) / 2 + 2 * i;
          words[g] = Pack<T>(Normalised(e[0], factor), Normalised(e[1], factor));
        }
        QuadTranspose(words);
        if (store) {
          *reinterpret_cast<uint4*>(row + n * 2 * kQuarterColumns + j + threadIdx.x % 4 * 8) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
    }
  }

  // Of two groups of 8 columns an even lane takes the first one and an odd lane the second: 4
  // neighbouring columns each, 16 bytes, after an exchange with the lane beside.
  __device__ __forceinline__ void WritePartialRow(float* row, int i, float factor, bool store) {
    if (!__any_sync(kFullWarp, store)) return;
    const bool odd = threadIdx.x & 1;
    row += odd ? 8 + FragmentColumn() - 2 : FragmentColumn();
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < kQuarterColumns; j += 16) {
        const float* first = o_[n] + j / 2 + 2 * i;
        const float* second = first + 4;
        float kept[2], other[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          kept[c] = Normalised(odd ? second[c] : first[c], factor);
          other[c] = __shfl_xor_sync(kFullWarp, Normalised(odd ? first[c] : second[c], factor), 1);
        }
        if (!store) continue;
        *reinterpret_cast<float4*>(row + n * 2 * kQuarterColumns + j) =
            odd ? make_float4(other[0], other[1], kept[0], kept[1])
                : make_float4(kept[0], kept[1], other[0], other[1]);
      }
    }
  }

  // A row that sees no key is 0, also where a value that it does not see is not finite.
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
