// The value warpgroups of a decode block: O = O * factor + P V, then the output.
//
// P is 0 for masked tokens, but 0 * NaN is NaN, so V must be finite there. In dense decode these
// warpgroups clear the rows after the end of a sequence. In sparse decode the loader has written
// zeros for invalid tokens already.
#pragma once

#include "decode/block.cuh"
#include "mla/epilogue.cuh"

namespace jax_flashmla::decode {

// One of the two warpgroups. It holds O for quarters `index` and `index + 2` of the columns.
template <typename Config>
class ValueAccumulator {
 public:
  __device__ __forceinline__ ValueAccumulator(SharedMemoryPlan<Config>& smem,
                                              const DecodeParams& params, int index)
      : smem_(smem), params_(params), index_(index) {
    v_.Advance(index);
  }

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.pieces_ready.full[piece_.Stage()], piece_.Parity());
      const int num_tiles = ThisPiece().num_tiles;
      if (ThisPiece().HasQueries(i == 0)) v_.Advance(kQueryStages);
      Clear();
      for (int t = 0; t < num_tiles; ++t) {
        RingCursor<kValueStages> quarters[kOwnQuarters] = {v_, v_};
        quarters[1].Advance(kValueWarpgroups);
#pragma unroll
        for (int n = 0; n < kOwnQuarters; ++n) {
          Wait(&smem_.v_ready.full[quarters[n].Stage()], quarters[n].Parity());
        }
        Wait(&smem_.message_ready.full[message_.Stage()], message_.Parity());
        Rescale();
        if constexpr (Config::kKeys == Keys::kListed) {
          // The keys were gathered: see Scorer::OrderGatheredKeys.
          if constexpr (!Config::kRelays) FenceAsyncProxy();
        } else if (t == num_tiles - 1) {
          const int valid = ThisPiece().length - (ThisPiece().first_tile + t) * kTileTokens;
          if (valid < kTileTokens) ClearRowsFrom(valid, quarters);
        }
        MultiplyAndAdd(quarters);
        v_.Advance(kQuarters);
      }
      const bool joins = ThisPiece().AddsOther();
      Wait(&smem_.message_ready.full[message_.Stage()], message_.Parity());
      float factor[2];
      ReadFactors(factor);
      QuadBroadcast(factor);
      Write(work, factor, joins);
      ReleaseMessage();
      if (ThisPiece().joined && ThisPiece().partial_index >= 0) {
        params_.flags.Set(params_.query, work);
      }
      Arrive(&smem_.pieces_ready.empty[piece_.Stage()]);
      piece_.Advance();
    }
  }

 private:
  using T = Config::Element;
  static constexpr int kClusterSize = Config::kClusterSize;
  static constexpr int kOwnQuarters = kQuarters / kValueWarpgroups;  // quarters of a warpgroup
  static constexpr int kAccumulators = Epilogue<T, kOwnQuarters>::kAccumulators;

  __device__ __forceinline__ const Piece& ThisPiece() const { return smem_.pieces[piece_.Stage()]; }

  // Every lane arrives, although one lane would do after __syncwarp(): racecheck follows
  // each thread by itself, and so sees which lanes have cleared rows of V and read
  // factors. It costs nothing.
  __device__ __forceinline__ void ReleaseMessage() {
    __syncwarp();
    Arrive(&smem_.message_ready.empty[message_.Stage()]);
    message_.Advance();
  }

  // The factors of this thread's two rows, in the first lane of a quad; 1 in the other lanes.
  __device__ __forceinline__ void ReadFactors(float (&factor)[2]) const {
    factor[0] = factor[1] = 1.f;
    if (!IsFirstOfQuad()) return;
    factor[0] = smem_.row_factor[message_.Stage()][FragmentRow()];
    factor[1] = smem_.row_factor[message_.Stage()][FragmentRow() + 8];
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) {
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
    for (int n = 0; n < kOwnQuarters; ++n) {
#pragma unroll
      for (int j = 0; j < kAccumulators; j += 4) {
        o_[n][j] *= factor[0];
        o_[n][j + 1] *= factor[0];
        o_[n][j + 2] *= factor[1];
        o_[n][j + 3] *= factor[1];
      }
    }
  }

  // Clears the rows of V beyond the end of the sequence. Their weights are 0, but they hold what
  // lies in the page there, or old data of the stage: perhaps NaN, and 0 * NaN is NaN.
  __device__ __forceinline__ void ClearRowsFrom(
      int row, const RingCursor<kValueStages> (&quarters)[kOwnQuarters]) {
    const int units = (kTileTokens - row) * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
    for (int c = 0; c < kOwnQuarters * kQuarterChunks; ++c) {
      const int stage = c < kQuarterChunks ? quarters[0].Stage() : quarters[1].Stage();
      uint4* rows = reinterpret_cast<uint4*>(smem_.v[stage][c % kQuarterChunks].data) +
                    row * SmemTile<T>::kUnitsPerRow;
#pragma unroll 1
      for (int i = Opaque(threadIdx.x % kWarpgroupSize); i < units; i += kWarpgroupSize) {
        rows[i] = make_uint4(0, 0, 0, 0);
      }
    }
    FenceAsyncProxy();
    NamedBarrierSync(1 + index_, kWarpgroupSize);
  }

  // O += P V. The first quarter is released while the second one is still multiplied.
  __device__ __forceinline__ void MultiplyAndAdd(
      const RingCursor<kValueStages> (&quarters)[kOwnQuarters]) {
    const uint64_t a = smem_.p[message_.Stage()].DescriptorAlongColumns();
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) KeepInRegisters(o_[n]);
    WgmmaFence();
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) {
      const uint64_t b = smem_.v[quarters[n].Stage()][0].DescriptorAlongRows();
#pragma unroll
      for (int k = 0; k < kTileTokens / 16; ++k) {
        WgmmaM64N128TransposedB<T>(o_[n], a + k * SmemTile<T>::kStepAlongColumns,
                                   b + k * SmemTile<T>::kStepAlongRows, 1);
      }
      WgmmaCommit();
    }
    WgmmaWait<1>();
    Release<kClusterSize>(&smem_.v_ready.empty[quarters[0].Stage()]);
    WgmmaWait<0>();
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) KeepInRegisters(o_[n]);
    Release<kClusterSize>(&smem_.v_ready.empty[quarters[1].Stage()]);
    ReleaseMessage();
  }

  __device__ __forceinline__ void Write(const BlockWork& work, const float (&factor)[2],
                                        bool joins) {
    const Piece& piece = ThisPiece();
    const QueryShape& query = params_.query;
    const int row = Opaque(work.row_tile * kTileRows + FragmentRow());
    if (!__any_sync(kFullWarp, row < query.rows)) return;
    const Epilogue<T, kOwnQuarters> epilogue(o_, index_, row, query.rows);
    if (piece.partial_index >= 0) {
      const PartialResults& partial = params_.partial;
      epilogue.WriteHalfRows(partial.ORow(query, piece.partial_index, work.kv_head, row),
                             partial.ScaleRow(query, piece.partial_index, work.kv_head, row),
                             factor);
      return;
    }
    T* out =
        static_cast<T*>(params_.out) + query.Row(piece.sequence, work.kv_head, row) * kHeadDimV;
    if (!joins) {
      epilogue.WriteRows(out, factor);
      return;
    }
    // The quarters of the other split follow the last tile through the ring. They come last of all,
    // so there is nothing to free.
#pragma unroll
    for (int n = 0; n < kOwnQuarters; ++n) {
      Wait(&smem_.v_ready.full[v_.Stage()], v_.Parity());
      const SmemTile<T>* other = smem_.v[v_.Stage()];
      v_.Advance(kValueWarpgroups);
      epilogue.AddAndWriteQuarter(out, n, factor, other,
                                  smem_.other.weight[index_ + n * kValueWarpgroups]);
    }
  }

  SharedMemoryPlan<Config>& smem_;
  const DecodeParams& params_;
  const int index_;
  float o_[kOwnQuarters][kAccumulators];
  RingCursor<kPieceStages> piece_;
  RingCursor<kValueStages> v_;
  RingCursor<kMessageStages> message_;
};

}  // namespace jax_flashmla::decode
