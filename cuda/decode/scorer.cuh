// The score warpgroup of a decode block: S = Q K^T, mask, softmax, P.
//
// What it masks: in dense decode the tokens after the end of the sequence or after the causal
// bound, in sparse decode those that the token mask of the tile calls invalid. It alone applies
// attention sinks to what this block writes, because it has the log-sum-exp.
#pragma once

#include "decode/block.cuh"
#include "mla/softmax.cuh"

namespace jax_flashmla::decode {

template <typename Config>
class Scorer {
 public:
  __device__ __forceinline__ Scorer(SharedMemoryPlan<Config>& smem, const DecodeParams& params)
      : smem_(smem), params_(params) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    const int num_pieces = work.NumPieces();
    const int first_row = work.row_tile * kTileRows;
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.pieces_ready.full[piece_.Stage()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Stage()];
      const int num_tiles = piece.num_tiles, first_tile = piece.first_tile;
      const int visible[2] = {VisibleKeys(first_row + FragmentRow(), piece),
                              VisibleKeys(first_row + FragmentRow() + 8, piece)};
      // Every row of the tile sees these: the first row sees fewest.
      const int all_visible = VisibleKeys(first_row, piece);
      OnlineSoftmax softmax;
      if (piece.HasQueries(i == 0)) LoadQueries();
      if (num_tiles > 0) WaitForTailQueries();
      for (int t = first_tile; t < first_tile + num_tiles; ++t) {
        float scores[32];
        MultiplyQueriesAndKeys(scores);
        if (t == first_tile + num_tiles - 1) ReleaseTailQueries();
        if constexpr (kIsListed) {
          MaskInvalidTokens(scores);
        } else if (t * kTileTokens > all_visible - kTileTokens) {
          MaskFrom(scores, visible[0] - t * kTileTokens, visible[1] - t * kTileTokens);
        }
        float factor[2];
        softmax.RaiseReferences(scores, params_.scale_log2, factor);
        WriteFactors(factor);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          softmax.Exponentiate(scores, params_.scale_log2, k);
          StoreFragment(smem_.p[message_.Stage()], scores, k);
        }
        FenceAsyncProxy();
        __syncwarp();
        announce_ = true;
        message_.Advance();
      }
      Announce();
      Finish(work, smem_.pieces[Opaque(piece_.Stage())], softmax);
      Arrive(&smem_.pieces_ready.empty[piece_.Stage()]);
      piece_.Advance();
    }
  }

 private:
  using T = Config::Element;
  static constexpr int kChunks = Config::kChunks, kClusterSize = Config::kClusterSize;
  static constexpr bool kIsListed = Config::kKeys == Keys::kListed;
  static constexpr bool kNeedsFence = kIsListed && !Config::kRelays;

  // How many keys query row `row` sees. The causal mask is aligned to the bottom right: the last
  // query sees all keys, the one before it all but the last. The offset moves that boundary.
  __device__ __forceinline__ int VisibleKeys(int row, const Piece& piece) const {
    const int length = piece.length;
    if (!params_.causal) return length;
    const int first = length - params_.query.s_q + piece.causal_offset;
    return min(length, max(0, first + row / params_.query.group + 1));
  }

  __device__ __forceinline__ void LoadQueries() {
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) {
      Wait(&smem_.v_ready.full[v_.Stage()], v_.Parity());
#pragma unroll
      for (int c = 0; c < min(kQuarterChunks, kRegisterChunks - first); ++c) {
#pragma unroll
        for (int k = 0; k < 4; ++k) LoadFragmentA(q_[first + c][k], smem_.v[v_.Stage()][c], k);
      }
      v_.Advance();
    }
    // The loads above have only been issued. Without a fence the release could reach the other
    // block, and its keys could overwrite these stages, before a load has been carried out.
    FenceAsyncProxy();
