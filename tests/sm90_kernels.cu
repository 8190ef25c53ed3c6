// A kernel for each primitive of the PTX layer and the online softmax, and behind them the
// functions that test_sm90.py calls: they run a kernel on arrays in host memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <string>
#include <utility>

#include "host/launch.h"
#include "host/tensor_map.h"
#include "mla/epilogue.cuh"
#include "mla/softmax.cuh"
#include "sm90/fragment.cuh"
#include "sm90/global_flag.cuh"
#include "sm90/tma.cuh"

// A numpy array. Not in the unnamed namespace: functions that take it would not be exported.
struct Array {
  void* data;
  size_t bytes;
};

namespace {

using namespace jax_flashmla;        // NOLINT: what is tested
using namespace jax_flashmla::sm90;  // NOLINT

constexpr int kSide = 64;  // rows and columns of a tile
constexpr int kSteps = kSide / 16;

// ------------------------------------------------------------------------------------------ tiles

template <typename T>
__device__ uint4& Unit(const SmemTile<T>& tile, int i) {
  constexpr int kUnits = SmemTile<T>::kUnitsPerRow;
  return *static_cast<uint4*>(__cvta_shared_to_generic(tile.UnitAddress(i / kUnits, i % kUnits)));
}

// Between a tile and 64 columns of a row-major matrix, by ordinary loads and stores.
template <typename T>
__device__ void FillTile(SmemTile<T>& tile, const T* matrix, int columns) {
  for (int i = threadIdx.x; i < kSide * SmemTile<T>::kUnitsPerRow; i += blockDim.x) {
    Unit(tile, i) = *reinterpret_cast<const uint4*>(matrix + i / 8 * columns + i % 8 * 8);
  }
}
template <typename T>
__device__ void ReadTile(const SmemTile<T>& tile, T* matrix) {
  for (int i = threadIdx.x; i < kSide * SmemTile<T>::kUnitsPerRow; i += blockDim.x) {
    constexpr int kUnits = SmemTile<T>::kUnitsPerRow;
    reinterpret_cast<uint4*>(matrix)[i] = tile.Unit(i / kUnits, i % kUnits);
  }
}

// Between an accumulator and a row-major matrix [64 x columns].
template <int kCount>
__device__ void ReadAccumulator(const float* matrix, float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = FragmentRow() + i / 2 % 2 * 8, column = FragmentColumn() + i / 4 * 8 + i % 2;
    d[i] = matrix[row * (2 * kCount) + column];
  }
}
template <int kCount>
__device__ void WriteAccumulator(float* matrix, const float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = FragmentRow() + i / 2 % 2 * 8, column = FragmentColumn() + i / 4 * 8 + i % 2;
    matrix[row * (2 * kCount) + column] = d[i];
  }
}

__device__ void WriteRowValues(float* rows, const float (&x)[2]) {
  if (threadIdx.x % 4 != 0) return;
  rows[FragmentRow()] = x[0];
  rows[FragmentRow() + 8] = x[1];
}

// --------------------------------------------------------------------------------------- barriers

// One thread: what TestWait says at each step of two phases of two arrivals, and of a phase that
// waits for bytes.
__global__ void BarrierPhasesKernel(int32_t* seen) {
  __shared__ Barrier barrier, bytes;
  BarrierInit(&barrier, 2);
  BarrierInit(&bytes, 1);
  FenceBarrierInit();
  *seen++ = TestWait(&barrier, 1);
  *seen++ = TestWait(&barrier, 0);
  Arrive(&barrier);
  *seen++ = TestWait(&barrier, 0);
  Arrive(&barrier);
  *seen++ = TestWait(&barrier, 0);
  *seen++ = TestWait(&barrier, 1);
  Arrive(&barrier);
  Arrive(&barrier);
  *seen++ = TestWait(&barrier, 1);
  *seen++ = TestWait(&barrier, 0);
  ArriveExpectBytes(&bytes, 16);
  *seen++ = TestWait(&bytes, 0);
}

