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

// Plans the pieces of a block, in shared memory. One warp; one lane does the work.
template <typename Config, bool kMakesSchedule>
class ListPlanner {
 public:
  __device__ __forceinline__ ListPlanner(SharedMemoryPlan<Config>& smem, const SparseParams& params,
                                         const BlockBounds<kMakesSchedule>& bounds)
      : smem_(smem), params_(params), bounds_(bounds) {}

  // Plans piece `i` of the block and hands it over. The lengths of 32 lists are read at once, so
  // that it rarely waits for them.
  __device__ __forceinline__ void Plan(int i) {
    const BlockWork& work = smem_.keys.work;
    const RingCursor<kPieceStages> planned(i);
    if (i % kWarpSize == 0) ReadLengths(work.begin.sequence + i);
    Wait(&smem_.pieces_ready.empty[planned.Stage()], planned.Parity() ^ 1);
    if (Opaque(threadIdx.x) % kWarpSize == 0) {
      Piece& piece = smem_.pieces[planned.Stage()];
      const int main_length = smem_.keys.main_lengths[i % kWarpSize];
      piece.sequence = work.begin.sequence + i;
      piece.main_length = main_length;
      piece.length = HasExtra() ? CeilDiv(main_length, kTileTokens) * kTileTokens +
                                      smem_.keys.extra_lengths[i % kWarpSize]
                                : main_length;
      piece.invalid = 0;
      CutPiece(piece, i == 0 ? work.begin.tile : 0, work, bounds_);
      Arrive(&smem_.pieces_ready.full[planned.Stage()]);
    }
    __syncwarp();
  }

  // Reads what a block needs of the other split of its last sequence.
  __device__ __forceinline__ void Join() {
    const DecodeParams& decode = params_.decode;
    Joiner<kWritingWarps, kMakesSchedule>(smem_.other, bounds_, decode.query, decode.partial,
                                          decode.flags)
        .Run(smem_.keys.work);
  }

 private:
  __device__ __forceinline__ bool HasExtra() const { return params_.extra.indices != nullptr; }

  __device__ __forceinline__ void ReadLengths(int first) {
    const int lane = Opaque(threadIdx.x) % kWarpSize, list = first + lane;
    const bool exists = list < params_.decode.batch;
    __syncwarp();
    smem_.keys.main_lengths[lane] = exists ? params_.main.Length(list) : 0;
    smem_.keys.extra_lengths[lane] = exists && HasExtra() ? params_.extra.Length(list) : 0;
    __syncwarp();
  }

  SharedMemoryPlan<Config>& smem_;
  const SparseParams& params_;
  const BlockBounds<kMakesSchedule>& bounds_;
};

// The warps that gather. Eight threads copy a row, 128 bytes at a time. A thread has the same four
// rows of every tile: 8 or 16 apart, so that the swizzle is the same in each. The blocks of a
// cluster gather one half of each tile each.
template <typename Config, bool kMakesSchedule>
class GatherLoader {
  using T = Config::Element;
  static constexpr int kWarps = Config::kGatherWarps;
  static constexpr int kRowBytes = Config::kChunks * kChunkColumns * sizeof(T);
  static constexpr int kChunkBytes = kChunkColumns * sizeof(T);
  static constexpr int kPassRows = kWarps * kWarpSize / SmemTile<T>::kUnitsPerRow;
  static constexpr int kPasses = 4;
  static constexpr int kOwnRows = kPasses * kPassRows;  // of a tile
  static_assert(kOwnRows * Config::kClusterSize == kTileTokens);

 public:
  __device__ __forceinline__ GatherLoader(SharedMemoryPlan<Config>& smem,
                                          const SparseParams& params,
                                          const BlockBounds<kMakesSchedule>& bounds)
      : smem_(smem), params_(params), planner_(smem, params, bounds) {}

