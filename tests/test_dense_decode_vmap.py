"""flash_mla_with_kvcache under vmap: any mapped arguments, any origin of the schedule."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from cases import D_K, assert_bit_equal, zeros
from dense_calls import causal_decode, decode, decode_structs
from lowering import (
    DECODE,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    custom_calls,
    primitives,
    struct,
    text_for_cuda,
)
from op_examples import stacked

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("origin", ["none", "inside", "outside", "mapped"])
@pytest.mark.parametrize("in_axes", [(0, 0, 0, 0), (0, None, None, None)], ids=str)
def test_schedules_of_any_origin(in_axes, origin, implementation):
    """Made by the call, by the mapped function, before vmap, by a vmap before this one."""
    arrays, examples = stacked(ops.decode_row, (3,), in_axes)

    def make(lengths):
        return fm.get_mla_metadata(lengths, 8, 1, num_sms=3, implementation=implementation)

    def run(*arrays):
        lengths, axis = arrays[3], in_axes[3]
        schedule, schedule_axis = (None, None), None
        if origin == "mapped" and axis is not None:
            schedule, schedule_axis = jax.vmap(make, axis, out_axes=1)(lengths), 1
        elif origin in ("outside", "mapped"):
            schedule = make(lengths if axis is None else jnp.take(lengths, 0, axis))

        def call(schedule, *arrays):
            if origin == "inside":
                schedule = make(arrays[3])
            return causal_decode(*arrays, schedule=schedule, implementation=implementation)

        return jax.vmap(call, (schedule_axis, *in_axes))(schedule, *arrays)

    made = primitives(run, *arrays)
    assert made.count("flash_mla_with_kvcache") == 1
    assert not {"scan", "while"} & set(made)
    out, lse = jax.jit(run)(*arrays)
    for (i,), example in examples.items():
        ops.decode_row.check((out[i], lse[i]), example)


def test_schedules_of_vmap_serve_calls_outside_it(implementation):
    """Used one by one in a scan, they equal what get_mla_metadata makes for each example."""
    (q, k_cache, table, lengths), examples = stacked(ops.decode_row, (3,), (0, None, 0, 0))

    def make(lengths):
        return fm.get_mla_metadata(lengths, 8, 1, num_sms=3, implementation=implementation)

    schedule = jax.vmap(make)(lengths)
    assert_bit_equal(jax.tree.map(lambda x: x[1], schedule), make(lengths[1]))

    def step(_, x):
        q, table, lengths, schedule = x
        arrays = (q, k_cache, table, lengths)
        return None, decode(*arrays, schedule=schedule, implementation=implementation)

    xs = (q, table, lengths, schedule)
    _, (out, lse) = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(xs)
    for (i,), example in examples.items():
        expected = cases.expected_decode(cases.Inputs(*example))
        cases.assert_decode_close((out[i], lse[i]), expected)


@pytest.mark.parametrize(
    ("in_axes", "shapes", "message"),
    [
        ((0, None, 0, 0), [(2, 1, 4, D_K), (8, 64, 1, D_K), (2, 4), (2,)], "q must have shape"),
        (
            (0, None, None, 0),
            [(3, 2, 1, 4, D_K), (8, 64, 1, D_K), (3, 2, 4), (3, 2)],
            r"block_table must have shape .*got \[3, 2, 4\]",
        ),
        (
            (0, None, 1, 0),
            [(3, 2, 1, 4, D_K), (8, 64, 1, D_K), (4, 3), (3, 2)],
            r"block_table must have shape .*got \[4\]",
        ),
        (
            (0, None, 0, 0),
            [(3, 2, 1, 4, D_K), (8, 64, 1, D_K), (2, 3, 4), (3, 2)],
            "vmap got inconsistent sizes",
        ),
        (
            (0, 1, 0, 0),
            [(3, 2, 1, 4, D_K), (8, 3, 1, D_K), (3, 2, 4), (3, 2)],
            r"k_cache must have shape .*got \[8, 1, 576\]",
        ),
    ],
    ids=str,
)
def test_wrong_mapped_axes(in_axes, shapes, message):
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.int32
    arrays = [zeros(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match=message):
        jax.vmap(decode, in_axes)(*arrays)


def test_schedules_that_do_not_fit_under_vmap():
    (q, k_cache, table, lengths), _ = stacked(ops.decode_row, (3,), (0, None, 0, 0))

    def call(schedule, axis):
        def one(q, table, lengths, schedule):
            return decode(q, k_cache, table, lengths, schedule=schedule)

        jax.eval_shape(jax.vmap(one, (0, 0, 0, axis)), q, table, lengths, schedule)

    with pytest.raises(ValueError, match="batch=6, but this call has 2 sequences"):
        call(fm.get_mla_metadata(lengths.reshape(-1), 8, 1), None)
    with pytest.raises(ValueError, match="num_heads_per_head_k=4, but this call has 8"):
        call(fm.get_mla_metadata(lengths[0], 4, 1), None)
    with pytest.raises(ValueError, match="vmap got inconsistent sizes"):
        call(fm.get_mla_metadata(lengths[0], 8, 1), 0)
    mapped = jax.vmap(lambda n: fm.get_mla_metadata(n, 8, 1))(lengths)
    with pytest.raises(ValueError, match=r"part_bounds must have shape \[parts\+1, 2\], got"):
        call(mapped, None)
    call(mapped, 0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_vmap_is_one_call_of_each_kernel(given, offset):
    q, k_cache, table, lengths = decode_structs()
    q, table, lengths = (struct((3, *x.shape), x.dtype) for x in (q, table, lengths))
    arrays = [q, k_cache, table, lengths, *([lengths] if offset else [])]

    def call(*arrays):
        schedule = fm.get_mla_metadata(arrays[3], 16, 1) if given else (None, None)
        return causal_decode(*arrays, schedule=schedule)

    run = jax.vmap(call, (0, None, 0, 0, *([0] if offset else [])))
    calls = custom_calls(text_for_cuda(run, *arrays))
    target = DECODE if given else SCHEDULE_AND_DECODE
    expected = {DECODE: 1, SCHEDULE: 1} if given else {SCHEDULE_AND_DECODE: 1}
    assert {target: len(lines) for target, lines in calls.items()} == expected
    assert "tensor<12x1x16x576xbf16>" in calls[target][0]
    assert "tensor<100x64x1x576xbf16>" in calls[target][0]
    operands = r"\(%\w+, %\w+, %\w+, %\w+"
    if given:
        (lengths,) = re.findall(r"^\((%\w+)\)", calls[SCHEDULE][0])  # the schedule is for these
        operands = rf"\(%\w+, %\w+, %\w+, {lengths}, (%\w+)#0, \1#1, \1#2"
    assert re.match(operands + (r", %\w+\)" if offset else r"\)"), calls[target][0])


def test_vmap_without_a_schedule_makes_none_outside_the_call():
    """The call of the folded batch makes its own, with as many parts as without vmap."""
    q, k_cache, table, lengths = decode_structs(b=4, s_q=2, h_q=128)
    for leading in ((), (3,), (2, 3)):
        run = functools.reduce(lambda f, _: jax.vmap(f, (0, None, 0, 0)), leading, decode)
        structs = [struct((*leading, *x.shape), x.dtype) for x in (q, table, lengths)]
        structs.insert(1, k_cache)
        eqns = jax.make_jaxpr(run)(*structs).eqns
        ours = ("get_mla_metadata", "flash_mla_with_kvcache")
        (op,) = [e for e in eqns if e.primitive.name in ours]
        assert (op.params["num_parts"], op.params["fixed_split_size"]) == (132 // 4, None)
        b = 4 * math.prod(leading)
        assert [x.aval.shape[0] for x in op.invars] == [b, 100, b, b]


def test_vmap_keeps_the_size_of_splits():
    """The schedule made under vmap has as many parts for each sequence as the given one."""
    q, k_cache, table, lengths = decode_structs(b=4)

    def call(q, table, lengths):
        schedule = fm.get_mla_metadata(lengths, 16, 1, fixed_split_size=128, max_seqlen=640)
        return decode(q, k_cache_of_zeros, table, lengths, schedule=schedule)

    k_cache_of_zeros = jnp.zeros(k_cache.shape, k_cache.dtype)
    for leading in ((3,), (2, 3)):
        run = functools.reduce(lambda f, _: jax.vmap(f), leading, call)
        structs = [struct((*leading, *x.shape), x.dtype) for x in (q, table, lengths)]
        eqns = jax.make_jaxpr(run)(*structs).eqns
        (op,) = [e for e in eqns if e.primitive.name == "flash_mla_with_kvcache"]
        (schedule,) = [e for e in eqns if e.outvars[0] is op.invars[4]]
        assert schedule.primitive.name == "get_mla_metadata"
        assert op.invars[4:7] == schedule.outvars
        assert schedule.invars == op.invars[3:4]  # the folded lengths
        b = 4 * int(np.prod(leading))
        assert schedule.params["num_parts"] == 5 * b
        assert schedule.outvars[0].aval.shape == (5 * b + 1, 2)
        assert [e.params["fixed_split_size"] for e in (schedule, op)] == [128, 128]
