"""flash_mla_with_kvcache: against float64, on the ground where such kernels have broken, misuse."""

import dataclasses
import functools
import random

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, UNUSED_ENTRY, Case

import jax_flashmla as fm
from jax_flashmla import schedule
from jax_flashmla.reference import schedule as reference


def decode(inputs, implementation, *, metadata=(None, None), **options):
    """(out, lse) of the op, as numpy arrays."""
    results = fm.flash_mla_with_kvcache(
        *inputs.device_arrays(), D_V, *metadata, implementation=implementation, **options
    )
    return tuple(map(np.asarray, results))


def check(inputs, implementation, **options):
    """Runs the op and compares it with float64."""
    metadata = options.pop("metadata", (None, None))
    actual = decode(inputs, implementation, metadata=metadata, **options)
    cases.assert_decode_close(actual, cases.expected_decode(inputs, **options))
    return actual


def assert_bit_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def metadata_for(lengths, inputs, implementation="xla", **options):
    s_q, h_q = inputs.q.shape[1:3]
    h_kv = inputs.k_cache.shape[2]
    return fm.get_mla_metadata(
        jnp.asarray(lengths, jnp.int32),
        s_q * h_q // h_kv,
        h_kv,
        implementation=implementation,
        **options,
    )


def grid_sample():
    """A few cases of the grid that numpy works through in about a second."""
    small = [c for c in cases.dense_grid() if c.b * c.s_k * c.h_q * c.s_q <= 2**20]
    return random.Random(0).sample(small, 20)


def test_grid_is_whole():
    grid = cases.dense_grid()
    assert len(grid) == len(set(grid)) == 2336
    assert len({(c.b, c.s_q, c.h_q, c.h_kv, c.causal) for c in grid}) == 416


@pytest.mark.parametrize("case", grid_sample(), ids=str)
def test_grid_sample(case, implementation):
    check(cases.make_inputs(case), implementation, causal=case.causal)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("page", [16, 32, 64, 128, 256])
def test_page_sizes_and_dtypes(page, dtype, implementation):
    case = Case(3, 2, 300, 16, 2, varlen=True, causal=True, page=page, dtype=dtype)
    check(cases.make_inputs(case), implementation, causal=True)


@pytest.mark.parametrize(
    ("d_k", "d_v", "page", "dtype"),
    [
        (64, 64, 1, "float32"),
        (288, 256, 64, "bfloat16"),
        (576, 512, 7, "float16"),
        (8, 3, 5, "float32"),
    ],
)
def test_shapes_without_a_kernel(d_k, d_v, page, dtype):
    rng = np.random.default_rng(0)
    inputs = cases.make_inputs(Case(3, 3, 40, 4, 2, varlen=True, page=page, dtype=dtype))
    inputs = inputs.replace(
        q=cases.random_values(rng, (3, 3, 4, d_k), dtype),
        k_cache=cases.random_values(rng, (*inputs.k_cache.shape[:3], d_k), dtype),
    )
    actual = fm.flash_mla_with_kvcache(
        *inputs.device_arrays(), d_v, causal=True, implementation="xla"
    )
    expected = cases.expected_decode(inputs, d_v=d_v, causal=True)
    cases.assert_decode_close(actual, expected)


def test_softmax_scale(implementation):
    inputs = cases.make_inputs(Case(2, 1, 100, 16))
    check(inputs, implementation, softmax_scale=0.3)
    given = decode(inputs, implementation, softmax_scale=np.float64(D_K**-0.5))
    for a, b in zip(given, decode(inputs, implementation), strict=True):
        np.testing.assert_array_equal(a, b)


def test_lse_is_natural_logarithm(implementation):
    inputs = cases.make_inputs(Case(2, 1, 200, 3))
    inputs = inputs.replace(q=np.zeros_like(inputs.q))
    lse = decode(inputs, implementation)[1]
    np.testing.assert_allclose(lse, np.log(200.0), rtol=1e-6)


