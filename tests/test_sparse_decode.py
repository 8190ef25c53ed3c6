"""flash_mla_with_kvcache over token lists against float64, where such kernels often go wrong.

`cases.make_sparse_inputs` puts NaN into every slot that no list names, so each test also shows that
such slots are not read into a result.
"""

import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_V, INT32, SparseCase
from sparse_calls import arrays, check, decoded, schedule_for, sparse_decode

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


def random_lengths(shape, topk, seed=0):
    return np.random.default_rng(seed).integers(0, topk + 1, shape).astype(np.int32)


def is_named(k_cache):
    """Which slots of a pool some list names: the others are NaN."""
    rows = k_cache.reshape(-1, k_cache.shape[-1])
    return ~np.isnan(rows[:, 0].astype(np.float32))


def assert_empty(out, lse):
    """The results of queries with no valid token."""
    assert (out == 0).all()
    assert (lse == np.inf).all()


@pytest.mark.parametrize("d_k", [576, 512])
@pytest.mark.parametrize("topk", [1, 63, 64, 65, 133, 2051, 2176])
def test_lists_of_any_size(topk, d_k, implementation):
    check(cases.make_sparse_inputs(SparseCase(3, 1, 16, topk, d_k=d_k)), implementation)


@pytest.mark.parametrize(
    ("page", "extra_page"), [(1, 64), (2, 576), (3, 61), (61, 3), (64, 2), (576, 1)]
)
def test_page_sizes(page, extra_page, implementation):
    case = SparseCase(2, 2, 16, 130, 70, page=page, extra_page=extra_page)
    check(cases.make_sparse_inputs(case), implementation)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("h_q", [1, 8, 16, 20, 40, 48, 64, 96, 128, 160])
def test_heads_and_dtypes(h_q, dtype, implementation):
    case = SparseCase(3, 1, h_q, 200, d_k=576 if dtype == "bfloat16" else 512, dtype=dtype)
    check(cases.make_sparse_inputs(case, lengths=[200, 70, 3]), implementation)


@pytest.mark.parametrize("s_q", [1, 2, 3, 5])
@pytest.mark.parametrize("h_q", [16, 128])
def test_each_query_has_its_own_list(h_q, s_q, implementation):
    lengths = random_lengths((4, s_q), 150, s_q)
    inputs = cases.make_sparse_inputs(SparseCase(4, s_q, h_q, 150), lengths=lengths)
    check(inputs, implementation)


@pytest.mark.parametrize(
    ("d_k", "d_v", "page", "extra_topk", "dtype"),
    [
        (64, 64, 1, 0, "float32"),
        (288, 256, 64, 9, "bfloat16"),
        (8, 3, 5, 40, "float32"),
        (576, 512, 7, 3, "float32"),
    ],
)
def test_shapes_without_a_kernel(d_k, d_v, page, extra_topk, dtype):
    case = SparseCase(2, 3, 4, 30, extra_topk, d_k=d_k, page=page, dtype=dtype)
    inputs = cases.make_sparse_inputs(case, lengths=[7, 30])
    out, lse = check(inputs, "xla", d_v=d_v)
    if dtype == "float32":
        expected = cases.expected_sparse_decode(inputs, d_v=d_v)
        for name, a, e in zip(("out", "lse"), (out, lse), expected, strict=True):
            cases.assert_close(name, a, e, atol=2e-6, rtol=2e-6)


# Lengths.


@pytest.mark.parametrize("h_q", [16, 128])
def test_every_length_with_garbage_behind_it(h_q, implementation):
    """Lengths around each tile's end. What follows may be any integers, slots of NaN too."""
    inputs = cases.make_sparse_inputs(SparseCase(131, 1, h_q, 130), lengths=np.arange(131))
    out, lse = check(inputs, implementation)
    assert_empty(out[0], lse[0])


LENGTHS = (INT32.min, -(2**30), -1, 0, 1, 64, 149, 150, 151, 2**30, INT32.max)


@pytest.mark.parametrize("axes", [1, 2])
def test_lengths_of_any_int32(axes, implementation):
    lengths = np.array(LENGTHS, np.int32)
    if axes == 2:
        lengths = np.stack([lengths, lengths[::-1]], axis=1)
    case = SparseCase(len(LENGTHS), 2, 16, 150)
    out, lse = check(cases.make_sparse_inputs(case, lengths=lengths), implementation)
    assert_empty(out[:4, 0], lse[:4, :, 0])
    assert np.isfinite(lse[4:, :, 0]).all()


