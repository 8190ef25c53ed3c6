"""A decode step as a server would export it: an append, a schedule, attention."""

import cases
import jax.numpy as jnp
import numpy as np
from cases import D_K, Case
from dense_calls import decode
from lowering import (
    struct,
)

import jax_flashmla as fm


def append(*arrays, **options):
    return fm.append_kv_cache(*arrays, **options)


def serve(q, new_kv, k_cache, block_table, lengths):
    """A step as one would export it."""
    slots = fm.get_slot_mapping(block_table, lengths[:, None] - 1, k_cache.shape[1])
    k_cache = append(k_cache, new_kv, slots.reshape(-1))
    schedule = fm.get_mla_metadata(lengths, q.shape[1] * q.shape[2], 1)
    return *decode(q, k_cache, block_table, lengths, schedule=schedule), k_cache


def serve_for(implementation):
    def step(q, new_kv, k_cache, block_table, lengths):
        slots = fm.get_slot_mapping(block_table, lengths[:, None] - 1, 64).reshape(-1)
        k_cache = append(k_cache, new_kv, slots, implementation=implementation)
        arrays = (q, k_cache, block_table, lengths)
        return *decode(*arrays, implementation=implementation), k_cache

    return step


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