def test_traced_lengths_and_tables(implementation):
    """One compiled function serves all lengths; the schedule is made inside it."""
    inputs = cases.make_inputs(Case(4, 2, 200, 8, varlen=True), max_blocks=16)

    @jax.jit
    def step(q, k_cache, block_table, lengths):
        metadata = fm.get_mla_metadata(lengths, 16, 1, implementation=implementation)
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *metadata, implementation=implementation
        )

    for lengths in (inputs.cache_seqlens, inputs.cache_seqlens // 2, inputs.cache_seqlens * 0):
        shorter = inputs.replace(cache_seqlens=lengths)
        actual = step(*shorter.device_arrays())
        cases.assert_decode_close(actual, cases.expected_decode(shorter))


@pytest.mark.parametrize("num_sms", [1, 2, 7, 132, 1000])
def test_any_number_of_parts(num_sms, implementation):
    inputs = cases.make_inputs(Case(5, 1, 400, 16, varlen=True))
    metadata = metadata_for(inputs.cache_seqlens, inputs, implementation, num_sms=num_sms)
    check(inputs, implementation, metadata=metadata)


# The schedule that a call makes itself.


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 4096, 16),
        Case(5, 2, 1500, 128, varlen=True, causal=True),
        Case(150, 1, 130, 8, varlen=True),
        Case(8, 2, 700, 8, 2, causal=True, zeros=True),
        Case(1100, 1, 40, 8, varlen=True),
    ],
    ids=str,
)
def test_without_metadata_as_with_it(case):
    """Once, in a loop whose lengths change from turn to turn, and under vmap."""
    inputs = cases.make_inputs(case)
    q, k_cache, table, lengths = inputs.device_arrays()
    options = {"causal": case.causal, "implementation": "cuda"}

    def given(lengths, **limits):
        metadata = metadata_for(lengths, inputs, "cuda", **limits)
        return fm.flash_mla_with_kvcache(q, k_cache, table, lengths, D_V, *metadata, **options)

    def made(lengths):
        return fm.flash_mla_with_kvcache(q, k_cache, table, lengths, D_V, **options)

    assert_bit_equal(made(lengths), given(lengths))
    with pytest.raises(AssertionError):  # with other splits there are other bits
        assert_bit_equal(made(lengths), given(lengths, num_sms=1))
    turns = jnp.stack([lengths // 9, lengths, lengths.at[0].set(0)])
    for transform in (jax.lax.map, lambda f, turns: jax.vmap(f)(turns)):
        results = [jax.jit(functools.partial(transform, f))(turns) for f in (made, given)]
        assert_bit_equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("b", [2, 40, 60, 100, 600, 1500, 4096])
def test_without_metadata_as_with_it_where_some_are_long(b, h_q):
    """Requests of many splits among whole ones, and fewer or more requests than threads."""
    rng = np.random.default_rng((b, h_q))
    q = jax.random.normal(jax.random.key(b), (b, 1, h_q, D_K), jnp.bfloat16)
    k_cache = jax.random.normal(jax.random.key(h_q), (500, 64, 1, D_K), jnp.bfloat16)
    table = jnp.asarray(rng.integers(0, 500, (b, 1000)), jnp.int32)

    def run(lengths, *metadata):
        return fm.flash_mla_with_kvcache(
            q, k_cache, table, lengths, D_V, *metadata, implementation="cuda"
        )

    for _ in range(5):
        lengths = np.minimum(100 * rng.pareto(0.7, b), 20 * 64).astype(np.int32)
        lengths[rng.integers(b)] = 64 * 1000
        lengths = jnp.asarray(lengths)
        metadata = fm.get_mla_metadata(lengths, h_q, 1, implementation="cuda")
        assert np.diff(metadata[1]).max() > 2
        assert_bit_equal(run(lengths), run(lengths, *metadata))


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 2, 5, 14, 66, 500])
@pytest.mark.parametrize(
    "case", [Case(3, 2, 1500, 128, varlen=True), Case(150, 1, 300, 8, varlen=True)], ids=str
)
def test_without_metadata_as_with_it_on_any_number_of_sms(case, num_sms, monkeypatch):
    """As on a part of a GPU."""
    monkeypatch.setattr(schedule, "_local_num_sms", lambda: num_sms)
    inputs = cases.make_inputs(case)
    metadata = metadata_for(inputs.cache_seqlens, inputs, "cuda")
    assert metadata[0].num_parts == max(1, num_sms // (4 if case.h_q == 128 else 1))
    assert_bit_equal(decode(inputs, "cuda"), decode(inputs, "cuda", metadata=metadata))


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 128])
def test_schedule_of_garbage(h_q):
    """Wrong results, but no wrong address: the device goes on, and the next call is right."""
    inputs = cases.make_inputs(Case(40, 1, 900, h_q, varlen=True), max_blocks=40)
    metadata = metadata_for(inputs.cache_seqlens, inputs, "cuda")
    rng = np.random.default_rng(h_q)
    for most in (4, 43, 500, 2**31):
        for _ in range(5):
            decode(inputs, "cuda", metadata=cases.random_arrays(rng, metadata, most))
    check(inputs, "cuda", metadata=metadata)


# What has broken in such kernels.


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("h_q", [16, 128])
def test_every_length_of_a_last_tile(h_q, page, implementation):
    """With room in the table for two row tiles to share their pages."""
    inputs = cases.make_inputs(
        Case(130, 1, 0, h_q, page=page), lengths=list(range(130)), max_blocks=512 // page
    )
    check(inputs, implementation)


@pytest.mark.parametrize("entry", [-1, UNUSED_ENTRY])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 70, 0], [130, 0, 1]])
def test_empty_sequences(lengths, entry, implementation):
    inputs = cases.make_inputs(Case(3, 2, 0, 8), lengths=lengths, max_blocks=4)
    inputs.block_table[inputs.block_table == UNUSED_ENTRY] = entry
    out, lse = check(inputs, implementation, causal=True)
    empty = inputs.cache_seqlens == 0
    assert (out[empty] == 0).all()
    assert (lse[empty] == np.inf).all()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_in_unused_slots(poison, implementation):
    inputs = cases.make_inputs(Case(4, 2, 65, 16, varlen=True, causal=True, page=128))
    inputs.k_cache[np.isnan(inputs.k_cache)] = poison
    out, _ = check(inputs, implementation, causal=True)
    assert np.isfinite(out.astype(np.float32)).all()