@pytest.mark.parametrize("extra_topk", [0, 133])
@pytest.mark.parametrize("h_q", [16, 128])
def test_lengths_beyond_the_list_change_nothing(h_q, extra_topk, implementation):
    """They are the length of the list, also for the schedule that the call makes."""
    case = SparseCase(5, 1, h_q, 1500, extra_topk)
    lengths = np.array([1500, 1500, 700, 1500, 0], np.int32)
    inputs = cases.make_sparse_inputs(case, lengths=lengths)
    expected = check(inputs, implementation)
    for beyond in ([1501, 1501, 1501], [INT32.max, 1500, 2**30], [INT32.max] * 3):
        far = lengths.copy()
        far[lengths == 1500] = beyond
        results = decoded(inputs.replace(topk_length=far), implementation)
        cases.assert_bit_equal(results, expected)


def test_a_length_holds_for_all_queries_of_its_sequence(implementation):
    lengths = np.array([0, 3, 100], np.int32)
    inputs = cases.make_sparse_inputs(SparseCase(3, 3, 8, 100), lengths=lengths)
    expected = decoded(inputs, implementation)
    repeated = inputs.replace(topk_length=np.repeat(lengths[:, None], 3, axis=1))
    cases.assert_bit_equal(decoded(repeated, implementation), expected)


def test_without_lengths_all_entries_count(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(3, 1, 8, 133))
    full = inputs.replace(topk_length=np.full(3, 133, np.int32))
    cases.assert_bit_equal(decoded(full, implementation), check(inputs, implementation))


# What an entry may be.


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("extra_topk", [0, 65])
def test_entries_outside_the_pool(extra_topk, h_q, implementation):
    """Sequence i has the i-th of these values alone, then among valid entries."""
    inputs = cases.make_sparse_inputs(SparseCase(16, 1, h_q, 90, extra_topk))
    slots = inputs.k_cache.shape[0] * inputs.k_cache.shape[1]
    bad = [-1, -2, -slots, INT32.min, INT32.max, INT32.max - 1, slots, slots + 1]
    inputs.indices[:8, 0] = np.array(bad)[:, None]
    inputs.indices[8:, 0, ::2] = np.array(bad)[:, None]
    if extra_topk:  # the same values: the two pools have different numbers of slots
        inputs.extra_indices[:] = np.array(bad * 2)[:, None, None]
    out, lse = check(inputs, implementation)
    if not extra_topk:
        assert_empty(out[:8], lse[:8])
    assert np.isfinite(lse[8:]).all()


def test_first_and_last_slot(implementation):
    """They are read when a list names them, and nothing else reads them."""
    inputs = cases.make_sparse_inputs(SparseCase(3, 1, 16, 70))
    rows = inputs.k_cache.reshape(-1, 576)
    named = is_named(inputs.k_cache)
    assert not named[[0, -1]].any()
    inputs.indices[0] = -1
    inputs.indices[1] = len(rows)
    out, lse = check(inputs, implementation)
    assert_empty(out[:2], lse[:2])
    rows[[0, -1]] = rows[np.argmax(named)]
    inputs.indices[0, 0, 5], inputs.indices[1, 0, 69] = 0, len(rows) - 1
    _, lse = check(inputs, implementation)
    assert np.isfinite(lse).all()


def test_a_slot_counts_as_often_as_it_is_named(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(3, 2, 16, 200))
    slot = np.argmax(is_named(inputs.k_cache))
    once = inputs.replace(indices=np.full((3, 2, 1), slot, np.int32))
    _, single = check(once, implementation)
    _, lse = check(inputs.replace(indices=np.full((3, 2, 200), slot, np.int32)), implementation)
    np.testing.assert_allclose(lse, single + np.log(200), rtol=0, atol=2e-5)


def test_order_of_a_list_does_not_matter(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 16, 300))
    sorted_lists = inputs.replace(indices=np.sort(inputs.indices, axis=2))
    actual = decoded(sorted_lists, implementation)
    check(inputs, implementation)
    cases.assert_decode_close(actual, cases.expected_sparse_decode(inputs))


