"""What stands in programs for a GPU, seen without one: StableHLO text and compiles for an H200."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V
from lowering import (
    APPEND,
    DECODE,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    copies_in,
    custom_calls,
    decode,
    decode_structs,
    struct,
    text_for_cuda,
)

import jax_flashmla as fm
from jax_flashmla import _ffi, _op

# Level 2: the text.


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["auto", "cuda"])
@pytest.mark.parametrize("given", [False, True])
def test_decode_text(given, implementation):
    """A schedule that is not given is made by the same call, which needs no scratch for it."""

    def f(*args):
        options = {"causal": True, "softmax_scale": 0.25, "implementation": implementation}
        if given:
            schedule = fm.get_mla_metadata(args[3], 256, 1, implementation=implementation)
            options["metadata"] = schedule
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
    """It is one more operand, and with it the mask counts for one query too."""

    def f(*args):
        metadata = fm.get_mla_metadata(args[3], s_q * 16, 1) if given else (None, None)
        return decode(*args[:4], metadata=metadata, causal=True, causal_offset=args[4])

    text = text_for_cuda(f, *decode_structs(s_q=s_q), struct((4,), jnp.int32))
    (line,) = custom_calls(text)[target]
    assert "causal = true" in line
    operands = re.findall(r"tensor<(\S+)>", line.split(" : ")[-1].split(" -> ")[0])
    assert len(operands) == count
    assert operands[-1] == "4xi32"
    (names,) = re.findall(r"^\((.*?)\)", line)
    assert names.split(", ")[-1] == "%arg4"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("s_q", "h_kv"), [(1, 1), (4, 1), (1, 8), (2, 2)])
def test_layout_of_the_queries(s_q, h_kv):
    """The kernel's layout is a reshape of the caller's but for several KV heads and queries."""
    text = text_for_cuda(decode, *decode_structs(s_q=s_q, h_q=16, h_kv=h_kv))
    assert ("stablehlo.transpose" in text) == (s_q > 1 and h_kv > 1)
    assert f"tensor<4x{h_kv}x{s_q * 16 // h_kv}x576xbf16>" in text


@pytest.mark.usefixtures("kernels")
def test_one_schedule_for_all_layers():
    def f(q, k_cache, table, lengths):
        metadata = fm.get_mla_metadata(lengths, 16, 1)
        return [decode(q * i, k_cache, table, lengths, metadata=metadata) for i in range(3)]

    text = text_for_cuda(f, *decode_structs())
    calls = custom_calls(text)
    assert {target: len(lines) for target, lines in calls.items()} == {DECODE: 3, SCHEDULE: 1}


@pytest.mark.usefixtures("kernels")
def test_append_text():
    structs = struct((100, 64, 1, D_K)), struct((7, 1, D_K)), struct((7,), jnp.int32)
    calls = custom_calls(text_for_cuda(fm.append_kv_cache, *structs))
    (line,) = calls[APPEND]
    assert "output_operand_alias" in line
    assert "operand_index = 0" in line


@pytest.mark.usefixtures("kernels")
def test_several_platforms_in_one_program():
    lowered = jax.jit(decode).trace(*decode_structs()).lower(lowering_platforms=("cpu", "cuda"))
    text = lowered.as_text()
    assert set(custom_calls(text)) == {SCHEDULE_AND_DECODE}
    assert "stablehlo.case" in text


# Which implementation is taken.


def test_xla_has_no_custom_calls(kernels):
    text = text_for_cuda(lambda *a: decode(*a, implementation="xla"), *decode_structs())
    assert not custom_calls(text)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("shapes", "d_v", "reason"),
    [
        ({"d_k": 288}, 256, "not for 288 and 256"),
        ({}, 256, "not for 576 and 256"),
        ({"page": 48}, D_V, r"page_block_size in .*, not for 48"),
        ({"dtype": jnp.float32}, D_V, "not for q in float32"),
    ],
)
def test_shapes_without_a_kernel(shapes, d_v, reason):
    _op._warn_once.cache_clear()
    structs = decode_structs(**shapes)
    with pytest.warns(RuntimeWarning, match=reason):
        text = text_for_cuda(lambda *a: decode(*a, d_v=d_v), *structs)
    assert not custom_calls(text)
    text_for_cuda(lambda *a: decode(*a, d_v=d_v), *structs)  # does not warn again
    with pytest.raises(NotImplementedError, match=reason):
        text_for_cuda(lambda *a: decode(*a, d_v=d_v, implementation="cuda"), *structs)


def test_machine_without_the_kernels(monkeypatch):
    _op._warn_once.cache_clear()
    monkeypatch.setattr(_ffi, "unavailable_reason", lambda: "it is Tuesday")
    monkeypatch.setattr(_ffi, "non_hopper_device", lambda: None)
    with pytest.warns(RuntimeWarning, match="reference in JAX ops.*: it is Tuesday") as caught:
        text = text_for_cuda(decode, *decode_structs())
    assert len(caught) == 1
    assert not custom_calls(text)
    with pytest.raises(NotImplementedError, match="it is Tuesday"):
        text_for_cuda(lambda *a: decode(*a, implementation="cuda"), *decode_structs())


def devices_of(capability):
    return [SimpleNamespace(compute_capability=capability, device_kind="NVIDIA X100")]


@pytest.fixture
def fresh_queries():
    """Forgets what was found out about this machine, before and after."""
    queries = _ffi.non_hopper_device, _ffi.unavailable_reason
    for query in queries:
        query.cache_clear()
    yield
    for query in queries:
        query.cache_clear()


@pytest.mark.usefixtures("fresh_queries")
def test_other_gpu(monkeypatch):
    """No warning there: plain JAX is what such a GPU is meant to run."""
    monkeypatch.setattr(_ffi, "_NOT_REGISTERED", None)
    monkeypatch.setattr(_ffi, "local_cuda_devices", lambda: devices_of("8.0"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not custom_calls(text_for_cuda(fm.append_kv_cache, *append_structs()))
    with pytest.raises(NotImplementedError, match=r"9\.0, this machine has NVIDIA X100 .*8\.0"):
        text_for_cuda(lambda *a: fm.append_kv_cache(*a, implementation="cuda"), *append_structs())


def append_structs():
    return struct((100, 64, 1, D_K)), struct((7, 1, D_K)), struct((7,), jnp.int32)


@pytest.mark.usefixtures("fresh_queries")
@pytest.mark.parametrize(
    ("driver", "reason"),
    [(13000, None), (13020, None), (14000, None), (None, None), (12080, "for CUDA 12.8")],
)
def test_old_driver(driver, reason, monkeypatch):
    extension = SimpleNamespace(build_info=lambda: {"ffi_api": (0, 1), "cudart": 13000})
    monkeypatch.setattr(_ffi, "_C", extension)
    monkeypatch.setattr(_ffi, "_NOT_REGISTERED", None)
    monkeypatch.setattr(_ffi, "local_cuda_devices", lambda: devices_of("9.0"))
    monkeypatch.setattr(_ffi, "_driver_cuda_version", lambda: driver)
    found = _ffi.unavailable_reason()
    assert found is None if reason is None else reason in found


def test_extension_for_a_newer_jaxlib(monkeypatch):
    """It is not offered to XLA: a refused handler would take the backend down."""
    runtime = _ffi._runtime_ffi_api()
    assert runtime is not None
    extension = SimpleNamespace(
        build_info=lambda: {"ffi_api": (runtime[0], runtime[1] + 1), "cudart": 13000},
        handlers=lambda: pytest.fail("registered"),
    )
    monkeypatch.setattr(_ffi, "_C", extension)
    assert re.search(r"compiled for XLA FFI .*the installed jaxlib .* has", _ffi._register())


# Level 3: compiled for an H200.


LAYERS, BATCH, PAGE = 3, 4, 64


def decode_loop(implementation, loop):
    """Appends a token a step and layer and attends to the cache, which holds all layers."""

    def step(carry):
        k_cache, q, lengths, table = carry
        pages = k_cache.shape[0] // LAYERS
        lengths = lengths + 1
        slots = fm.get_slot_mapping(table, lengths[:, None] - 1, PAGE)[:, 0]
        metadata = fm.get_mla_metadata(lengths, q.shape[2], 1, implementation=implementation)

        def layer(carry, i):
            k_cache, q = carry
            first = i * pages
            k_cache = fm.append_kv_cache(
                k_cache, q[:, 0, :1], slots + first * PAGE, implementation=implementation
            )
            arrays = (q, k_cache, table + first, lengths)
            out, _ = decode(*arrays, metadata=metadata, implementation=implementation)
            return (k_cache, q.at[..., :D_V].add(out)), None

        layers = jnp.arange(LAYERS, dtype=jnp.int32)
        (k_cache, q), _ = jax.lax.scan(layer, (k_cache, q), layers)
        return k_cache, q, lengths, table

    def run(k_cache, q, lengths, table):
        carry = (k_cache, q, lengths, table)
        if loop == "fori_loop":
            return jax.lax.fori_loop(0, 100, lambda _, c: step(c), carry)[:2]
        if loop == "scan":
            return jax.lax.scan(lambda c, _: (step(c), None), carry, length=100)[0][:2]
        return jax.lax.while_loop(lambda c: jnp.any(c[2] < 500), step, carry)[:2]

    return jax.jit(run, donate_argnums=0)


def compile_loop(implementation, loop, pages, sharding):
    structs = (
        struct((LAYERS * pages, PAGE, 1, D_K), sharding=sharding),
        struct((BATCH, 1, 16, D_K), sharding=sharding),
        struct((BATCH,), jnp.int32, sharding=sharding),
        struct((BATCH, 32), jnp.int32, sharding=sharding),
    )
    return decode_loop(implementation, loop).lower(*structs).compile()


@pytest.mark.parametrize("loop", ["fori_loop", "scan", "while_loop"])
@pytest.mark.parametrize("implementation", ["cuda", "xla"])
def test_cache_stays_in_place(loop, implementation, h200, request):
    if implementation == "cuda":
        request.getfixturevalue("compiled_kernels")
    sizes, temporary = (1000, 50000), []
    for pages in sizes:
        compiled = compile_loop(implementation, loop, pages, h200)
        memory, text = compiled.memory_analysis(), compiled.as_text()
        shape = (LAYERS * pages, PAGE, 1, D_K)
        assert memory.alias_size_in_bytes >= np.prod(shape) * 2
        assert not copies_in(text, shape)
        temporary.append(memory.temp_size_in_bytes)
        if implementation == "cuda":
            assert {DECODE, SCHEDULE, APPEND} <= set(re.findall(r"jax_flashmla_\w+", text))
    assert temporary[0] == temporary[1]


def partial_bytes(rows):
    """Of a part: two partial results (fp16, scales, log-sum-exps), and flags of each row tile."""
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
        metadata = fm.get_mla_metadata(arrays[3], h_q, 1, **options)
        return decode(*arrays, metadata=metadata, implementation="cuda")

    compiled = jax.jit(step).lower(*structs).compile()
    assert set(re.findall(r"jax_flashmla_\w+", compiled.as_text())) == {DECODE}
    scratch = b * 16 * partial_bytes(h_q)
    # Beside it the schedule: 8 bytes a part, and what XLA makes it of.
    assert 0 <= compiled.memory_analysis().temp_size_in_bytes - scratch <= 1000 * b + 2**15
    notes = Path(__file__).parent.parent / "docs/schedule.md"
    if b == 32:
        assert f"{scratch / 1e6:.1f} MB with {h_q}" in notes.read_text("utf-8")
