"""Calls of sparse decode on the SparseInputs of `cases`."""

import cases
import jax.numpy as jnp
import numpy as np
from cases import D_V

import jax_flashmla as fm


def arrays(inputs):
    """(q, k_cache, the keyword arguments that hold arrays), on the device."""
    optional = {
        "indices": inputs.indices,
        "topk_length": inputs.topk_length,
        "attn_sink": inputs.attn_sink,
        "extra_k_cache": inputs.extra_k_cache,
        "extra_indices_in_kvcache": inputs.extra_indices,
        "extra_topk_length": inputs.extra_topk_length,
    }
    optional = {name: jnp.asarray(x) for name, x in optional.items() if x is not None}
    return jnp.asarray(inputs.q), jnp.asarray(inputs.k_cache), optional


def sparse_decode(q, k_cache, schedule=(None, None), d_v=D_V, **options):
    return fm.flash_mla_with_kvcache(q, k_cache, None, None, d_v, *schedule, **options)


def decoded(inputs, implementation, **options):
    """(out, lse) of the op, as numpy arrays."""
    q, k_cache, optional = arrays(inputs)
    results = sparse_decode(q, k_cache, implementation=implementation, **optional, **options)
    return tuple(map(np.asarray, results))


def check(inputs, implementation, **options):
    """Runs the op and compares it with float64."""
    actual = decoded(inputs, implementation, **options)
    options.pop("schedule", None)
    cases.assert_decode_close(actual, cases.expected_sparse_decode(inputs, **options))
    return actual


def schedule_for(inputs, implementation="xla", lengths=None, **options):
    """The schedule of a call, or one made for other lengths: i32 [b * s_q]."""
    if lengths is None:
        _, _, optional = arrays(inputs)
        names = ("topk_length", "extra_indices_in_kvcache", "extra_topk_length")
        lengths = fm.get_sparse_seqlens(optional["indices"], *map(optional.get, names))
    return fm.get_mla_metadata(
        jnp.asarray(lengths, jnp.int32),
        inputs.q.shape[2],
        1,
        implementation=implementation,
        **options,
    )
