"""Donated caches are updated in place, others are kept."""

import functools
import re

import jax
import numpy as np
import ops
import pytest
from cases import assert_bit_equal
from decode_loop import (
    fori_loop,
    independent_loops,
    loop_state,
    loop_step,
    loop_weights,
    scan,
    while_loop,
)
from lowering import (
    PASSED_ON,
    copies_in,
    operations_on,
    struct,
)


@ops.each_run(lambda row: row.in_place)
def test_donated_operand_is_updated_in_place(row, implementation):
    run = jax.jit(row.with_implementation(implementation), donate_argnums=row.cache_index)
    operands = row.arrays()
    given = operands[row.cache_index]
    address = given.unsafe_buffer_pointer()
    for _ in range(3):
        (operands[row.cache_index],) = run(*operands)
        assert operands[row.cache_index].unsafe_buffer_pointer() == address
    assert given.is_deleted()
    # Writing three times gives what writing once gives.
    row.check([operands[row.cache_index]], row.example())


@pytest.mark.parametrize("eager", [False, True])
@ops.each_run(lambda row: row.in_place)
def test_operand_that_is_not_donated_is_kept(row, implementation, eager):
    run = row.with_implementation(implementation)
    operands, example = row.arrays(), row.example()
    (after,) = (run if eager else jax.jit(run))(*operands)
    given = operands[row.cache_index]
    assert after.unsafe_buffer_pointer() != given.unsafe_buffer_pointer()
    assert_bit_equal(given, example[row.cache_index])
    row.check([after], example)


# A whole decode step in loops.


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
