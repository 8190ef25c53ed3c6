"""The ops under JAX's transformations, in its loops, ahead of time, among threads and processes."""

import concurrent.futures
import functools
import hashlib
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, UNUSED_ENTRY, Case
from jax import export
from lowering import (
    APPEND,
    DECODE,
    PASSED_ON,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    copies_in,
    custom_calls,
    decode,
    decode_structs,
    operations_on,
    struct,
    text_for_cuda,
)

import jax_flashmla as fm

ROOT = Path(__file__).parent.parent
ARGUMENTS = ("q", "k_cache", "block_table", "cache_seqlens", "causal_offset")
RANKS = (4, 4, 2, 1)  # of all but the offset


def causal_decode(q, k_cache, block_table, lengths, causal_offset=None, **options):
    arrays = (q, k_cache, block_table, lengths)
    return decode(*arrays, causal=True, causal_offset=causal_offset, **options)


def causal_expected(q, k_cache, block_table, lengths, causal_offset=None):
    inputs = cases.Inputs(q, k_cache, block_table, lengths)
    return cases.expected_decode(inputs, causal=True, causal_offset=causal_offset)


def assert_bit_equal(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.tobytes() == e.tobytes()


def primitives(function, *arrays):
    """The names of all primitives in a function's jaxpr, inner ones too."""
    return re.findall(r" = ([a-z_0-9]+)[\[ ]", str(jax.make_jaxpr(function)(*arrays)))


# vmap.


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
        metadata, metadata_axis = (None, None), None
        if origin == "mapped" and axis is not None:
            metadata, metadata_axis = jax.vmap(make, axis, out_axes=1)(lengths), 1
        elif origin in ("outside", "mapped"):
            metadata = make(lengths if axis is None else jnp.take(lengths, 0, axis))

        def call(metadata, *arrays):
            if origin == "inside":
                metadata = make(arrays[3])
            return causal_decode(*arrays, metadata=metadata, implementation=implementation)

        return jax.vmap(call, (metadata_axis, *in_axes), out_axes)(metadata, *arrays)

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

    metadata = jax.vmap(make)(lengths)
    assert_bit_equal(jax.tree.map(lambda x: x[1], metadata), make(lengths[1]))

    def step(_, x):
        q, table, lengths, metadata = x
        arrays = (q, k_cache, table, lengths)
        return None, decode(*arrays, metadata=metadata, implementation=implementation)

    xs = (q, table, lengths, metadata)
    _, (out, lse) = jax.jit(lambda xs: jax.lax.scan(step, None, xs))(xs)
    for i, example in examples.items():
        expected = cases.expected_decode(cases.Inputs(*example))
        cases.assert_decode_close((out[i], lse[i]), expected)


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


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

    def call(metadata, axis):
        def one(q, table, lengths, metadata):
            return decode(q, k_cache, table, lengths, metadata=metadata)

        jax.eval_shape(jax.vmap(one, (0, 0, 0, axis)), q, table, lengths, metadata)

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
        metadata = fm.get_mla_metadata(arrays[3], 16, 1) if given else (None, None)
        return causal_decode(*arrays, metadata=metadata)

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
        metadata = fm.get_mla_metadata(lengths, 16, 1, fixed_split_size=128, max_seqlen=640)
        return decode(q, k_cache_of_zeros, table, lengths, metadata=metadata)

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


def structs_on(sharding, *shapes):
    """Structs on a device: of floats, and of integers where the rank is at most 2."""
    return [
        struct(shape, jnp.int32 if len(shape) <= 2 else jnp.bfloat16, sharding=sharding)
        for shape in shapes
    ]


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


# vmap of the append.


def append(*arrays, **options):
    return fm.append_kv_cache(*arrays, **options)


@pytest.mark.parametrize(
    ("in_axes", "out_axis"), [((0, 0, 0), 0), ((1, None, 0), 3), ((0, 1, None), 1)], ids=str
)
def test_append_under_vmap(in_axes, out_axis, implementation):
    rng = np.random.default_rng(0)
    arrays = [
        cases.random_values(rng, (3, 4, 16, 1, D_K), "bfloat16"),
        cases.random_values(rng, (3, 5, 1, D_K), "bfloat16"),
        np.array([[3, 63, -1, 64, 7], [0, 1, 2, 3, 4], [9, -64, 70, 1, 60]], np.int32),
    ]
    arguments = [
        jnp.asarray(a[0] if axis is None else np.moveaxis(a, 0, axis))
        for a, axis in zip(arrays, in_axes, strict=True)
    ]
    run = jax.vmap(functools.partial(append, implementation=implementation), in_axes, out_axis)
    assert primitives(run, *arguments).count("append_kv_cache") == 1
    actual = np.moveaxis(np.asarray(run(*arguments)), out_axis, 0)
    for i in range(3):
        k_cache, new_kv, slots = (
            a[0 if axis is None else i] for a, axis in zip(arrays, in_axes, strict=True)
        )
        expected = k_cache.copy()
        for token, slot in zip(new_kv, slots, strict=True):
            if 0 <= slot < 64:
                expected[slot // 16, slot % 16] = token
        np.testing.assert_array_equal(actual[i], expected)


def test_nested_vmaps_of_the_append(implementation):
    """New tokens mapped by both, the cache by the outer one: they fold into one append each."""
    rng = np.random.default_rng(0)
    k_cache = cases.random_values(rng, (2, 3, 4, 16, 1, D_K), "bfloat16")
    new_kv = cases.random_values(rng, (2, 3, 1, 1, D_K), "bfloat16")
    slots = np.array([[[0], [63], [5]], [[64], [-1], [17]]], np.int32)
    call = functools.partial(append, implementation=implementation)
    run = jax.vmap(jax.vmap(call))
    arrays = [jnp.asarray(x) for x in (k_cache, new_kv, slots)]
    assert primitives(run, *arrays).count("append_kv_cache") == 1
    expected = k_cache.copy()
    for i, j in np.ndindex(2, 3):
        if 0 <= (slot := slots[i, j, 0]) < 64:
            expected[i, j, slot // 16, slot % 16] = new_kv[i, j]
    np.testing.assert_array_equal(run(*arrays), expected)


@pytest.mark.parametrize("in_axes", [(None, 0, 0), (None, None, 0)])
def test_append_to_a_cache_that_is_not_mapped_raises(in_axes):
    slots = zeros(3, 1, dtype=jnp.int32)
    new_kv = zeros(3, 1, 1, D_K) if in_axes[1] == 0 else zeros(1, 1, D_K)
    with pytest.raises(NotImplementedError, match="k_cache not mapped"):
        jax.vmap(append, in_axes)(zeros(2, 16, 1, D_K), new_kv, slots)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize(("axis", "copied"), [(0, False), (1, True)])
def test_append_under_vmap_is_in_place(axis, copied, h200):
    shape = [1000, 64, 1, D_K]
    shape.insert(axis, 3)
    structs = structs_on(h200, tuple(shape), (3, 7, 1, D_K), (3, 7))
    run = jax.vmap(functools.partial(append, implementation="cuda"), (axis, 0, 0), axis)
    compiled = jax.jit(run, donate_argnums=0).lower(*structs).compile()
    hlo = compiled.as_text()
    assert hlo.count(f'custom_call_target="{APPEND}"') == 1
    size = int(np.prod(shape))
    assert bool(operations_on(size, hlo) - PASSED_ON - {"custom-call"}) == copied
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * size
    assert (memory.temp_size_in_bytes >= 2 * size) == copied


# Loops.

# Lengths grow across ends of pages and tiles, and with the tiles the splits change. One sequence
# begins empty. Each ends with its budget, or with an end-of-sequence token.
LOOP_PAGE, STEPS = 16, 20
STARTS, BUDGETS = np.array([[120, 0, 245, 50], [18, 13, 17, 18]], np.int32)
VOCAB, ENDS = 97, 5  # tokens, and how many of them end a sequence


def loop_weights(seed=0):
    """The cache, the block table, and what stands for each token: its queries, its cache entry."""
    rng = np.random.default_rng(seed)
    b, width = len(STARTS), 17
    order = rng.permutation(b * width).astype(np.int32).reshape(b, width)
    k_cache = cases.random_values(rng, (b * width, LOOP_PAGE, 1, D_K), "bfloat16")
    queries = cases.random_values(rng, (VOCAB, 1, 16, D_K), "bfloat16")
    entries = cases.random_values(rng, (VOCAB, 1, D_K), "bfloat16")
    return tuple(jnp.asarray(x) for x in (k_cache, order, queries, entries))


def hashed(out, lse):
    """A token for each sequence that depends on each bit of its results, by integer arithmetic."""
    bits = jax.lax.bitcast_convert_type(out, jnp.int16).astype(jnp.int32)
    more = jax.lax.bitcast_convert_type(lse, jnp.int32)
    place = jnp.arange(1, bits[0].size + 1, dtype=jnp.int32).reshape(bits[0].shape)
    return (jnp.sum(bits * place, axis=(1, 2, 3)) + jnp.sum(more, axis=(1, 2))) % VOCAB


def loop_step(weights, implementation, given=True):
    """One step: appends, makes the schedule and attends, all at lengths that the last one left.

    With `given` false the call makes a schedule of its own.
    """
    table, queries, entries = weights

    def step(state):
        count, k_cache, lengths, tokens, done = state
        lengths = lengths + ~done
        positions = jnp.where(done, -1, lengths - 1)[:, None]
        slots = fm.get_slot_mapping(table, positions, LOOP_PAGE)[:, 0]
        k_cache = append(k_cache, entries[tokens], slots, implementation=implementation)
        metadata = fm.get_mla_metadata(lengths, 16, 1, num_sms=9, implementation=implementation)
        arrays = queries[tokens], k_cache, table, lengths
        passed = metadata if given else (None, None)
        out, lse = decode(*arrays, metadata=passed, implementation=implementation)
        following = jnp.where(done, tokens, hashed(out, lse))
        done = done | (following < ENDS) | (lengths >= STARTS + BUDGETS)
        return (count + 1, k_cache, lengths, following, done), metadata[1]

    return step


def loop_state(k_cache):
    tokens = jnp.arange(len(STARTS), dtype=jnp.int32) + ENDS
    return jnp.int32(0), k_cache + 0, jnp.asarray(STARTS), tokens, jnp.zeros(len(STARTS), bool)


def fori_loop(step, state):
    return jax.lax.fori_loop(0, STEPS, lambda _, s: step(s)[0], state)


def scan(step, state):
    return jax.lax.scan(lambda s, _: (step(s)[0], None), state, length=STEPS)[0]


def while_loop(step, state):
    """Until every sequence has ended, which only the device knows."""
    return jax.lax.while_loop(lambda s: ~jnp.all(s[4]), lambda s: step(s)[0], state)


def cond(step, state):
    """A step at every turn but the third ones."""

    def turn(s, i):
        return jax.lax.cond(i % 3 < 2, lambda s: step(s)[0], lambda s: s, s), None

    return jax.lax.scan(turn, state, jnp.arange(STEPS))[0]


def unrolled(step, state, loop):
    """The same in Python, a jitted step at a time; and num_splits of each step."""
    step, splits = jax.jit(step), []
    for i in range(STEPS):
        if loop is while_loop and np.all(state[4]):
            break
        if loop is not cond or i % 3 < 2:
            state, num_splits = step(state)
            splits.append(tuple(np.asarray(num_splits).tolist()))
    return state, splits


COMMAND_BUFFERS = {
    "default": {},
    "off": {"xla_gpu_enable_command_buffer": ""},
    "while": {
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CONDITIONAL,WHILE",
        "xla_gpu_graph_min_graph_size": 1,
    },
}


@pytest.mark.parametrize(
    "buffers",
    ["default", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("off", "while"))],
)
@pytest.mark.parametrize("loop", [fori_loop, scan, while_loop, cond], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", [False, True])
def test_loops_equal_the_unrolled_one(given, loop, buffers, implementation):
    """To the bit: any bit of any result decides on all the tokens that follow."""
    k_cache, *weights = loop_weights()
    step = loop_step(weights, implementation, given)
    expected, splits = unrolled(step, loop_state(k_cache), loop)
    assert len(set(splits)) > 1, "the splits never change"
    assert (loop is while_loop) == (expected[0] < STEPS - 6 * (loop is cond))
    options = COMMAND_BUFFERS[buffers] if implementation == "cuda" else {}
    run = jax.jit(functools.partial(loop, step), donate_argnums=0)
    run = run.lower(loop_state(k_cache)).compile(compiler_options=options)
    for _ in range(3 if implementation == "cuda" else 1):  # a captured graph is replayed
        assert_bit_equal(run(loop_state(k_cache)), expected)


def test_loop_with_matmuls_of_xla(implementation):
    """Within 1%, for XLA may sum in another order in a loop: queries and entries are bfloat16."""
    k_cache, table, _, _ = loop_weights()
    keys = jax.random.split(jax.random.key(0), 4)
    b, width = len(STARTS), 64
    up = jax.random.normal(keys[0], (width, 16 * D_K)) / width**0.5
    entry = jax.random.normal(keys[1], (width, D_K)) / width**0.5
    down = jax.random.normal(keys[2], (16 * D_V, width)) / (16 * D_V) ** 0.5
    x = jax.random.normal(keys[3], (b, width))

    def step(state, _):
        k_cache, lengths, x = state
        lengths = lengths + 1
        slots = fm.get_slot_mapping(table, lengths[:, None] - 1, LOOP_PAGE)[:, 0]
        new_kv = (x @ entry).astype(jnp.bfloat16)
        k_cache = append(k_cache, new_kv, slots, implementation=implementation)
        q = (x @ up).astype(jnp.bfloat16).reshape(b, 1, 16, D_K)
        out, _ = decode(q, k_cache, table, lengths, implementation=implementation)
        x = x + 10 * out.reshape(b, -1).astype(jnp.float32) @ down
        x = x / jnp.linalg.norm(x, axis=-1, keepdims=True) * width**0.5
        return (k_cache, lengths, x), x

    state = k_cache, jnp.asarray(STARTS), x
    with jax.default_matmul_precision("highest"):
        _, actual = jax.jit(lambda s: jax.lax.scan(step, s, length=8))(state)
        once, expected = jax.jit(step), []
        for _ in range(8):
            state, x = once(state, None)
            expected.append(x)
    expected = np.stack(expected)
    assert np.linalg.norm(expected[-1] - expected[0]) > 0.3 * np.linalg.norm(expected[0])
    error = np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() < 0.01


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("buffers", COMMAND_BUFFERS)
def test_command_buffer_options_for_an_h200(buffers, h200):
    weights = loop_weights()
    step = loop_step(weights[1:], "cuda")
    structs = jax.tree.map(
        lambda x: struct(x.shape, x.dtype, sharding=h200), loop_state(weights[0])
    )
    lowered = jax.jit(functools.partial(while_loop, step)).lower(structs)
    hlo = lowered.compile(compiler_options=COMMAND_BUFFERS[buffers]).as_text()
    for target in (APPEND, DECODE, SCHEDULE):
        assert hlo.count(f'custom_call_target="{target}"') == 1
    with pytest.raises(jax.errors.JaxRuntimeError, match="not a valid enum value"):
        lowered.compile(compiler_options={"xla_gpu_enable_command_buffer": "NONSENSE"})


# Ahead of time.


def serve(q, new_kv, k_cache, block_table, lengths):
    """A step as one would export it."""
    slots = fm.get_slot_mapping(block_table, lengths[:, None] - 1, k_cache.shape[1])
    k_cache = append(k_cache, new_kv, slots.reshape(-1))
    metadata = fm.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
    return *decode(q, k_cache, block_table, lengths, metadata=metadata), k_cache


def serve_structs(b, pages, width, **options):
    return (
        struct((b, 1, 16, D_K), **options),
        struct((b, D_K), **options),
        struct((pages, 64, 1, D_K), **options),
        struct((b, width), jnp.int32, **options),
        struct((b,), jnp.int32, **options),
    )


def serve_inputs(b, pages, width):
    """Arguments of `serve`, and the Inputs that its decode then has."""
    rng = np.random.default_rng(b)
    lengths = rng.integers(1, min(pages // b, width) * 64, b)
    inputs = cases.make_inputs(Case(b, 1, 0, 16), lengths=lengths, max_blocks=width)
    unused = pages - len(inputs.k_cache)
    before = np.pad(inputs.k_cache, [(0, unused)] + [(0, 0)] * 3, constant_values=np.nan)
    new_kv, after = cases.random_values(rng, (b, D_K), "bfloat16"), before.copy()
    for i, last in enumerate(lengths - 1):
        after[inputs.block_table[i, last // 64], last % 64, 0] = new_kv[i]
    q, _, table, lengths = inputs.device_arrays()
    arrays = (q, jnp.asarray(new_kv), jnp.asarray(before), table, lengths)
    return arrays, inputs.replace(k_cache=after)


def check_serve(call, *sizes):
    arrays, after = serve_inputs(*sizes)
    *results, k_cache = call(*arrays)
    cases.assert_decode_close(results, cases.expected_decode(after))
    np.testing.assert_array_equal(k_cache.astype(np.float32), after.k_cache.astype(np.float32))


PLATFORMS = [
    pytest.param(("cpu", "cuda"), id="cpu-cuda"),
    pytest.param(("cpu", "cuda"), id="cpu-cuda-on-a-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda",), id="cuda-on-a-gpu", marks=pytest.mark.gpu),
]


def exported(platforms, *sizes):
    """`serve` in bytes, with the kernels for CUDA."""
    export_ = export.export(
        jax.jit(lambda *arrays: serve(*arrays)),  # one that was not lowered before
        platforms=platforms,
        disabled_checks=fm.EXPORT_DISABLED_CHECKS,
    )
    program = export_(*serve_structs(*sizes))
    assert set(custom_calls(program.mlir_module())) == {APPEND, DECODE, SCHEDULE}
    return program.serialize()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
def test_export_and_back(platforms):
    loaded = export.deserialize(exported(platforms, 3, 20, 6))
    assert loaded.platforms == platforms
    check_serve(loaded.call, 3, 20, 6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
@pytest.mark.parametrize("sizes", ["b, 40, 6", "b, p, w"])
def test_export_of_a_symbolic_batch(sizes, platforms):
    """The size of the pool and the width of the table may be symbolic as well."""
    loaded = export.deserialize(exported(platforms, *export.symbolic_shape(sizes)))
    for b in (1, 5):
        check_serve(loaded.call, b, *((40, 6) if "p" not in sizes else (30 + b, 4 + b)))


@pytest.mark.usefixtures("kernels")
def test_export_for_cuda_from_anywhere():
    """On a machine without a GPU too; and not without the checks that the library publishes."""
    structs = serve_structs(*export.symbolic_shape("b, 40, 6"))
    export_ = functools.partial(export.export, platforms=("cuda",))
    program = export_(jax.jit(serve), disabled_checks=fm.EXPORT_DISABLED_CHECKS)(*structs)
    calls = custom_calls(program.mlir_module())
    assert {target: len(lines) for target, lines in calls.items()} == {
        APPEND: 1, DECODE: 1, SCHEDULE: 1
    }  # fmt: skip
    with pytest.raises(ValueError, match="jax_flashmla_dense_decode"):
        export_(jax.jit(serve))(*structs)
    with pytest.raises(ValueError, match="jax_flashmla_schedule_and_decode"):
        export_(jax.jit(serve_for("auto")))(*structs)


@pytest.mark.usefixtures("kernels")
def test_export_of_a_symbolic_vmap():
    n, b = export.symbolic_shape("n, b")
    q, k_cache, table, lengths = decode_structs(b=b)
    structs = (struct((n, *x.shape), x.dtype) for x in (q, table, lengths))
    run = jax.jit(
        jax.vmap(lambda q, table, lengths, c: decode(q, c, table, lengths), (0, 0, 0, None))
    )
    program = export.export(run, platforms=("cuda",), disabled_checks=fm.EXPORT_DISABLED_CHECKS)
    program = program(*structs, k_cache)
    assert [x.shape for x in program.out_avals] == [(n, b, 1, 16, D_V), (n, b, 16, 1)]
    calls = custom_calls(program.mlir_module())
    assert {target: len(lines) for target, lines in calls.items()} == {SCHEDULE_AND_DECODE: 1}


def causal_structs(b, pages, width, **options):
    """Arguments of `causal_decode` with an offset."""
    return (
        struct((b, 2, 16, D_K), **options),
        struct((pages, 64, 1, D_K), **options),
        struct((b, width), jnp.int32, **options),
        struct((b,), jnp.int32, **options),
        struct((b,), jnp.int32, **options),
    )


def exported_with_an_offset(platforms):
    """`causal_decode` in bytes."""
    export_ = export.export(
        jax.jit(lambda *arrays: causal_decode(*arrays)),  # one that was not lowered before
        platforms=platforms,
        disabled_checks=fm.EXPORT_DISABLED_CHECKS,
    )
    return export_(*causal_structs(*export.symbolic_shape("b, p, w"))).serialize()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
def test_export_with_a_causal_offset(platforms):
    loaded = export.deserialize(exported_with_an_offset(platforms))
    for count in (1, 5):
        inputs = cases.make_inputs(Case(count, 2, 130, 16, varlen=True))
        offset = np.array([-70, -500, 0, 1, -1], np.int32)[:count]
        expected = cases.expected_decode(inputs, causal=True, causal_offset=offset)
        actual = loaded.call(*inputs.device_arrays(), jnp.asarray(offset))
        cases.assert_decode_close(actual, expected)


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 64, "max_seqlen": 256}], ids=str)
def test_export_with_a_schedule_as_argument(options):
    inputs = cases.make_inputs(Case(3, 1, 100, 16, varlen=True))
    arrays = inputs.device_arrays()
    metadata = fm.get_mla_metadata(arrays[3], 16, 1, **options)

    def step(arrays, metadata):
        return decode(*arrays, metadata=metadata), metadata

    program = export.export(jax.jit(step), disabled_checks=fm.EXPORT_DISABLED_CHECKS)
    loaded = export.deserialize(program(arrays, metadata).serialize())
    results, again = loaded.call(arrays, metadata)
    cases.assert_decode_close(results, cases.expected_decode(inputs))
    assert jax.tree.structure(again) == jax.tree.structure(metadata)
    assert_bit_equal(again, metadata)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
def test_export_of_a_symbolic_batch_in_fixed_splits(platforms):
    """The number of parts is symbolic too."""

    def step(*arrays):
        metadata = fm.get_mla_metadata(arrays[3], 16, 1, fixed_split_size=64, max_seqlen=300)
        return decode(*arrays, metadata=metadata)

    b, width = export.symbolic_shape("b, w")
    structs = decode_structs(b=b)
    structs = *structs[:2], struct((b, width), jnp.int32), structs[3]
    program = export.export(
        jax.jit(step), platforms=platforms, disabled_checks=fm.EXPORT_DISABLED_CHECKS
    )(*structs)
    assert set(custom_calls(program.mlir_module())) == {DECODE}  # XLA makes this schedule
    loaded = export.deserialize(program.serialize())
    for count in (1, 5):
        inputs = cases.make_inputs(Case(count, 1, 200, 16, varlen=True), max_blocks=10 + count)
        unused = np.full_like(inputs.k_cache, np.nan, shape=(100, *inputs.k_cache.shape[1:]))
        k_cache = np.concatenate([inputs.k_cache, unused])[:100]
        actual = loaded.call(*inputs.replace(k_cache=k_cache).device_arrays())
        cases.assert_decode_close(actual, cases.expected_decode(inputs))


def operands_of(target, compiled):
    """How many operands the kernel's one call has; none for the shapes that were symbolic."""
    pattern = rf".*custom-call\((.*)\), custom_call_target=\"{target}\""
    (operands,) = re.findall(pattern, compiled.as_text())
    return operands.count("%")


@pytest.mark.usefixtures("compiled_kernels", "kernels")
def test_exported_symbolic_batch_compiles_for_an_h200(h200):
    loaded = export.deserialize(exported(("cpu", "cuda"), *export.symbolic_shape("b, p, w")))
    run = jax.jit(loaded.call, donate_argnums=2)
    compiled = run.lower(*serve_structs(3, 1000, 6, sharding=h200)).compile()
    assert operands_of(DECODE, compiled) == 7
    assert compiled.memory_analysis().alias_size_in_bytes >= 1000 * 64 * D_K * 2
    loaded = export.deserialize(exported_with_an_offset(("cpu", "cuda")))
    structs = causal_structs(3, 1000, 6, sharding=h200)
    compiled = jax.jit(loaded.call).lower(*structs).compile()
    assert operands_of(SCHEDULE_AND_DECODE, compiled) == 5


def test_lowered_and_compiled_by_hand():
    arrays, _ = serve_inputs(2, 10, 4)
    compiled = jax.jit(serve).lower(*serve_structs(2, 10, 4)).compile()
    check_serve(compiled, 2, 10, 4)
    with pytest.raises(TypeError, match=r"bfloat16\[3,1,16,576\]"):
        compiled(*serve_inputs(3, 12, 4)[0])


# Processes and threads.


def digest(implementation):
    """Runs a loop; returns the bits of its results in short, and the hits of the cache on disk."""
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    k_cache, *weights = loop_weights()
    step = loop_step(weights, implementation)
    leaves = jax.jit(functools.partial(fori_loop, step))(loop_state(k_cache))
    bits = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()
    found = [e.rsplit("/", 1)[1] for e in events if e.startswith("/jax/compilation_cache/cache_")]
    return bits, found.count("cache_hits"), found.count("cache_misses")


def start_process(implementation, **environment):
    """A further process that prints its `digest`."""
    code = f"import test_transforms; print(*test_transforms.digest({implementation!r}))"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the GPU has other users
        **environment,
    }
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    bits, hits, misses = output.split()
    return bits, int(hits), int(misses)


def test_two_processes_and_the_cache_on_disk(implementation, tmp_path):
    """Two at a time on one device, with a cache of programs each; then again, with hits alone."""
    both = [
        {
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / name),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "JAX_RAISE_PERSISTENT_CACHE_ERRORS": "1",
        }
        for name in "ab"
    ]
    first = [finish(p) for p in [start_process(implementation, **each) for each in both]]
    second = finish(start_process(implementation, **both[0]))
    expected = digest(implementation)[0]
    assert [bits for bits, _, _ in (*first, second)] == [expected] * 3
    assert all(hits == 0 and misses > 0 for _, hits, misses in first)
    assert second[1:] == (first[0][2], 0)


def independent_loops(implementation):
    """A compiled step of some tokens, and states to start from, made anew at each call."""
    k_cache, *weights = loop_weights()
    step = loop_step(weights, implementation)
    run = jax.jit(lambda s: jax.lax.fori_loop(0, 4, lambda _, s: step(s)[0], s), donate_argnums=0)

    def states():
        for i in range(4):
            count, cache, lengths, tokens, done = loop_state(k_cache)
            yield count, cache, lengths - i * (lengths > 10), tokens + i, done

    return run.lower(next(states())).compile(), lambda: list(states())


def test_threads_call_one_compiled_step(implementation):
    run, states = independent_loops(implementation)
    expected = []
    for state in states():
        for _ in range(3):
            state = jax.block_until_ready(run(state))
        expected.append(jax.device_get(state))
    assert len({e[1].tobytes() for e in expected}) == 4

    def work(state):
        for _ in range(3):
            state = run(state)
        return jax.device_get(state)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5 if implementation == "cuda" else 1):
            assert_bit_equal(list(pool.map(work, states())), expected)
    turns = states()  # several loops under way at a time, from one thread
    for _ in range(3):
        turns = [run(state) for state in turns]
    assert_bit_equal(jax.device_get(turns), expected)


# Donation.


def test_donated_cache_stays_where_it_is(implementation):
    run, states = independent_loops(implementation)
    state = states()[0]
    given, address = state[1], state[1].unsafe_buffer_pointer()
    for _ in range(3):
        state = run(state)
        assert state[1].unsafe_buffer_pointer() == address
    assert given.is_deleted()


def test_cache_that_is_not_donated_is_kept(implementation):
    k_cache, *weights = loop_weights()
    step, state = loop_step(weights, implementation), loop_state(k_cache)
    after = jax.jit(functools.partial(fori_loop, step))(state)
    assert after[1].unsafe_buffer_pointer() != state[1].unsafe_buffer_pointer()
    np.testing.assert_array_equal(state[1], k_cache)
    assert not np.array_equal(after[1], k_cache)


@pytest.mark.usefixtures("compiled_kernels")
@pytest.mark.parametrize("loop", [fori_loop, scan, while_loop], ids=lambda f: f.__name__)
@pytest.mark.parametrize("donated", [False, True])
def test_one_copy_of_a_cache_that_is_not_donated(loop, donated, h200):
    k_cache, *weights = loop_weights()
    step = loop_step(weights, "cuda")
    structs = jax.tree.map(lambda x: struct(x.shape, x.dtype, sharding=h200), loop_state(k_cache))
    run = jax.jit(functools.partial(loop, step), donate_argnums=0 if donated else ())
    hlo = run.lower(structs).compile().as_text()
    copies = [
        computation.split(None, 1)[0]
        for computation in re.split(r"\n(?=\S)", hlo)
        for _ in copies_in(computation, k_cache.shape)
    ]
    assert copies == ([] if donated else ["ENTRY"])
    others = operations_on(k_cache.size, hlo) - PASSED_ON - {"custom-call"}
    assert others == (set() if donated else {"copy"})


# Derivatives: there are none.


def attend(q, k_cache):
    """A scalar of the decode op."""
    table, lengths = zeros(2, 1, dtype=jnp.int32), jnp.array([3, 16], jnp.int32)
    metadata = fm.get_mla_metadata(lengths, 4, 1)
    return decode(q, k_cache, table, lengths, metadata=metadata)[1].sum()


def append_all(new_kv, k_cache):
    """A scalar of the append."""
    return append(k_cache, new_kv, jnp.array([3, 5], jnp.int32)).astype(jnp.float32).sum()


DERIVATIVES = {
    "grad": lambda f, *args: jax.grad(f)(*args),
    "grad of the cache": lambda f, *args: jax.grad(f, 1)(*args),
    "jvp": lambda f, *args: jax.jvp(f, args, args),
    "vjp": lambda f, *args: jax.vjp(f, *args),
    "linearize": lambda f, *args: jax.linearize(f, *args),
    "jacfwd": lambda f, *args: jax.jacfwd(f)(*args),
    "jit": lambda f, *args: jax.jit(jax.grad(jax.jit(f)))(*args),
    "checkpoint": lambda f, *args: jax.grad(jax.checkpoint(f))(*args),
    "vmap": lambda f, *args: jax.vmap(jax.grad(f), (None, 0))(args[0], args[1][None]),
    "scan": lambda f, *args: jax.grad(
        lambda x: jax.lax.scan(lambda c, _: (c + f(x, args[1]), None), 0.0, length=2)[0]
    )(args[0]),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize(
    ("function", "shape", "op"),
    [(attend, (2, 1, 4, D_K), "flash_mla_with_kvcache"), (append_all, (2, D_K), "append_kv_cache")],
    ids=["decode", "append"],
)
def test_derivatives_raise(function, shape, op, derivative):
    with pytest.raises(NotImplementedError, match=f"{op} is an inference op and has no derivative"):
        DERIVATIVES[derivative](function, zeros(*shape), zeros(2, 16, 1, D_K))


def test_ops_among_what_is_differentiated():
    """Where no derivative goes through them, they do not mind."""
    q, k_cache = jnp.ones((2, 1, 4, D_K), jnp.bfloat16), jnp.ones((2, 16, 1, D_K), jnp.bfloat16)

    def loss(x):
        constant = attend(jax.lax.stop_gradient(x * q), k_cache)
        return x * x * constant

    expected = 4 * attend(2 * q, k_cache)
    for f in (loss, jax.checkpoint(loss), jax.jit(loss)):
        np.testing.assert_allclose(jax.grad(f)(jnp.bfloat16(2)), expected, rtol=0.01)


# What one looks at programs with.


def serve_for(implementation):
    def step(q, new_kv, k_cache, block_table, lengths):
        slots = fm.get_slot_mapping(block_table, lengths[:, None] - 1, 64).reshape(-1)
        k_cache = append(k_cache, new_kv, slots, implementation=implementation)
        arrays = (q, k_cache, block_table, lengths)
        return *decode(*arrays, implementation=implementation), k_cache

    return step


def test_shapes_without_running():
    out, lse, k_cache = jax.eval_shape(serve, *serve_structs(3, 20, 6))
    assert (out.shape, out.dtype) == ((3, 1, 16, D_V), jnp.bfloat16)
    assert (lse.shape, lse.dtype) == ((3, 16, 1), jnp.float32)
    assert (k_cache.shape, k_cache.dtype) == ((20, 64, 1, D_K), jnp.bfloat16)


def test_ops_stand_in_jaxprs_by_name():
    ours = ["append_kv_cache", "get_mla_metadata", "flash_mla_with_kvcache"]
    structs = serve_structs(3, 20, 6)
    assert [name for name in primitives(serve, *structs) if name in ours] == ours
    assert [name for name in primitives(jax.checkpoint(serve), *structs) if name in ours] == ours


@pytest.mark.usefixtures("compiled_kernels")
def test_names_in_a_compiled_program(h200):
    """What a profile shows: scopes of the caller's, and the op."""

    @jax.named_scope("layer")
    def step(*arrays):
        return serve_for("cuda")(*arrays)

    structs = serve_structs(3, 20, 6, sharding=h200)
    hlo = jax.jit(step).lower(*structs).compile().as_text()
    found = re.findall(r'custom_call_target="(jax_flashmla_\w+)".*op_name="([^"]*)"', hlo)
    assert dict(found) == {
        APPEND: "jit(step)/layer/append_kv_cache/ffi_call",
        SCHEDULE_AND_DECODE: "jit(step)/layer/flash_mla_with_kvcache/ffi_call",
    }


def test_names_of_the_reference_too():
    text = jax.jit(serve_for("xla")).lower(*serve_structs(3, 20, 6)).as_text(debug_info=True)
    for name in ("append_kv_cache", "flash_mla_with_kvcache"):
        assert re.search(rf'"jit\(step\)/{name}/\w+', text), name


def test_profile(implementation, tmp_path):
    """With the caller's annotation in it, and the kernels by name."""
    arrays, _ = serve_inputs(2, 10, 4)
    options = COMMAND_BUFFERS["off"] if implementation == "cuda" else {}
    step = jax.jit(serve_for(implementation)).lower(*arrays).compile(compiler_options=options)
    jax.block_until_ready(step(*arrays))
    with jax.profiler.trace(tmp_path), jax.profiler.TraceAnnotation("one decode step"):
        jax.block_until_ready(step(*arrays))
    (file,) = tmp_path.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    names = {event.name for plane in planes for line in plane.lines for event in line.events}
    assert "one decode step" in names
    if implementation == "cuda":
        assert [name for name in names if "jax_flashmla" in name]


def test_debug_print_and_callback(implementation, capfd):
    arrays, after = serve_inputs(2, 10, 4)
    seen = []

    @jax.jit
    def step(*arrays):
        jax.debug.print("before {}", arrays[4])
        out, lse, k_cache = serve_for(implementation)(*arrays)
        jax.debug.print("after {}", jnp.isfinite(lse).sum())
        jax.debug.callback(lambda lse: seen.append(np.asarray(lse)), lse)
        return out, lse, k_cache

    _, lse, _ = step(*arrays)
    jax.effects_barrier()
    printed = capfd.readouterr().out
    assert f"before {after.cache_seqlens}" in printed
    assert f"after {lse.size}" in printed
    assert_bit_equal(seen, [lse])


# Costs.


@pytest.mark.parametrize(
    ("causal", "offset", "seen"),
    [
        (False, None, [70, 0, 0, 1]),
        (True, None, [70, 0, 0, 1]),
        (True, [-6, 5, 5, 2**31 - 1], [64, 0, 0, 1]),
        (True, [1, -1, 0, -(2**31)], [70, 0, 0, 0]),
    ],
)
def test_cost(causal, offset, seen):
    """Counted query by query; `seen` is what the last one of a sequence sees."""
    lengths = np.array([70, 0, -3, 1], np.int32)
    q, k_cache = struct((4, 3, 8, D_K)), struct((9, 64, 2, D_K), jnp.bfloat16)
    scores = 0
    for n, moved in zip(lengths.tolist(), offset or [0] * 4, strict=True):
        for i in range(3):
            boundary = n - 3 + i + moved if causal else n
            scores += 8 * sum(j <= boundary for j in range(n))
    ids = sum(-(-n // 64) for n in seen)
    assert fm.decode_cost(q, k_cache, lengths, D_V, causal, causal_offset=offset) == {
        "flops": 2.0 * scores * (D_K + D_V),
        "transcendentals": float(scores),
        "bytes accessed": 2 * (sum(seen) * 2 * D_K + 4 * 3 * 8 * (D_K + D_V))  # cache, q and out
        + 4 * (ids + 4 + (4 if offset else 0) + 4 * 3 * 8),  # page ids, lengths, offsets, lse
    }


def test_cost_is_in_units_of_xla():
    """Against what XLA counts for attention over one plain sequence."""
    q, kv = struct((16, D_K), jnp.float32), struct((500, D_K), jnp.float32)

    def plain(q, kv):
        return jax.nn.softmax(q @ kv.T) @ kv[:, :D_V]

    theirs = jax.jit(plain).lower(q, kv).cost_analysis()
    ours = fm.decode_cost(
        struct((1, 1, 16, D_K), jnp.float32), struct((8, 64, 1, D_K), jnp.float32), [500], D_V
    )
    assert ours.keys() <= theirs.keys()
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.01)
    assert ours["transcendentals"] == pytest.approx(theirs["transcendentals"], rel=0.01)


@pytest.mark.gpu
def test_xla_counts_no_flops_for_the_kernel():
    arrays, after = serve_inputs(2, 10, 4)
    analysis = jax.jit(serve_for("cuda")).lower(*arrays).compile().cost_analysis()
    ours = fm.decode_cost(arrays[0], arrays[2], after.cache_seqlens, D_V)
    assert (analysis or {}).get("flops", 0) < 0.01 * ours["flops"]


@pytest.mark.parametrize(
    ("lengths", "d_v", "causal", "error", "message"),
    [
        ([1, 2, 3], D_V, False, ValueError, r"cache_seqlens has shape \[3\].*must be 2"),
        ([1, 2], 512.0, False, TypeError, "head_dim_v must be a static Python int"),
        ([1, 2], D_V, 1, TypeError, "causal must be a static Python bool"),
        ([[1, 2]], D_V, False, ValueError, r"cache_seqlens must have shape \[b\], got \[1, 2\]"),
    ],
)
def test_misuse_of_the_cost(lengths, d_v, causal, error, message):
    with pytest.raises(error, match=message):
        fm.decode_cost(struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K)), lengths, d_v, causal)


def test_cost_of_traced_lengths():
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    with pytest.raises(TypeError, match=r"cache_seqlens must be values.*outside jit"):
        jax.jit(lambda n: fm.decode_cost(q, k_cache, n, D_V))(jnp.ones(2, jnp.int32))


def test_cost_of_an_offset_without_a_mask():
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    with pytest.raises(ValueError, match="causal_offset moves the boundary"):
        fm.decode_cost(q, k_cache, [1, 2], D_V, causal_offset=[0, 0])
    with pytest.raises(ValueError, match=r"causal_offset has shape \[3\].*must be 2"):
        fm.decode_cost(q, k_cache, [1, 2], D_V, causal=True, causal_offset=[0, 0, 0])