// Warp 0 hands a word a lane to warp 1, round after round through one buffer.
__global__ void BarrierHandOverKernel(int32_t* received, int rounds) {
  __shared__ int32_t words[kWarpSize];
  __shared__ Barrier full, empty;
  if (threadIdx.x == 0) {
    BarrierInit(&full, kWarpSize);
    BarrierInit(&empty, kWarpSize);
    FenceBarrierInit();
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < kWarpSize) {
      Wait(&empty, (round & 1) ^ 1);
      words[lane] = round * kWarpSize + lane;
      Arrive(&full);
    } else {
      Wait(&full, round & 1);
      received[round * kWarpSize + lane] = words[kWarpSize - 1 - lane];
      Arrive(&empty);
    }
  }
}

// Two pairs of warps, a barrier a pair; in each round a thread sees what its partner wrote, though
// one of them is late. The second pair stops after half of the rounds.
__global__ void NamedBarrierKernel(int32_t* received, int rounds) {
  __shared__ int32_t words[4 * kWarpSize];
  const int pair = threadIdx.x / (2 * kWarpSize), warp = threadIdx.x / kWarpSize;
  for (int round = 0; round < (pair == 0 ? rounds : rounds / 2); ++round) {
    if (warp % 2 == round % 2) __nanosleep(2000);
    words[threadIdx.x] = round * blockDim.x + threadIdx.x;
    NamedBarrierSync(1 + pair, 2 * kWarpSize);
    received[round * blockDim.x + threadIdx.x] = words[threadIdx.x ^ kWarpSize];
    NamedBarrierSync(1 + pair, 2 * kWarpSize);
  }
}

// ------------------------------------------------------------------------------------ bulk copies

// Fills a tile with boxes of `box_rows` rows, one behind the other along the tensor's last axis.
__global__ void TmaLoadKernel(const __grid_constant__ CUtensorMap map, int4 at, int box_rows,
                              uint16_t* out) {
  __shared__ SmemTile<uint16_t> tile;
  __shared__ Barrier full;
  for (int i = threadIdx.x; i < kSide * kSide; i += blockDim.x) tile.data[i] = 0xffff;
  FenceAsyncProxy();
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize && IsElected()) {
    ArriveExpectBytes(&full, tile.kBytes);
    for (int row = 0; row < kSide; row += box_rows) {
      TmaLoad4d(tile.data + row * kSide, &map, &full, kEvictNormal, at.x, at.y, at.z,
                at.w + row / box_rows);
    }
  }
  Wait(&full, 0);
  ReadTile(tile, out);
}

// In each round a cluster of two blocks loads the next of its pages [64 x 64] to both, each block
// one half of it. A block overwrites a tile when both have read theirs.
__global__ void MulticastKernel(const __grid_constant__ CUtensorMap map, int rounds,
                                uint16_t* out) {
  constexpr int kBlocks = 2, kRows = kSide / kBlocks;
  __shared__ SmemTile<uint16_t> tile;
  __shared__ Barrier full, empty;
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    BarrierInit(&empty, kBlocks);
    FenceBarrierInit();
  }
  ClusterArrive();
  ClusterWait();
  const int row = kRows * ClusterRank();
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x == 0) {
      Wait(&empty, (round & 1) ^ 1);
      ArriveExpectBytes(&full, tile.kBytes);
      TmaLoadMulticast4d(tile.data + row * kSide, &map, &full, kEvictNormal, (1 << kBlocks) - 1, 0,
                         0, row, (round * gridDim.x + blockIdx.x) / kBlocks);
    }
    Wait(&full, round & 1);
    ReadTile(tile, out + (round * gridDim.x + blockIdx.x) * kSide * kSide);
    __syncthreads();
    if (threadIdx.x < kBlocks) ArriveAtRank(&empty, threadIdx.x);
  }
  ClusterArrive();
  ClusterWait();
}

// ----------------------------------------------------------------------------------- global flags

// Blocks in pairs. The warps of the second one, of which one is late, copy a tile to global memory
// and flag their shares of it; the first one waits for them, clears the flags and loads the tile by
// the copy engine. tiles and received [rounds, pairs, 64, 64], `map` of shared_tiles [pairs, 64,
// 64], flags [pairs, kFlaggingWarps].
constexpr int kFlaggingWarps = 4;

