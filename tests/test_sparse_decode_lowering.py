"""The sparse decode op in programs for a GPU: text, and scratch memory once compiled."""

import re

import jax
import jax.numpy as jnp
import pytest
from lowering import SCHEDULE, SPARSE_DECODE, copies_in, custom_calls, struct, text_for_cuda

import jax_flashmla as fm

B, H_Q, TOPK, EXTRA_TOPK, PAGES = 4, 20, 133, 65, 1000


def structs_of(s_q, d_k, sharding=None):
    """Of all arrays of a call, by name."""

    def of(*shape, dtype=jnp.int32):
        return struct(shape, dtype, sharding=sharding)

    return {
        "q": of(B, s_q, H_Q, d_k, dtype=jnp.float16),
        "k_cache": of(PAGES, 48, 1, d_k, dtype=jnp.float16),
        "indices": of(B, s_q, TOPK),
        "topk_length": of(B, s_q),
        "extra_k_cache": of(PAGES, 3, 1, d_k, dtype=jnp.float16),
        "extra_indices_in_kvcache": of(B, s_q, EXTRA_TOPK),
        "extra_topk_length": of(B, s_q),
        "attn_sink": of(H_Q, dtype=jnp.float32),
    }


EXTRA = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length")


def sparse_call(given, **options):
    """The op as a function of the arrays of `structs_of`, with or without a schedule."""

    def run(arrays):
        schedule = ()
        if given:
            names = ("indices", "topk_length", *EXTRA[1:])
            lengths = fm.get_sparse_seqlens(*map(arrays.get, names))
            schedule = fm.get_mla_metadata(lengths, H_Q, 1)
        names = ("q", "k_cache")
        return fm.flash_mla_with_kvcache(
            *map(arrays.get, names), None, None, 512, *schedule, **options,
            **{name: x for name, x in arrays.items() if name not in names},
        )  # fmt: skip

    return run


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("s_q", "d_k"), [(1, 576), (3, 512)])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_text(extra, sink, given, s_q, d_k):
    """The operands in their order, the results, and attributes of one type each."""
    arrays = structs_of(s_q, d_k)
    for name in (*(() if extra else EXTRA), *(() if sink else ("attn_sink",))):
        del arrays[name]
    calls = custom_calls(text_for_cuda(sparse_call(given, softmax_scale=0.25), arrays))
    expected = {SPARSE_DECODE: 1, SCHEDULE: 1} if given else {SPARSE_DECODE: 1}
    assert {target: len(lines) for target, lines in calls.items()} == expected
    (line,) = calls[SPARSE_DECODE]
    words = {True: "true", False: "false"}
    assert set(re.findall(r"(\w+ = (?:true|false|[\d.e+-]+ : \w+))", line)) >= {
        f"has_extra = {words[extra]}",
        f"has_attn_sink = {words[sink]}",
        f"has_schedule = {words[given]}",
        "softmax_scale = 2.500000e-01 : f32",
    }
    lists = B * s_q
    operands, results = (
        re.findall(r"tensor<(\S+)>", types) for types in line.split(" : ")[-1].split(" -> ")
    )
    parts = 132
    assert operands == [
        f"{lists}x{H_Q}x{d_k}xf16",
        f"{PAGES}x48x1x{d_k}xf16",
        f"{lists}x{TOPK}xi32",
        f"{lists}xi32",
        *((f"{PAGES}x3x1x{d_k}xf16", f"{lists}x{EXTRA_TOPK}xi32", f"{lists}xi32") if extra else ()),
        *((f"1x{H_Q}xf32",) if sink else ()),
        *((f"{parts + 1}x2xi32", f"{lists}xi32", f"{lists + 1}xi32") if given else ()),
        *(() if given else (f"{lists}xi32",)),
    ]
    assert results == [
        f"{lists}x{H_Q}x512xf16",
        f"{B}x{H_Q}x{s_q}xf32",
        f"{2 * parts}x1x{H_Q}x512xf16",
        f"{2 * parts}x1x4x{H_Q}xf32",
        f"{2 * parts}x1x{H_Q}xf32",
        f"{parts}x1x1x32xi32",
    ]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("extra", [False, True])
def test_lengths_for_the_schedule_of_the_call(extra):
    """Without an extra list they are topk_length as it is: the call makes nothing but reshapes."""
    arrays = structs_of(2, 576)
    for name in () if extra else EXTRA:
        del arrays[name]
    text = text_for_cuda(sparse_call(False), arrays)
    found = set(re.findall(r"stablehlo\.(\w+)", text))
    (line,) = custom_calls(text)[SPARSE_DECODE]
    (names,) = re.findall(r"^\((.*?)\)", line)
    assert (names.split(", ")[3] == names.split(", ")[-1]) == (not extra)
    assert (found <= {"custom_call", "reshape", "broadcast_in_dim"}) == (not extra)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("pool", ["k_cache", "extra_k_cache"])
def test_pool_without_pages(pool):
    """There is nothing to read, so there is no kernel to call."""
    arrays = structs_of(1, 576)
    arrays[pool] = struct((0, *arrays[pool].shape[1:]), arrays[pool].dtype)
    run = sparse_call(False, implementation="cuda")
    assert not custom_calls(text_for_cuda(run, arrays))


@pytest.mark.usefixtures("kernels")
def test_one_schedule_for_all_layers():
    def f(arrays):
        lengths = fm.get_sparse_seqlens(arrays["indices"], arrays["topk_length"])
        schedule = fm.get_mla_metadata(lengths, H_Q, 1)
        layers = []
        for i in range(3):
            q = arrays["q"] * i
            lists = {name: arrays[name] for name in ("indices", "topk_length")}
            layers.append(
                fm.flash_mla_with_kvcache(q, arrays["k_cache"], None, None, 512, *schedule, **lists)
            )
        return layers

    calls = custom_calls(text_for_cuda(f, structs_of(1, 576)))
    assert {target: len(lines) for target, lines in calls.items()} == {
        SPARSE_DECODE: 3, SCHEDULE: 1
    }  # fmt: skip


@pytest.mark.parametrize(("h_q", "parts"), [(8, 132), (16, 132), (64, 132), (96, 66), (128, 66)])
@pytest.mark.usefixtures("compiled_kernels")
def test_workspace_is_all_the_kernel_needs(h_q, parts, h200):
    """Scratch follows the heads, not the batch, the lists or the cache; no cache is copied."""
    scratch = parts * (2 * h_q * (2 * 512 + 4 * 4 + 4) + -(-h_q // 64) * 16 * 8)
    for b, topk, pages in ((4, 133, 1000), (512, 2048, 500_000)):
        structs = (
            struct((b, 1, h_q, 576), sharding=h200),
            struct((pages, 64, 1, 576), sharding=h200),
            struct((b, 1, topk), jnp.int32, sharding=h200),
            struct((b,), jnp.int32, sharding=h200),
        )

        def run(q, k_cache, indices, lengths):
            return fm.flash_mla_with_kvcache(
                q, k_cache, None, None, 512, indices=indices, topk_length=lengths,
                implementation="cuda",
            )  # fmt: skip

        compiled = jax.jit(run).lower(*structs).compile()
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        assert scratch <= memory.temp_size_in_bytes <= scratch + 2**15
        assert re.findall(r'custom_call_target="(\w+)"', hlo) == [SPARSE_DECODE]
        assert not copies_in(hlo)
        assert "fusion(" not in hlo
