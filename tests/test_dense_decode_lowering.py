"""The dense decode op in programs for a GPU: text, and scratch memory once compiled."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import D_K, D_V
from dense_calls import decode, decode_structs
from lowering import (
    DECODE,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    custom_calls,
    struct,
    text_for_cuda,
)

import jax_flashmla as fm


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["auto", "cuda"])
@pytest.mark.parametrize("given", [False, True])
def test_decode_text(given, implementation):
    """A schedule that is not given is made by the same call, which needs no scratch for it."""

    def f(*args):
        options = {"causal": True, "softmax_scale": 0.25, "implementation": implementation}
        if given:
            schedule = fm.get_mla_metadata(args[3], 256, 1, implementation=implementation)
            options["schedule"] = schedule
        return decode(*args, **options)

    text = text_for_cuda(f, *decode_structs(b=4, s_q=2, h_q=128))
    calls = custom_calls(text)
    target = DECODE if given else SCHEDULE_AND_DECODE
    expected = {DECODE: 1, SCHEDULE: 1} if given else {SCHEDULE_AND_DECODE: 1}
    assert {target: len(lines) for target, lines in calls.items()} == expected
    (line,) = calls[target]
    assert "causal = true" in line
    assert "softmax_scale = 2.500000e-01 : f32" in line
    operands, results = line.split(" : ")[-1].split(" -> ")
    parts = 132 // 4
    schedule = [f"{parts + 1}x2xi32", "4xi32", "5xi32"]
    assert re.findall(r"tensor<(\S+)>", operands) == [
        "4x1x256x576xbf16",
        "100x64x1x576xbf16",
        "4x10xi32",
        "4xi32",
        *(schedule if given else []),
    ]
    assert re.findall(r"tensor<(\S+)>", results) == [
        "4x1x256x512xbf16",
        "4x128x2xf32",
        f"{2 * parts}x1x256x512xf16",
        f"{2 * parts}x1x4x256xf32",
        f"{2 * parts}x1x256xf32",
        f"{parts}x1x4x32xi32",
    ]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("s_q", [1, 4])
@pytest.mark.parametrize(
    ("given", "target", "count"), [(False, SCHEDULE_AND_DECODE, 5), (True, DECODE, 8)]
)
def test_causal_offset_text(given, target, count, s_q):
    """It is one more operand. With it the mask matters even for one query."""

    def f(*args):
        schedule = fm.get_mla_metadata(args[3], s_q * 16, 1) if given else (None, None)
        return decode(*args[:4], schedule=schedule, causal=True, causal_offset=args[4])

    text = text_for_cuda(f, *decode_structs(s_q=s_q), struct((4,), jnp.int32))
    (line,) = custom_calls(text)[target]
    assert "causal = true" in line
    operands = re.findall(r"tensor<(\S+)>", line.split(" : ")[-1].split(" -> ")[0])
    assert len(operands) == count
    assert operands[-1] == "4xi32"
    (names,) = re.findall(r"^\((.*?)\)", line)
    assert names.split(", ")[-1] == "%arg4"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_attn_sink_text(given, offset):
    """It is the last operand, with an attribute that calls without a sink do not have."""

    def f(sink, *args):
        schedule = fm.get_mla_metadata(args[3], 16, 1) if given else (None, None)
        causal = {"causal": True, "causal_offset": args[4]} if offset else {}
        return decode(*args[:4], schedule=schedule, attn_sink=sink, **causal)

    structs = *decode_structs(), *([struct((4,), jnp.int32)] if offset else [])
    target = DECODE if given else SCHEDULE_AND_DECODE
    without = custom_calls(text_for_cuda(lambda *args: f(None, *args), *structs))
    assert "has_attn_sink" not in without[target][0]
    (line,) = custom_calls(text_for_cuda(f, struct((16,), jnp.float32), *structs))[target]
    assert "has_attn_sink = true" in line
    operands, earlier = (
        re.findall(r"tensor<(\S+)>", text.split(" : ")[-1].split(" -> ")[0])
        for text in (line, without[target][0])
    )
    assert operands == [*earlier, "1x16xf32"]


@pytest.mark.usefixtures("kernels")
def test_without_rope_columns():
    """The kernel also takes d_k 512."""
    structs = decode_structs(d_k=512)
    calls = custom_calls(text_for_cuda(functools.partial(decode, implementation="cuda"), *structs))
    (line,) = calls[SCHEDULE_AND_DECODE]
    operands, results = line.split(" : ")[-1].split(" -> ")
    assert re.findall(r"tensor<(\S+)>", operands)[:2] == ["4x1x16x512xbf16", "100x64x1x512xbf16"]
    assert re.findall(r"tensor<(\S+)>", results)[0] == "4x1x16x512xbf16"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("s_q", "h_kv"), [(1, 1), (4, 1), (1, 8), (2, 2)])
def test_layout_of_the_queries(s_q, h_kv):
    """The kernel's layout is a reshape of q's, except with several KV heads and several queries."""
    text = text_for_cuda(decode, *decode_structs(s_q=s_q, h_q=16, h_kv=h_kv))
    assert ("stablehlo.transpose" in text) == (s_q > 1 and h_kv > 1)
    assert f"tensor<4x{h_kv}x{s_q * 16 // h_kv}x576xbf16>" in text


@pytest.mark.usefixtures("kernels")
def test_one_schedule_for_all_layers():
    def f(q, k_cache, table, lengths):
        schedule = fm.get_mla_metadata(lengths, 16, 1)
        return [decode(q * i, k_cache, table, lengths, schedule=schedule) for i in range(3)]

    text = text_for_cuda(f, *decode_structs())
    calls = custom_calls(text)
    assert {target: len(lines) for target, lines in calls.items()} == {DECODE: 3, SCHEDULE: 1}


def partial_bytes(rows):
    """Bytes of one part: two partial results (fp16, scales, lse), and flags of each row tile."""
    return 2 * rows * (2 * D_V + 4 * 4 + 4) + -(-rows // 64) * 16 * 8


@pytest.mark.parametrize(("s_q", "h_q"), [(1, 8), (1, 16), (1, 128), (2, 128), (4, 128)])
@pytest.mark.usefixtures("compiled_kernels")
def test_workspace_is_all_the_kernel_needs(s_q, h_q, h200):
    """Scratch follows heads and queries, not the batch, the table or the cache; as documented."""
    rows = s_q * h_q
    parts = 132 // -(-rows // 64)
    scratch = parts * partial_bytes(rows)
    for b, width, pages in ((4, 10, 1000), (512, 16384, 500_000)):
        structs = (
            struct((b, s_q, h_q, D_K), sharding=h200),
            struct((pages, 64, 1, D_K), sharding=h200),
            struct((b, width), jnp.int32, sharding=h200),
            struct((b,), jnp.int32, sharding=h200),
        )
        compiled = jax.jit(lambda *a: decode(*a, implementation="cuda")).lower(*structs).compile()
        memory = compiled.memory_analysis()
        assert scratch <= memory.temp_size_in_bytes <= scratch + 2**15
        targets = re.findall(r'custom_call_target="(\w+)"', compiled.as_text())
        assert targets == [SCHEDULE_AND_DECODE]
    notes = Path(__file__).parent.parent / "docs/dense_decode.md"
    lines = re.findall(r"^\| (?:h_q · s_q|MB) \|(.*)\|$", notes.read_text("utf-8"), re.MULTILINE)
    documented = dict(zip(*(map(str.strip, line.split("|")) for line in lines), strict=True))
    assert documented[str(rows)] == f"{scratch / 1e6:.1f}"


@pytest.mark.parametrize(("b", "h_q"), [(1, 16), (32, 16), (32, 128)])
@pytest.mark.usefixtures("compiled_kernels")
def test_workspace_of_fixed_splits(b, h_q, h200):
    """Scratch follows the splits that all sequences may have; as documented."""
    structs = (
        struct((b, 1, h_q, D_K), sharding=h200),
        struct((1000, 64, 1, D_K), sharding=h200),
        struct((b, 512), jnp.int32, sharding=h200),
        struct((b,), jnp.int32, sharding=h200),
    )

    def step(*arrays):
        options = {"fixed_split_size": 2048, "max_seqlen": 32768, "implementation": "cuda"}
        schedule = fm.get_mla_metadata(arrays[3], h_q, 1, **options)
        return decode(*arrays, schedule=schedule, implementation="cuda")

    compiled = jax.jit(step).lower(*structs).compile()
    assert set(re.findall(r"jax_flashmla_\w+", compiled.as_text())) == {DECODE}
    scratch = b * 16 * partial_bytes(h_q)
    # Besides, there is the schedule, 8 bytes a part, and XLA's temporaries for it.
    assert 0 <= compiled.memory_analysis().temp_size_in_bytes - scratch <= 1000 * b + 2**15
    notes = Path(__file__).parent.parent / "docs/schedule.md"
    if b == 32:
        assert f"{scratch / 1e6:.1f} MB with {h_q}" in notes.read_text("utf-8")
