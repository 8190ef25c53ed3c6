// The loading warpgroup of sparse decode: it gathers the tokens that lists name.
#pragma once

#include "decode/block.cuh"
#include "sm90/gather.cuh"
#include "split_kv/planner.cuh"

namespace jax_flashmla::sparse_decode {

using namespace decode;  // NOLINT: used in nearly every line

// A pool of tokens, and a list of its slots for each query.
struct TokenLists {
  const void* pool;        // [slots, d_k]
  uint32_t slots;          // an index from here on is invalid; at most 2^31
  const int32_t* indices;  // [lists, topk]
  const int32_t* lengths;  // [lists]
  int32_t topk;

  __device__ __forceinline__ int Length(int list) const { return min(max(lengths[list], 0), topk); }
};

struct SparseParams {
  DecodeParams decode;
  const void* q;     // [lists, heads, d_k]
  TokenLists main;   // of the tokens that a piece attends to, these come first
  TokenLists extra;  // and these from the next whole tile on; indices is null if there are none
};

// All threads of the warpgroup load. Eight threads copy a row, 128 bytes at a time. A thread has
// the same four rows of every tile: 16 apart, so that the swizzle is the same in each.
template <typename Config, bool kMakesSchedule>
class GatherLoader {
  using T = Config::Element;
  static constexpr int kRowBytes = Config::kChunks * kChunkColumns * sizeof(T);
  static constexpr int kChunkBytes = kChunkColumns * sizeof(T);
  static constexpr int kPassRows = kWarpgroupSize / SmemTile<T>::kUnitsPerRow;
  static constexpr int kPasses = kTileTokens / kPassRows;

 public:
  __device__ __forceinline__ GatherLoader(SharedMemoryPlan<Config>& smem,
                                          const SparseParams& params,
                                          const BlockBounds<kMakesSchedule>& bounds)
      : smem_(smem), params_(params), bounds_(bounds) {}

  __device__ __forceinline__ void Run(const BlockWork& given) {
    if (given.NumPieces() <= 0) return;
    if (threadIdx.x % kWarpgroupSize == 0) smem_.keys.work = given;
    NamedBarrierSync(1 + kLoadWarpgroup, kWarpgroupSize);
    // What needs no length is read before the first piece is planned.
    if (!HasExtra()) next_index_ = ReadIndex(Work().begin.sequence, Work().begin.tile, INT32_MAX);
    LoadRegisterQueries(Work().begin.sequence);
    if (IsPlanWarp()) Plan(0);
#pragma unroll 1
    while (PieceIndex() < Work().NumPieces()) {
      if (IsPlanWarp() && PieceIndex() + 1 < Work().NumPieces()) Plan(PieceIndex() + 1);
      Wait(&smem_.pieces_ready.full[PieceCursor().Stage()], PieceCursor().Parity());
      LoadPiece();
      if (ThisPiece().AddsOther()) {
        if (IsPlanWarp()) {
          const DecodeParams& decode = params_.decode;
          Joiner<kWritingWarps, kMakesSchedule>(smem_.other, bounds_, decode.query, decode.partial,
                                                decode.flags)
              .Run(Work());
        }
        LoadOtherSplit();
      }
      Release<1>(&smem_.pieces_ready.empty[PieceCursor().Stage()]);
      Count(smem_.keys.pieces);
    }
    AwaitCopies();
  }

 private:
  __device__ __forceinline__ const BlockWork& Work() const { return smem_.keys.work; }
  // Which piece of the block this warp is at.
  __device__ __forceinline__ int PieceIndex() const {
    return static_cast<int>(smem_.keys.pieces[Warp()]);
  }
  __device__ __forceinline__ RingCursor<kPieceStages> PieceCursor() const {
    return RingCursor<kPieceStages>(PieceIndex());
  }
  __device__ __forceinline__ RingCursor<Config::kTailStages> TailCursor() const {
    return RingCursor<Config::kTailStages>(smem_.keys.tails[Warp()]);
  }
  // Adds 1 to this warp's count.
  __device__ __forceinline__ void Count(uint32_t (&counts)[kWarpsPerWarpgroup]) const {
    __syncwarp();
    if (Lane() == 0) counts[Warp()] += 1;
    __syncwarp();
  }
  __device__ __forceinline__ const Piece& ThisPiece() const {
    return smem_.pieces[smem_.keys.pieces[Warp()] % kPieceStages];
  }
  __device__ __forceinline__ bool HasExtra() const { return params_.extra.indices != nullptr; }

  // Threads work out anew who they are wherever they need it: no register is free to keep it.
  __device__ __forceinline__ static uint32_t Thread() {
    return static_cast<uint32_t>(Opaque(threadIdx.x)) % kWarpgroupSize;
  }
  __device__ __forceinline__ static uint32_t Lane() { return Thread() % kWarpSize; }
  __device__ __forceinline__ static uint32_t Warp() { return Thread() / kWarpSize; }
  __device__ __forceinline__ static bool IsPlanWarp() { return WarpUniform(Warp()) == 0; }

