"""The PTX layer (cuda/sm90) and the online softmax, a primitive at a time, against numpy.

The kernels are in sm90_kernels.cu, compiled here with the compiler that the build would use.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "sm90_kernels.cu"
FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=sm_90a"),
    *("-Werror=all-warnings", "-Xcompiler=-Wall,-Werror,-fPIC", "-shared", "-cudart=static"),
]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernels are for Linux")
dtypes = pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])


def find_nvcc():
    """Looks where cmake/CudaCompiler.cmake does: CUDACXX, the wheels of this interpreter, PATH."""
    if nvcc := os.environ.get("CUDACXX"):
        return nvcc
    command = [sys.executable, ROOT / "cmake" / "find_cuda_wheels.py"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return f"{root}/bin/nvcc" if (root := done.stdout.strip()) else shutil.which("nvcc")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    nvcc = find_nvcc()
    assert nvcc, "there is no nvcc: install the extra [test], or set CUDACXX"
    path = tmp_path_factory.mktemp("sm90") / "sm90_kernels.so"
    folders = [f"-I{ROOT / 'cuda'}", "-isystem", jax.ffi.include_dir()]
    folders.append(f"-L{Path(nvcc).parent.parent / 'lib'}")  # nvcc itself looks in lib64
    command = [nvcc, *FLAGS, *folders, "-o", path, SOURCE]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return ctypes.CDLL(path, os.RTLD_NOW)


class Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


@pytest.fixture
def launch(library):
    """Calls a function of the library, which changes arrays in place."""

    def call(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        error = function(*map(to_c, arguments))
        assert error is None, error.decode()

    return call


def to_c(value):
    if not isinstance(value, np.ndarray):
        return ctypes.c_float(value) if isinstance(value, float) else int(value)
    assert value.flags.c_contiguous
    assert value.flags.writeable
    return Array(value.ctypes.data, value.nbytes)


def random(shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype)


def is_bf16(dtype):
    return dtype == ml_dtypes.bfloat16


def test_compiles_and_links(library):
    names = re.findall(r"^const char\* (\w+)\(Array", SOURCE.read_text(), flags=re.MULTILINE)
    assert names
    assert [name for name in names if not hasattr(library, name)] == []


# --------------------------------------------------------------------------------------- barriers


@pytest.mark.gpu
def test_barrier_phases(launch):
    seen = np.full(8, -1, np.int32)
    launch("barrier_phases", seen)
    # Fresh: the phase before the first counts as complete. Then two phases of two arrivals each,
    # and one that has its arrival but not its bytes.
    assert seen.tolist() == [1, 0, 0, 1, 0, 1, 0, 0]


@pytest.mark.gpu
def test_barriers_hand_a_buffer_over(launch):
    received = np.full((11, 32), -1, np.int32)
    launch("barrier_hand_over", received, len(received))
    np.testing.assert_array_equal(received, np.arange(11 * 32).reshape(11, 32)[:, ::-1])


@pytest.mark.gpu
def test_named_barriers(launch):
    received = np.full((8, 128), -1, np.int32)
    launch("named_barrier", received, len(received))
    expected = np.arange(8 * 128).reshape(8, 2, 2, 32)[:, :, ::-1].reshape(8, 128)
    expected[4:, 64:] = -1
    np.testing.assert_array_equal(received, expected)


# ------------------------------------------------------------------------------------ bulk copies


def box_of(tensor, start, box):
    """The part of `tensor` in a box that may lie outside of it; zeros there."""
    positions = [first + np.arange(size) for first, size in zip(start, box, strict=True)]
    inside = [(p >= 0) & (p < size) for p, size in zip(positions, tensor.shape, strict=True)]
    result = np.zeros(box, tensor.dtype)
    source = np.ix_(*(p[i] for p, i in zip(positions, inside, strict=True)))
    result[np.ix_(*inside)] = tensor[source]
    return result


PAGES = (3, 24, 2, 136), (1, 16, 1, 64)  # tensor and box: four boxes make a tile
ROWS = (3, 2, 40, 136), (1, 1, 64, 64)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize(
    ("layout", "start"),
    [
        pytest.param(PAGES, (0, 0, 0, 0), id="pages"),
        pytest.param(PAGES, (-1, 4, 1, 64), id="negative-page"),
        pytest.param(PAGES, (-9, 0, 0, 0), id="all-pages-negative"),
        pytest.param(PAGES, (2, 0, 1, 72), id="pages-past-the-end"),
        pytest.param(PAGES, (0, 16, 0, 0), id="rows-past-the-page"),
        pytest.param(PAGES, (0, -5, 1, 0), id="negative-row"),
        pytest.param(PAGES, (0, 0, -1, 0), id="negative-head"),
        pytest.param(PAGES, (0, 0, 2, 0), id="head-past-the-end"),
        pytest.param(PAGES, (0, 0, 0, 104), id="columns-past-the-end"),
        pytest.param(PAGES, (0, 0, 0, -24), id="negative-columns"),
        pytest.param(ROWS, (1, 1, 0, 64), id="fewer-rows-than-the-box"),
        pytest.param(ROWS, (2, 0, 39, 8), id="the-last-row"),
        pytest.param(ROWS, (2, 0, 40, 0), id="no-row"),
    ],
)
def test_tma_load(layout, start, dtype, launch):
    shape, box = layout
    tensor = random(shape, dtype)
    tile = np.empty((64, 64), dtype)
    geometry = np.array([shape, box, start], np.int32)[:, ::-1].copy()
    launch("tma_load", tensor, is_bf16(dtype), geometry, tile)
    count = 64 // np.prod(box[:-1])
    boxes = [box_of(tensor, (start[0] + i, *start[1:]), box) for i in range(count)]
    np.testing.assert_array_equal(
        tile.view(np.uint16), np.stack(boxes).reshape(64, 64).view(np.uint16)
    )


@pytest.mark.gpu
def test_tma_load_multicast(launch):
    rounds, blocks = 5, 6
    pages = random((rounds, blocks // 2, 64, 64), ml_dtypes.bfloat16).view(np.uint16)
    received = np.zeros((rounds, blocks, 64, 64), np.uint16)
    launch("tma_load_multicast", pages, rounds * blocks // 2, rounds, blocks, received)
    np.testing.assert_array_equal(received, np.repeat(pages, 2, axis=1))


# ----------------------------------------------------------------------------------- global flags


@pytest.mark.gpu
def test_global_flags(launch):
    """What other blocks write arrives complete, whatever was in the flags, every time."""
    rounds, pairs = 20, 12
    tiles = random((rounds, pairs, 64, 64), np.float16).view(np.uint16)
    received, shared_tiles = np.zeros_like(tiles), np.zeros_like(tiles[0])
    value = np.array([0x0123456789ABCDEF], np.uint64)
    half = np.uint64(0xFFFFFFFF)
    flags = np.tile(np.concatenate([value & half, value & ~half, ~value, 0 * value]), (pairs, 1))
    launch("global_flags", tiles, rounds, pairs, value, shared_tiles, flags, received)
    np.testing.assert_array_equal(received, tiles)
    np.testing.assert_array_equal(flags, 0)


@pytest.mark.gpu
def test_counts(launch):
    """A count goes on from its old value, and wraps around past the largest one."""
    start, blocks = np.array([2**32 - 100], np.uint32), 300
    total, seen = start.copy(), np.zeros(blocks, np.uint32)
    launch("count", total, blocks, seen)
    assert (total - start).tolist() == [blocks * (blocks + 1) // 2]
    assert (seen - start >= 1 + np.arange(blocks)).all()
    assert (seen - start <= total - start).all()


# -------------------------------------------------------------------------------------- fragments


@pytest.mark.gpu
@dtypes
def test_fragments(dtype, launch):
    matrix = random((64, 64))
    tile, fragments = np.empty((64, 64), dtype), np.empty((4, 128, 4, 2), dtype)
    launch("fragments", matrix, is_bf16(dtype), tile, fragments)
    rounded = matrix.astype(dtype)
    np.testing.assert_array_equal(tile, rounded)
    step, thread, register, half = np.indices(fragments.shape)
    warp, lane = thread // 32, thread % 32
    row = 16 * warp + lane // 4 + 8 * (register % 2)
    column = 16 * step + 8 * (register // 2) + 2 * (lane % 4) + half
    np.testing.assert_array_equal(fragments, rounded[row, column])


@pytest.mark.gpu
@dtypes
def test_pack_rounds_to_nearest_even(dtype, launch):
    ties = [1 + k * 2.0**-bits for bits in (8, 11) for k in (1, 3)]
    special = [0.0, -0.0, np.inf, -np.inf, 65504, 65519, 65520, 3e38, 6e-8, 2.0**-25, *ties]
    pairs = random((512, 2)) * 10.0 ** random((512, 2), seed=1) * 100
    pairs = pairs.astype(np.float32)
    pairs.reshape(-1)[: len(special)] = special
    packed = np.empty((512, 2), dtype)
    launch("pack", pairs, is_bf16(dtype), packed)
    with np.errstate(over="ignore", under="ignore"):
        expected = pairs.astype(dtype)
    np.testing.assert_array_equal(packed.view(np.uint16), expected.view(np.uint16))


@pytest.mark.gpu
@dtypes
def test_unpack(dtype, launch):
    """All values in both halves. Pack turns the results back into the same values."""
    low = np.arange(2**16, dtype=np.uint32)
    packed = low | low[::-1] << 16
    pairs, again = np.empty((len(packed), 2), np.float32), np.empty_like(packed)
    launch("unpack", packed, is_bf16(dtype), pairs, again)
    with np.errstate(invalid="ignore"):  # some NaNs are of the signaling kind
        expected = packed.view(dtype).astype(np.float32).reshape(pairs.shape)
    np.testing.assert_array_equal(pairs, expected)
    numbers = ~np.isnan(expected).reshape(-1)
    np.testing.assert_array_equal(again.view(np.uint16)[numbers], packed.view(np.uint16)[numbers])


@pytest.mark.gpu
def test_quad_transpose(launch):
    rows = np.arange(32 * 4, dtype=np.uint32).reshape(8, 4, 4)
    expected = rows.swapaxes(1, 2).copy()
    launch("quad_transpose", rows)
    np.testing.assert_array_equal(rows, expected)


@pytest.mark.gpu
def test_quad_max_and_sum(launch):
    pairs = np.random.default_rng(0).integers(-99, 99, (8, 4, 2)).astype(np.float32)
    pairs[2, 1:, 0] = pairs[5, :, 1] = -np.inf
    largest, sums = np.empty_like(pairs), np.empty_like(pairs)
    launch("quad_reduce", pairs, largest, sums)
    for actual, reduce in (largest, np.max), (sums, np.sum):
        expected = np.broadcast_to(reduce(pairs, axis=1, keepdims=True), pairs.shape)
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.gpu
def test_quad_max_of_four(launch):
    values = random((8, 4, 4))
    values[3, :, 1], values[6, 1:, 2] = -np.inf, -np.inf
    expected = np.broadcast_to(values.max(axis=1, keepdims=True), values.shape)
    launch("quad_max_of_four", values)
    np.testing.assert_array_equal(values, expected)


# ---------------------------------------------------------------------------------------- partials


@pytest.mark.gpu
def test_half_scale(launch):
    """Two powers of 2 with product 1. Scaled values use fp16's range but do not overflow it."""
    smallest = 2.0**-112
    exponents = np.arange(-149, 128)
    powers = np.ldexp(1.0, exponents)
    inside = powers * np.random.default_rng(0).uniform(1, 2, len(powers))
    info = np.finfo(np.float32)
    edges = [0, info.max, info.tiny, info.smallest_subnormal, smallest]
    largest = np.concatenate([powers, inside, edges]).astype(np.float32)
    below = np.nextafter(largest, np.float32(0))
    largest = np.concatenate([largest, below])
    scales, scaled = np.empty((len(largest), 2), np.float32), np.empty_like(largest)
    launch("half_scale", largest, scales, scaled)
    to_half, from_half = scales.astype(np.float64).T
    for scale in to_half, from_half:
        assert (np.frexp(scale)[0] == 0.5).all()
        assert (scale >= info.tiny).all()
    np.testing.assert_array_equal(to_half * from_half, 1)
    np.testing.assert_array_equal(scaled, largest * to_half)
    assert (scaled < 2**15).all()
    assert (scaled[largest >= smallest] >= 2**14).all()


