"""merge_attention_states against float64: shares, empty parts, invalid ones, misuse."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expected import expected_merge

import jax_flashmla as fm

SHAPE = (4, 3, 2, 5, 16)  # n, b, s_q, h_q, d_v


def random_parts(dtype="float32", spread=3.0, shape=SHAPE):
    rng = np.random.default_rng(0)
    n, b, s_q, h_q, _ = shape
    outs = rng.standard_normal(shape).astype(jnp.dtype(dtype))
    return outs, (spread * rng.standard_normal((n, b, h_q, s_q))).astype(np.float32)


def check(outs, lses):
    out, lse = fm.merge_attention_states(jnp.asarray(outs), jnp.asarray(lses))
    assert out.dtype == outs.dtype
    assert lse.dtype == jnp.float32
    expected_out, expected_lse = expected_merge(outs, lses)
    rtol = {"float32": 1e-6, "float16": 2**-10, "bfloat16": 2**-7}[outs.dtype.name]
    out, lse = np.asarray(out), np.asarray(lse)
    cases.assert_close("out", out, expected_out, atol=2e-6, rtol=rtol)
    cases.assert_close("lse", lse, expected_lse, atol=1e-6, rtol=1e-6)
    return out, lse


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_random_parts(dtype):
    check(*random_parts(dtype))


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_lses_far_apart_and_far_from_zero(shift):
    """exp of an lse, or of a difference of two, is 0 or infinite."""
    outs, lses = random_parts(spread=100.0)
    check(outs, lses + np.float32(shift))


def test_attention_over_parts_is_attention_over_all():
    rng = np.random.default_rng(1)
    q, kv = rng.standard_normal((2, 1, 3, 8)), rng.standard_normal((2, 50, 8))

    def attend(keys):
        scores = np.einsum("bshd,btd->bsht", q, keys)
        total = np.exp(scores).sum(axis=-1)
        out = np.einsum("bsht,btd->bshd", np.exp(scores) / total[..., None], keys)
        return out, np.log(total).swapaxes(1, 2)

    parts = [attend(kv[:, cut]) for cut in (slice(0, 1), slice(1, 30), slice(30, 50))]
    outs, lses = (jnp.asarray(np.stack(x), jnp.float32) for x in zip(*parts, strict=True))
    out, lse = fm.merge_attention_states(outs, lses)
    np.testing.assert_allclose(out, attend(kv)[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, attend(kv)[1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("infinity", [np.inf, -np.inf])
def test_empty_parts_add_nothing(infinity, dtype):
    outs, lses = random_parts(dtype)
    empty = np.random.default_rng(2).random(lses.shape) < 0.5
    empty[:, 0] = True  # everywhere
    empty[:, 1] = False
    lses[empty] = infinity
    outs[empty.swapaxes(2, 3)] = np.nan  # it must not matter
    out, lse = check(outs, lses)
    assert (out[0] == 0).all()
    assert (lse[0] == np.inf).all()
    assert np.isfinite(out.astype(np.float32)).all()


def test_one_part_is_unchanged():
    outs, lses = random_parts("bfloat16", shape=(1, *SHAPE[1:]))
    lses[0, 0] = np.inf
    outs[0, 0] = 0
    out, lse = fm.merge_attention_states(jnp.asarray(outs), jnp.asarray(lses))
    np.testing.assert_array_equal(out, outs[0])
    np.testing.assert_array_equal(lse, lses[0])


@pytest.mark.parametrize("others", [0.0, np.inf])
def test_an_invalid_part_shows(others):
    outs, lses = random_parts()
    lses[:] = others
    outs[2, 1], lses[2, 1] = np.nan, np.nan
    out, lse = map(np.asarray, fm.merge_attention_states(jnp.asarray(outs), jnp.asarray(lses)))
    for i in range(3):
        assert (np.isnan(out[i]) == (i == 1)).all()
        assert (np.isnan(lse[i]) == (i == 1)).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sink(dtype):
    """It multiplies out by sigmoid(lse - sink) and is not in lse."""
    outs, lses = random_parts(dtype, spread=20.0)
    lses[:, 0, :, 1] = np.inf  # queries that see no key
    outs[:, 0, 1] = np.nan
    sink = np.array([np.inf, -np.inf, 0.0, 30.0, -1e38], np.float32)
    out, lse = fm.merge_attention_states(*map(jnp.asarray, (outs, lses)), attn_sink=sink)
    plain = fm.merge_attention_states(*map(jnp.asarray, (outs, lses)))
    np.testing.assert_array_equal(lse, plain[1])
    expected, _ = cases.with_sink(*expected_merge(outs, lses), sink)
    rtol = {"float32": 1e-5, "bfloat16": 2**-7}[dtype]
    cases.assert_close("out", np.asarray(out), expected, atol=2e-6, rtol=rtol)
    assert (out[:, :, 0] == 0).all()  # +inf
    np.testing.assert_array_equal(out[:, :, [1, 4]], plain[0][:, :, [1, 4]])  # -inf, or almost
    assert (out[0, 1] == 0).all()


def test_sink_makes_no_infinities():
    """Infinite sinks do not stop a program under jax_debug_infs."""
    outs, lses = random_parts()
    outs, lses = jnp.asarray(outs), jnp.asarray(lses)
    sink = jnp.array([np.inf, -np.inf, 0.0, 30.0, -1e30], jnp.float32)
    with jax.debug_infs(True), jax.debug_nans(True):
        out, lse = fm.merge_attention_states(outs, lses, attn_sink=sink)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


def test_sink_of_nan_and_an_invalid_part():
    outs, lses = random_parts()
    sink = np.array([np.nan, np.inf, -np.inf, 0.0, 1.0], np.float32)
    out, _ = fm.merge_attention_states(*map(jnp.asarray, (outs, lses)), attn_sink=sink)
    np.testing.assert_array_equal(np.isnan(out).all(axis=(0, 1, 3)), np.isnan(sink))
    outs[2, 1], lses[2, 1] = np.nan, np.nan
    out, lse = fm.merge_attention_states(*map(jnp.asarray, (outs, lses)), attn_sink=sink)
    assert np.isnan(out[1]).all()
    assert np.isnan(lse[1]).all()


def test_under_transformations_and_strict_configurations():
    outs, lses = random_parts("bfloat16")
    expected = fm.merge_attention_states(jnp.asarray(outs), jnp.asarray(lses))
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        stacked = np.stack([outs, outs], 1), np.stack([lses, lses], 2)
        out, lse = jax.jit(jax.vmap(fm.merge_attention_states, (1, 2)))(*stacked)
        with_sink = jax.vmap(
            lambda outs, lses, sink: fm.merge_attention_states(outs, lses, attn_sink=sink),
            (1, 2, None),
        )
        unchanged, _ = jax.jit(with_sink)(*stacked, np.full(5, -np.inf, np.float32))
        np.testing.assert_array_equal(unchanged, out)
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    for i in range(2):
        np.testing.assert_allclose(lse[i], expected[1], rtol=1e-6)
        np.testing.assert_allclose(
            np.asarray(out[i], np.float32), np.asarray(expected[0], np.float32), rtol=2**-7
        )


ZEROS = jnp.zeros(SHAPE), jnp.zeros((4, 3, 5, 2))


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        (ZEROS[0][0], ZEROS[1], ValueError, r"outs must have shape \[n, b, s_q, h_q, d_v\]"),
        (ZEROS[0].astype(jnp.int32), ZEROS[1], TypeError, "outs must have dtype .*got int32"),
        (ZEROS[0][:0], ZEROS[1], ValueError, r"outs must hold at least one part, got .*\[0, 3"),
        (ZEROS[0], ZEROS[1].astype(jnp.bfloat16), TypeError, "lses .*float32, got bfloat16"),
        (ZEROS[0], ZEROS[1][:3], ValueError, "lses .*axis 0 must be 4, the n of outs"),
        (ZEROS[0], ZEROS[1][:, :2], ValueError, "lses .*axis 1 must be 3, the b of outs"),
        (ZEROS[0], ZEROS[1].swapaxes(2, 3), ValueError, "lses .*axis 2 must be 5, the h_q of outs"),
        (ZEROS[0], ZEROS[1][..., :1], ValueError, "lses .*axis 3 must be 2, the s_q of outs"),
    ],
)
def test_misuse(outs, lses, error, message):
    with pytest.raises(error, match=message):
        fm.merge_attention_states(outs, lses)


@pytest.mark.parametrize(
    ("sink", "error", "message"),
    [
        (jnp.zeros(4), ValueError, "^attn_sink .*axis 0 must be 5, the h_q of out"),
        (jnp.zeros((1, 5)), ValueError, r"^attn_sink must have shape \[h_q\], got \[1, 5\]"),
        (jnp.zeros(5, jnp.bfloat16), TypeError, "^attn_sink must have dtype float32, got bfloat16"),
    ],
)
def test_misuse_of_a_sink(sink, error, message):
    with pytest.raises(error, match=message):
        fm.merge_attention_states(*ZEROS, attn_sink=sink)
    with pytest.raises(error, match=message):
        fm.merge_attention_states_across(ZEROS[0][0], ZEROS[1][0], "x", attn_sink=sink)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({}, ValueError, "axis_name 'x' is not a manual mesh axis here.*inside a jax.shard_map"),
        ({"axis_name": 0}, TypeError, "axis_name must be the name .*got 0"),
        ({"axis_name": ()}, TypeError, r"axis_name must be the name .*got \(\)"),
        ({"out": ZEROS[0]}, ValueError, r"out must have shape \[b, s_q, h_q, d_v\]"),
        ({"lse": ZEROS[1][0, :, :4]}, ValueError, "lse .*axis 1 must be 5, the h_q of out"),
        ({"lse": ZEROS[1][0].astype(jnp.float16)}, TypeError, "lse must have dtype float32"),
    ],
)
def test_misuse_across(changes, error, message):
    arguments = {"out": ZEROS[0][0], "lse": ZEROS[1][0], "axis_name": "x"}
    with pytest.raises(error, match=message):
        fm.merge_attention_states_across(**{**arguments, **changes})
