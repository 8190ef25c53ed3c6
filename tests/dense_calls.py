"""Calls of the dense decode op: on arrays, on the Inputs of `cases`, on shapes alone."""

import cases
import jax.numpy as jnp
import numpy as np
from cases import D_K, D_V
from lowering import (
    struct,
)

import jax_flashmla as fm


def decode_structs(b=4, s_q=1, h_q=16, h_kv=1, *, d_k=D_K, page=64, dtype=jnp.bfloat16):
    return (
        struct((b, s_q, h_q, d_k), dtype),
        struct((100, page, h_kv, d_k), dtype),
        struct((b, 10), jnp.int32),
        struct((b,), jnp.int32),
    )


def decode(*arrays, d_v=D_V, schedule=(None, None), **options):
    return fm.flash_mla_with_kvcache(*arrays, d_v, *schedule, **options)


def causal_decode(q, k_cache, block_table, lengths, causal_offset=None, **options):
    arrays = (q, k_cache, block_table, lengths)
    return decode(*arrays, causal=True, causal_offset=causal_offset, **options)


def decoded(inputs, implementation, *, schedule=(None, None), **options):
    """(out, lse) of the op, as numpy arrays."""
    results = fm.flash_mla_with_kvcache(
        *inputs.device_arrays(), D_V, *schedule, implementation=implementation, **options
    )
    return tuple(map(np.asarray, results))


def check(inputs, implementation, **options):
    """Runs the op and compares it with float64."""
    schedule = options.pop("schedule", (None, None))
    actual = decoded(inputs, implementation, schedule=schedule, **options)
    cases.assert_decode_close(actual, cases.expected_decode(inputs, **options))
    return actual


def schedule_for(lengths, inputs, implementation="xla", **options):
    s_q, h_q = inputs.q.shape[1:3]
    h_kv = inputs.k_cache.shape[2]
    return fm.get_mla_metadata(
        jnp.asarray(lengths, jnp.int32),
        s_q * h_q // h_kv,
        h_kv,
        implementation=implementation,
        **options,
    )