@pytest.mark.parametrize(
    "planned", [[0, 0, 0, 0], [1, 500, 3, 64], [500, 500, 500, 500], [0, 900, 0, 2**30]], ids=str
)
@pytest.mark.parametrize("actual", [[400, 64, 0, 129], [0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("fixed", [None, 64, 128])
def test_schedule_of_other_lengths(fixed, planned, actual, implementation):
    """Lengths that grew, shrank, went from 0 to n and back since the schedule was made."""
    inputs = cases.make_inputs(Case(4, 1, 0, 16), lengths=actual, max_blocks=8)
    options = {} if fixed is None else {"fixed_split_size": fixed, "max_seqlen": 320}
    check(inputs, implementation, metadata=metadata_for(planned, inputs, implementation, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("tested", ["cuda", "xla"])
def test_offsets_past_int32(tested):
    """A pool of more than 2^31 elements, with the pages that matter at its end."""
    inputs = cases.make_inputs(Case(2, 1, 300, 16))
    used = len(inputs.k_cache)
    pages = 2**31 // (64 * D_K) + 1000
    k_cache = jnp.full((pages, 64, 1, D_K), jnp.nan, jnp.bfloat16)
    place = jax.jit(lambda pool, end: pool.at[-used:].set(end), donate_argnums=0)
    k_cache = place(k_cache, jnp.asarray(inputs.k_cache))
    table = np.where(
        inputs.block_table == UNUSED_ENTRY, UNUSED_ENTRY, inputs.block_table % used + pages - used
    ).astype(np.int32)
    actual = fm.flash_mla_with_kvcache(
        jnp.asarray(inputs.q),
        k_cache,
        jnp.asarray(table),
        jnp.asarray(inputs.cache_seqlens),
        D_V,
        implementation=tested,
    )
    cases.assert_decode_close(actual, cases.expected_decode(inputs))


@pytest.mark.gpu
def test_scratch_offsets_past_int32():
    """So many parts that their partial results hold more than 2^31 elements."""
    parts = 2**31 // (2 * 128 * D_V) + 100
    length = reference.TILE_TOKENS * (parts - reference.SEQUENCE_OVERHEAD)  # a tile a part
    q = cases.random_values(np.random.default_rng(0), (1, 1, 128, D_K), "bfloat16")
    pool = cases.random_values(np.random.default_rng(1), (50, 64, 1, D_K), "bfloat16")
    table = np.arange(parts, dtype=np.int32)[None] % 50
    arrays = [jnp.asarray(x) for x in (q, pool, table, np.array([length], np.int32))]
    metadata = fm.get_mla_metadata(arrays[3], 128, 1, num_sms=2 * parts, implementation="cuda")
    assert metadata[0].num_parts == parts
    actual = fm.flash_mla_with_kvcache(*arrays, D_V, *metadata, implementation="cuda")
    expected = fm.flash_mla_with_kvcache(*arrays, D_V, implementation="xla")
    cases.assert_decode_close(actual, tuple(np.asarray(x, np.float64) for x in expected))


@pytest.mark.parametrize("b", [16385, pytest.param(70000, marks=pytest.mark.gpu)])
def test_many_sequences(b, implementation):
    """More sequences than a grid's y axis or a list of fixed size holds."""
    few = cases.make_inputs(Case(64, 1, 0, 1, page=16), lengths=np.arange(64) % 32)
    often = -(-b // 64)
    inputs = few.replace(
        **{
            name: np.tile(getattr(few, name), (often, *[1] * (getattr(few, name).ndim - 1)))[:b]
            for name in ("q", "block_table", "cache_seqlens")
        }
    )
    out, lse = cases.expected_decode(few)
    expected = np.tile(out, (often, 1, 1, 1))[:b], np.tile(lse, (often, 1, 1))[:b]
    cases.assert_decode_close(decode(inputs, implementation), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 64, 128, 256])
@pytest.mark.parametrize("longest", [64, 200])
def test_many_short_sequences_again_and_again(longest, h_q):
    """Each block changes its queries often; in clusters the other block's keys follow them."""
    rng = np.random.default_rng((longest, h_q))
    b, calls = 840, 300
    q = jax.random.normal(jax.random.key(longest), (b, 1, h_q, D_K), jnp.bfloat16)
    k_cache = jax.random.normal(jax.random.key(h_q), (400, 64, 1, D_K), jnp.bfloat16)
    table = jnp.asarray(rng.integers(0, 400, (b, 8)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, longest + 1, b), jnp.int32)

    def run(lengths, implementation="cuda"):
        return fm.flash_mla_with_kvcache(
            q, k_cache, table, lengths, D_V, implementation=implementation
        )

    @jax.jit
    def count_wrong(lengths, expected):
        def body(carry, _):
            lengths, wrong = carry
            differs = [(a != e).any() for a, e in zip(run(lengths), expected, strict=True)]
            carry = jax.lax.optimization_barrier((lengths, wrong + (differs[0] | differs[1])))
            return carry, None

        return jax.lax.scan(body, (lengths, jnp.int32(0)), length=calls)[0][1]

    first, plain = run(lengths), run(lengths, "xla")
    # Values of up to 5.5, weighed by numbers of 8 bits and rounded to 8 bits, twice: 0.03 at most.
    # A row of wrong queries is off by more than that, mostly by far.
    for name, atol, a, e in zip(("out", "lse"), (0.05, 0.02), first, plain, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=name)
    assert count_wrong(lengths, first) == 0


@pytest.mark.gpu
def test_many_rows():
    """More row tiles than a grid's y or z axis holds."""
    s_q, h_q = 33000, 128
    some_q = cases.random_values(np.random.default_rng(0), (1, 100, h_q, D_K), "bfloat16")
    q = jnp.tile(jnp.asarray(some_q), (1, s_q // 100, 1, 1))
    inputs = cases.make_inputs(Case(1, 1, 100, 1))
    _, *rest = inputs.device_arrays()
    out, lse = fm.flash_mla_with_kvcache(q, *rest, D_V, implementation="cuda")
    some = slice(0, s_q, 1009)  # without a mask, queries do not depend on one another
    expected = fm.flash_mla_with_kvcache(q[:, some], *rest, D_V, implementation="xla")
    cases.assert_decode_close(
        (out[:, some], lse[..., some]), tuple(np.asarray(x, np.float64) for x in expected)
    )


def test_repeat_runs_are_bit_equal(implementation):
    inputs = cases.make_inputs(Case(6, 2, 700, 32, varlen=True, causal=True))
    first = decode(inputs, implementation, causal=True)
    for _ in range(50 if implementation == "cuda" else 2):
        again = decode(inputs, implementation, causal=True)
        for a, b in zip(first, again, strict=True):
            assert a.tobytes() == b.tobytes()


def test_alone_as_in_a_batch(implementation):
    inputs = cases.make_inputs(Case(4, 1, 400, 16, varlen=True))
    out, lse = decode(inputs, implementation)
    for i in range(4):
        alone = inputs.replace(
            q=inputs.q[i : i + 1],
            block_table=inputs.block_table[i : i + 1],
            cache_seqlens=inputs.cache_seqlens[i : i + 1],
        )
        expected = out[i : i + 1].astype(np.float64), lse[i : i + 1].astype(np.float64)
        cases.assert_decode_close(decode(alone, implementation), expected)


@pytest.mark.parametrize("h_q", [3, 128])
def test_more_queries_than_tokens(h_q, implementation):
    inputs = cases.make_inputs(Case(4, 6, 0, h_q), lengths=[1, 3, 6, 70])
    out, lse = check(inputs, implementation, causal=True)
    assert (out[0, :5] == 0).all()
    assert (lse[0, :, :5] == np.inf).all()
    assert np.isfinite(lse[0, :, 5]).all()


# The offset of the causal mask.

INT32 = np.iinfo(np.int32)
OFFSETS = (0, 1, 3, 4, -1, -60, -65, -129, -130, -131, 1000, -1000, INT32.max, INT32.min)


@pytest.mark.parametrize("h_q", [3, 128])
@pytest.mark.parametrize("s_q", [1, 4])
def test_causal_offset(s_q, h_q, implementation):
    """Offsets that hide keys and show more, up to all; 131 tokens are three tiles."""
    inputs = cases.make_inputs(Case(len(OFFSETS), s_q, 131, h_q))
    offset = np.array(OFFSETS, np.int32)
    out, lse = check(inputs, implementation, causal=True, causal_offset=jnp.asarray(offset))
    for hidden in (-1000, INT32.min):
        row = OFFSETS.index(hidden)
        assert (out[row] == 0).all()
        assert (lse[row] == np.inf).all()
    unmasked = decode(inputs, implementation)  # what all queries see without a mask
    for seen in (4, 1000, INT32.max):
        row = OFFSETS.index(seen)
        cases.assert_close("lse", lse[row], unmasked[1][row], atol=1e-6, rtol=1e-5)


def test_causal_offset_of_ragged_sequences(implementation):
    """Empty, short, long, split over several parts and invalid sequences."""
    lengths = [0, 1, 2, 64, 65, 700, 3000, 10]
    inputs = cases.make_inputs(Case(len(lengths), 4, 0, 16, 2), lengths=lengths)
    inputs.block_table[4, 1] = -1
    inputs.cache_seqlens[7] = INT32.max  # more than the table holds
    for offset in ([3, -1, 2, 2, 5, -80, -2950, 1], [-3, 1, -1, -64, -5, 1, 2, INT32.min]):
        offset = np.array(offset, np.int32)
        out, _ = check(inputs, implementation, causal=True, causal_offset=jnp.asarray(offset))
        assert np.isnan(out[[4, 7]].astype(np.float32)).all()


@pytest.mark.parametrize("s_q", [1, 4])
def test_parts_of_a_sequence_join_to_the_whole(s_q, implementation):
    """Runs of pages, one of which ends among the new tokens themselves."""
    inputs = cases.make_inputs(Case(5, s_q, 0, 8), lengths=[130, 128, 126, 3, 191], max_blocks=4)
    capacity = 64  # a page a part
    outs, lses = [], []
    for part in range(4):
        left = inputs.cache_seqlens - part * capacity
        local = np.clip(left, 0, capacity)
        part_of = inputs.replace(
            block_table=inputs.block_table[:, part : part + 1], cache_seqlens=local
        )
        out, lse = check(part_of, implementation, causal=True, causal_offset=left - local)
        outs.append(out)
        lses.append(lse)
    actual = fm.merge_attention_states(np.stack(outs), np.stack(lses))
    cases.assert_decode_close(actual, cases.expected_decode(inputs, causal=True))


# Requests that are split: two splits are joined by decode itself, more by the combine kernel.

ROOM = 1100
"""Columns of a block table, so many that two row tiles share their pages in a cluster."""

row_tiles = pytest.mark.parametrize(
    ("h_q", "max_blocks"), [(3, None), (128, None), (128, ROOM)], ids=["one", "two", "cluster"]
)
PARTS = 12
LENGTHS = [40, 24 * 64 - 5, 320, 320 - 63, 320 - 20, 320 - 1, 9 * 64]
SPLITS = [1, 5, 1, 2, 2, 2, 3]  # of which a part has the end of one and the start of the next


def split_inputs(h_q, max_blocks):
    return cases.make_inputs(Case(len(LENGTHS), 1, 0, h_q), lengths=LENGTHS, max_blocks=max_blocks)


def split_in(splits, lengths, inputs, implementation, **options):
    """The schedule for `lengths`, which must have this many splits of each request."""
    metadata = metadata_for(lengths, inputs, implementation, **options)
    np.testing.assert_array_equal(np.diff(metadata[1]), splits)
    return metadata


def split_in_parts(inputs, implementation):
    """The schedule of LENGTHS for PARTS parts."""
    s_q, h_q = inputs.q.shape[1:3]
    h_kv = inputs.k_cache.shape[2]
    row_tiles = -(-s_q * h_q // h_kv // 64)
    num_sms = PARTS * row_tiles * h_kv
    return split_in(SPLITS, LENGTHS, inputs, implementation, num_sms=num_sms)


@pytest.mark.parametrize(
    "case",
    [
        Case(len(LENGTHS), 1, 0, 3),
        Case(len(LENGTHS), 1, 0, 16, dtype="float16"),
        Case(len(LENGTHS), 1, 0, 16, page=16),
        Case(len(LENGTHS), 2, 0, 16, 2, causal=True),
        Case(len(LENGTHS), 1, 0, 64),
        Case(len(LENGTHS), 1, 0, 128),
        Case(len(LENGTHS), 2, 0, 128, causal=True),
        Case(len(LENGTHS), 1, 0, 192),
    ],
    ids=str,
)
@pytest.mark.parametrize("max_blocks", [None, ROOM])
def test_one_two_three_and_more_splits(case, max_blocks, implementation):
    inputs = cases.make_inputs(case, lengths=LENGTHS, max_blocks=max_blocks)
    metadata = split_in_parts(inputs, implementation)
    check(inputs, implementation, metadata=metadata, causal=case.causal)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(7, 1, 0, 128), Case(7, 2, 0, 128, causal=True)], ids=str)
def test_shared_pages_change_no_bits(case):
    """Whether two blocks share their pages follows from the room in the table, no result does."""
    narrow, wide = (cases.make_inputs(case, lengths=LENGTHS, max_blocks=n) for n in (None, ROOM))
    assert_bit_equal((narrow.q, narrow.k_cache), (wide.q, wide.k_cache))
    results = [
        decode(inputs, "cuda", metadata=split_in_parts(inputs, "cuda"), causal=case.causal)
        for inputs in (narrow, wide)
    ]
    assert_bit_equal(*results)


@pytest.mark.parametrize("h_q", [3, 128])
def test_first_split_of_next_to_no_weight(h_q, implementation):
    """Beside the second split it counts for nothing, but what is NaN in it stays NaN."""
    inputs = cases.make_inputs(Case(2, 1, 0, h_q), lengths=[256, 256])
    first, second = inputs.block_table[:, :2], inputs.block_table[:, 2:4]
    inputs.q[..., D_V:] = 1
    inputs.k_cache[first, :, :, D_V:] = -1
    inputs.k_cache[second, :, :, D_V:] = 0
    inputs.q[..., :D_V] = 0
    to_nan = 9
    inputs.q[..., to_nan] = -1
    inputs.k_cache[..., to_nan] = 0
    options = {"fixed_split_size": 128, "max_seqlen": 256}
    metadata = split_in([2, 2], [256, 256], inputs, implementation, **options)
    scale = 40.0  # scores of -2560 and of 0
    check(inputs, implementation, metadata=metadata, softmax_scale=scale)
    inputs.k_cache[first[1, 0], 7, 0, to_nan] = np.inf  # a score of -inf, and 0 * inf
    with np.errstate(invalid="ignore"):
        out, lse = cases.expected_decode(inputs, softmax_scale=scale)
    assert np.isnan(out[1, ..., to_nan]).all()
    assert np.isfinite(out).sum() == out.size - h_q
    actual = decode(inputs, implementation, metadata=metadata, softmax_scale=scale)
    cases.assert_decode_close(actual, (out, lse))


@row_tiles
@pytest.mark.parametrize(
    "exponents", [[100] * 4, [-100] * 4, [66, -66, 0, 100]], ids=["large", "small", "mixed"]
)
def test_values_that_fp16_does_not_hold(exponents, h_q, max_blocks, implementation):
    """By powers of 2 a quarter of the columns, so that all else stays as it was."""
    lengths = [200, 256, 300, 500]
    inputs = cases.make_inputs(Case(4, 1, 0, h_q), lengths=lengths, max_blocks=max_blocks)
    inputs.q[..., :D_V] = 0  # the scores come from the other columns
    values = inputs.k_cache[..., :D_V]
    for i, pages in enumerate(inputs.block_table):
        for j in range(-(-lengths[i] // 64)):
            values[pages[j]] *= 2 ** (3 * (j // 2 % 2))  # the splits differ too
    expected = cases.expected_decode(inputs)
    scale = np.repeat(np.exp2(np.array(exponents, np.float32)), D_V // 4)
    inputs.k_cache[..., :D_V] = values * scale.astype(values.dtype)
    options = {"fixed_split_size": 128, "max_seqlen": 512}
    metadata = split_in([2, 2, 3, 4], lengths, inputs, implementation, **options)
    out, lse = decode(inputs, implementation, metadata=metadata)
    out = (out.astype(np.float32) / scale).astype(out.dtype)
    cases.assert_decode_close((out, lse), expected)


@row_tiles
def test_values_that_are_not_finite_in_one_split(h_q, max_blocks, implementation):
    """They stay in their columns, and what has the largest magnitude is not taken from them."""
    lengths, splits, bad_splits = [256, 256, 300, 500], [2, 2, 3, 4], [0, 1, 1, 3]
    inputs = cases.make_inputs(Case(4, 1, 0, h_q), lengths=lengths, max_blocks=max_blocks)
    to_nan, to_inf, to_minus_inf = 5, 300, 301
    pages = [inputs.block_table[i, 2 * split] for i, split in enumerate(bad_splits)]
    # One token: a score of -inf, and 0 * inf. Of every other head inf, so that all becomes NaN.
    inputs.k_cache[pages, 40, 0, to_nan] = np.inf
    inputs.q[..., to_nan] = -1
    inputs.q[:, :, 1::2, to_nan] = 1
    # All tokens of a page: sums that float32 does not hold.
    inputs.q[..., [to_inf, to_minus_inf]] = 0
    inputs.k_cache[pages, :, 0, to_inf] = 3e38
    inputs.k_cache[pages, :, 0, to_minus_inf] = -3e38
    with np.errstate(invalid="ignore"):
        out, lse = cases.expected_decode(inputs)
    assert np.isnan(out[:, :, 0::2]).sum() == out[:, :, 0::2, 0].size
    assert np.isnan(out[:, :, 1::2]).all()
    out[:, :, 0::2, to_inf], out[:, :, 0::2, to_minus_inf] = np.inf, -np.inf
    options = {"fixed_split_size": 128, "max_seqlen": 512}
    metadata = split_in(splits, lengths, inputs, implementation, **options)
    cases.assert_decode_close(decode(inputs, implementation, metadata=metadata), (out, lse))


@pytest.mark.parametrize("h_q", [1, 3])  # two row tiles, and five
def test_queries_that_see_nothing_of_a_split(h_q, implementation):
    s_q, split_size = 100, 64
    lengths = [128, 128, 190, 190, 256, 128, 190]
    offset = np.array([0, -70, 0, -101, -85, -1000, INT32.min], np.int32)
    blind = slice(5, 7)  # all of their queries
    visible = np.add(lengths, offset)[:, None] - s_q + 1 + np.arange(s_q)
    starts = split_size * np.arange(1, 3)  # of the second and the third split
    sees = (visible[:, :, None] > starts).any(axis=1)
    np.testing.assert_array_equal(sees[:5], [[1, 0], [0, 0], [1, 1], [1, 0], [1, 1]])
    assert (visible[:5].min(axis=1) <= starts[[0, 0, 1, 0, 1]]).all()

    inputs = cases.make_inputs(Case(len(lengths), s_q, 0, h_q), lengths=lengths)
    inputs.k_cache[inputs.block_table[blind, :2]] = np.nan
    options = {"fixed_split_size": split_size, "max_seqlen": 256}
    metadata = split_in([2, 2, 3, 3, 4, 2, 3], lengths, inputs, implementation, **options)
    options = {"causal": True, "causal_offset": jnp.asarray(offset)}
    out, lse = check(inputs, implementation, metadata=metadata, **options)
    assert (out[blind] == 0).all()
    assert (lse[blind] == np.inf).all()


@row_tiles
def test_split_sequences_that_have_become_short(h_q, max_blocks, implementation):
    inputs = split_inputs(h_q, max_blocks)
    metadata = split_in_parts(inputs, implementation)
    for now in ([0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, 0], [1, 0, 0, 64, 320, 0, 65]):
        shorter = inputs.replace(cache_seqlens=np.array(now, np.int32))
        check(shorter, implementation, metadata=metadata)


@pytest.mark.gpu
@row_tiles
def test_arrays_of_different_schedules(h_q, max_blocks):
    """Nobody says what that gives, but it ends, and the next call knows nothing of it."""
    inputs = split_inputs(h_q, max_blocks)
    ours, our_splits = metadata = split_in_parts(inputs, "cuda")
    for tiles in (
        [24, 5, 1, 5, 5, 5, 9],
        [5, 5, 5, 9, 9, 9, 9],
        [0, 0, 15, 0, 0, 0, 7],
        [40, 0, 0, 0, 0, 0, 9],
    ):
        lengths = 64 * np.array(tiles)
        num_sms = PARTS * -(-h_q // 64)
        theirs, their_splits = metadata_for(lengths, inputs, "cuda", num_sms=num_sms)
        assert theirs.num_parts == ours.num_parts
        for mixed in (
            (ours, their_splits),
            (theirs, our_splits),
            (dataclasses.replace(ours, first_part=theirs.first_part), our_splits),
            (dataclasses.replace(ours, part_bounds=theirs.part_bounds), our_splits),
        ):
            out, lse = decode(inputs, "cuda", metadata=mixed)
            assert out.shape == (len(LENGTHS), 1, h_q, D_V)
            assert lse.shape == (len(LENGTHS), h_q, 1)
        check(inputs, "cuda", metadata=metadata)


@row_tiles
def test_repeat_runs_of_splits_are_bit_equal(h_q, max_blocks, implementation):
    """On one scratch, where every other call leaves partial results of other queries."""
    inputs = split_inputs(h_q, max_blocks)
    others = inputs.replace(q=inputs.q[::-1].copy())
    metadata = split_in_parts(inputs, implementation)
    q = jnp.stack([inputs.q, others.q])
    _, *rest = inputs.device_arrays()

    def turn(i):
        return fm.flash_mla_with_kvcache(
            q[i % 2], *rest, D_V, *metadata, implementation=implementation
        )

    turns = jnp.arange(50 if implementation == "cuda" else 4)
    outs, lses = map(np.asarray, jax.jit(lambda turns: jax.lax.map(turn, turns))(turns))
    for i, which in enumerate((inputs, others)):
        cases.assert_decode_close((outs[i], lses[i]), cases.expected_decode(which))
    for i in range(2, len(turns)):
        assert_bit_equal((outs[i], lses[i]), (outs[i % 2], lses[i % 2]))


# What only the device can see.


@pytest.mark.parametrize("bad_id", [-1, -(2**31), "pages", 2**31 - 1])
@pytest.mark.parametrize("position", [0, 2])
def test_needed_page_outside_the_pool(position, bad_id, implementation):
    inputs = cases.make_inputs(Case(3, 2, 150, 8))
    inputs.block_table[1, position] = len(inputs.k_cache) if bad_id == "pages" else bad_id
    out, lse = check(inputs, implementation, causal=True)
    for i, bad in enumerate([False, True, False]):
        assert (np.isnan(out[i].astype(np.float32)) == bad).all()
        assert (np.isnan(lse[i]) == bad).all()


@pytest.mark.parametrize("length", [193, 2**31 - 1])
def test_length_beyond_the_table(length, implementation):
    inputs = cases.make_inputs(Case(3, 1, 192, 8))
    inputs.cache_seqlens[2] = length
    out, lse = check(inputs, implementation)
    assert np.isnan(lse[2]).all()
    assert not np.isnan(lse[:2]).any()
    assert not np.isnan(out[:2].astype(np.float32)).any()


@pytest.mark.parametrize("length", [-1, -(2**31)])
def test_negative_length_counts_as_zero(length, implementation):
    inputs = cases.make_inputs(Case(3, 2, 0, 8), lengths=[100, length, 64])
    out, lse = check(inputs, implementation, causal=True)
    assert (out[1] == 0).all()
    assert (lse[1] == np.inf).all()


def test_no_pages_and_no_table(implementation):
    inputs = cases.make_inputs(Case(2, 1, 0, 8), lengths=[0, 10])
    for changes in (
        {"k_cache": inputs.k_cache[:0]},
        {"block_table": inputs.block_table[:, :0]},
    ):
        _, lse = check(inputs.replace(**changes), implementation)
        assert (lse[0] == np.inf).all()
        assert np.isnan(lse[1]).all()


# Transformations.


def test_eager_calls_compile_once():
    inputs = cases.make_inputs(Case(2, 1, 37, 5))
    events = []

    def listen(event, duration, **_):
        events.append(event)

    arrays = inputs.device_arrays()
    fm.flash_mla_with_kvcache(*arrays, D_V)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(3):
            fm.flash_mla_with_kvcache(*arrays, D_V)
        repeated = list(events)
        fm.flash_mla_with_kvcache(*cases.make_inputs(Case(3, 1, 37, 5)).device_arrays(), D_V)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in repeated if "trace" in event or "compile" in event]
    assert [event for event in events if "compile" in event], "the listener hears nothing"


def test_under_strict_configurations(implementation):
    """Models may run with 64-bit types, or with implicit promotions forbidden."""
    inputs = cases.make_inputs(Case(3, 2, 100, 4, 2, varlen=True, causal=True))

    def step(q, k_cache, block_table, lengths):
        nowhere = fm.get_slot_mapping(block_table, lengths[:, None] - (1 << 20), 64)[:, 0]
        k_cache = fm.append_kv_cache(k_cache, q[:, 0, :2], nowhere, implementation=implementation)
        metadata = fm.get_mla_metadata(lengths, 4, 2, implementation=implementation)
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *metadata,
            causal=True, implementation=implementation,
        )  # fmt: skip

    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        arrays = inputs.device_arrays()
        results = [jax.jit(step)(*arrays)]
        out, lse = jax.jit(jax.vmap(step))(*(jnp.stack([x, x]) for x in arrays))
    results += [(out[i], lse[i]) for i in range(2)]
    for actual in results:
        cases.assert_decode_close(actual, cases.expected_decode(inputs, causal=True))


# Misuse: the error comes before anything runs and names the argument and its value.


def call_with(**changes):
    """The op on good arguments of batch 2, s_q 1, h_q 4, of which some are changed."""
    arguments = {
        "q": jnp.zeros((2, 1, 4, D_K), jnp.bfloat16),
        "k_cache": jnp.zeros((8, 64, 1, D_K), jnp.bfloat16),
        "block_table": jnp.zeros((2, 4), jnp.int32),
        "cache_seqlens": jnp.ones(2, jnp.int32),
        "head_dim_v": D_V,
        "implementation": "xla",
    }
    return fm.flash_mla_with_kvcache(**{**arguments, **changes})


def schedule_for(b=2, rows=4, h_kv=1):
    return fm.get_mla_metadata(jnp.ones(b, jnp.int32), rows, h_kv, implementation="xla")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": jnp.zeros((2, 4, D_K))}, ValueError, r"q must have shape .*got \[2, 4, 576\]"),
        ({"q": jnp.zeros((2, 1, 4, D_K), jnp.int8)}, TypeError, "q must have dtype .*got int8"),
        ({"q": jnp.zeros((2, 0, 4, D_K), jnp.bfloat16)}, ValueError, "q must have no empty axis"),
        ({"k_cache": jnp.zeros((8, 64, 1, D_K), jnp.float16)}, TypeError, "k_cache .*got float16"),
        ({"k_cache": jnp.zeros((8, 64, D_K), jnp.bfloat16)}, ValueError, "k_cache must have shape"),
        (
            {"k_cache": jnp.zeros((8, 64, 1, 512), jnp.bfloat16)},
            ValueError,
            "k_cache .*must be 576",
        ),
        ({"k_cache": jnp.zeros((8, 64, 3, D_K), jnp.bfloat16)}, ValueError, "h_kv must divide h_q"),
        ({"k_cache": jnp.zeros((8, 0, 1, D_K), jnp.bfloat16)}, ValueError, "axis 0 of k_cache"),
        ({"block_table": jnp.zeros((3, 4), jnp.int32)}, ValueError, "block_table .*must be 2"),
        ({"block_table": jnp.zeros((2, 4))}, TypeError, "block_table .*got float32"),
        ({"cache_seqlens": jnp.ones(3, jnp.int32)}, ValueError, "cache_seqlens .*must be 2"),
        ({"cache_seqlens": jnp.ones(2, jnp.int16)}, TypeError, "cache_seqlens .*got int16"),
        ({"head_dim_v": 577}, ValueError, "head_dim_v must be at most .*577"),
        ({"head_dim_v": 0}, ValueError, "head_dim_v must be .*got 0"),
        ({"head_dim_v": 512.0}, TypeError, "head_dim_v must be a static Python int"),
        ({"softmax_scale": 0}, ValueError, "softmax_scale must be finite and above 0.*got 0"),
        ({"softmax_scale": -1.0}, ValueError, "softmax_scale .*got -1.0"),
        ({"softmax_scale": float("nan")}, ValueError, "softmax_scale .*got nan"),
        ({"softmax_scale": 1e300}, ValueError, r"softmax_scale .*got 1e\+300"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a static Python number"),
        ({"softmax_scale": jnp.float32(1)}, TypeError, "softmax_scale must be a static Python"),
        ({"causal": 1}, TypeError, "causal must be a static Python bool, got 1"),
        (
            {"causal_offset": jnp.ones(3, jnp.int32), "causal": True},
            ValueError,
            "causal_offset .*must be 2",
        ),
        ({"causal_offset": jnp.ones(2), "causal": True}, TypeError, "causal_offset .*got float32"),
        ({"causal_offset": 1, "causal": True}, ValueError, r"causal_offset must have shape \[b\]"),
        ({"causal_offset": jnp.ones(2, jnp.int32)}, ValueError, "pass causal=True"),
        ({"implementation": "triton"}, ValueError, "implementation must be one of .*'triton'"),
        ({"num_splits": jnp.zeros(3, jnp.int32)}, ValueError, "None for tile_scheduler_metadata"),
        ({"tile_scheduler_metadata": schedule_for()[0]}, ValueError, "None for num_splits"),
    ],
)
def test_misuse(changes, error, message):
    with pytest.raises(error, match=message):
        call_with(**changes)


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ({"b": 3}, "batch=3, but this call has 2"),
        ({"rows": 8}, "num_heads_per_head_k=8, but this call has 4"),
        ({"h_kv": 2}, "num_heads_k=2, but this call has 1"),
    ],
)
def test_metadata_of_another_call(made_for, message):
    metadata, num_splits = schedule_for(**made_for)
    with pytest.raises(ValueError, match=message):
        call_with(tile_scheduler_metadata=metadata, num_splits=num_splits)
    with pytest.raises(ValueError, match=message):  # also where all arrays are traced
        jax.eval_shape(
            lambda m, n: call_with(tile_scheduler_metadata=m, num_splits=n), metadata, num_splits
        )


def test_metadata_of_another_kind():
    metadata, num_splits = schedule_for()
    with pytest.raises(TypeError, match=r"tile_scheduler_metadata must be .*got .* of type tuple"):
        call_with(tile_scheduler_metadata=(metadata,), num_splits=num_splits)
    with pytest.raises(ValueError, match=r"num_splits .*must be 3"):
        call_with(tile_scheduler_metadata=metadata, num_splits=num_splits[1:])
    call_with(tile_scheduler_metadata=metadata, num_splits=num_splits)


def test_traced_softmax_scale():
    with pytest.raises(TypeError, match=r"softmax_scale must be a static .*traced"):
        jax.jit(lambda scale: call_with(softmax_scale=scale))(0.1)


def test_kernel_on_another_platform():
    if jax.default_backend() == "gpu":
        pytest.skip("for machines without a GPU")
    with pytest.raises(NotImplementedError, match="no kernel for the platform cpu"):
        call_with(implementation="cuda")