  // The row of a tile whose index this lane reads. The 16 rows of a warp are spread over its lanes
  // in the order of TokenMasks; lanes 16 apart read the same index.
  __device__ __forceinline__ static int RowOfLane() {
    static_assert(kPassRows == 16);
    const uint32_t thread = Thread();
    return thread / 4 % 4 * kPassRows + thread / kWarpSize * 4 + thread % 4;
  }

  // Reads this lane's index of a tile; of which list, `main_tiles` tells. Whether it is valid is
  // known when the tile is loaded.
  __device__ __forceinline__ int ReadIndex(int sequence, int tile, int main_tiles) const {
    const bool is_main = tile < main_tiles;
    const TokenLists& lists = is_main ? params_.main : params_.extra;
    const int column = (is_main ? tile : tile - main_tiles) * kTileTokens + RowOfLane();
    if (column >= lists.topk) return -1;
    return __ldg(lists.indices + static_cast<int64_t>(sequence) * lists.topk + column);
  }

  // Plans piece `i` of the block and hands it over. One warp; one lane does the work, in shared
  // memory. The lengths of 32 lists are read at once, so that it rarely waits for them.
  __device__ __forceinline__ void Plan(int i) {
    const RingCursor<kPieceStages> planned(i);
    if (i % kWarpSize == 0) ReadLengths(Work().begin.sequence + i);
    Wait(&smem_.pieces_ready.empty[planned.Stage()], planned.Parity() ^ 1);
    if (IsFirstLane()) {
      Piece& piece = smem_.pieces[planned.Stage()];
      const int main_length = smem_.keys.main_lengths[i % kWarpSize];
      piece.sequence = Work().begin.sequence + i;
      piece.main_length = main_length;
      piece.length = HasExtra() ? CeilDiv(main_length, kTileTokens) * kTileTokens +
                                      smem_.keys.extra_lengths[i % kWarpSize]
                                : main_length;
      piece.invalid = 0;
      CutPiece(piece, i == 0 ? Work().begin.tile : 0, Work(), bounds_);
      Arrive(&smem_.pieces_ready.full[planned.Stage()]);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void ReadLengths(int first) {
    const int lane = static_cast<int>(Lane()), list = first + lane;
    const bool exists = list < params_.decode.batch;
    __syncwarp();
    smem_.keys.main_lengths[lane] = exists ? params_.main.Length(list) : 0;
    smem_.keys.extra_lengths[lane] = exists && HasExtra() ? params_.extra.Length(list) : 0;
    __syncwarp();
  }

  __device__ __forceinline__ void LoadPiece() {
    if (ThisPiece().num_tiles == 0) return;
    // Run() has done both for the first piece.
    const bool is_first = PieceIndex() == 0;
    if (!is_first || HasExtra()) next_index_ = ReadIndexOfPiece(ThisPiece().first_tile);
    if (!is_first) LoadRegisterQueries(ThisPiece().sequence);
#pragma unroll 1
    for (int tile = ThisPiece().first_tile; tile < EndTile(); ++tile) {
      const bool is_main = tile < MainTiles();
      const TokenLists& lists = is_main ? params_.main : params_.extra;
      const int length = is_main ? ThisPiece().main_length : ThisPiece().length;
      const bool valid = tile * kTileTokens + RowOfLane() < length &&
                         static_cast<uint32_t>(next_index_) < lists.slots;
      WriteTokenMask(valid);
      Rows rows;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int index = __shfl_sync(kFullWarp, valid ? next_index_ : -1, 4 * i + Lane() / 8);
        rows.Set(i, lists.pool, kRowBytes, index, index >= 0);
      }
      if (tile + 1 < EndTile()) next_index_ = ReadIndexOfPiece(tile + 1);
      LoadTile(rows);
      // After the first tile, because the previous piece may still use q_tail. Score frees it with
      // that piece's last keys, so this wait delays no keys of this tile.
      if (tile == ThisPiece().first_tile) LoadTailQueries(ThisPiece().sequence);
    }
  }
  __device__ __forceinline__ int EndTile() const {
    return ThisPiece().first_tile + ThisPiece().num_tiles;
  }
  __device__ __forceinline__ int MainTiles() const {
    return static_cast<int>(CeilDiv<uint32_t>(ThisPiece().main_length, kTileTokens));
  }
  __device__ __forceinline__ int ReadIndexOfPiece(int tile) const {
    return ReadIndex(ThisPiece().sequence, tile, MainTiles());
  }

  __device__ __forceinline__ void WriteTokenMask(bool valid) {
    const uint32_t bits = __ballot_sync(kFullWarp, valid);
    if (Lane() == 0) {
      const uint32_t stage = smem_.keys.tiles[Warp()] % kTokenMaskStages;
      smem_.keys.words[stage][Warp()] = static_cast<uint16_t>(bits);
      Arrive(&smem_.keys.written[stage]);
    }
  }

  // This thread's share of four rows: where their first chunk begins, and whether to read them.
  struct Rows {
    const char* at[kPasses];
    bool valid[kPasses];

    __device__ __forceinline__ void Set(int i, const void* base, uint32_t row_bytes, uint32_t row,
                                        bool is_valid) {
      valid[i] = is_valid;
      at[i] = static_cast<const char*>(base) +
              static_cast<uint64_t>(is_valid ? row : 0) * row_bytes + Unit() * 16;
    }
  };

  // The stages are unrolled, so that only addresses in shared memory are computed for each.
  __device__ __forceinline__ void LoadTile(const Rows& rows) {
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      LoadStage(rows, quarter * kQuarterChunks);
    }
    if constexpr (Config::kHasRope) {
      static_assert(kRopeStages == 1);
      Wait(&smem_.rope_ready.empty[0], smem_.keys.tiles[Warp()] % 2 ^ 1);
      CopyChunks<1>(smem_.rope.tiles, rows, Config::kChunks - 1);
      ArriveAfterCopies(&smem_.rope_ready.full[0]);
    }
    Count(smem_.keys.tiles);
  }

