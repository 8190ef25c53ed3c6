// The score warpgroup of dense decode: S = Q K^T, softmax, P.
#pragma once

#include <limits>

#include "dense_decode/block.cuh"
#include "mla/softmax.cuh"

namespace jax_flashmla::dense_decode {

template <typename T, int kClusterSize>
class Scorer {
 public:
  __device__ __forceinline__ Scorer(SharedMemoryPlan<T>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    const int first_row = work.row_tile * kTileRows;
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.piece_full[piece_.Slot()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Slot()];
      const int num_tiles = piece.num_tiles, first_tile = piece.first_tile;
      const int visible[2] = {VisibleKeys(first_row + FragmentRow(), piece),
                              VisibleKeys(first_row + FragmentRow() + 8, piece)};
      const int all_visible = VisibleKeys(first_row, piece);
      OnlineSoftmax softmax;
      if (i == 0 || num_tiles > 0) LoadQueries();
      if (num_tiles > 0) {
        Wait(&smem_.q_full, q_parity_);
        q_parity_ ^= 1;
      }
      for (int t = first_tile; t < first_tile + num_tiles; ++t) {
        float scores[32];
        MultiplyQueriesAndKeys(scores);
        if (t == first_tile + num_tiles - 1) Release<1>(&smem_.q_empty);
        if (t * kTileTokens > all_visible - kTileTokens) {
          MaskFrom(scores, visible[0] - t * kTileTokens, visible[1] - t * kTileTokens);
        }
        float factor[2];
        softmax.Raise(scores, params_.scale_log2, factor);
        WriteFactors(factor);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          softmax.Exponentiate(scores, params_.scale_log2, k);
          StoreFragment(smem_.p[message_.Slot()], scores, k);
        }
        FenceAsyncProxy();
        __syncwarp();
        announce_ = true;
        message_.Advance();
      }
      Announce();
      Finish(work, smem_.pieces[Opaque(piece_.Slot())], softmax);
      Arrive(&smem_.piece_empty[piece_.Slot()]);
      piece_.Advance();
    }
  }

 private:
  // Keys that query row `row` sees: the first ones, up to the bottom-right aligned diagonal, which
  // the offset moves.
  __device__ __forceinline__ int VisibleKeys(int row, const Piece& piece) const {
    const int length = piece.length;
    if (!params_.causal) return length;
    const int first = length - params_.s_q + piece.causal_offset;
    return min(length, max(0, first + row / params_.group + 1));
  }

  __device__ __forceinline__ void LoadQueries() {
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) {
      Wait(&smem_.v_full[v_.Slot()], v_.Parity());
#pragma unroll
      for (int c = 0; c < min(kQuarterChunks, kRegisterChunks - first); ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) LoadFragmentA(q_[first + c][k], smem_.v[v_.Slot()][c], k);
      }
      v_.Advance();
    }
    // The loads have only been issued: without a fence the news that the slots are free may reach
    // the other block, and its keys these slots, before a load that waits its turn.
    FenceAsyncProxy();
