"""append under vmap"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, zeros
from decode_step import append
from lowering import (
    APPEND,
    PASSED_ON,
    operations_on,
    primitives,
    structs_on,
)


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
