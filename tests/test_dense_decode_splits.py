"""Dense decode under any schedule: its own, one of other lengths, garbage; how splits join."""

import dataclasses
import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, Case, assert_bit_equal
from dense_calls import check, decoded, schedule_for

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.mark.parametrize("num_sms", [1, 2, 7, 132, 1000])
def test_any_number_of_parts(num_sms, implementation):
    inputs = cases.make_inputs(Case(5, 1, 400, 16, varlen=True))
    schedule = schedule_for(inputs.cache_seqlens, inputs, implementation, num_sms=num_sms)
    check(inputs, implementation, schedule=schedule)


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
def test_without_a_schedule_as_with_it(case):
    """Once, in a loop whose lengths change from turn to turn, and under vmap."""
    inputs = cases.make_inputs(case)
    q, k_cache, table, lengths = inputs.device_arrays()
    options = {"causal": case.causal, "implementation": "cuda"}

    def given(lengths, **limits):
        schedule = schedule_for(lengths, inputs, "cuda", **limits)
        return fm.flash_mla_with_kvcache(q, k_cache, table, lengths, D_V, *schedule, **options)

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
def test_without_a_schedule_as_with_it_where_some_are_long(b, h_q):
    """Sequences of many splits among whole ones, and fewer or more sequences than threads."""
    rng = np.random.default_rng((b, h_q))
    q = jax.random.normal(jax.random.key(b), (b, 1, h_q, D_K), jnp.bfloat16)
    k_cache = jax.random.normal(jax.random.key(h_q), (500, 64, 1, D_K), jnp.bfloat16)
    table = jnp.asarray(rng.integers(0, 500, (b, 1000)), jnp.int32)

    def run(lengths, *schedule):
        return fm.flash_mla_with_kvcache(
            q, k_cache, table, lengths, D_V, *schedule, implementation="cuda"
        )

    for _ in range(5):
        lengths = np.minimum(100 * rng.pareto(0.7, b), 20 * 64).astype(np.int32)
        lengths[rng.integers(b)] = 64 * 1000
        lengths = jnp.asarray(lengths)
        schedule = fm.get_mla_metadata(lengths, h_q, 1, implementation="cuda")
        assert np.diff(schedule[1]).max() > 2
        assert_bit_equal(run(lengths), run(lengths, *schedule))


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 2, 5, 14, 66, 500])
@pytest.mark.parametrize(
    "case", [Case(3, 2, 1500, 128, varlen=True), Case(150, 1, 300, 8, varlen=True)], ids=str
)
def test_without_a_schedule_as_with_it_on_any_number_of_sms(case, num_sms, machine):
    """As on a part of a GPU."""
    machine.has_sms(num_sms)
    inputs = cases.make_inputs(case)
    schedule = schedule_for(inputs.cache_seqlens, inputs, "cuda")
    assert schedule[0].num_parts == max(1, num_sms // (4 if case.h_q == 128 else 1))
    assert_bit_equal(decoded(inputs, "cuda"), decoded(inputs, "cuda", schedule=schedule))


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 128])
def test_schedule_of_garbage(h_q):
    """Results are wrong, but addresses are not: the device goes on, and the next call is right."""
    inputs = cases.make_inputs(Case(40, 1, 900, h_q, varlen=True), max_blocks=40)
    schedule = schedule_for(inputs.cache_seqlens, inputs, "cuda")
    rng = np.random.default_rng(h_q)
    for garbage in cases.schedules_of_garbage(rng, schedule, 5 * [4, 43, 500, 2**31]):
        decoded(inputs, "cuda", schedule=garbage)
    check(inputs, "cuda", schedule=schedule)


@pytest.mark.parametrize(
    "planned", [[0, 0, 0, 0], [1, 500, 3, 64], [500, 500, 500, 500], [0, 900, 0, 2**30]], ids=str
)
@pytest.mark.parametrize("actual", [[400, 64, 0, 129], [0, 0, 1, 0]], ids=str)
@pytest.mark.parametrize("fixed", [None, 64, 128])
def test_schedule_of_other_lengths(fixed, planned, actual, implementation):
    """Lengths that grew, shrank, went from 0 to n and back since the schedule was made."""
    inputs = cases.make_inputs(Case(4, 1, 0, 16), lengths=actual, max_blocks=8)
    options = {} if fixed is None else {"fixed_split_size": fixed, "max_seqlen": 320}
    check(inputs, implementation, schedule=schedule_for(planned, inputs, implementation, **options))