@pytest.mark.parametrize("h_q", [8, 128])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_poison_in_slots_that_no_list_names(poison, h_q, implementation):
    case = SparseCase(4, 2, h_q, 140, 70, page=3, extra_page=64)
    inputs = cases.make_sparse_inputs(case, lengths=[140, 3, 65, 0], extra_lengths=[70, 1, 0, 0])
    for cache in (inputs.k_cache, inputs.extra_k_cache):
        cache[np.isnan(cache)] = poison
    out, lse = check(inputs, implementation)
    assert np.isfinite(out.astype(np.float32)).all()
    assert_empty(out[3], lse[3])


@pytest.mark.parametrize("h_q", [8, 128])
def test_a_call_full_of_nan_leaves_nothing_behind(h_q, implementation):
    """Not in shared memory, not in scratch memory."""
    lengths = [200, 0, 70, 133, 1]
    inputs = cases.make_sparse_inputs(SparseCase(5, 1, h_q, 200), lengths=lengths)
    full = np.arange(200) + np.zeros((5, 1, 1), int)
    poisoned = inputs.replace(
        k_cache=np.full_like(inputs.k_cache, np.nan),
        indices=full.astype(np.int32),
        topk_length=np.full(5, 200, np.int32),
    )
    out, lse = decoded(poisoned, implementation)
    assert np.isnan(out.astype(np.float32)).all()
    assert np.isnan(lse).all()
    check(inputs, implementation)


def test_nan_stays_with_the_queries_that_name_it(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(5, 2, 16, 100))
    inputs.indices[1, 0, 7] = inputs.indices[4, 1, 99] = np.argmin(is_named(inputs.k_cache))
    out, lse = decoded(inputs, implementation)
    named = np.zeros((5, 2), bool)
    named[1, 0] = named[4, 1] = True
    assert (np.isnan(out.astype(np.float32)).all(axis=(2, 3)) == named).all()
    assert (np.isnan(lse).any(axis=1) == named).all()


# The extra cache.


@pytest.mark.parametrize("d_k", [576, 512])
@pytest.mark.parametrize("h_q", [16, 128])
def test_extra_cache(h_q, d_k, implementation):
    """Lengths of 0 on either side and on both, of any size in between, and none given."""
    case = SparseCase(6, 1, h_q, 133, 700, d_k=d_k, extra_page=2)
    lengths, extra_lengths = [0, 0, 133, 64, 65, -5], [0, 700, 0, 1, 63, 9999]
    inputs = cases.make_sparse_inputs(case, lengths=lengths, extra_lengths=extra_lengths)
    out, lse = check(inputs, implementation)
    assert_empty(out[0], lse[0])
    assert np.isfinite(lse[1:]).all()
    check(cases.make_sparse_inputs(case), implementation)


def test_extra_lengths_of_each_query(implementation):
    case = SparseCase(3, 3, 20, 70, 140, extra_page=61)
    lengths, extra_lengths = (random_lengths((3, 3), n, n) for n in (70, 140))
    inputs = cases.make_sparse_inputs(case, lengths=lengths, extra_lengths=extra_lengths)
    check(inputs, implementation)
    check(cases.make_sparse_inputs(case, extra_lengths=extra_lengths), implementation)
    check(cases.make_sparse_inputs(case, lengths=lengths), implementation)


def test_extra_cache_is_the_main_cache(implementation):
    """A list cut in two gives what the whole list does."""
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 16, 300))
    cut = inputs.replace(
        indices=inputs.indices[..., :128],
        extra_k_cache=inputs.k_cache,
        extra_indices=inputs.indices[..., 128:],
    )
    cases.assert_decode_close(decoded(cut, implementation), cases.expected_sparse_decode(inputs))


# Sinks, scales, lse.


SINKS = (np.inf, -np.inf, 0, 5.5, -3, 200, -200, 1e30, -1e30, 1, 2, 3, 4, 6, 7, 8)