# -------------------------------------------------------------------------------------- multiplies


def check_product(actual, a, b, before):
    """Against float64, to within float32 rounding of the products' magnitudes."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    tolerance = 1e-5 * np.max(abs(a) @ abs(b))
    np.testing.assert_allclose(actual, before + a @ b, rtol=0, atol=tolerance)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("registers", [False, True], ids=["shared-a", "register-a"])
def test_wgmma_m64n64(registers, accumulate, dtype, launch):
    a, b, d = random((64, 64), dtype), random((64, 64), dtype, seed=1), random((64, 64), seed=2)
    before = d * accumulate
    launch("multiply", a, b, is_bf16(dtype), d, accumulate, registers)
    check_product(d, a, b.T, before)


@pytest.mark.gpu
@dtypes
@pytest.mark.parametrize("accumulate", [False, True])
def test_wgmma_m64n128_transposed_b(accumulate, dtype, launch):
    a, b, d = random((64, 64), dtype), random((64, 128), dtype, seed=1), random((64, 128), seed=2)
    before = d * accumulate
    launch("multiply_transposed", a, b, is_bf16(dtype), d, accumulate)
    check_product(d, a, b, before)


# ---------------------------------------------------------------------------------------- softmax


@pytest.mark.gpu
def test_online_softmax(launch):
    scale = 0.7
    # The centers of the tiles' scores. The second one exceeds the first by less than the lag.
    around = np.array([0, 1, 30, -20, 60], np.float32)
    tiles = len(around)
    scores = 3 * random((tiles, 64, 64)) + around[:, None, None]
    scores[0, 20] = scores[2, 29] = -np.inf  # no key in this row's tile
    visible = np.full(64, tiles * 64, np.int32)
    visible[:5] = [0, 1, 64, 65, 200]
    visible[8:13] = [0, 2, 63, 319, 130]
    visible[63] = 0
    keys = np.arange(tiles * 64).reshape(tiles, 1, 64)
    logits = np.where(keys < visible[:, None], scale * scores.astype(np.float64), -np.inf)

    factors = np.empty((tiles + 1, 64), np.float32)
    lse2, lse = both = np.empty((2, 64), np.float32)
    weights = scores
    launch("softmax", weights, visible, scale, tiles, factors, both)

    seen = visible > 0
    largest = np.where(seen, logits.max(axis=(0, 2)), 0)
    exponentials = np.exp(logits - largest[:, None])
    total = exponentials.sum(axis=(0, 2))
    expected = exponentials / np.where(seen, total, 1)[:, None]
    expected_lse = (largest + np.log(total, where=seen, out=np.zeros(64)))[seen]

    # A tile's weights are multiplied with all factors that come after.
    later = np.cumprod(factors[::-1].astype(np.float64), axis=0)[::-1][1:]
    np.testing.assert_allclose(weights * later[:, :, None], expected, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(lse[seen], expected_lse, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse2[seen], expected_lse / np.log(2), rtol=1e-5, atol=1e-5)
    assert (lse[~seen] == np.inf).all()
    assert (lse2[~seen] == -np.inf).all()
    assert (factors[-1, ~seen] == 0).all()
    # The reference lags behind, by a factor of 2^8 at most.
    assert 1 < weights.max() < 2**8 * 1.001
    unmasked = [row for row in np.flatnonzero(visible == tiles * 64) if row not in (20, 29)]
    raised = (factors[1:-1] != 1)[:, unmasked]
    assert (raised == np.array([[False], [True], [False], [True]])).all()