__global__ void GlobalFlagKernel(const __grid_constant__ CUtensorMap map, const uint4* tiles,
                                 int round, Flag value, uint4* shared_tiles, Flag* flags,
                                 uint16_t* received) {
  __shared__ SmemTile<uint16_t> tile;
  __shared__ Barrier full;
  constexpr int kUnits = sizeof(tile) / sizeof(uint4);
  const int pair = blockIdx.x / 2, pairs = gridDim.x / 2;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int at = round * pairs + pair;
  flags += pair * kFlaggingWarps;
  if (blockIdx.x % 2 == 1) {
    if (warp == round % kFlaggingWarps) __nanosleep(20000);
    for (int i = threadIdx.x; i < kUnits; i += blockDim.x) {
      shared_tiles[pair * kUnits + i] = tiles[at * kUnits + i];
    }
    ReleaseGlobalWrites();
    if (lane == 0) SetFlag(flags + warp, value);
    return;
  }
  if (threadIdx.x == 0) {
    BarrierInit(&full, 1);
    FenceBarrierInit();
  }
  __syncthreads();
  if (warp == 0) {
    if (lane < kFlaggingWarps) {
      while (ReadFlag(flags + lane) != value) {
      }
      SetFlag(flags + lane, 0);
    }
    AcquireGlobalWrites();
    if (IsElected()) {
      ArriveExpectBytes(&full, tile.kBytes);
      TmaLoad4d(tile.data, &map, &full, kEvictNormal, 0, 0, 0, pair);
    }
  }
  Wait(&full, 0);
  ReadTile(tile, received + at * kSide * kSide);
}

// Block b counts b + 1 and says what the count is then.
__global__ void CountKernel(uint32_t* count, uint32_t* seen) {
  CountRelaxed(count, blockIdx.x + 1);
  seen[blockIdx.x] = ReadRelaxed(count);
}

// -------------------------------------------------------------------------------------- fragments

// d [64 x 64] rounded and stored as a tile, and that tile loaded as A fragments [4][128][4].
template <typename T>
__global__ void FragmentsKernel(const float* d, T* tile_out, uint32_t* fragments) {
  __shared__ SmemTile<T> tile;
  float accumulator[32];
  ReadAccumulator(d, accumulator);
  for (int k = 0; k < kSteps; ++k) StoreFragment(tile, accumulator, k);
  __syncthreads();
  ReadTile(tile, tile_out);
  for (int k = 0; k < kSteps; ++k) {
    uint32_t a[4];
    LoadFragmentA(a, tile, k);
    for (int i = 0; i < 4; ++i) fragments[(k * kWarpgroupSize + threadIdx.x) * 4 + i] = a[i];
  }
}

template <typename T>
__global__ void PackKernel(const float2* pairs, uint32_t* packed) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  packed[i] = Pack<T>(pairs[i].x, pairs[i].y);
}

template <typename T>
__global__ void UnpackKernel(const uint32_t* packed, float2* pairs, uint32_t* again) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  pairs[i] = Unpack<T>(packed[i]);
  again[i] = Pack<T>(pairs[i].x, pairs[i].y);
}