@pytest.mark.parametrize("extra_topk", [0, 70])
@pytest.mark.parametrize("often", [1, 8])
def test_attn_sink(often, extra_topk, implementation):
    """It changes out and never lse; +inf gives 0, -inf nothing. One list is empty, one is split."""
    case = SparseCase(3, 2, 16 * often, 900, extra_topk)
    lengths = np.array([[900, 3], [0, 70], [850, 0]])
    inputs = cases.make_sparse_inputs(case, lengths=lengths, extra_lengths=lengths * 0)
    sink = np.tile(np.array(SINKS, np.float32), often)
    out, lse = check(inputs.replace(attn_sink=sink), implementation)
    plain_out, plain_lse = decoded(inputs, implementation)
    cases.assert_bit_equal(lse, plain_lse)
    assert (out[:, :, sink == np.inf] == 0).all()
    unchanged = sink <= -200
    cases.assert_bit_equal(out[:, :, unchanged], plain_out[:, :, unchanged])
    seen = np.isfinite(lse).transpose(0, 2, 1)
    changed = (out != plain_out).any(axis=-1)
    assert changed[seen & (sink >= 0)].all()
    for i, s in ((1, 0), (2, 1)):
        assert_empty(out[i, s], lse[i, :, s])


@pytest.mark.parametrize("sink", [np.inf, -np.inf])
def test_one_sink_for_all_heads(sink, implementation):
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 16, 100))
    sinks = np.full(16, sink, np.float32)
    out, lse = check(inputs.replace(attn_sink=sinks), implementation)
    assert (out == 0).all() == (sink > 0)
    assert np.isfinite(lse).all()


def test_lse_is_natural_logarithm(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 3, 200))
    inputs = inputs.replace(q=np.zeros_like(inputs.q))
    _, lse = decoded(inputs, implementation)
    slots = inputs.k_cache.shape[0] * inputs.k_cache.shape[1]
    valid = ((inputs.indices >= 0) & (inputs.indices < slots)).sum(axis=2)
    assert (valid < 200).all()
    np.testing.assert_allclose(lse, np.log(valid)[:, None] * np.ones((2, 3, 1)), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 2.0, 1e-5, 1e-37, 1e-40])
def test_softmax_scale(scale, implementation):
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 16, 100, 40))
    check(inputs, implementation, softmax_scale=scale)


@pytest.mark.parametrize("scale", [1e39, 1e-50])
def test_softmax_scale_outside_float32(scale, implementation):
    inputs = cases.make_sparse_inputs(SparseCase(1, 1, 1, 1))
    with pytest.raises(ValueError, match="softmax_scale must be finite and above 0 in float32"):
        decoded(inputs, implementation, softmax_scale=scale)


def test_sinks_are_in_natural_units_and_unscaled(implementation):
    """A sink of ln 3 beside a token with a score of 0 takes 3 of 4 shares, whatever the scale."""
    inputs = cases.make_sparse_inputs(SparseCase(1, 1, 4, 1))
    slot = np.argmax(is_named(inputs.k_cache))
    inputs = inputs.replace(
        q=np.zeros_like(inputs.q),
        indices=np.full((1, 1, 1), slot, np.int32),
        attn_sink=np.full(4, np.log(3), np.float32),
    )
    out, lse = decoded(inputs, implementation, softmax_scale=0.01)
    quarter = inputs.k_cache.reshape(-1, 576)[slot, :D_V].astype(np.float32) / 4
    np.testing.assert_allclose(out[0, 0].astype(np.float32), np.tile(quarter, (4, 1)), rtol=1e-2)
    np.testing.assert_allclose(lse, 0, atol=1e-6)


# Layouts, sizes and offsets.


def test_q_that_is_not_contiguous(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(3, 2, 16, 100))
    q, k_cache, optional = arrays(inputs)

    @jax.jit
    def run(q, k_cache, optional):
        q = jnp.transpose(q, (2, 1, 3, 0))
        return sparse_decode(q, k_cache, implementation=implementation, **optional)

    actual = run(jnp.transpose(q, (3, 1, 0, 2)), k_cache, optional)
    cases.assert_decode_close(actual, cases.expected_sparse_decode(inputs))