#pragma unroll
    for (int i = kQueryStages; i > 0; --i) {
      Release<kClusterSize>(&smem_.v_ready.empty[v_.Before(i).Stage()]);
    }
  }

  __device__ __forceinline__ void WaitForTailQueries() {
    Wait(&smem_.q_tail_ready.full[q_tail_.Stage()], q_tail_.Parity());
    if constexpr (kIsListed) FenceAsyncProxy();
  }
  __device__ __forceinline__ void ReleaseTailQueries() {
    Release<1>(&smem_.q_tail_ready.empty[q_tail_.Stage()]);
    q_tail_.Advance();
  }

  // The copy engine writes what the tensor cores read by the same proxy. Gathered keys are written
  // by another one, so that a fence must stand between. (Where a warp relays them, it is there.)
  __device__ __forceinline__ void OrderGatheredKeys() {
    if constexpr (kNeedsFence) FenceAsyncProxy();
  }

  // Sets the scores of tokens to -inf that no valid index names.
  __device__ __forceinline__ void MaskInvalidTokens(float (&scores)[32]) {
    Wait(&smem_.keys.written[token_mask_.Stage()], token_mask_.Parity());
    const uint2 words = *reinterpret_cast<const uint2*>(smem_.keys.words[token_mask_.Stage()]);
    token_mask_.Advance();
    if ((words.x & words.y) != ~0u) MaskByBits(scores, words);
  }

  // Tells value that the last P is ready, unless that was done already. Every lane arrives,
  // although one lane would do after __syncwarp(): racecheck follows each thread by itself, and so
  // sees that all have written P and have read the queries in stages whose rows value may clear
  // next. It costs nothing.
  __device__ __forceinline__ void Announce() {
    if (announce_) Arrive(&smem_.message_ready.full[message_.Before(1).Stage()]);
    announce_ = false;
  }

  // Waits for keys. If they are not there yet, announces P first, so that value can go on.
  __device__ __forceinline__ void WaitForKeys(Barrier* full, uint32_t parity) {
    if (kNeedsFence && tile_is_here_) return;
    if (!TestWait(full, parity)) {
      Announce();
      Wait(full, parity);
    }
    __syncwarp();
    OrderGatheredKeys();
  }

  // Gathered keys need a fence before they are multiplied. Where the whole tile is there already,
  // one will do.
  __device__ __forceinline__ void LookForTile() {
    tile_is_here_ = TestWait(&smem_.v_ready.full[v_.Stage()], v_.Parity());
#pragma unroll
    for (int quarter = 1; quarter < kQuarters; ++quarter) {
      RingCursor<kValueStages> v = v_;
      v.Advance(quarter);
      tile_is_here_ &= TestWait(&smem_.v_ready.full[v.Stage()], v.Parity());
    }
    if constexpr (Config::kHasRope) {
      tile_is_here_ &= TestWait(&smem_.rope_ready.full[rope_.Stage()], rope_.Parity());
    }
    tile_is_here_ = __all_sync(kFullWarp, tile_is_here_);
    if (tile_is_here_) OrderGatheredKeys();
  }

  // S = Q K^T of the next tile in the ring. On return the stage for its P is free as well.
  __device__ __forceinline__ void MultiplyQueriesAndKeys(float (&scores)[32]) {
    if constexpr (kNeedsFence) LookForTile();
    WgmmaFence();
    MultiplyQuarter<0>(scores);
    MultiplyQuarter<1>(scores);
    MultiplyQuarter<2>(scores);
    Announce();
    MultiplyQuarter<3>(scores);
    if constexpr (Config::kHasRope) {
      WaitForKeys(&smem_.rope_ready.full[rope_.Stage()], rope_.Parity());
      MultiplyChunk<kChunks - 1>(scores, smem_.rope.tiles[rope_.Stage()]);
    }
    WgmmaCommit();
    Wait(&smem_.message_ready.empty[message_.Stage()], message_.Parity() ^ 1);
    WgmmaWait<0>();
    KeepInRegisters(scores);
    if constexpr (Config::kHasRope) {
      Release<kClusterSize>(&smem_.rope_ready.empty[rope_.Stage()]);
      rope_.Advance();
    }
  }

  template <int kQuarter>
  __device__ __forceinline__ void MultiplyQuarter(float (&scores)[32]) {
    WaitForKeys(&smem_.v_ready.full[v_.Stage()], v_.Parity());
    MultiplyChunk<kQuarter * kQuarterChunks>(scores, smem_.v[v_.Stage()][0]);
    MultiplyChunk<kQuarter * kQuarterChunks + 1>(scores, smem_.v[v_.Stage()][1]);
    v_.Advance();
  }

  // Multiplies one chunk of 64 columns. The first one overwrites the scores,
  // the others add to them.
  template <int kChunk>
  __device__ __forceinline__ void MultiplyChunk(float (&scores)[32], const SmemTile<T>& keys) {
    constexpr uint64_t kStep = SmemTile<T>::kStepAlongColumns;
    const uint64_t b = keys.DescriptorAlongColumns();
#pragma unroll
    for (int k = 0; k < kChunkColumns / 16; ++k) {
      if constexpr (kChunk < kRegisterChunks) {
        WgmmaM64N64RegA<T>(scores, q_[kChunk][k], b + k * kStep, kChunk > 0 || k > 0);
      } else {
        const uint64_t a =
            smem_.q_tail[q_tail_.Stage()][kChunk - kRegisterChunks].DescriptorAlongColumns();
        WgmmaM64N64<T>(scores, a + k * kStep, b + k * kStep, 1);
      }
    }
  }

  // The first lane of each quad writes the factors of its two rows.
  __device__ __forceinline__ void WriteFactors(const float (&factor)[2]) {
    if (!IsFirstOfQuad()) return;
    smem_.row_factor[message_.Stage()][FragmentRow()] = factor[0];
    smem_.row_factor[message_.Stage()][FragmentRow() + 8] = factor[1];
  }

  // The last message of a piece: the factors that normalise O. Writes the log-sum-exp.
  __device__ __forceinline__ void Finish(const BlockWork& work, const Piece& piece,
                                         const OnlineSoftmax& softmax) {
    const QueryShape& query = params_.query;
    float factor[2], lse2[2];
    softmax.Finish(factor, lse2);
    if (piece.invalid) {  // a kernel cannot raise: the result is NaN
      factor[0] = factor[1] = lse2[0] = lse2[1] = NAN;
    }
    if (piece.AddsOther()) smem_.other.AddOther(factor, lse2);
    if (params_.sink.IsGiven() && piece.partial_index < 0) AddSink(work, piece, lse2, factor);
    Wait(&smem_.message_ready.empty[message_.Stage()], message_.Parity() ^ 1);
    WriteFactors(factor);
    __syncwarp();
    announce_ = true;
    message_.Advance();
    Announce();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = Opaque(work.row_tile * kTileRows + FragmentRow() + 8 * i);
      if (!IsFirstOfQuad() || row >= query.rows) continue;
      if (piece.partial_index >= 0) {
        *params_.partial.LseRow(query, piece.partial_index, work.kv_head, row) = lse2[i];
      } else {
        params_.lse[query.LseRow(piece.sequence, work.kv_head, row)] = NaturalLse(lse2[i]);
      }
    }
    if (piece.joined && piece.partial_index >= 0) params_.flags.Set(query, work);
  }

  // Takes the share of the attention sink from what this block writes as the final result.
  __device__ __forceinline__ void AddSink(const BlockWork& work, const Piece& piece,
                                          const float (&lse2)[2], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int tile_row = Opaque(FragmentRow()) + 8 * i;
      const int row = work.row_tile * kTileRows + tile_row;
      if (row >= params_.query.rows) continue;
      const float share =
          params_.sink.ShareOfKeys(params_.query, piece.sequence, work.kv_head, row, lse2[i]);
      factor[i] *= share;
      if (piece.AddsOther()) smem_.other.ScaleWeights(tile_row, share);
    }
  }

  SharedMemoryPlan<Config>& smem_;
  const DecodeParams& params_;
  uint32_t q_[kRegisterChunks][4][4];
  bool announce_ = false;
  bool tile_is_here_ = false;  // used where keys are gathered
  RingCursor<Config::kTailStages> q_tail_;
  RingCursor<kTokenMaskStages> token_mask_;
  RingCursor<kPieceStages> piece_;
  RingCursor<kValueStages> v_;
  RingCursor<kRopeStages> rope_;
  RingCursor<kMessageStages> message_;
};

}  // namespace jax_flashmla::decode
