"""The references of decode work in chunks: some tokens of some sequences, bounded in bytes."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, Case, SparseCase
from jax import export
from lowering import struct

from jax_flashmla.reference.dense_decode import decode
from jax_flashmla.reference.sparse_decode import sparse_decode

SCALE = D_K**-0.5
MB = 10**6

# Bytes of a chunk, and the most tokens of a sequence in it. A token takes 1200 bytes or more.
CHUNKS = {
    "all at once": (2**26, 32768),
    "groups of sequences": (2_900_000, 32768),
    "some tokens of all sequences": (2**26, 100),
    "some tokens of some sequences": (500_000, 70),
    "some tokens of a sequence": (250_000, 32768),
    "a token or a page at a time": (1, 1),
}


def dense(q, k_cache, table, lengths, sink):
    return decode(
        q, k_cache, table, lengths, attn_sink=sink,
        head_dim_v=D_V, softmax_scale=SCALE, causal=True,
    )  # fmt: skip


def sparse(*arrays):
    return sparse_decode(*arrays, head_dim_v=D_V, softmax_scale=SCALE)


def dense_call():
    """(function, arrays, expected results); sequences of very different lengths."""
    lengths = [200, 0, 33, 130, 7, 500, 64]
    inputs = cases.make_inputs(Case(7, 2, 0, 4, 2, page=16), lengths=lengths, max_blocks=37)
    sink = np.linspace(-2, 2, 4, dtype=np.float32)
    expected = cases.expected_decode(inputs, causal=True, attn_sink=sink)
    return dense, (*inputs.device_arrays(), jnp.asarray(sink)[None]), expected


def sparse_call():
    lengths, extra_lengths = (
        np.random.default_rng(i).integers(-5, n + 5, (7, 2)) for i, n in enumerate((300, 110))
    )
    inputs = cases.make_sparse_inputs(
        SparseCase(7, 2, 3, 300, 110, extra_page=2), lengths=lengths, extra_lengths=extra_lengths
    )
    inputs = inputs.replace(attn_sink=np.linspace(-2, 2, 3, dtype=np.float32))
    expected = cases.expected_sparse_decode(inputs)
    fields = (
        inputs.q, inputs.k_cache, inputs.indices, inputs.topk_length, inputs.extra_k_cache,
        inputs.extra_indices, inputs.extra_topk_length, inputs.attn_sink[None],
    )  # fmt: skip
    return sparse, tuple(map(jnp.asarray, fields)), expected


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("make", [dense_call, sparse_call])
def test_any_chunks_give_the_result(make, chunks, set_chunks):
    set_chunks(*CHUNKS[chunks])
    function, arrays, expected = make()
    jitted = jax.jit(lambda *arrays: function(*arrays))
    looped = "while" in jitted.lower(*arrays).as_text()
    assert looped == (chunks != "all at once")
    cases.assert_decode_close(jitted(*arrays), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [dense_call, sparse_call])
def test_any_chunks_on_a_gpu(make, set_chunks):
    """There, products of 16-bit values have 16-bit operands."""
    function, arrays, expected = make()
    for chunks in CHUNKS.values():
        set_chunks(*chunks)
        cases.assert_decode_close(jax.jit(lambda *arrays: function(*arrays))(*arrays), expected)


@pytest.mark.parametrize("chunks", ["all at once", "some tokens of all sequences"])
@pytest.mark.parametrize("make", [dense_call, sparse_call])
def test_symbolic_batch(make, chunks, set_chunks):
    set_chunks(*CHUNKS[chunks])
    function, arrays, expected = make()
    (b,) = export.symbolic_shape("b")
    structs = [struct((b, *x.shape[1:]) if len(x) == 7 else x.shape, x.dtype) for x in arrays]
    program = export.export(jax.jit(function))(*structs)
    cases.assert_decode_close(program.call(*arrays), expected)


def large_call(kind, b, tokens, h_q, dtype, place=struct):
    """(function, structs) of a call with `tokens` tokens of each sequence or entries of a list."""
    q, page = place((b, 1, h_q, D_K), dtype), 64
    if kind == "dense":
        pages = place((b * tokens // page, page, 1, D_K), dtype)
        rest = (place((b, tokens // page), jnp.int32), place((b,), jnp.int32))
        sink = place((1, h_q), jnp.float32)
        return dense, (q, pages, *rest, sink)
    pages = place((4000, page, 1, D_K), dtype)
    return sparse, (q, pages, place((b, 1, tokens), jnp.int32), place((b, 1), jnp.int32))


LARGE = [
    ("dense", 128, 4096, 16, "bfloat16"),
    ("dense", 128, 4096, 128, "bfloat16"),
    ("dense", 64, 8192, 128, "bfloat16"),
    ("dense", 1, 32768, 128, "bfloat16"),
    ("dense", 2, 2**20, 16, "float16"),
    ("dense", 64, 8192, 16, "float32"),
    ("sparse", 1, 2048, 128, "bfloat16"),
    ("sparse", 128, 2048, 128, "bfloat16"),
    ("sparse", 4096, 2048, 16, "bfloat16"),
    ("sparse", 128, 2048, 16, "float32"),
]


@pytest.mark.parametrize("call", LARGE, ids=str)
def test_temporary_memory_is_bounded(call, h200):
    """Compiled for an H200; the gathered tokens of 128 x 4096 alone would take 604 MB."""
    function, structs = large_call(*call, place=functools.partial(struct, sharding=h200))
    compiled = jax.jit(function).lower(*structs).compile()
    results = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(compiled.out_info))
    assert compiled.memory_analysis().temp_size_in_bytes <= 80 * MB + 2 * results
    hlo = compiled.as_text()
    if call[-1] != "float32":
        assert_tokens_are_written_once(hlo, min(16384, call[1] * call[2]))
    # A GPU waits for its host in each step of a loop whose length is not known beforehand.
    open_loops = len(re.findall(r" while\(", hlo)) - hlo.count('"known_trip_count"')
    assert open_loops == (1 if call[2] > 32768 else 0)


def assert_tokens_are_written_once(hlo, tokens):
    """Those of a chunk, `tokens` or more, stay 16 bit, and one instruction writes them."""
    writes = 0
    for result, name in re.findall(
        r"^ *(?:ROOT )?%\S+ = (.*?) (fusion|copy|transpose|convert|select|gather)\(",
        outside_fusions(hlo),
        re.MULTILINE,
    ):
        for dtype, dims in re.findall(r"(\w+)\[([\d,]+)\]", result):
            sizes = list(map(int, dims.split(",")))
            if D_K in sizes and math.prod(sizes) >= tokens * D_K:
                assert dtype in ("bf16", "f16"), (result, name)
                writes += 1
    assert writes == 1


def outside_fusions(hlo):
    """The computations that run as they stand, without the bodies of fusions."""
    computations = re.split(r"\n\n", hlo)
    return "\n".join(c for c in computations if not re.match(r"%?(fused|wrapped|gemm)", c.strip()))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("platform", "dtype", "operands", "precision"),
    [
        ("cuda", "bfloat16", "bf16", "DEFAULT"),
        ("cuda", "float16", "f16", "DEFAULT"),
        ("cuda", "float32", "f32", "HIGHEST"),
        ("cpu", "bfloat16", "f32", "HIGHEST"),
        ("cpu", "float32", "f32", "HIGHEST"),
    ],
)
def test_products(platform, dtype, operands, precision, kind):
    """Sums are float32. On a GPU products of 16-bit values have 16-bit operands."""
    function, structs = large_call(kind, 128, 4096, 16, dtype)
    text = jax.jit(function).trace(*structs).lower(lowering_platforms=(platform,)).as_text()
    found = re.findall(r"dot_general .*", text)
    assert len(found) == 2
    for line in found:
        assert re.findall(r"x([a-z]+\d+)>", line) == [operands, operands, "f32"], line
        assert ("HIGHEST" in line) == (precision == "HIGHEST"), line