@pytest.mark.parametrize(
    ("b", "s_q"),
    [
        (4100, 4),
        pytest.param(70000, 1, marks=pytest.mark.gpu),
        pytest.param(1, 70000, marks=pytest.mark.gpu),
        pytest.param(17, 4200, marks=pytest.mark.gpu),
    ],
)
def test_many_lists(b, s_q, implementation):
    """More lists than a grid's y axis holds."""
    few = cases.make_sparse_inputs(SparseCase(64, 1, 1, 3), lengths=np.arange(64) % 4)
    chosen = np.arange(b * s_q) % 64

    def lists(x):
        return x[chosen].reshape(b, s_q, *x.shape[2:])

    inputs = few.replace(
        q=lists(few.q), indices=lists(few.indices), topk_length=lists(few.topk_length)
    )
    out, lse = cases.expected_sparse_decode(few)
    lse = lse[chosen].reshape(b, s_q, 1).swapaxes(1, 2)
    cases.assert_decode_close(decoded(inputs, implementation), (lists(out), lse))


@pytest.mark.gpu
@pytest.mark.parametrize("tested", ["cuda", "xla"])
@pytest.mark.parametrize("d_k", [576, 512])
def test_offsets_past_int32(d_k, tested):
    """Pools of more than 2^31 elements, with the slots that matter at their ends."""
    case = SparseCase(2, 1, 16, 300, 130, d_k=d_k, extra_page=2)
    inputs = cases.make_sparse_inputs(case)

    def at_the_end_of_a_large_pool(cache, lists):
        used, page = cache.shape[:2]
        first = 2**31 // (page * d_k) + 1000
        pool = jnp.full((first + used, page, 1, d_k), jnp.nan, jnp.bfloat16)
        place = jax.jit(lambda pool, end: pool.at[first:].set(end), donate_argnums=0)
        valid = (lists >= 0) & (lists < used * page)
        return place(pool, cache), np.where(valid, lists + first * page, -1).astype(np.int32)

    k_cache, indices = at_the_end_of_a_large_pool(inputs.k_cache, inputs.indices)
    extra, extra_indices = at_the_end_of_a_large_pool(inputs.extra_k_cache, inputs.extra_indices)
    large = inputs.replace(
        k_cache=k_cache, indices=indices, extra_k_cache=extra, extra_indices=extra_indices
    )
    actual = decoded(large, tested)
    cases.assert_decode_close(actual, cases.expected_sparse_decode(inputs))


@pytest.mark.gpu
def test_reference_on_a_gpu():
    """There, products of 16-bit arrays stay 16 bit. The lists take several chunks."""
    for h_q, extra_topk, dtype in ((16, 0, "bfloat16"), (128, 700, "bfloat16"), (8, 9, "float16")):
        case = SparseCase(140, 1, h_q, 1100, extra_topk, dtype=dtype)
        lengths = random_lengths(140, 1100)
        inputs = cases.make_sparse_inputs(case, lengths=lengths)
        check(inputs, "xla")


# Schedules.


LISTS = {
    "one split": (SparseCase(3, 1, 16, 130), [130, 0, 70]),
    "two splits": (SparseCase(66, 1, 16, 512), [512] * 66),
    "two splits of 128 heads": (SparseCase(66, 1, 128, 512), [512] * 60 + [0] * 6),
    "many splits": (SparseCase(3, 1, 40, 4000), [4000, 3000, 100]),
    "one, two and more": (SparseCase(9, 1, 128, 2000), [700] * 7 + [64, 2000]),
    "several queries": (SparseCase(5, 3, 96, 700, 90), [700, 3, 100, 0, 650]),
}


@pytest.mark.parametrize("name", LISTS)
def test_given_schedule(name, implementation):
    """The schedule of the lists themselves, and those of longer and shorter ones."""
    case, lengths = LISTS[name]
    inputs = cases.make_sparse_inputs(case, lengths=lengths)
    count, topk = case.b * case.s_q, case.topk
    rng = np.random.default_rng(0)
    for made_for in (None, np.full(count, 10 * topk), rng.integers(-5, topk, count)):
        schedule = schedule_for(inputs, implementation, made_for)
        check(inputs, implementation, schedule=schedule)


@pytest.mark.parametrize("num_sms", [1, 2, 1000])
def test_schedule_for_any_number_of_sms(num_sms, implementation):
    inputs = cases.make_sparse_inputs(SparseCase(3, 2, 16, 900), lengths=[900, 64, 0])
    schedule = schedule_for(inputs, implementation, num_sms=num_sms)
    check(inputs, implementation, schedule=schedule)