__global__ void QuadTransposeKernel(uint4* rows) {
  const uint4 row = rows[threadIdx.x];
  uint32_t words[4] = {row.x, row.y, row.z, row.w};
  QuadTranspose(words);
  rows[threadIdx.x] = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void QuadReduceKernel(const float2* pairs, float2* largest, float2* sums) {
  const float2 pair = pairs[threadIdx.x];
  float x[2] = {pair.x, pair.y};
  sums[threadIdx.x] = make_float2(QuadSum(x[0]), QuadSum(x[1]));
  QuadMax(x);
  largest[threadIdx.x] = make_float2(x[0], x[1]);
}

__global__ void QuadMaxKernel(float4* values) {
  const float4 four = values[threadIdx.x];
  float x[4] = {four.x, four.y, four.z, four.w};
  QuadMax(x);
  values[threadIdx.x] = make_float4(x[0], x[1], x[2], x[3]);
}

// ---------------------------------------------------------------------------------------- partials

// A block a value; scales [blocks, 2]: to_half and from_half.
__global__ void HalfScaleKernel(const float* largest, float2* scales, float* scaled) {
  const HalfScale scale(largest[blockIdx.x]);
  scales[blockIdx.x] = make_float2(scale.to_half, scale.from_half);
  scaled[blockIdx.x] = largest[blockIdx.x] * scale.to_half;
}

// -------------------------------------------------------------------------------------- multiplies

// d [64 x 64] (+)= a [64 x 64] b [64 x 64]^T, with A in registers or in shared memory.
template <typename T, bool kRegisterA>
__global__ void MultiplyKernel(const T* a, const T* b, float* d, bool accumulate) {
  __shared__ SmemTile<T> a_tile, b_tile;
  FillTile(a_tile, a, kSide);
  FillTile(b_tile, b, kSide);
  FenceAsyncProxy();
  __syncthreads();
  uint32_t fragments[kSteps][4];
  if constexpr (kRegisterA) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) LoadFragmentA(fragments[k], a_tile, k);
  }
  float accumulator[32];
  ReadAccumulator(d, accumulator);
  KeepInRegisters(accumulator);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    const uint64_t step = k * SmemTile<T>::kStepAlongColumns;
    if constexpr (kRegisterA) {
      WgmmaM64N64RegA<T>(accumulator, fragments[k], b_tile.DescriptorAlongColumns() + step,
                         accumulate || k > 0);
    } else {
      WgmmaM64N64<T>(accumulator, a_tile.DescriptorAlongColumns() + step,
                     b_tile.DescriptorAlongColumns() + step, accumulate || k > 0);
    }
  }
  WgmmaCommit();
  WgmmaWait<0>();
  KeepInRegisters(accumulator);
  WriteAccumulator(d, accumulator);
}

// d [64 x 128] (+)= a [64 x 64] b [64 x 128].
template <typename T>
__global__ void MultiplyTransposedKernel(const T* a, const T* b, float* d, bool accumulate) {
  __shared__ SmemTile<T> a_tile, b_tiles[2];
  FillTile(a_tile, a, kSide);
  for (int n = 0; n < 2; ++n) FillTile(b_tiles[n], b + n * kSide, 2 * kSide);
  FenceAsyncProxy();
  __syncthreads();
  float accumulator[64];
  ReadAccumulator(d, accumulator);
  KeepInRegisters(accumulator);
  WgmmaFence();
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    WgmmaM64N128TransposedB<T>(
        accumulator, a_tile.DescriptorAlongColumns() + k * SmemTile<T>::kStepAlongColumns,
        b_tiles[0].DescriptorAlongRows() + k * SmemTile<T>::kStepAlongRows, accumulate || k > 0);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  KeepInRegisters(accumulator);
  WriteAccumulator(d, accumulator);
}

// ---------------------------------------------------------------------------------------- softmax

// scores [tiles, 64, 64] become weights; row r sees its first visible[r] keys. factors [tiles + 1,
// 64]: the last row is the final one. lse [2, 64]: in base 2, and as the public convention has it.
__global__ void SoftmaxKernel(float* scores, const int32_t* visible, float scale, int tiles,
                              float* factors, float* lse) {
  const int top = visible[FragmentRow()], bottom = visible[FragmentRow() + 8];
  OnlineSoftmax softmax;
  float factor[2];
  for (int t = 0; t < tiles; ++t) {
    float d[32];
    ReadAccumulator(scores + t * kSide * kSide, d);
    MaskFrom(d, top - t * kSide, bottom - t * kSide);
    softmax.RaiseReferences(d, scale * kLog2e, factor);
#pragma unroll
    for (int k = 0; k < 4; ++k) softmax.Exponentiate(d, scale * kLog2e, k);
    WriteAccumulator(scores + t * kSide * kSide, d);
    WriteRowValues(factors + t * kSide, factor);
  }
  float lse2[2];
  softmax.Finish(factor, lse2);
  WriteRowValues(factors + tiles * kSide, factor);
  WriteRowValues(lse, lse2);
  WriteRowValues(lse + kSide, {NaturalLse(lse2[0]), NaturalLse(lse2[1])});
}

