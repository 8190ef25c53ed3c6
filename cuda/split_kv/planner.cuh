// The plan warp of a split decode: it works out the pieces of the block ahead of all other warps,
// so that none of them waits for global memory to know what to do.
#pragma once

#include "split_kv/work.cuh"

namespace jax_flashmla::split_kv {

// Fills in which tiles of its sequence a piece has, from tile `first` on, and where its result
// goes. Its sequence and length are there already.
template <bool kMakesSchedule>
__device__ __forceinline__ void CutPiece(Piece& piece, int first, const BlockWork& work,
                                         const BlockBounds<kMakesSchedule>& bounds) {
  const int tiles = piece.length / kTileTokens + (piece.length % kTileTokens != 0);
  const bool continues = piece.sequence == work.end.sequence;  // in the next part
  // The last split runs to the actual length, even if the schedule was made for another one.
  const int end = continues ? min(work.end.tile, tiles) : tiles;
  piece.first_tile = min(first, tiles);
  piece.num_tiles = max(end - piece.first_tile, 0);
  const bool shared = first > 0 || continues;
  // The bound of the part that makes the second split, if there are two.
  const int second = first > 0 ? kOwnBegin : kOwnBegin + 1;
  piece.joined = shared && bounds.BeginsInSecondOfTwo(work.part, second);
  const bool writes_result = !shared || (piece.joined && first == 0);
  piece.partial_index = writes_result ? -1 : PartialIndex(work.part, first == 0);
}

// One warp. `Source` knows where the tokens of a sequence are (PageSource: in the pages of a block
// table). It has Prefetch(sequence, first_tile), ReadSequence(piece) and Plan(piece, prefetched).
template <typename Source, int kStages, bool kMakesSchedule>
class Planner {
 public:
  __device__ __forceinline__ Planner(Source source, const BlockBounds<kMakesSchedule>& bounds,
                                     Piece (&pieces)[kStages], RingBarriers<kStages>& barriers)
      : source_(source), bounds_(bounds), pieces_(pieces), barriers_(barriers) {}

  __device__ __forceinline__ void Run(const BlockWork& work) {
    int sequence = work.begin.sequence, first_tile = work.begin.tile;
    for (int left = work.NumPieces(); left > 0; --left) {
      // Read together with the length instead of after it: one latency less before the first load.
      const auto prefetched = source_.Prefetch(sequence, first_tile);
      const Piece piece = MakePiece(work, sequence, first_tile);
      ++sequence;
      first_tile = 0;
      Wait(&barriers_.empty[piece_.Stage()], piece_.Parity() ^ 1);
      if (IsFirstLane()) {
        pieces_[piece_.Stage()] = piece;
        Arrive(&barriers_.full[piece_.Stage()]);
      }
      __syncwarp();
      source_.Plan(pieces_[piece_.Stage()], prefetched);
      piece_.Advance();
    }
  }

 private:
  __device__ __forceinline__ Piece MakePiece(const BlockWork& work, int sequence, int first) const {
    Piece piece;
    piece.sequence = sequence;
    source_.ReadSequence(piece);
    CutPiece(piece, first, work, bounds_);
    return piece;
  }

  Source source_;
  const BlockBounds<kMakesSchedule>& bounds_;
  Piece (&pieces_)[kStages];
  RingBarriers<kStages>& barriers_;
  RingCursor<kStages> piece_;
};

}  // namespace jax_flashmla::split_kv