#pragma unroll
    for (int i = kQuerySlots; i > 0; --i) {
      Release<kClusterSize>(&smem_.v_empty[v_.Before(i).Slot()]);
    }
  }

  // Tells value that the last P is there, if that has not been done. Each lane arrives: all have
  // written P, and read what came before the keys in their slots, which value may clear next.
  __device__ __forceinline__ void Announce() {
    if (announce_) Arrive(&smem_.message_full[message_.Slot() ^ 1]);
    announce_ = false;
  }

  // Waits for keys; if they are late, value goes first.
  __device__ __forceinline__ void WaitForKeys(Barrier* full, uint32_t parity) {
    if (!TestWait(full, parity)) {
      Announce();
      Wait(full, parity);
    }
    __syncwarp();
  }

  // S = Q K^T of the next tile in the ring. On return the message slot for its P is free as well.
  __device__ __forceinline__ void MultiplyQueriesAndKeys(float (&scores)[32]) {
    WgmmaFence();
    MultiplyQuarter<0>(scores);
    MultiplyQuarter<1>(scores);
    MultiplyQuarter<2>(scores);
    Announce();
    MultiplyQuarter<3>(scores);
    WaitForKeys(&smem_.rope_full[rope_.Slot()], rope_.Parity());
    MultiplyChunk<kChunks - 1>(scores, smem_.rope[rope_.Slot()]);
    WgmmaCommit();
    Announce();
    Wait(&smem_.message_empty[message_.Slot()], message_.Parity() ^ 1);
    WgmmaWait<0>();
    KeepInRegisters(scores);
    Release<kClusterSize>(&smem_.rope_empty[rope_.Slot()]);
    rope_.Advance();
  }

  template <int kQuarter>
  __device__ __forceinline__ void MultiplyQuarter(float (&scores)[32]) {
    WaitForKeys(&smem_.v_full[v_.Slot()], v_.Parity());
    MultiplyChunk<kQuarter * kQuarterChunks>(scores, smem_.v[v_.Slot()][0]);
    MultiplyChunk<kQuarter * kQuarterChunks + 1>(scores, smem_.v[v_.Slot()][1]);
    v_.Advance();
  }

  // The first chunk overwrites the scores.
  template <int kChunk>
  __device__ __forceinline__ void MultiplyChunk(float (&scores)[32], const SmemTile<T>& keys) {
    constexpr uint64_t kStep = SmemTile<T>::kStepAlongColumns;
    const uint64_t b = keys.DescriptorAlongColumns();
#pragma unroll
    for (int k = 0; k < kChunkColumns / 16; ++k) {
      if constexpr (kChunk < kRegisterChunks) {
        WgmmaM64N64RegA<T>(scores, q_[kChunk][k], b + k * kStep, kChunk > 0 || k > 0);
      } else {
        const uint64_t a = smem_.q_tail[kChunk - kRegisterChunks].DescriptorAlongColumns();
        WgmmaM64N64<T>(scores, a + k * kStep, b + k * kStep, 1);
      }
    }
  }

  // The first lane of each quad writes the factors of its two rows.
  __device__ __forceinline__ void WriteFactors(const float (&factor)[2]) {
    if (!IsFirstOfQuad()) return;
    smem_.row_factor[message_.Slot()][FragmentRow()] = factor[0];
    smem_.row_factor[message_.Slot()][FragmentRow() + 8] = factor[1];
  }

  // The last message of a piece: what O must be multiplied with. Writes the log-sum-exp.
  __device__ __forceinline__ void Finish(const BlockWork& work, const Piece& piece,
                                         const OnlineSoftmax& softmax) {
    float factor[2], lse2[2];
    softmax.Finish(factor, lse2);
    if (piece.invalid) {
      factor[0] = factor[1] = lse2[0] = lse2[1] = NAN;
    }
    if (piece.AddsOther()) Join(factor, lse2);
    Wait(&smem_.message_empty[message_.Slot()], message_.Parity() ^ 1);
    WriteFactors(factor);
    __syncwarp();
    announce_ = true;
    message_.Advance();
    Announce();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Opaque(work.row_tile * kTileRows + FragmentRow() + 8 * i);
      if (!IsFirstOfQuad() || row >= params_.rows) continue;
      if (piece.slot >= 0) {
        params_.partial.lse[PartialRow(params_, piece.slot, work.kv_head, row)] = lse2[i];
      } else {
        params_.lse[LseOffset(params_, piece.request, work.kv_head, row)] = NaturalLse(lse2[i]);
      }
    }
    if (piece.joined && piece.slot >= 0) FlagPartial(params_, work);
  }

  // Weighs this split and the other one: `factor` and `lse2` become those of both together.
  __device__ __forceinline__ void Join(float (&factor)[2], float (&lse2)[2]) {
    Wait(&smem_.other_written, 0);
    const int first_row = Opaque(FragmentRow());
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first_row + 8 * i;
      const float other_lse2 = smem_.other_lse[row];
      float largest = fmaxf(lse2[i], other_lse2);
      if (largest == -INFINITY) largest = 0.f;  // -inf - -inf is NaN
      const float own = Exp2(lse2[i] - largest), other = Exp2(other_lse2 - largest);
      const float sum = own + other;
      const float inverse = sum == 0.f ? 0.f : 1.f / sum;
      // 0 stays what a row has that sees no key, for values that are not finite.
      constexpr float kLeast = std::numeric_limits<float>::denorm_min();
      const float weighed = factor[i] * own * inverse;
      factor[i] = factor[i] != 0.f && weighed == 0.f ? kLeast : weighed;
      lse2[i] = log2f(sum) + largest;  // -inf where the sum is 0
      if (IsFirstOfQuad()) {
#pragma unroll
        for (int q = 0; q < kQuarters; ++q) smem_.other_weight[q][row] *= other * inverse;
      }
    }
  }

  SharedMemoryPlan<T>& smem_;
  const DecodeParams& params_;
  uint32_t q_[kRegisterChunks][4][4];
  bool announce_ = false;
  uint32_t q_parity_ = 0;
  RingCursor<kPieceSlots> piece_;
  RingCursor<kValueSlots> v_;
  RingCursor<kRopeSlots> rope_;
  RingCursor<kMessageSlots> message_;
};

}  // namespace jax_flashmla::dense_decode
