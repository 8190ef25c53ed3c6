"""Tracing starts no JAX backend, and gives the same before and after a backend has started.

jax.distributed.initialize must come before any backend starts. A program may trace before that, to
learn shapes or to build modules.
"""

import socket
from types import SimpleNamespace

import fresh_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import jax_flashmla as fm
from jax_flashmla import _ffi

MESH = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,))


def struct(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def floats(*shape):
    return struct(*shape, dtype=jnp.bfloat16)


def make(lengths):
    return fm.get_mla_metadata(lengths, 4, 1)


def make_fixed(lengths):
    return fm.get_mla_metadata(lengths, 4, 1, fixed_split_size=64, max_seqlen=200)


def decode(*arrays):
    return fm.flash_mla_with_kvcache(*arrays, 512)


def decode_of_a_schedule(*arrays):
    return fm.flash_mla_with_kvcache(
        *arrays, 512, *make(arrays[3]), causal=True, causal_offset=arrays[3]
    )


def lists_of_a_schedule(q, k_cache, indices, lengths, sink):
    lists = (indices, lengths, indices, lengths)
    schedule = fm.get_mla_metadata(fm.get_sparse_seqlens(*lists), 4, 1)
    return fm.flash_mla_with_kvcache(
        q, k_cache, None, None, 512, *schedule, indices=indices, topk_length=lengths,
        attn_sink=sink, extra_k_cache=k_cache, extra_indices_in_kvcache=indices,
        extra_topk_length=lengths,
    )  # fmt: skip


def merge_across(out, lse):
    merge = jax.shard_map(
        lambda *args: fm.merge_attention_states_across(*args, "x"),
        mesh=MESH,
        in_specs=P("x"),
        out_specs=P(),
    )
    return merge(out, lse)


def decode_in_shard_map(*arrays):
    specs = P("x"), P(), P("x"), P("x")
    f = jax.shard_map(decode_of_a_schedule, mesh=MESH, in_specs=specs, out_specs=P("x"))
    return f(*arrays)


ARRAYS = floats(2, 1, 4, 576), floats(8, 16, 1, 576), struct(2, 4), struct(2)
LISTS = *ARRAYS[:2], struct(2, 1, 40)
TOKENS = floats(8, 16, 1, 576), floats(2, 1, 576), struct(2)
FUNCTIONS = {
    "get_mla_metadata": (make, ARRAYS[3:]),
    "get_mla_metadata with fixed splits": (make_fixed, ARRAYS[3:]),
    "flash_mla_with_kvcache": (decode, ARRAYS),
    "flash_mla_with_kvcache with a schedule": (decode_of_a_schedule, ARRAYS),
    "flash_mla_with_kvcache with indices": (
        lambda q, k_cache, indices: fm.flash_mla_with_kvcache(
            q, k_cache, None, None, 512, indices=indices
        ),
        LISTS,
    ),
    "flash_mla_with_kvcache with indices and a schedule": (
        lists_of_a_schedule, (*LISTS, struct(2), struct(4, dtype=jnp.float32))
    ),
    "get_sparse_seqlens": (fm.get_sparse_seqlens, (LISTS[2], struct(2))),
    "to_local_slots": (
        lambda indices, first: fm.to_local_slots(indices, first, 64), (LISTS[2], struct())
    ),
    "append_kv_cache": (fm.append_kv_cache, TOKENS),
    "get_slot_mapping": (
        lambda *args: fm.get_slot_mapping(*args, 16), (struct(2, 4), struct(2, 1))
    ),
    "merge_attention_states": (
        fm.merge_attention_states, (floats(3, 2, 1, 4, 8), struct(3, 2, 4, 1, dtype=jnp.float32))
    ),
    "merge_attention_states_across": (
        merge_across, (floats(4, 1, 4, 8), struct(4, 4, 1, dtype=jnp.float32))
    ),
    "flash_mla_with_kvcache in shard_map": (decode_in_shard_map, ARRAYS),
}  # fmt: skip
VMAPPED = [name for name in FUNCTIONS if "shard_map" not in name and "across" not in name]


def traces():
    """The jaxpr of every function, alone and under vmap. Traces in other ways too."""
    found = {}
    for name, (function, structs) in FUNCTIONS.items():
        jax.eval_shape(function, *structs)
        jax.jit(function).trace(*structs)
        found[name] = str(jax.make_jaxpr(function)(*structs))
    for name in VMAPPED:
        function, structs = FUNCTIONS[name]
        structs = [struct(3, *x.shape, dtype=x.dtype) for x in structs]
        found[f"vmap of {name}"] = str(jax.make_jaxpr(jax.vmap(function))(*structs))
    fm.decode_cost(*ARRAYS[:2], np.array([3, 70]), 512, True, causal_offset=[0, 1])
    fm.decode_cost(*ARRAYS[:2], None, 512, indices=np.zeros((2, 1, 40), np.int32))
    return found


def trace_before_and_after_a_backend():
    """Runs in a new process. Fails if tracing starts a backend or depends on one."""
    before = traces()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=1, process_id=0)
    assert jax.devices()  # now there is a backend
    jax.clear_caches()
    assert traces() == before
    print("traced", len(before))


def test_tracing_starts_no_backend():
    code = "import test_tracing; test_tracing.trace_before_and_after_a_backend()"
    output = fresh_process.finish(fresh_process.start(code))
    assert output.splitlines()[-1] == f"traced {len(FUNCTIONS) + len(VMAPPED)}"


def test_every_public_function_is_traced():
    names = {name.split(" ")[0] for name in FUNCTIONS}
    public = {name for name in fm.__all__ if callable(getattr(fm, name))}
    assert public - names == {"TileSchedulerMetadata", "decode_cost"}


@pytest.fixture
def replace_extension(monkeypatch):
    """Replaces the extension. Afterwards clears the cached SM count."""

    def replace(extension):
        monkeypatch.setattr(_ffi, "_C", extension)
        _ffi.sm_count.cache_clear()
        jax.clear_caches()  # JAX remembers what it traced

    yield replace
    _ffi.sm_count.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize(
    ("extension", "expected"),
    [
        (None, 132),
        (SimpleNamespace(), 132),  # one that cannot say
        (SimpleNamespace(sm_count=lambda: None), 132),  # no driver, or no device
        (SimpleNamespace(sm_count=lambda: 78), 78),
    ],
)
def test_sm_count(extension, expected, replace_extension, monkeypatch):
    """It comes from the driver, never from a JAX device, and sets the number of parts."""
    monkeypatch.setattr(jax, "local_devices", lambda **_: pytest.fail("asked JAX for its devices"))
    replace_extension(extension)
    assert jax.eval_shape(make, struct(2))[0].num_parts == expected
    (eqn,) = jax.make_jaxpr(decode)(*ARRAYS).eqns
    assert eqn.params["num_parts"] == expected
