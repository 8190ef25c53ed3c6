"""Sparse decode under vmap: pools that become one, sinks, schedules."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from jax import export
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from lowering import SCHEDULE, SPARSE_DECODE, custom_calls, primitives, struct, text_for_cuda
from op_examples import stacked

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")

PRIMITIVE = "sparse_flash_mla_with_kvcache"
PUBLIC_NAME = "flash_mla_with_kvcache with indices"


def op_of(run, *structs):
    """The one call of the op in a function's jaxpr, and all equations."""
    eqns = jax.make_jaxpr(run)(*structs).eqns
    (op,) = [eqn for eqn in eqns if eqn.primitive.name == PRIMITIVE]
    return op, eqns


@pytest.mark.parametrize("lengths_ndim", [1, 2])
def test_lengths_by_sequence_and_by_query(lengths_ndim, implementation):
    """A list's length may differ by sequence alone."""
    row = ops.two_caches_row
    arrays, examples = stacked(row, (3,), (0,) * len(row.operands))
    for i in (3, 6):
        if lengths_ndim == 1:
            arrays[i] = arrays[i].at[:, :, 1].set(arrays[i][:, :, 0])
            for (j,), example in examples.items():
                example[i] = np.asarray(arrays[i][j])

    def run(*arrays):
        arrays = list(arrays)
        if lengths_ndim == 1:
            arrays[3], arrays[6] = arrays[3][:, 0], arrays[6][:, 0]
        return row.run(*arrays, implementation=implementation)

    out, lse = jax.jit(jax.vmap(run))(*arrays)
    for (i,), example in examples.items():
        row.check((out[i], lse[i]), example)


def test_slots_of_other_examples_stay_invalid():
    """A slot just past an example's pool is not one of the next example's."""
    k_cache = jnp.ones((3, 2, 4, 1, 8))
    q = jnp.ones((3, 1, 1, 1, 8))
    for slot, seen in ((7, True), (8, False), (-1, False), (-8, False), (-(2**31), False)):
        indices = jnp.full((3, 1, 1, 1), slot, jnp.int32)
        for out_of in ("k_cache", "extra_k_cache"):

            def run(q, k_cache, indices, out_of=out_of):
                lists = {"indices": indices}
                if out_of == "extra_k_cache":
                    lists = {
                        "indices": jnp.full_like(indices, -1), "extra_k_cache": k_cache,
                        "extra_indices_in_kvcache": indices,
                    }  # fmt: skip
                return fm.flash_mla_with_kvcache(q, k_cache, None, None, 4, **lists)

            out, lse = jax.vmap(run)(q, k_cache, indices)
            assert (out == seen).all()
            assert (np.isinf(lse) == (not seen)).all()


# Slots beyond int32.

POOL = 2**27  # slots


def lists_of_pools(q, k_cache, indices):
    return fm.flash_mla_with_kvcache(q, k_cache, None, None, 512, indices=indices)


def extra_lists_of_pools(q, k_cache, indices):
    lists = {"indices": indices, "extra_indices_in_kvcache": indices}
    small = jnp.zeros((1, 1, 1, 576), jnp.bfloat16)
    return fm.flash_mla_with_kvcache(q, small, None, None, 512, extra_k_cache=k_cache, **lists)