@pytest.mark.gpu
def test_schedule_of_garbage_does_no_harm():
    """Nothing is read out of bounds, nothing waits for ever, and the next call is right."""
    rng = np.random.default_rng(0)
    for name in ("one split", "one, two and more", "several queries"):
        case, lengths = LISTS[name]
        inputs = cases.make_sparse_inputs(case, lengths=lengths)
        schedule = schedule_for(inputs, "cuda")
        limits = 5 * [2, case.b * case.s_q + 3, 2**31]
        for garbage in cases.schedules_of_garbage(rng, schedule, limits):
            decoded(inputs, "cuda", schedule=garbage)
        check(inputs, "cuda", schedule=schedule)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LISTS)
def test_repeat_runs_are_bit_equal(name):
    case, lengths = LISTS[name]
    inputs = cases.make_sparse_inputs(case, lengths=lengths)
    q, k_cache, optional = arrays(inputs)

    @jax.jit
    def run(q, k_cache, optional):
        return sparse_decode(q, k_cache, implementation="cuda", **optional)

    first = run(q, k_cache, optional)
    for _ in range(50):
        cases.assert_bit_equal(run(q, k_cache, optional), first)


@pytest.mark.gpu
@pytest.mark.parametrize(("h_q", "size"), [(16, 256), (128, 256), (20, 64), (128, 2048)])
@pytest.mark.parametrize("extra_topk", [0, 133])
def test_alone_as_in_a_batch(extra_topk, h_q, size):
    """With splits of a fixed size a query has the same bits alone, in a batch, at any place."""
    topk = 1100
    lengths = [1, 64, 255, 256, 257, 700, 1024, 1099, 1100, 0, 513]
    case = SparseCase(len(lengths), 1, h_q, topk, extra_topk)
    inputs = cases.make_sparse_inputs(case, lengths=lengths)
    inputs = inputs.replace(attn_sink=np.linspace(-3, 3, h_q, dtype=np.float32))
    bound = topk + extra_topk + 64

    def run(inputs, how=decoded):
        options = {"fixed_split_size": size, "max_seqlen": bound}
        return how(inputs, "cuda", schedule=schedule_for(inputs, "cuda", **options))

    together = run(inputs, check)
    alone = [run(inputs.sequences(np.array([i]))) for i in range(case.b)]
    rng = np.random.default_rng(1)
    for chosen in (np.arange(case.b)[::-1], rng.integers(0, case.b, 200)):
        results = run(inputs.sequences(chosen))
        for i, number in enumerate(chosen):
            for x, y in zip(results, alone[number], strict=True):
                assert x[i].tobytes() == y[0].tobytes(), (i, number)
    for i in range(case.b):
        for x, y in zip(together, alone[i], strict=True):
            assert x[i].tobytes() == y[0].tobytes(), i


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 128])
def test_queries_of_one_sequence_as_sequences_of_one_query(h_q):
    """s_q queries have the same bits as s_q sequences, with splits of a fixed size."""
    lengths = random_lengths((3, 3), 600)
    inputs = cases.make_sparse_inputs(SparseCase(3, 3, h_q, 600), lengths=lengths)
    flat = inputs.replace(
        q=inputs.q.reshape(9, 1, *inputs.q.shape[2:]),
        indices=inputs.indices.reshape(9, 1, -1),
        topk_length=lengths.reshape(9),
    )
    options = {"fixed_split_size": 256, "max_seqlen": 600}
    out, lse = (
        decoded(x, "cuda", schedule=schedule_for(x, "cuda", **options)) for x in (inputs, flat)
    )
    cases.assert_bit_equal(out[0].reshape(lse[0].shape), lse[0])
    cases.assert_bit_equal(out[1].swapaxes(1, 2).reshape(lse[1].shape), lse[1])


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [16, 64, 128, 160])
@pytest.mark.parametrize("longest", [64, 200])
def test_many_short_lists_again_and_again(longest, h_q):
    """Each block changes its queries often."""
    rng = np.random.default_rng((longest, h_q))
    b, calls, slots = 840, 300, 25600
    q = jax.random.normal(jax.random.key(longest), (b, 1, h_q, 576), jnp.bfloat16)
    k_cache = jax.random.normal(jax.random.key(h_q), (slots // 64, 64, 1, 576), jnp.bfloat16)
    indices = jnp.asarray(rng.integers(-50, slots + 50, (b, 1, 200)), jnp.int32)
    lengths = jnp.asarray(rng.integers(1, longest + 1, b), jnp.int32)

    def run(lengths, implementation):
        options = {"indices": indices, "topk_length": lengths, "implementation": implementation}
        return sparse_decode(q, k_cache, **options)

    cases.assert_right_again_and_again(run, lengths, calls)


# Programs.


def test_one_program_serves_all_lengths(implementation):
    """The schedule is made inside it. Lengths of 0 and of nonsense follow long ones."""
    inputs = cases.make_sparse_inputs(SparseCase(4, 2, 16, 300))
    q, k_cache, optional = arrays(inputs)

    @jax.jit
    def step(q, k_cache, indices, lengths):
        seqlens = fm.get_sparse_seqlens(indices, lengths)
        schedule = fm.get_mla_metadata(seqlens, 16, 1, implementation=implementation)
        return sparse_decode(
            q, k_cache, schedule, indices=indices, topk_length=lengths,
            implementation=implementation,
        )  # fmt: skip

    for lengths in ([300, 300, 300, 300], [0, 0, 0, 0], [300, -7, 1, 10**9], [64, 65, 0, 299]):
        lengths = np.array(lengths, np.int32)
        actual = step(q, k_cache, optional["indices"], jnp.asarray(lengths))
        expected = cases.expected_sparse_decode(inputs.replace(topk_length=lengths))
        cases.assert_decode_close(actual, expected)


def test_two_calls_in_one_program(implementation):
    """Each has scratch memory of its own; run again with other lists."""
    first, second = (
        cases.make_sparse_inputs(SparseCase(3, 1, 16, 1000, seed=i), lengths=[1000, 700, n])
        for i, n in enumerate((0, 900))
    )

    @jax.jit
    def both(a, b):
        return tuple(
            sparse_decode(q, k_cache, implementation=implementation, **optional)
            for q, k_cache, optional in (a, b)
        )

    for inputs in ((first, second), (second, first), (first, first)):
        for x, actual in zip(inputs, both(*map(arrays, inputs)), strict=True):
            cases.assert_decode_close(actual, cases.expected_sparse_decode(x))


def test_parts_of_a_cache_join_to_the_whole(implementation):
    """A cache cut over three devices: local slots, no sink; the merge applies the sink once."""
    inputs = cases.make_sparse_inputs(
        SparseCase(4, 2, 16, 150, page=16), lengths=[[150, 1], [0, 70], [33, 150], [2, 0]]
    )
    pages = len(inputs.k_cache)
    cuts = [0, pages // 3, pages // 2, pages]
    outs, lses = [], []
    for first, end in itertools.pairwise(cuts):
        local = fm.to_local_slots(jnp.asarray(inputs.indices), first * 16, (end - first) * 16)
        part = inputs.replace(k_cache=inputs.k_cache[first:end], indices=np.asarray(local))
        out, lse = check(part, implementation)
        outs.append(out)
        lses.append(lse)
    sink = np.linspace(-4, 4, 16, dtype=np.float32)
    sink[[3, 5]] = np.inf, -np.inf
    actual = fm.merge_attention_states(np.stack(outs), np.stack(lses), attn_sink=sink)
    expected = cases.expected_sparse_decode(inputs.replace(attn_sink=sink))
    cases.assert_decode_close(actual, expected)
    assert_empty(np.asarray(actual[0])[1, 0], np.asarray(actual[1])[1, :, 0])


def test_halves_of_a_list_join_to_the_whole(implementation):
    inputs = cases.make_sparse_inputs(SparseCase(2, 1, 16, 300))
    halves = [inputs.replace(indices=inputs.indices[..., s]) for s in (slice(100), slice(100, 300))]
    results = [decoded(half, implementation) for half in halves]
    outs, lses = (np.stack(x) for x in zip(*results, strict=True))
    sink = np.linspace(-4, 4, 16, dtype=np.float32)
    actual = fm.merge_attention_states(outs, lses, attn_sink=sink)
    whole = inputs.replace(attn_sink=sink)
    cases.assert_decode_close(actual, cases.expected_sparse_decode(whole))
    cases.assert_decode_close(decoded(whole, implementation), tuple(map(np.asarray, actual)))
