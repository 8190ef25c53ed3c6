"""flash_mla_with_kvcache under vmap: any mapped arguments, any origin of the schedule."""

import functools
import itertools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, UNUSED_ENTRY, assert_bit_equal, zeros
from dense_calls import causal_decode, causal_expected, decode, decode_structs
from lowering import (
    DECODE,
    PASSED_ON,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    custom_calls,
    operations_on,
    primitives,
    struct,
    structs_on,
    text_for_cuda,
)

import jax_flashmla as fm

ARGUMENTS = ("q", "k_cache", "block_table", "cache_seqlens", "causal_offset")

RANKS = (4, 4, 2, 1)  # of all but the offset

PAGES, PAGE = 9, 16


def random_argument(name, leading, rng):
    """An argument of a call with two sequences and two queries each, [*leading, ...].

    Tables name a page behind the pool, which makes a sequence NaN where its length reaches that
    far, and must not be a page of the next example's pool.
    """
    if name == "q":
        return cases.random_values(rng, (*leading, 2, 2, 4, D_K), "bfloat16")
    if name == "k_cache":
        return cases.random_values(rng, (*leading, PAGES, PAGE, 1, D_K), "bfloat16")
    if name == "cache_seqlens":
        return rng.integers(-2, 3 * PAGE, (*leading, 2), dtype=np.int32)
    if name == "causal_offset":
        return rng.integers(-2 * PAGE, 3, (*leading, 2), dtype=np.int32)
    table = rng.integers(0, PAGES, (*leading, 2, 4), dtype=np.int32)
    table[..., 2] = rng.choice([PAGES, 0, -1], table.shape[:-1])
    table[..., 3] = UNUSED_ENTRY
    return table


def random_examples(sizes, *in_axes):
    """Arguments of nested vmaps, the outermost first, and those of each example.

    As many as there are axes: the offset may be left out.
    """
    rng = np.random.default_rng(0)
    arrays, values = [], []
    for name, axes in zip(ARGUMENTS, zip(*in_axes, strict=True), strict=False):
        shape = [1 if axis is None else n for n, axis in zip(sizes, axes, strict=True)]
        value = random_argument(name, shape, rng)
        values.append(np.broadcast_to(value, (*sizes, *value.shape[len(sizes) :])))
        for level in reversed(range(len(sizes))):  # the innermost axis goes into place first
            if axes[level] is None:
                value = np.squeeze(value, level)
            else:
                value = np.moveaxis(value, level, level + axes[level])
        arrays.append(jnp.asarray(value))
    return arrays, {index: [value[index] for value in values] for index in np.ndindex(*sizes)}


def subsets():
    """Every choice of mapped arguments, each with other axes and another origin of the schedule.

    The offset is in turn left out, not mapped, and mapped.
    """
    origins = itertools.cycle(["none", "inside", "outside", "mapped"])
    offsets = itertools.cycle([(), (None,), (0,), (), (None,), (1,)])
    for i, mapped in enumerate(itertools.product((False, True), repeat=4)):
        axes = [(i + j) % (rank + 1) for j, rank in enumerate(RANKS)]
        in_axes = tuple(axis if m else None for axis, m in zip(axes, mapped, strict=True))
        if any(mapped):
            yield (*in_axes, *next(offsets)), (i % 5, i % 4), next(origins)
    for origin in ("none", "inside", "outside", "mapped"):
        yield (0, 0, 0, 0), (0, 0), origin
        yield (0, None, None, None), (0, 0), origin
    yield (None, None, None, None, 0), (0, 0), "none"


def vmapped_call(in_axes, out_axes, origin, implementation):
    """The arguments -> vmap of the op, its schedule from `origin`."""

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

        return jax.vmap(call, (schedule_axis, *in_axes), out_axes)(schedule, *arrays)

    return run


@pytest.mark.parametrize(("in_axes", "out_axes", "origin"), list(subsets()), ids=str)
def test_vmap_of_any_subset(in_axes, out_axes, origin, implementation):
    arrays, examples = random_examples((3,), in_axes)
    run = vmapped_call(in_axes, out_axes, origin, implementation)
    made = primitives(run, *arrays)
    assert made.count("flash_mla_with_kvcache") == 1
    assert not {"scan", "while"} & set(made)
    results = zip(jax.jit(run)(*arrays), out_axes, strict=True)
    out, lse = (np.moveaxis(np.asarray(x), axis, 0) for x, axis in results)
    for i, example in examples.items():
        cases.assert_decode_close((out[i], lse[i]), causal_expected(*example))


@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        ((0, None, 0, 0), (0, None, 0, 0)),
        ((1, 0, None, 0), (None, 0, 1, None)),
        ((None, 0, 0, None), (2, None, None, 1)),
        ((None, None, None, 1), (None, 1, 0, None)),
        ((0, None, None, 0, 1), (0, None, None, 0, None)),
        ((0, None, 0, None, None), (None, None, None, None, 0)),
    ],
    ids=str,
)
def test_nested_vmaps(outer, inner, implementation):
    arrays, examples = random_examples((2, 3), outer, inner)
    call = functools.partial(causal_decode, implementation=implementation)
    run = jax.vmap(jax.vmap(call, inner), outer)
    assert primitives(run, *arrays).count("flash_mla_with_kvcache") == 1
    out, lse = jax.jit(run)(*arrays)
    for i, example in examples.items():
        cases.assert_decode_close((out[i], lse[i]), causal_expected(*example))


def test_schedules_of_vmap_serve_calls_outside_it(implementation):
    """One by one in a scan: they are what get_mla_metadata makes for each."""
    (q, k_cache, table, lengths), examples = random_examples((3,), (0, None, 0, 0))

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
    for i, example in examples.items():
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
    (q, k_cache, table, lengths), _ = random_examples((3,), (0, None, 0, 0))

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
    """The call of the folded batch makes it, of as many parts as one alone."""
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
    """The one schedule that it makes has as many parts for each sequence as the call's own."""
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


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(("axis", "copied"), [(None, False), (0, False), (1, True)])
def test_copies_of_the_cache_under_vmap(axis, copied, h200):
    shape = [1000, 64, 1, D_K]
    if axis is not None:
        shape.insert(axis, 3)
    structs = structs_on(h200, (3, 4, 1, 16, D_K), tuple(shape), (3, 4, 10), (3, 4))
    structs[2] = struct((3, 4, 10), jnp.int32, sharding=h200)
    run = jax.vmap(functools.partial(decode, implementation="cuda"), (0, axis, 0, 0))
    hlo = jax.jit(run).lower(*structs).compile().as_text()
    assert hlo.count(f'custom_call_target="{SCHEDULE_AND_DECODE}"') == 1
    assert bool(operations_on(int(np.prod(shape)), hlo) - PASSED_ON) == copied