  // The rows of this row tile in an array [rows, ...], of queries or of a partial result.
  __device__ __forceinline__ Rows RowsOfQueries(const void* base, uint32_t row_bytes) const {
    Rows rows;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int row = Work().row_tile * kTileRows + ThreadRow() + i * kPassRows;
      rows.Set(i, base, row_bytes, row, row < params_.decode.query.rows);
    }
    return rows;
  }
  __device__ __forceinline__ Rows Queries(int sequence) const {
    return RowsOfQueries(
        static_cast<const char*>(params_.q) + params_.decode.query.Row(sequence, 0, 0) * kRowBytes,
        kRowBytes);
  }

  // Loads the query chunks that score keeps in registers, through kQueryStages stages of V columns.
  __device__ __forceinline__ void LoadRegisterQueries(int sequence) {
    const Rows rows = Queries(sequence);
#pragma unroll
    for (int first = 0; first < kRegisterChunks; first += kQuarterChunks) LoadStage(rows, first);
  }

  __device__ __forceinline__ void LoadTailQueries(int sequence) {
    Wait(&smem_.q_tail_ready.empty[TailCursor().Stage()], TailCursor().Parity() ^ 1);
    const Rows rows = Queries(sequence);
    CopyChunks<Config::kTailChunks>(smem_.q_tail[TailCursor().Stage()], rows, kRegisterChunks);
    ArriveAfterCopies(&smem_.q_tail_ready.full[TailCursor().Stage()]);
    Count(smem_.keys.tails);
  }

  // Loads the rows of the other split of the last sequence: a quarter a stage, like a tile.
  __device__ __forceinline__ void LoadOtherSplit() {
    Wait(&smem_.other.written, 0);
    const int index = PartialIndex(Work().part + 1, false);
    const Rows rows = RowsOfQueries(params_.decode.partial.ORow(params_.decode.query, index, 0, 0),
                                    kHeadDimV * sizeof(__half));
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      LoadStage(rows, quarter * kQuarterChunks);
    }
  }

  // Fills the next stage of V columns with two chunks.
  __device__ __forceinline__ void LoadStage(const Rows& rows, int first_chunk) {
    Wait(&smem_.v_ready.empty[v_.Stage()], v_.Parity() ^ 1);
    CopyChunks<kQuarterChunks>(smem_.v[v_.Stage()], rows, first_chunk);
    ArriveAfterCopies(&smem_.v_ready.full[v_.Stage()]);
    v_.Advance();
  }

  // Copies neighbouring chunks of this thread's rows into neighbouring tiles. A row that is not
  // valid becomes zeros.
  template <int kCount>
  __device__ __forceinline__ void CopyChunks(SmemTile<T>* tiles, const Rows& rows,
                                             int first_chunk) const {
    const uint32_t to = tiles->UnitAddress(ThreadRow(), Unit());
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        CopyUnitAsync(to + i * kPassRows * SmemTile<T>::kRowBytes + c * SmemTile<T>::kBytes,
                      rows.at[i] + (first_chunk + c) * kChunkBytes, rows.valid[i]);
      }
    }
  }

  // The first of this thread's rows in a tile.
  __device__ __forceinline__ static int ThreadRow() {
    return static_cast<int>(Thread() / SmemTile<T>::kUnitsPerRow);
  }
  // Which 16 bytes of each chunk this thread copies.
  __device__ __forceinline__ static int Unit() {
    return static_cast<int>(Thread() % SmemTile<T>::kUnitsPerRow);
  }

  SharedMemoryPlan<Config>& smem_;
  const SparseParams& params_;
  const BlockBounds<kMakesSchedule>& bounds_;
  int next_index_;  // this lane's index of the next tile, read ahead
  RingCursor<kValueStages> v_;
};

}  // namespace jax_flashmla::sparse_decode