// ------------------------------------------------------------------------------------------- host

// An array's copy on the device, which a kernel takes as a pointer; copied back at the end.
class OnDevice {
 public:
  explicit OnDevice(Array host) : host_(host) {
    cudaMalloc(&data_, host.bytes);
    cudaMemcpy(data_, host.data, host.bytes, cudaMemcpyHostToDevice);
  }
  ~OnDevice() {
    cudaMemcpy(host_.data, data_, host_.bytes, cudaMemcpyDeviceToHost);
    cudaFree(data_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  template <typename T>
  operator T*() const {  // NOLINT: implicit
    return static_cast<T*>(data_);
  }

 private:
  Array host_;
  void* data_ = nullptr;
};

// What Python gets: nullptr, or the error's text.
const char* Result(const ffi::Error& error) {
  static std::string message;
  message = error.message();
  return error.failure() ? message.c_str() : nullptr;
}

template <typename... Parameters, typename... Arguments>
const char* Launch(const LaunchShape& shape, void (*kernel)(Parameters...),
                   Arguments&&... arguments) {
  cudaDeviceSynchronize();
  ffi::Error error = CheckCuda(cudaGetLastError(), "copy to the device");
  if (error.success()) {
    error =
        LaunchOverlapped("launch", nullptr, shape, kernel, std::forward<Arguments>(arguments)...);
  }
  if (error.success()) error = CheckCuda(cudaDeviceSynchronize(), "kernel");
  return Result(error);
}

CUtensorMapDataType TensorMapType(bool bf16) {
  return bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
}

}  // namespace

extern "C" {

const char* barrier_phases(Array seen) {
  return Launch({.grid = 1, .block = 1}, BarrierPhasesKernel, OnDevice(seen));
}

const char* barrier_hand_over(Array received, int rounds) {
  return Launch({.grid = 1, .block = 64}, BarrierHandOverKernel, OnDevice(received), rounds);
}

const char* named_barrier(Array received, int rounds) {
  return Launch({.grid = 1, .block = 128}, NamedBarrierKernel, OnDevice(received), rounds);
}

// geometry i32[3, 4]: shape of the tensor, shape of the box, where it starts; fastest axis first.
const char* tma_load(Array tensor, bool bf16, Array geometry, Array out) {
  const auto g = static_cast<const int32_t*>(geometry.data);
  const auto u = reinterpret_cast<const uint32_t*>(g);
  const OnDevice data(tensor);
  CUtensorMap map;
  const ffi::Error error = EncodeTensorMap({.data = data,
                                            .type = TensorMapType(bf16),
                                            .shape = {u[0], u[1], u[2], u[3]},
                                            .box = {u[4], u[5], u[6], u[7]}},
                                           &map);
  if (error.failure()) return Result(error);
  return Launch({.grid = 1, .block = 128}, TmaLoadKernel, map, make_int4(g[8], g[9], g[10], g[11]),
                g[5] * g[6] * g[7], OnDevice(out));
}

// tensor [pages, 64, 64], out [rounds, blocks, 64, 64].
const char* tma_load_multicast(Array tensor, int pages, int rounds, int blocks, Array out) {
  const OnDevice data(tensor);
  CUtensorMap map;
  const ffi::Error error =
      EncodeTensorMap({.data = data,
                       .type = TensorMapType(true),
                       .shape = {kSide, 1, kSide, static_cast<uint64_t>(pages)},
                       .box = {kSide, 1, kSide / 2, 1}},
                      &map);
  if (error.failure()) return Result(error);
  return Launch({.grid = dim3(blocks), .block = 128, .cluster = 2}, MulticastKernel, map, rounds,
                OnDevice(out));
}

// value u64[1]; one launch a round, all with the same flags.
const char* global_flags(Array tiles, int rounds, int pairs, Array value, Array shared_tiles,
                         Array flags, Array received) {
  const OnDevice from(tiles), between(shared_tiles), flagged(flags), to(received);
  CUtensorMap map;
  const ffi::Error error =
      EncodeTensorMap({.data = between,
                       .type = TensorMapType(false),
                       .shape = {kSide, kSide, 1, static_cast<uint64_t>(pairs)},
                       .box = {kSide, kSide, 1, 1}},
                      &map);
  if (error.failure()) return Result(error);
  for (int round = 0; round < rounds; ++round) {
    const char* failure =
        Launch({.grid = dim3(2 * pairs), .block = kFlaggingWarps * kWarpSize}, GlobalFlagKernel,
               map, from, round, *static_cast<const Flag*>(value.data), between, flagged, to);
    if (failure != nullptr) return failure;
  }
  return nullptr;
}

const char* count(Array total, int blocks, Array seen) {
  return Launch({.grid = dim3(blocks), .block = 1}, CountKernel, OnDevice(total), OnDevice(seen));
}

const char* fragments(Array d, bool bf16, Array tile, Array a) {
  const auto run = [&](auto kernel) {
    return Launch({.grid = 1, .block = 128}, kernel, OnDevice(d), OnDevice(tile), OnDevice(a));
  };
  return bf16 ? run(FragmentsKernel<__nv_bfloat16>) : run(FragmentsKernel<__half>);
}

const char* pack(Array pairs, bool bf16, Array packed) {
  const unsigned count = packed.bytes / sizeof(uint32_t);
  const auto run = [&](auto kernel) {
    return Launch({.grid = count / 32, .block = 32}, kernel, OnDevice(pairs), OnDevice(packed));
  };
  return bf16 ? run(PackKernel<__nv_bfloat16>) : run(PackKernel<__half>);
}

const char* unpack(Array packed, bool bf16, Array pairs, Array again) {
  const unsigned count = packed.bytes / sizeof(uint32_t);
  const auto run = [&](auto kernel) {
    return Launch({.grid = count / 32, .block = 32}, kernel, OnDevice(packed), OnDevice(pairs),
                  OnDevice(again));
  };
  return bf16 ? run(UnpackKernel<__nv_bfloat16>) : run(UnpackKernel<__half>);
}

const char* quad_transpose(Array rows) {
  return Launch({.grid = 1, .block = 32}, QuadTransposeKernel, OnDevice(rows));
}

const char* quad_reduce(Array pairs, Array largest, Array sums) {
  return Launch({.grid = 1, .block = 32}, QuadReduceKernel, OnDevice(pairs), OnDevice(largest),
                OnDevice(sums));
}

const char* quad_max_of_four(Array values) {
  return Launch({.grid = 1, .block = 32}, QuadMaxKernel, OnDevice(values));
}

const char* half_scale(Array largest, Array scales, Array scaled) {
  const unsigned count = largest.bytes / sizeof(float);
  return Launch({.grid = count, .block = 1}, HalfScaleKernel, OnDevice(largest), OnDevice(scales),
                OnDevice(scaled));
}

const char* multiply(Array a, Array b, bool bf16, Array d, bool accumulate, bool register_a) {
  const auto run = [&](auto kernel) {
    return Launch({.grid = 1, .block = 128}, kernel, OnDevice(a), OnDevice(b), OnDevice(d),
                  accumulate);
  };
  if (register_a) {
    return bf16 ? run(MultiplyKernel<__nv_bfloat16, true>) : run(MultiplyKernel<__half, true>);
  }
  return bf16 ? run(MultiplyKernel<__nv_bfloat16, false>) : run(MultiplyKernel<__half, false>);
}

const char* multiply_transposed(Array a, Array b, bool bf16, Array d, bool accumulate) {
  const auto run = [&](auto kernel) {
    return Launch({.grid = 1, .block = 128}, kernel, OnDevice(a), OnDevice(b), OnDevice(d),
                  accumulate);
  };
  return bf16 ? run(MultiplyTransposedKernel<__nv_bfloat16>)
              : run(MultiplyTransposedKernel<__half>);
}

const char* softmax(Array scores, Array visible, float scale, int tiles, Array factors, Array lse) {
  return Launch({.grid = 1, .block = 128}, SoftmaxKernel, OnDevice(scores), OnDevice(visible),
                scale, tiles, OnDevice(factors), OnDevice(lse));
}

}  // extern "C"