  // Loads what needs no length, before the first piece is planned.
  __device__ __forceinline__ void LoadFirstQueries() {
    if (!HasExtra()) next_index_ = ReadIndex(Work().begin.sequence, Work().begin.tile, INT32_MAX);
    LoadRegisterQueries(Work().begin.sequence);
  }

  __device__ __forceinline__ void Run() {
    if (IsPlanWarp()) planner_.Plan(0);
#pragma unroll 1
    while (PieceIndex() < Work().NumPieces()) {
      if (IsPlanWarp() && PieceIndex() + 1 < Work().NumPieces()) planner_.Plan(PieceIndex() + 1);
      Wait(&smem_.pieces_ready.full[PieceCursor().Stage()], PieceCursor().Parity());
      LoadPiece();
      if (ThisPiece().AddsOther()) {
        if (IsPlanWarp()) planner_.Join();
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
  __device__ __forceinline__ void Count(uint32_t (&counts)[kWarps]) const {
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
  // Whether this warp plans too: where each warp of the warpgroup gathers, one must.
  __device__ __forceinline__ static bool IsPlanWarp() {
    return kWarps == kWarpsPerWarpgroup && WarpUniform(Warp()) == 0;
  }

  // The row of a tile whose index this lane reads. Without a cluster lanes 16 apart read the same
  // row, one of this warp's 16. In a cluster a warp reads the indices of its rows in both halves of
  // the tile, because a block masks all tokens. The order is that of TokenMasks: lane 16h + 4i + q
  // has bit 4i + q of this warp's half-word h.
  __device__ __forceinline__ static int RowOfLane() {
    const uint32_t thread = Thread();
    return thread / 4 % 4 * 16 + HalfWord(thread % kWarpSize / 16) * 4 + thread % 4;
  }
  // The half-words of a mask that this warp writes: one, or two in a cluster.
  static constexpr uint32_t kHalfWords = kWarpsPerWarpgroup / kWarps;
  __device__ __forceinline__ static uint32_t HalfWord(uint32_t n) {
    return n % kHalfWords * kWarps + Warp();
  }
  // The lane that reads the index of this thread's row i.
  __device__ __forceinline__ static int LaneOfRow(int i) {
    const int q = Lane() / 8;
    if constexpr (Config::kClusterSize == 1) {
      return 4 * i + q;
    } else {
      return 16 * (i % 2) + 8 * static_cast<int>(ClusterRank()) + 4 * (i / 2) + q;
    }
  }
  // The first row of a tile that this block gathers.
  __device__ __forceinline__ static int FirstOwnRow() {
    return Config::kClusterSize == 1 ? 0 : static_cast<int>(ClusterRank()) * kOwnRows;
  }

  // Reads this lane's index of a tile; of which list, `main_tiles` tells. Whether it is valid is
  // known when the tile is loaded.
  __device__ __forceinline__ int ReadIndex(int sequence, int tile, int main_tiles) const {
    const bool is_main = tile < main_tiles;
    const TokenLists& lists = is_main ? params_.main : params_.extra;
    // Unsigned: with a schedule of garbage the product may wrap, but must not become negative.
    const uint32_t list_tile = is_main ? tile : tile - main_tiles;
    const uint32_t column = list_tile * kTileTokens + RowOfLane();
    if (column >= static_cast<uint32_t>(lists.topk)) return -1;
    return __ldg(lists.indices + static_cast<int64_t>(sequence) * lists.topk + column);
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
        const int index = __shfl_sync(kFullWarp, valid ? next_index_ : -1, LaneOfRow(i));
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
#pragma unroll
      for (uint32_t n = 0; n < kHalfWords; ++n) {
        smem_.keys.words[stage][HalfWord(n)] = static_cast<uint16_t>(bits >> 16 * n);
      }
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
      LoadStage([&](SmemTile<T>* tiles) {
        CopyChunks<kQuarterChunks>(tiles, rows, FirstOwnRow(), quarter * kQuarterChunks);
      });
    }
    if constexpr (Config::kHasRope) {
      static_assert(kRopeStages == 1);
      Wait(&smem_.rope_ready.empty[0], smem_.keys.tiles[Warp()] % 2 ^ 1);
      CopyChunks<1>(smem_.rope.tiles, rows, FirstOwnRow(), Config::kChunks - 1);
      ArriveAfterCopies(Config::kRelays ? &smem_.keys.rope_gathered[0] : &smem_.rope_ready.full[0]);
    }
    Count(smem_.keys.tiles);
  }

  // Copies chunks of all rows of this row tile, of an array [rows, ...] of queries or of a partial
  // result. Unlike keys, each block has its own.
  template <int kCount>
  __device__ __forceinline__ void CopyQueryChunks(SmemTile<T>* tiles, const void* base,
                                                  int row_bytes, int first_chunk) const {
#pragma unroll
    for (int first = 0; first < kTileRows; first += kOwnRows) {
      Rows rows;
#pragma unroll
      for (int i = 0; i < kPasses; ++i) {
        const int row = Work().row_tile * kTileRows + first + ThreadRow() + i * kPassRows;
        rows.Set(i, base, row_bytes, row, row < params_.decode.query.rows);
      }
      CopyChunks<kCount>(tiles, rows, first, first_chunk);
    }
  }
  __device__ __forceinline__ const char* Queries(int sequence) const {
    return static_cast<const char*>(params_.q) +
           params_.decode.query.Row(sequence, 0, 0) * kRowBytes;
  }

  // Loads the query chunks that score keeps in registers, through kQueryStages stages of V columns.
  __device__ __forceinline__ void LoadRegisterQueries(int sequence) {
#pragma unroll 1
    for (int chunk = 0; chunk < kRegisterChunks; chunk += kQuarterChunks) {
      LoadStage([&](SmemTile<T>* tiles) {
        CopyQueryChunks<kQuarterChunks>(tiles, Queries(sequence), kRowBytes, chunk);
      });
    }
  }

  __device__ __forceinline__ void LoadTailQueries(int sequence) {
    Wait(&smem_.q_tail_ready.empty[TailCursor().Stage()], TailCursor().Parity() ^ 1);
    CopyQueryChunks<Config::kTailChunks>(smem_.q_tail[TailCursor().Stage()], Queries(sequence),
                                         kRowBytes, kRegisterChunks);
    ArriveAfterCopies(&smem_.q_tail_ready.full[TailCursor().Stage()]);
    Count(smem_.keys.tails);
  }

  // Loads the rows of the other split of the last sequence: a quarter a stage, like a tile.
  __device__ __forceinline__ void LoadOtherSplit() {
    Wait(&smem_.other.written, 0);
    const int index = PartialIndex(Work().part + 1, false);
#pragma unroll 1
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      LoadStage([&](SmemTile<T>* tiles) {
        CopyQueryChunks<kQuarterChunks>(
            tiles, params_.decode.partial.ORow(params_.decode.query, index, 0, 0),
            kHeadDimV * sizeof(__half), quarter * kQuarterChunks);
      });
    }
  }

  // Fills the next stage of V columns, by `copy(tiles)`.
  template <typename Copy>
  __device__ __forceinline__ void LoadStage(Copy&& copy) {
    Wait(&smem_.v_ready.empty[v_.Stage()], v_.Parity() ^ 1);
    copy(smem_.v[v_.Stage()]);
    ArriveAfterCopies(Config::kRelays ? &smem_.keys.gathered[v_.Stage()]
                                      : &smem_.v_ready.full[v_.Stage()]);
    v_.Advance();
  }

  // Copies neighbouring chunks of this thread's rows into neighbouring tiles, from row `first` of
  // the tiles on. A row that is not valid becomes zeros.
  template <int kCount>
  __device__ __forceinline__ void CopyChunks(SmemTile<T>* tiles, const Rows& rows, int first,
                                             int first_chunk) const {
    const uint32_t to = tiles->UnitAddress(first + ThreadRow(), Unit());
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
    static_assert(kPassRows % 8 == 0);
    return static_cast<int>(Thread() / SmemTile<T>::kUnitsPerRow);
  }
  // Which 16 bytes of each chunk this thread copies.
  __device__ __forceinline__ static int Unit() {
    return static_cast<int>(Thread() % SmemTile<T>::kUnitsPerRow);
  }

  SharedMemoryPlan<Config>& smem_;
  const SparseParams& params_;
  ListPlanner<Config, kMakesSchedule> planner_;
  int next_index_;  // this lane's index of the next tile, read ahead
  RingCursor<kValueStages> v_;
};

// In a cluster: hands over what this block's warps have gathered. It passes their half of a tile on
// to the other block, and counts on the stage's `full` barrier of its own block, which completes
// when the other half is there too. It also fences what was gathered, once for all that multiply
// it. One warp.
template <typename Config>
class Relay {
  using T = Config::Element;

 public:
  __device__ __forceinline__ explicit Relay(SharedMemoryPlan<Config>& smem) : smem_(smem) {}

  __device__ __forceinline__ void Run() {
    const int num_pieces = smem_.keys.work.NumPieces();
#pragma unroll 1
    for (int i = 0; i < num_pieces; ++i) {
      Wait(&smem_.pieces_ready.full[piece_.Stage()], piece_.Parity());
      const Piece& piece = smem_.pieces[piece_.Stage()];
      if (piece.HasQueries(i == 0)) PassStages</*kIsShared=*/false>(kQueryStages);
#pragma unroll 1
      for (int t = 0; t < piece.num_tiles; ++t) {
        PassStages</*kIsShared=*/true>(kQuarters);
        if constexpr (Config::kHasRope) {
          Pass<true, 1>(smem_.rope.tiles, &smem_.keys.rope_gathered[rope_.Stage()],
                        &smem_.rope_ready.full[rope_.Stage()], rope_.Parity());
          rope_.Advance();
        }
      }
      if (piece.AddsOther()) PassStages</*kIsShared=*/false>(kQuarters);
      Release<1>(&smem_.pieces_ready.empty[piece_.Stage()]);
      piece_.Advance();
    }
  }

 private:
  template <bool kIsShared>
  __device__ __forceinline__ void PassStages(int stages) {
#pragma unroll 1
    for (int n = 0; n < stages; ++n) {
      Pass<kIsShared, kQuarterChunks>(smem_.v[v_.Stage()], &smem_.keys.gathered[v_.Stage()],
                                      &smem_.v_ready.full[v_.Stage()], v_.Parity());
      v_.Advance();
    }
  }

  template <bool kIsShared, int kCount>
  __device__ __forceinline__ void Pass(SmemTile<T>* tiles, Barrier* gathered, Barrier* full,
                                       uint32_t parity) {
    constexpr int kHalfBytes = SmemTile<T>::kBytes / 2;
    Wait(gathered, parity);
    FenceAsyncProxy();
    __syncwarp();
    if (IsElected()) {
      if constexpr (!kIsShared) {
        Arrive(full);
      } else {
        ArriveExpectBytes(full, kCount * kHalfBytes);
        const uint32_t rank = ClusterRank();
#pragma unroll
        for (int c = 0; c < kCount; ++c) {
          CopyToRank(reinterpret_cast<char*>(tiles[c].data) + rank * kHalfBytes, kHalfBytes, full,
                     rank ^ 1);
        }
      }
    }
    __syncwarp();
  }

  SharedMemoryPlan<Config>& smem_;
  RingCursor<kPieceStages> piece_;
  RingCursor<kValueStages> v_;
  RingCursor<kRopeStages> rope_;
};

}  // namespace jax_flashmla::sparse_decode
