"""The two ceilings of the chip, measured: reading memory, and bf16 matrix products."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp

MATMUL_SIZE = 8192

STREAM_KERNEL = r"""
extern "C" __global__ __launch_bounds__(512) void stream_read(
    const uint4* data, unsigned long long count, unsigned* sink) {
  const unsigned long long stride = 1ull * gridDim.x * blockDim.x;
  unsigned long long i = 1ull * blockIdx.x * blockDim.x + threadIdx.x;
  unsigned seen = 0;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) v[k] = __ldcs(data + i + k * stride);
#pragma unroll
    for (int k = 0; k < 8; ++k) seen ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
  }
  for (; i < count; i += stride) {
    const uint4 v = __ldcs(data + i);
    seen ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (seen == 0x9e3779b9u) *sink = seen;
}
"""


def _cupy_read_seconds(pool, repeats):
    """A kernel of our own that only reads: 4 blocks an SM, 8 loads of 16 bytes in flight."""
    import cupy

    kernel = cupy.RawKernel(STREAM_KERNEL, "stream_read")
    sms = cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
    sink = cupy.zeros(1, cupy.uint32)
    pointer = cupy.uint64(pool.unsafe_buffer_pointer())
    arguments = (pointer, cupy.uint64(pool.nbytes // 16), sink)
    seconds = []
    for _ in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel((4 * sms,), (512,), arguments)
        end.record()
        end.synchronize()
        seconds.append(1e-3 * cupy.cuda.get_elapsed_time(start, end))
    return seconds[2:]


def _jax_read_seconds(pool, repeats):
    """XLA's reduction, where CuPy is missing; it reaches some 10% less."""
    read = jax.jit(lambda x: jnp.max(x, axis=0))
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        read(pool).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def read_gbs(pool, repeats=10):
    """Read bandwidth in GB/s over `pool`, and how it was measured."""
    pool.block_until_ready()
    try:
        seconds, method = _cupy_read_seconds(pool, repeats), "streaming kernel"
    except Exception as error:
        print(f"no streaming kernel ({type(error).__name__}: {error})", flush=True)
        seconds, method = _jax_read_seconds(pool, repeats), "XLA reduction"
    return pool.nbytes / statistics.median(seconds) / 1e9, method


@functools.partial(jax.jit, donate_argnums=0, static_argnames="calls", keep_unused=True)
def _matmuls(products, pairs, calls):
    return [pairs[i % len(pairs)][0] @ pairs[i % len(pairs)][1] for i in range(calls)]


def _torch_matmul_seconds(pairs, products, repeats):
    import torch

    jax.block_until_ready(pairs)
    pairs = [[torch.from_dlpack(x) for x in pair] for pair in pairs]
    out = torch.empty_like(pairs[0][0])
    seconds = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(products):
            torch.matmul(*pairs[i % len(pairs)], out=out)
        end.record()
        end.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end) / products)
    return seconds[1:]


def _jax_matmul_seconds(pairs, products, repeats):
    outs = [jnp.zeros_like(pairs[0][0]) for _ in range(products)]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        outs = _matmuls(outs, pairs, products)
        jax.block_until_ready(outs)
        seconds.append((time.perf_counter() - start) / products)
    return seconds[1:]


def matmul_tflops(size=MATMUL_SIZE, products=20, repeats=5):
    """bf16 size^3 matrix products in TFLOP/s on random data, and how it was measured."""
    keys = jax.random.split(jax.random.key(1), 4)
    draw = jax.jit(lambda key: jax.random.normal(key, (size, size), jnp.bfloat16))
    pairs = [[draw(keys[0]), draw(keys[1])], [draw(keys[2]), draw(keys[3])]]
    try:
        seconds, method = _torch_matmul_seconds(pairs, products, repeats), "torch"
    except Exception as error:
        print(f"no torch matmul ({type(error).__name__}: {error})", flush=True)
        seconds, method = _jax_matmul_seconds(pairs, min(products, 4), repeats), "XLA"
    return 2 * size**3 / statistics.median(seconds) / 1e12, method


def measure(pool, matmul_size=MATMUL_SIZE):
    """The ceilings of this machine, now."""
    read, read_method = read_gbs(pool)
    tflops, matmul_method = matmul_tflops(matmul_size)
    return {
        "read_gbs": round(read),
        "read_method": read_method,
        "matmul_bf16_tflops": round(tflops),
        "matmul_method": matmul_method,
    }