INT32 = cases.INT32

ROOM = 1100
"""Enough columns of a block table for two row tiles to share their pages in a cluster."""


row_tiles = pytest.mark.parametrize(
    ("h_q", "max_blocks"), [(3, None), (128, None), (128, ROOM)], ids=["one", "two", "cluster"]
)

PARTS = 12

LENGTHS = [40, 24 * 64 - 5, 320, 320 - 63, 320 - 20, 320 - 1, 9 * 64]

SPLITS = [1, 5, 1, 2, 2, 2, 3]  # of which a part has the end of one and the start of the next


def split_inputs(h_q, max_blocks):
    return cases.make_inputs(Case(len(LENGTHS), 1, 0, h_q), lengths=LENGTHS, max_blocks=max_blocks)


def split_in(splits, lengths, inputs, implementation, **options):
    """The schedule for `lengths`, which must have this many splits of each sequence."""
    schedule = schedule_for(lengths, inputs, implementation, **options)
    np.testing.assert_array_equal(np.diff(schedule[1]), splits)
    return schedule


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
    schedule = split_in_parts(inputs, implementation)
    check(inputs, implementation, schedule=schedule, causal=case.causal)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(7, 1, 0, 128), Case(7, 2, 0, 128, causal=True)], ids=str)
def test_shared_pages_change_no_bits(case):
    """The width of the table decides whether two blocks share pages, but changes no result."""
    narrow, wide = (cases.make_inputs(case, lengths=LENGTHS, max_blocks=n) for n in (None, ROOM))
    assert_bit_equal((narrow.q, narrow.k_cache), (wide.q, wide.k_cache))
    results = [
        decoded(inputs, "cuda", schedule=split_in_parts(inputs, "cuda"), causal=case.causal)
        for inputs in (narrow, wide)
    ]
    assert_bit_equal(*results)


@pytest.mark.parametrize("h_q", [3, 128])
def test_first_split_of_next_to_no_weight(h_q, implementation):
    """The first split adds nothing to the second one, but its NaN stay NaN."""
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
    schedule = split_in([2, 2], [256, 256], inputs, implementation, **options)
    scale = 40.0  # scores of -2560 and of 0
    check(inputs, implementation, schedule=schedule, softmax_scale=scale)
    inputs.k_cache[first[1, 0], 7, 0, to_nan] = np.inf  # a score of -inf, and 0 * inf
    with np.errstate(invalid="ignore"):
        out, lse = cases.expected_decode(inputs, softmax_scale=scale)
    assert np.isnan(out[1, ..., to_nan]).all()
    assert np.isfinite(out).sum() == out.size - h_q
    actual = decoded(inputs, implementation, schedule=schedule, softmax_scale=scale)
    cases.assert_decode_close(actual, (out, lse))


@row_tiles
@pytest.mark.parametrize(
    "exponents", [[100] * 4, [-100] * 4, [66, -66, 0, 100]], ids=["large", "small", "mixed"]
)
def test_values_that_fp16_does_not_hold(exponents, h_q, max_blocks, implementation):
    """Each quarter of the columns is scaled by a power of 2, so everything else stays the same."""
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
    schedule = split_in([2, 2, 3, 4], lengths, inputs, implementation, **options)
    out, lse = decoded(inputs, implementation, schedule=schedule)
    out = (out.astype(np.float32) / scale).astype(out.dtype)
    cases.assert_decode_close((out, lse), expected)


