"""Sparse decode on several devices: data, tensor and context parallelism, what H200s exchange."""

import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from lowering import SPARSE_DECODE, cpu_mesh, h200_mesh, placed, struct

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")

BOTH_TYPES = pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit], ids=str)
NAMES = ("q", "k_cache", "indices", "topk_length", "attn_sink")
CUT_OVER_DEVICES = P(), P("x"), P(), P(), P()
ROW = ops.two_caches_row


def make_arrays(page=16, seed=0):
    """Lists of which some end early, some are empty, and some name tokens of one device alone."""
    q, k_cache, indices, lengths, *_, attn_sink = ROW.example(seed, b=4, pages=8, page=page)
    pool = 8 * page
    indices[0, 0] = np.where(np.arange(70) < 5, np.arange(70), -1)  # of the first page
    indices[1] = pool - 1 - np.arange(70) % page  # of the last page
    indices[2, 1] = -1
    lengths[:] = [[70, 70], [70, 3], [90, 70], [0, -2]]
    attn_sink[:] = [0.5, np.inf, -np.inf, -3]
    return q, k_cache, indices, lengths, attn_sink


def cut_over_devices(given=False, **options):
    """Decode of a cache that is cut over devices, as a function for jax.shard_map."""

    def run(q, k_cache, indices, lengths, attn_sink):
        count = k_cache.shape[0] * k_cache.shape[1]
        local = fm.to_local_slots(indices, jax.lax.axis_index("x") * count, count)
        schedule = (None, None)
        if given:
            schedule = fm.get_mla_metadata(fm.get_sparse_seqlens(local, lengths), q.shape[2], 1)
        out, lse = ops.sparse_decode(q, k_cache, local, lengths, schedule=schedule, **options)
        return fm.merge_attention_states_across(out, lse, "x", attn_sink=attn_sink)

    return run


def on_mesh(run, mesh, in_specs, out_specs):
    return jax.jit(jax.shard_map(run, mesh=mesh, in_specs=in_specs, out_specs=out_specs))


def put(arrays, mesh, specs):
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def check(results, arrays):
    """Against the whole lists in float64; the tolerance is that of outs rounded before a merge."""
    q, k_cache, indices, lengths, attn_sink = arrays
    whole = ops.expected_sparse_decode(q, k_cache, indices, lengths)
    ROW.assert_close(results, cases.with_sink(*whole, attn_sink))
    out, lse = (np.asarray(x, np.float32) for x in results)
    for i, s in ((2, 1), (3, 0), (3, 1)):  # lists without a valid token
        assert (out[i, s] == 0).all()
        assert (lse[i, :, s] == np.inf).all()
    assert (out[:, :, 1] == 0).all()  # an infinite sink


@BOTH_TYPES
@pytest.mark.parametrize("given", [False, True])
def test_cache_cut_over_devices(given, types):
    """Each device attends to its own tokens, without the sink; the merge applies it once."""
    arrays, mesh = make_arrays(), cpu_mesh((4,), ("x",), types)
    run = on_mesh(cut_over_devices(given=given), mesh, CUT_OVER_DEVICES, (P(), P()))
    with jax.set_mesh(mesh):
        check(run(*put(arrays, mesh, CUT_OVER_DEVICES)), arrays)


def test_three_kinds_at_once():
    """Sequences, heads and the cache are cut. Each run of sequences has a cache of its own."""
    mesh = cpu_mesh((2, 2, 2), ("data", "tensor", "x"))
    examples = [make_arrays(seed=seed) for seed in range(2)]
    examples[1] = (*examples[1][:4], examples[0][4])
    arrays = [np.concatenate(x) for x in zip(*(e[:4] for e in examples), strict=True)]
    specs = (
        P("data", None, "tensor"), P(("data", "x")), P("data"), P("data"), P("tensor")
    )  # fmt: skip
    out_specs = P("data", None, "tensor"), P("data", "tensor")
    run = on_mesh(cut_over_devices(), mesh, specs, out_specs)
    out, lse = run(*put((*arrays, examples[0][4]), mesh, specs))
    for i, example in enumerate(examples):
        check((out[4 * i : 4 * i + 4], lse[4 * i : 4 * i + 4]), example)


