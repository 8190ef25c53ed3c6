"""The rates that the card reaches in this run: reading memory, and bf16 matrix products."""

import statistics

import jax
import jax.numpy as jnp

from core.power import attempt

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


def read_gbs(pool, repeats=10):
    """Read bandwidth over `pool` in GB/s, by a kernel that only reads.

    It has 4 blocks an SM and 8 loads of 16 bytes in flight. CuPy runs it.
    """
    import cupy

    kernel = cupy.RawKernel(STREAM_KERNEL, "stream_read")
    sms = cupy.cuda.runtime.getDeviceProperties(0)["multiProcessorCount"]
    sink = cupy.zeros(1, cupy.uint32)
    pointer = cupy.uint64(jax.block_until_ready(pool).unsafe_buffer_pointer())
    arguments = (pointer, cupy.uint64(pool.nbytes // 16), sink)
    seconds = []
    for _ in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        kernel((4 * sms,), (512,), arguments)
        end.record()
        end.synchronize()
        seconds.append(1e-3 * cupy.cuda.get_elapsed_time(start, end))
    return round(pool.nbytes / statistics.median(seconds[2:]) / 1e9)


def matmul_tflops(size=MATMUL_SIZE, products=20, repeats=5):
    """bf16 size^3 matrix products of PyTorch on random data, in TFLOP/s."""
    import torch

    keys = jax.random.split(jax.random.key(1), 4)
    drawn = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys]
    a, b, c, d = (torch.from_dlpack(x) for x in jax.block_until_ready(drawn))
    pairs, out, seconds = [(a, b), (c, d)], torch.empty_like(a), []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for i in range(products):
            torch.matmul(*pairs[i % 2], out=out)
        end.record()
        end.synchronize()
        seconds.append(1e-3 * start.elapsed_time(end) / products)
    return round(2 * size**3 / statistics.median(seconds[1:]) / 1e12)


def measure(pool):
    """The rates of this machine, now; None where CuPy or PyTorch is missing."""
    return {
        "read_gbs": attempt(lambda: read_gbs(pool), "read bandwidth"),
        "matmul_bf16_tflops": attempt(matmul_tflops, "matrix products"),
    }