@row_tiles
def test_values_that_are_not_finite_in_one_split(h_q, max_blocks, implementation):
    """They stay in their columns, and the scale of a quarter is not computed from them."""
    lengths, splits, bad_splits = [256, 256, 300, 500], [2, 2, 3, 4], [0, 1, 1, 3]
    inputs = cases.make_inputs(Case(4, 1, 0, h_q), lengths=lengths, max_blocks=max_blocks)
    to_nan, to_inf, to_minus_inf = 5, 300, 301
    pages = [inputs.block_table[i, 2 * split] for i, split in enumerate(bad_splits)]
    # In one token: even heads get a score of -inf, and 0 * inf. Odd heads get inf, so everything
    # becomes NaN.
    inputs.k_cache[pages, 40, 0, to_nan] = np.inf
    inputs.q[..., to_nan] = -1
    inputs.q[:, :, 1::2, to_nan] = 1
    # In all tokens of a page: values whose sum float32 does not hold.
    inputs.q[..., [to_inf, to_minus_inf]] = 0
    inputs.k_cache[pages, :, 0, to_inf] = 3e38
    inputs.k_cache[pages, :, 0, to_minus_inf] = -3e38
    with np.errstate(invalid="ignore"):
        out, lse = cases.expected_decode(inputs)
    assert np.isnan(out[:, :, 0::2]).sum() == out[:, :, 0::2, 0].size
    assert np.isnan(out[:, :, 1::2]).all()
    out[:, :, 0::2, to_inf], out[:, :, 0::2, to_minus_inf] = np.inf, -np.inf
    options = {"fixed_split_size": 128, "max_seqlen": 512}
    schedule = split_in(splits, lengths, inputs, implementation, **options)
    cases.assert_decode_close(decoded(inputs, implementation, schedule=schedule), (out, lse))


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
    schedule = split_in([2, 2, 3, 3, 4, 2, 3], lengths, inputs, implementation, **options)
    options = {"causal": True, "causal_offset": jnp.asarray(offset)}
    out, lse = check(inputs, implementation, schedule=schedule, **options)
    assert (out[blind] == 0).all()
    assert (lse[blind] == np.inf).all()


@row_tiles
def test_split_sequences_that_have_become_short(h_q, max_blocks, implementation):
    inputs = split_inputs(h_q, max_blocks)
    schedule = split_in_parts(inputs, implementation)
    for now in ([0] * 7, [1] * 7, [0, 1, 0, 1, 0, 1, 0], [1, 0, 0, 64, 320, 0, 65]):
        shorter = inputs.replace(cache_seqlens=np.array(now, np.int32))
        check(shorter, implementation, schedule=schedule)


@pytest.mark.gpu
@row_tiles
def test_arrays_of_different_schedules(h_q, max_blocks):
    """The results are undefined, but the call ends, and the next call is right."""
    inputs = split_inputs(h_q, max_blocks)
    ours, our_splits = schedule = split_in_parts(inputs, "cuda")
    for tiles in (
        [24, 5, 1, 5, 5, 5, 9],
        [5, 5, 5, 9, 9, 9, 9],
        [0, 0, 15, 0, 0, 0, 7],
        [40, 0, 0, 0, 0, 0, 9],
    ):
        lengths = 64 * np.array(tiles)
        num_sms = PARTS * -(-h_q // 64)
        theirs, their_splits = schedule_for(lengths, inputs, "cuda", num_sms=num_sms)
        assert theirs.num_parts == ours.num_parts
        for mixed in (
            (ours, their_splits),
            (theirs, our_splits),
            (dataclasses.replace(ours, first_part=theirs.first_part), our_splits),
            (dataclasses.replace(ours, part_bounds=theirs.part_bounds), our_splits),
        ):
            out, lse = decoded(inputs, "cuda", schedule=mixed)
            assert out.shape == (len(LENGTHS), 1, h_q, D_V)
            assert lse.shape == (len(LENGTHS), h_q, 1)
        check(inputs, "cuda", schedule=schedule)


@row_tiles
def test_repeat_runs_of_splits_are_bit_equal(h_q, max_blocks, implementation):
    """All calls share one scratch, and every other call leaves partial results of other queries."""
    inputs = split_inputs(h_q, max_blocks)
    others = inputs.replace(q=inputs.q[::-1].copy())
    schedule = split_in_parts(inputs, implementation)
    q = jnp.stack([inputs.q, others.q])
    _, *rest = inputs.device_arrays()

    def turn(i):
        return fm.flash_mla_with_kvcache(
            q[i % 2], *rest, D_V, *schedule, implementation=implementation
        )

    turns = jnp.arange(50 if implementation == "cuda" else 4)
    outs, lses = map(np.asarray, jax.jit(lambda turns: jax.lax.map(turn, turns))(turns))
    for i, which in enumerate((inputs, others)):
        cases.assert_decode_close((outs[i], lses[i]), cases.expected_decode(which))
    for i in range(2, len(turns)):
        assert_bit_equal((outs[i], lses[i]), (outs[i % 2], lses[i % 2]))