def test_two_halves_of_a_list_are_the_whole():
    """On one device: the halves run without the sink, the merge applies it once."""
    arrays = make_arrays()
    q, k_cache, indices, lengths, attn_sink = map(jnp.asarray, arrays)
    halves = [
        ops.sparse_decode(q, k_cache, indices[..., :30], jnp.minimum(lengths, 30)),
        ops.sparse_decode(q, k_cache, indices[..., 30:], lengths - 30),
    ]
    outs, lses = (jnp.stack(x) for x in zip(*halves, strict=True))
    check(fm.merge_attention_states(outs, lses, attn_sink=attn_sink), arrays)
    whole = ops.sparse_decode(q, k_cache, indices, lengths, attn_sink=attn_sink)
    check(whole, arrays)


def test_a_sink_in_every_part_is_seen():
    """It would count several times."""
    arrays = make_arrays()
    q, k_cache, indices, lengths, attn_sink = map(jnp.asarray, arrays)
    parts = [
        ops.sparse_decode(q, k_cache, half, lengths, attn_sink=attn_sink)
        for half in (indices[..., :30], indices[..., 30:])
    ]
    outs, lses = (jnp.stack(x) for x in zip(*parts, strict=True))
    with pytest.raises(AssertionError):
        check(fm.merge_attention_states(outs, lses, attn_sink=attn_sink), arrays)


def test_sinks_are_split_with_their_heads():
    arrays, mesh = make_arrays(), cpu_mesh((4,), ("x",))
    specs = P(None, None, "x"), P(), P(), P(), P("x")

    def run(q, k_cache, indices, lengths, attn_sink):
        return ops.sparse_decode(q, k_cache, indices, lengths, attn_sink=attn_sink)

    out_specs = P(None, None, "x"), P(None, "x")
    check(on_mesh(run, mesh, specs, out_specs)(*put(arrays, mesh, specs)), arrays)
    specs = *specs[:4], P()
    with pytest.raises(
        ValueError, match=r"attn_sink has shape \[4\], but axis 0 must be 1, the he"
    ):
        on_mesh(run, mesh, specs, out_specs)(*put(arrays, mesh, specs))


def test_schedule_of_the_global_lists_raises():
    mesh = cpu_mesh((2,), ("x",))
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_arrays()[:4]]

    def run(q, k_cache, indices, lengths, schedule):
        return ops.sparse_decode(q, k_cache, indices, lengths, schedule=schedule)

    lists = jax.eval_shape(lambda x: fm.get_mla_metadata(x, 4, 1), struct((8,), jnp.int32))
    specs = P("x"), P(), P("x"), P("x"), P()
    with pytest.raises(
        ValueError, match=r"batch=8, but this call has 4 .*in jax\.shard_map.*lists"
    ):
        jax.eval_shape(
            jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("x")), *structs, lists
        )


@pytest.mark.usefixtures("compiled_kernels")
def test_what_8_devices_exchange():
    """One all-gather of partial results; never a byte of the cache."""
    mesh = h200_mesh((8,), ("x",))
    structs = (
        struct((8, 2, 128, 576)),
        struct((8192, 64, 1, 576)),
        struct((8, 2, 2048), jnp.int32),
        struct((8, 2), jnp.int32),
        struct((128,), jnp.float32),
    )
    run = on_mesh(cut_over_devices(implementation="cuda"), mesh, CUT_OVER_DEVICES, (P(), P()))
    hlo = run.lower(*placed(structs, mesh, *CUT_OVER_DEVICES)).compile().as_text()
    assert re.findall(r'custom_call_target="(jax_flashmla_\w+)"', hlo) == [SPARSE_DECODE]
    names = r"all-gather|all-reduce|all-to-all|reduce-scatter|collective-\w+"
    found = re.findall(rf"= (.*?) ({names})(?:-start)?\(", hlo)
    assert [name for _, name in found] == ["all-gather"]
    assert "8192" not in found[0][0]
