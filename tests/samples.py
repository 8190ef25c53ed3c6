"""Small calls that together run every kernel, for compute-sanitizer: see `make sanitize`.

Each sample is a function of `implementation` and `garbage`. With garbage the schedules are random
integers. Then the results mean nothing, and only the addresses are checked.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import sparse_calls
from cases import D_K, D_V, UNUSED_ENTRY

import jax_flashmla as fm


def decode_sample(
    lengths,
    h_q,
    *,
    s_q=1,
    h_kv=1,
    page=64,
    dtype=jnp.bfloat16,
    bad_page=False,
    offsets=None,
    room=0,
    garbage=False,
    implementation,
):
    """Appends a token to each sequence and decodes; with `bad_page` sequence 0 must be NaN.

    With room for more pages in the block table, two row tiles share their pages in a cluster. With
    `garbage` the schedules are random integers, and the results mean nothing.
    """
    rng = np.random.default_rng(0)
    b, max_blocks = len(lengths), -(-max(lengths) // page) + 1
    num_blocks = b * max_blocks
    table = rng.permutation(num_blocks).reshape(b, max_blocks).astype(np.int32)
    for row, length in zip(table, lengths, strict=True):
        row[-(-length // page) :] = UNUSED_ENTRY
    if bad_page:
        table[0, 0] = num_blocks + 7
    table = np.pad(table, ((0, 0), (0, room)), constant_values=UNUSED_ENTRY)
    block_table, cache_seqlens = jnp.asarray(table), jnp.asarray(lengths, jnp.int32)

    cache = jnp.asarray(rng.standard_normal((num_blocks, page, h_kv, D_K)), dtype)
    slots = fm.get_slot_mapping(block_table, cache_seqlens[:, None] - 1, page).reshape(-1)
    new_kv = jnp.ones((b, h_kv, D_K), dtype)
    cache = fm.append_kv_cache(cache, new_kv, slots, implementation=implementation)
    q = jnp.asarray(rng.standard_normal((b, s_q, h_q, D_K)), dtype)
    schedule = fm.get_mla_metadata(
        cache_seqlens, s_q * h_q // h_kv, h_kv, implementation=implementation
    )

    def decode(*given):
        return fm.flash_mla_with_kvcache(
            q,
            cache,
            block_table,
            cache_seqlens,
            D_V,
            *given,
            causal=s_q > 1,
            causal_offset=None if offsets is None else jnp.asarray(offsets, jnp.int32),
            implementation=implementation,
        )

    if garbage:
        for given in cases.schedules_of_garbage(rng, schedule, (b + 3, 2**31)):
            jax.block_until_ready(decode(*given))
        return
    for given in ((), schedule):  # made by the call, and given
        out, _ = decode(*given)
        finite = np.isfinite(np.asarray(out.astype(jnp.float32))).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(finite, [not bad_page] + [True] * (b - 1))


def sample(lengths, h_q, **options):
    return functools.partial(decode_sample, lengths, h_q, **options)


DECODE = (
    sample([300, 1000, 17], 16),
    sample([300, 0, 700], 128, room=200),
    sample([130, 90], 128, s_q=2, page=16, room=600, bad_page=True),
    sample([200, 65], 6, s_q=3, h_kv=2, page=32, dtype=jnp.float16),
    sample([300, 40, 0, 1000], 32, s_q=4, offsets=[7, -30, 5, -2000]),
    sample([70] * 140, 64, page=128),
    sample([40] * 700, 64),  # more sequences in a block than it plans ahead
    sample([512] * 66, 16),  # two splits each, which decode joins
    sample([700] * 20 + [0, 64, 2000], 128),  # one, two and more splits
    sample([700] * 20 + [0, 64, 2000], 128, room=40),
)


def sparse_sample(
    lengths,
    h_q,
    *,
    s_q=1,
    topk,
    extra_lengths=None,
    extra_topk=0,
    sink=False,
    implementation,
    garbage=False,
    **options,
):
    """Decodes lists of these lengths; see `cases.make_sparse_inputs` for the poison around them.

    With `garbage` the schedules are random integers, and the results mean nothing.
    """
    rng = np.random.default_rng(0)
    case = cases.SparseCase(len(lengths), s_q, h_q, topk, extra_topk, **options)
    inputs = cases.make_sparse_inputs(case, lengths=lengths, extra_lengths=extra_lengths)
    if sink:
        inputs = inputs.replace(attn_sink=rng.standard_normal(h_q).astype(np.float32))
    schedule = sparse_calls.schedule_for(inputs, implementation)
    if garbage:
        for given in cases.schedules_of_garbage(rng, schedule, (len(lengths) * s_q + 3, 2**31)):
            sparse_calls.decoded(inputs, implementation, schedule=given)
        return
    for given in ((None, None), schedule):  # made by the call, and given
        sparse_calls.check(inputs, implementation, schedule=given)


def sparse(lengths, h_q, **options):
    return functools.partial(sparse_sample, lengths, h_q, **options)


SPARSE_DECODE = (
    sparse([128, 70, 0], 16, topk=128),
    sparse([133, 1, 64], 6, s_q=2, topk=133, page=1, sink=True, dtype="float16"),
    sparse([[300, 3], [0, 64], [-4, 2000]], 128, s_q=2, topk=700, extra_topk=65, sink=True),
    sparse([512, 30, 0], 64, topk=512, d_k=512, page=48, extra_topk=128, extra_page=2),
    sparse([70, 0], 8, topk=70, d_k=512, extra_topk=900, extra_lengths=[0, 900], sink=True),
    sparse([2048], 8, topk=2051, d_k=512),
    sparse([40] * 400, 20, s_q=2, topk=64),  # more lists in a block than it plans ahead
    sparse([512] * 66, 16, topk=512),  # two splits each, which decode joins
    sparse([512] * 66, 128, topk=512, d_k=512),
    sparse([700] * 20 + [0, 64, 2000], 128, topk=2000, sink=True),  # one, two and more splits
    sparse([3000, 100], 160, topk=3000),  # many splits
)