def structs_of_pools(*leading):
    return (
        struct((*leading, 1, 1, 4, 576)),
        struct((*leading, POOL // 64, 64, 1, 576)),
        struct((*leading, 1, 1, 40), jnp.int32),
    )


@pytest.mark.parametrize("run", [lists_of_pools, extra_lists_of_pools])
def test_pools_that_int32_cannot_hold(run):
    """Each alone, or unmapped, may have as many slots as it likes."""
    jax.eval_shape(jax.vmap(run), *structs_of_pools(15))
    message = (
        rf"vmap of {PUBLIC_NAME} over 16 caches of {POOL} slots exceeds the int32 range of slots; "
        "map fewer caches at a time"
    )
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(jax.vmap(run), *structs_of_pools(16))
    nested = jax.vmap(jax.vmap(run))
    jax.eval_shape(nested, *structs_of_pools(3, 5))
    with pytest.raises(NotImplementedError, match="exceeds the int32 range"):
        jax.eval_shape(nested, *structs_of_pools(4, 4))
    q, _, indices = structs_of_pools(1000)
    jax.eval_shape(jax.vmap(run, (0, None, 0)), q, structs_of_pools()[1], indices)


def exported(implementation, constraints):
    """The op under vmap over `n` caches of `p` pages of 4 tokens."""
    n, p = export.symbolic_shape("n, p", constraints=constraints)
    structs = (
        struct((n, 1, 2, 4, 576)),
        struct((n, p, 4, 1, 576)),
        struct((n, 1, 2, 7), jnp.int32),
    )

    def call(q, k_cache, indices):
        return fm.flash_mla_with_kvcache(
            q, k_cache, None, None, 512, indices=indices, implementation=implementation
        )

    return export.export(
        jax.jit(jax.vmap(call)),
        platforms=("cpu", "cuda"),
        disabled_checks=fm.EXPORT_DISABLED_CHECKS,
    )(*structs)


@pytest.mark.usefixtures("kernels")
def test_symbolic_pools():
    """The kernel where a constraint bounds the slots, else the reference, which needs no bound."""
    bound = "4*n*p <= 2147483647"
    assert SPARSE_DECODE in custom_calls(exported("auto", [bound]).mlir_module())
    program = exported("auto", [])
    assert not custom_calls(program.mlir_module())
    row = ops.sparse_row
    sizes = {"b": 1, "page": 4, "pages": 6, "topk": 7}
    examples = [row.example(seed, **sizes) for seed in range(3)]
    out, lse = program.call(*(jnp.stack(x) for x in zip(*examples, strict=True)))
    for i, example in enumerate(examples):
        row.check((out[i], lse[i]), example)


def test_symbolic_pools_with_the_kernel_alone(machine):
    machine.takes_kernels()
    message = (
        rf'vmap of {PUBLIC_NAME} over n caches of 4\*p slots.*the constraint "4\*n\*p <= 2147483'
    )
    with pytest.raises(NotImplementedError, match=message):
        exported("cuda", [])


# What the folded call gets.


def sparse_structs(*leading, b=4, s_q=2, topk=40):
    return (
        struct((*leading, b, s_q, 4, 576)),
        struct((100, 64, 1, 576)),
        struct((*leading, b, s_q, topk), jnp.int32),
        struct((*leading, b, s_q), jnp.int32),
    )


@pytest.mark.parametrize("dense", [False, True])
def test_sinks(dense):
    """[1, h_q] where all examples have the same, else one of h_q for each sequence."""

    def call(q, k_cache, indices, lengths, attn_sink):
        if dense:
            arrays = (indices[:, 0], lengths[:, 0])
            return fm.flash_mla_with_kvcache(q, k_cache, *arrays, 512, attn_sink=attn_sink)
        return ops.sparse_decode(q, k_cache, indices, lengths, attn_sink=attn_sink)

    def shape(run, *structs):
        (op,) = [e for e in jax.make_jaxpr(run)(*structs).eqns if "sink" in str(e.params)]
        assert op.params["operands"] == ("attn_sink",)
        return op.invars[-1].aval.shape

    sinks = [struct((*n, 4), jnp.float32) for n in ((), (3,), (5, 3))]
    once = functools.partial(jax.vmap, in_axes=(0, None, 0, 0, None))
    of_all = functools.partial(jax.vmap, in_axes=(0, None, 0, 0, 0))
    assert shape(call, *sparse_structs(), sinks[0]) == (1, 4)
    assert shape(once(call), *sparse_structs(3), sinks[0]) == (1, 4)
    assert shape(of_all(call), *sparse_structs(3), sinks[1]) == (3 * 4, 4)
    assert shape(once(once(call)), *sparse_structs(5, 3), sinks[0]) == (1, 4)
    for maps in ((once, of_all), (of_all, once)):
        run = maps[0](maps[1](call))
        n = 3 if maps[1] is of_all else 5
        sink = struct((n, 4), jnp.float32)
        assert shape(run, *sparse_structs(5, 3), sink) == (5 * 3 * 4, 4)
    assert shape(of_all(of_all(call)), *sparse_structs(5, 3), sinks[2]) == (5 * 3 * 4, 4)


@pytest.mark.parametrize("levels", [(3,), (2, 3)])
@pytest.mark.parametrize("extra", [False, True])
def test_vmap_keeps_the_size_of_splits(extra, levels):
    """The schedule made under vmap has as many parts for each list as the given one."""

    def call(q, k_cache, indices, lengths):
        lists = (indices, lengths, indices, lengths) if extra else (indices, lengths)
        schedule = fm.get_mla_metadata(
            fm.get_sparse_seqlens(*lists), 4, 1, fixed_split_size=64, max_seqlen=320
        )
        names = ("extra_indices_in_kvcache", "extra_topk_length") if extra else ()
        options = dict(zip(names, lists[2:], strict=True))
        if extra:
            options["extra_k_cache"] = k_cache
        return ops.sparse_decode(q, k_cache, indices, lengths, schedule=schedule, **options)

    run = functools.reduce(lambda f, _: jax.vmap(f, (0, None, 0, 0)), levels, call)
    op, eqns = op_of(run, *sparse_structs(*levels))
    n = 4 * 2 * int(np.prod(levels))  # lists
    (schedule,) = [eqn for eqn in eqns if eqn.outvars[0] is op.invars[-3]]
    assert schedule.primitive.name == "get_mla_metadata"
    assert op.invars[-3:] == schedule.outvars
    assert schedule.params["num_parts"] == 5 * n
    assert schedule.params["rows"] == 4
    assert schedule.invars[0].aval.shape == (n,)
    assert [eqn.params["fixed_split_size"] for eqn in (schedule, op)] == [64, 64]


@pytest.mark.parametrize("extra", [False, True])
def test_schedule_under_vmap_is_for_the_lists_lengths(extra):
    """Of all examples, as get_sparse_seqlens gives them."""

    def call(q, k_cache, indices, lengths):
        lists = (indices, lengths, indices[..., :7], lengths - 60)
        names = ("extra_indices_in_kvcache", "extra_topk_length")
        options = dict(zip(names, lists[2:], strict=True)) | {"extra_k_cache": k_cache}
        if not extra:
            lists, options = lists[:2], {}
        lengths_ = fm.get_sparse_seqlens(*lists)
        schedule = fm.get_mla_metadata(lengths_, 4, 1, num_sms=7)
        out, _ = ops.sparse_decode(q, k_cache, indices, lengths, schedule=schedule, **options)
        return out.sum(), lengths_

    arrays = ops.sparse_given_row.arrays(topk=70)[:4]
    arrays[3] = jnp.array([[-2, 70], [75, 64]], jnp.int32)
    stacked_arrays = [jnp.stack([x, x[::-1]]) for x in arrays]
    run = jax.vmap(call)
    _, wanted = run(*stacked_arrays)

    jaxpr = jax.make_jaxpr(run)(*stacked_arrays)
    (op,) = [e for e in jaxpr.jaxpr.eqns if e.primitive.name == PRIMITIVE]
    (schedule,) = [e for e in jaxpr.jaxpr.eqns if e.outvars[0] is op.invars[-3]]
    (lengths,) = schedule.invars
    debug_info = jaxpr.jaxpr.debug_info._replace(result_paths=("lengths",))
    inner = jaxpr.jaxpr.replace(outvars=[lengths], debug_info=debug_info)
    (found,) = jaxpr_as_fun(ClosedJaxpr(inner, jaxpr.consts))(*stacked_arrays)
    np.testing.assert_array_equal(found, wanted.reshape(-1))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("given", [False, True])
def test_vmap_is_one_call_of_each_kernel(given):
    def call(q, k_cache, indices, lengths):
        schedule = (None, None)
        if given:
            schedule = fm.get_mla_metadata(fm.get_sparse_seqlens(indices, lengths), 4, 1)
        return ops.sparse_decode(q, k_cache, indices, lengths, schedule=schedule)

    run = jax.vmap(call, (0, None, 0, 0))
    structs = sparse_structs(3)
    assert primitives(run, *structs).count(PRIMITIVE) == 1
    calls = custom_calls(text_for_cuda(run, *structs))
    expected = {SPARSE_DECODE: 1, SCHEDULE: 1} if given else {SPARSE_DECODE: 1}
    assert {target: len(lines) for target, lines in calls.items()} == expected
    types = re.findall(r"tensor<(\S+)>", calls[SPARSE_DECODE][0].split(" : ")[-1])
    assert types[:4] == ["24x4x576xbf16", "100x64x1x576xbf16", "24x40xi32", "24xi32"]
