"""flash_mla_with_kvcache against float64, mostly in cases where such kernels often go wrong."""

import random

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, UNUSED_ENTRY, Case
from dense_calls import check, decoded, schedule_for

import jax_flashmla as fm
from jax_flashmla.reference import schedule as reference

pytestmark = pytest.mark.usefixtures("quick_compile")


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
    given = decoded(inputs, implementation, softmax_scale=np.float64(D_K**-0.5))
    for a, b in zip(given, decoded(inputs, implementation), strict=True):
        np.testing.assert_array_equal(a, b)


SINKS = (np.inf, -np.inf, 0, 5.5, -3, 200, -200, 1e30, -1e30, 1, 2, 3, 4, 6, 7, 8)


@pytest.mark.parametrize(("s_q", "h_kv"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("often", [1, 8])
def test_attn_sink(often, s_q, h_kv, implementation):
    """It changes out and never lse; +inf gives 0, -inf nothing. Two sequences see no token."""
    lengths = [900, 0, 70, 1, 0]
    inputs = cases.make_inputs(Case(5, s_q, 0, 16 * often, h_kv), lengths=lengths, max_blocks=20)
    inputs.block_table[2, 1] = -1  # a NaN sequence stays so
    sink = np.tile(np.array(SINKS, np.float32), often)
    out, lse = check(inputs, implementation, causal=True, attn_sink=jnp.asarray(sink))
    plain_out, plain_lse = decoded(inputs, implementation, causal=True)
    cases.assert_bit_equal(lse, plain_lse)
    for i in (1, 4):
        assert (out[i] == 0).all()
        assert (lse[i] == np.inf).all()
    assert np.isnan(out[2].astype(np.float32)).all()
    out, plain_out = out[[0, 3]], plain_out[[0, 3]]
    assert (out[:, :, sink == np.inf] == 0).all()
    cases.assert_bit_equal(out[:, :, sink <= -200], plain_out[:, :, sink <= -200])
    changed = (out != plain_out).any(axis=-1)
    assert changed[0][:, sink >= 0].all()


@pytest.mark.parametrize("h_q", [1, 20, 64, 96, 160])
def test_attn_sink_of_any_number_of_heads(h_q, implementation):
    inputs = cases.make_inputs(Case(4, 1, 300, h_q, varlen=True))
    sink = np.linspace(-4, 4, h_q, dtype=np.float32)
    check(inputs, implementation, attn_sink=jnp.asarray(sink))


def test_attn_sink_with_a_given_schedule(implementation):
    """One, two and more splits, and a sequence that has none."""
    lengths = [700] * 7 + [0, 64, 2000]
    inputs = cases.make_inputs(Case(len(lengths), 1, 0, 128), lengths=lengths)
    sink = jnp.linspace(-4, 4, 128, dtype=jnp.float32)
    for made_for in (lengths, [64] * len(lengths)):
        schedule = schedule_for(made_for, inputs, implementation)
        check(inputs, implementation, schedule=schedule, attn_sink=sink)


def test_attn_sink_once_for_all_parts(implementation):
    """Parts run without a sink, and the merge applies it once."""
    inputs = cases.make_inputs(Case(3, 2, 0, 16), lengths=[200, 0, 100], max_blocks=4)
    results = []
    for first in (0, 128):
        part = inputs.replace(
            block_table=inputs.block_table[:, first // 64 :],
            cache_seqlens=np.clip(inputs.cache_seqlens - first, 0, 128).astype(np.int32),
        )
        results.append(decoded(part, implementation))
    outs, lses = (np.stack(x) for x in zip(*results, strict=True))
    sink = np.array(SINKS, np.float32)
    actual = fm.merge_attention_states(outs, lses, attn_sink=sink)
    cases.assert_decode_close(actual, cases.expected_decode(inputs, attn_sink=sink))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("h_q", [3, 16, 64, 128])
def test_head_dim_512(h_q, dtype, implementation):
    """K without rope: K and V are the same columns."""
    case = Case(6, 2, 300, h_q, varlen=True, causal=True, d_k=512, dtype=dtype)
    inputs = cases.make_inputs(case)
    check(inputs, implementation, causal=True)
    sink = jnp.linspace(-4, 4, h_q, dtype=jnp.float32)
    check(inputs, implementation, causal=True, attn_sink=sink)


@pytest.mark.parametrize("page", [16, 128])
def test_head_dim_512_of_split_and_empty_sequences(page, implementation):
    lengths = [3000, 0, 1, 64, 65, 129]
    case = Case(len(lengths), 1, 0, 128, page=page, d_k=512)
    inputs = cases.make_inputs(case, lengths=lengths)
    out, lse = check(inputs, implementation)
    assert (out[1] == 0).all()
    assert (lse[1] == np.inf).all()


def test_head_dim_512_of_two_kv_heads(implementation):
    check(cases.make_inputs(Case(3, 2, 200, 8, 2, varlen=True, d_k=512)), implementation)


def test_lse_is_natural_logarithm(implementation):
    inputs = cases.make_inputs(Case(2, 1, 200, 3))
    inputs = inputs.replace(q=np.zeros_like(inputs.q))
    lse = decoded(inputs, implementation)[1]
    np.testing.assert_allclose(lse, np.log(200.0), rtol=1e-6)


def test_traced_lengths_and_tables(implementation):
    """One compiled function serves all lengths; the schedule is made inside it."""
    inputs = cases.make_inputs(Case(4, 2, 200, 8, varlen=True), max_blocks=16)

    @jax.jit
    def step(q, k_cache, block_table, lengths):
        schedule = fm.get_mla_metadata(lengths, 16, 1, implementation=implementation)
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *schedule, implementation=implementation
        )

    for lengths in (inputs.cache_seqlens, inputs.cache_seqlens // 2, inputs.cache_seqlens * 0):
        shorter = inputs.replace(cache_seqlens=lengths)
        actual = step(*shorter.device_arrays())
        cases.assert_decode_close(actual, cases.expected_decode(shorter))


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("h_q", [16, 128])
def test_every_length_of_a_last_tile(h_q, page, implementation):
    """The table is wide enough for two row tiles to share their pages."""
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
    """There are so many parts that their partial results hold more than 2^31 elements."""
    parts = 2**31 // (2 * 128 * D_V) + 100
    length = reference.TILE_TOKENS * (parts - reference.SEQUENCE_OVERHEAD)  # a tile a part
    q = cases.random_values(np.random.default_rng(0), (1, 1, 128, D_K), "bfloat16")
    pool = cases.random_values(np.random.default_rng(1), (50, 64, 1, D_K), "bfloat16")
    table = np.arange(parts, dtype=np.int32)[None] % 50
    arrays = [jnp.asarray(x) for x in (q, pool, table, np.array([length], np.int32))]
    schedule = fm.get_mla_metadata(arrays[3], 128, 1, num_sms=2 * parts, implementation="cuda")
    assert schedule[0].num_parts == parts
    actual = fm.flash_mla_with_kvcache(*arrays, D_V, *schedule, implementation="cuda")
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
    cases.assert_decode_close(decoded(inputs, implementation), expected)


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

    def run(lengths, implementation):
        return fm.flash_mla_with_kvcache(
            q, k_cache, table, lengths, D_V, implementation=implementation
        )

    cases.assert_right_again_and_again(run, lengths, calls)


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
    first = decoded(inputs, implementation, causal=True)
    for _ in range(50 if implementation == "cuda" else 2):
        again = decoded(inputs, implementation, causal=True)
        for a, b in zip(first, again, strict=True):
            assert a.tobytes() == b.tobytes()


def test_alone_as_in_a_batch(implementation):
    inputs = cases.make_inputs(Case(4, 1, 400, 16, varlen=True))
    out, lse = decoded(inputs, implementation)
    for i in range(4):
        alone = inputs.replace(
            q=inputs.q[i : i + 1],
            block_table=inputs.block_table[i : i + 1],
            cache_seqlens=inputs.cache_seqlens[i : i + 1],
        )
        expected = out[i : i + 1].astype(np.float64), lse[i : i + 1].astype(np.float64)
        cases.assert_decode_close(decoded(alone, implementation), expected)


@pytest.mark.parametrize("h_q", [3, 128])
def test_more_queries_than_tokens(h_q, implementation):
    inputs = cases.make_inputs(Case(4, 6, 0, h_q), lengths=[1, 3, 6, 70])
    out, lse = check(inputs, implementation, causal=True)
    assert (out[0, :5] == 0).all()
    assert (lse[0, :, :5] == np.inf).all()
    assert np.isfinite(lse[0, :, 5]).all()


INT32 = cases.INT32

OFFSETS = (0, 1, 3, 4, -1, -60, -65, -129, -130, -131, 1000, -1000, INT32.max, INT32.min)


@pytest.mark.parametrize("h_q", [3, 128])
@pytest.mark.parametrize("s_q", [1, 4])
def test_causal_offset(s_q, h_q, implementation):
    """Offsets that hide keys and that show more keys, up to all. 131 tokens are three tiles."""
    inputs = cases.make_inputs(Case(len(OFFSETS), s_q, 131, h_q))
    offset = np.array(OFFSETS, np.int32)
    out, lse = check(inputs, implementation, causal=True, causal_offset=jnp.asarray(offset))
    for hidden in (-1000, INT32.min):
        row = OFFSETS.index(hidden)
        assert (out[row] == 0).all()
        assert (lse[row] == np.inf).all()
    unmasked = decoded(inputs, implementation)  # without a mask, for all queries
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
    """The parts are runs of pages. One of them ends among the new tokens."""
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
