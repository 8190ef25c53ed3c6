"""The ops in jax.lax's loops."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from cases import D_K, D_V, assert_bit_equal
from decode_loop import (
    COMMAND_BUFFERS,
    LOOP_PAGE,
    STARTS,
    STEPS,
    cond,
    fori_loop,
    loop_state,
    loop_step,
    loop_weights,
    scan,
    unrolled,
    while_loop,
)
from decode_step import append
from dense_calls import decode
from lowering import (
    APPEND,
    DECODE,
    SCHEDULE,
    copies_in,
    struct,
)

import jax_flashmla as fm

LOOPS = {}


def loop_form(function):
    """A loop: (step, state, xs, count) -> the last state, and the results of each step stacked."""
    LOOPS[function.__name__] = function
    return function


@loop_form
def by_scan(step, state, xs, count):
    return jax.lax.scan(step, state, xs)


@loop_form
def by_scan_with_cond(step, state, xs, count):
    """A cond decides on each step. Its predicate is always true here."""

    def turn(state, x):
        results = jax.eval_shape(step, state, x)[1]
        skipped = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
        return jax.lax.cond(count > 0, step, lambda state, x: (state, skipped), state, x)

    return jax.lax.scan(turn, state, xs)


@loop_form
def by_while_loop(step, state, xs, count):
    """A value on the device gives the number of steps."""
    x = jax.tree.map(lambda x: x[0], xs)
    results = jax.tree.map(
        lambda x: jnp.zeros((len(jax.tree.leaves(xs)[0]), *x.shape), x.dtype),
        jax.eval_shape(step, state, x)[1],
    )

    def body(carry):
        i, state, results = carry
        state, result = step(state, jax.tree.map(lambda x: x[i], xs))
        return i + 1, state, jax.tree.map(lambda all, one: all.at[i].set(one), results, result)

    return jax.lax.while_loop(lambda c: c[0] < count, body, (jnp.int32(0), state, results))[1:]


def step_of(row, implementation):
    """(state, operands) -> (state, results); the state is the cache that is updated, if any."""

    def step(state, operands):
        if not row.in_place:
            return state, row.run(*operands, implementation=implementation)
        operands = [*operands[: row.cache_index], state, *operands[row.cache_index :]]
        (state,) = row.run(*operands, implementation=implementation)
        return state, ()

    return step


def steps_of(row, count):
    """The first state, and the operands of `count` steps."""
    steps = [row.arrays((13, i)) for i in range(count)]
    state = steps[0][row.cache_index] if row.in_place else ()
    if row.in_place:
        steps = [[x for i, x in enumerate(s) if i != row.cache_index] for s in steps]
    return state, steps


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("loop", LOOPS)
@ops.each_run()
def test_loops_give_what_single_calls_give(row, implementation, loop):
    """To the bit."""
    step, (state, steps) = step_of(row, implementation), steps_of(row, 3)
    expected, once, last = [], jax.jit(step), state
    for operands in steps:
        last, results = once(last, operands)
        expected.append(results)
    run = jax.jit(functools.partial(LOOPS[loop], step))
    xs = jax.tree.map(lambda *x: jnp.stack(x), *steps)
    actual_last, actual = run(state, xs, jnp.int32(3))
    assert_bit_equal(actual_last, last)
    assert_bit_equal(actual, jax.tree.map(lambda *x: jnp.stack(x), *expected))


# A whole decode step in loops: an append, a schedule and attention. Results decide what follows.


@pytest.mark.parametrize(
    "buffers",
    ["default", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("off", "while"))],
)
@pytest.mark.parametrize("loop", [fori_loop, scan, while_loop, cond], ids=lambda f: f.__name__)
@pytest.mark.parametrize("given", [False, True])
def test_loops_equal_the_unrolled_one(given, loop, buffers, implementation):
    """To the bit, because every bit of a result decides all the tokens that follow."""
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
    """Within 1%: XLA may sum in another order in a loop, and queries and entries are bfloat16."""
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


LAYERS, BATCH, PAGE = 3, 4, 64


def loop_of_layers(implementation, loop):
    """Appends a token a step and layer and attends to the cache, which holds all layers."""

    def step(carry):
        k_cache, q, lengths, table = carry
        pages = k_cache.shape[0] // LAYERS
        lengths = lengths + 1
        slots = fm.get_slot_mapping(table, lengths[:, None] - 1, PAGE)[:, 0]
        schedule = fm.get_mla_metadata(lengths, q.shape[2], 1, implementation=implementation)

        def layer(carry, i):
            k_cache, q = carry
            first = i * pages
            k_cache = fm.append_kv_cache(
                k_cache, q[:, 0, :1], slots + first * PAGE, implementation=implementation
            )
            arrays = (q, k_cache, table + first, lengths)
            out, _ = decode(*arrays, schedule=schedule, implementation=implementation)
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
    return loop_of_layers(implementation, loop).lower(*structs).compile()


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
