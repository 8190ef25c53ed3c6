"""What goes with token lists: their lengths for the schedule, and local slots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flashmla as fm


def expected_seqlens(shape, lengths, extra_shape=None, extra_lengths=None):
    """List by list, in Python integers."""
    found = []
    for i, s in np.ndindex(shape[:2]):
        tokens = shape[2] if lengths is None else min(max(int(lengths[i, s]), 0), shape[2])
        if extra_shape is not None:
            more = extra_shape[2]
            if extra_lengths is not None:
                more = min(max(int(extra_lengths[i, s]), 0), more)
            tokens = -(-tokens // 64) * 64 + more
        found.append(tokens)
    return found


@pytest.mark.parametrize("extra", [None, "whole", "lengths"])
@pytest.mark.parametrize("ranks", [0, 1, 2])
@pytest.mark.parametrize("topk", [1, 64, 133])
def test_get_sparse_seqlens(topk, ranks, extra):
    rng = np.random.default_rng(0)
    shape, extra_shape = (5, 3, topk), (5, 3, 70)
    extremes = [-(2**31), -1, 0, 1, 63, 64, 65, topk, topk + 1, 2**31 - 1]
    lengths, extra_lengths = rng.choice(extremes, (2, *shape[:2])).astype(np.int32)
    if ranks == 1:
        lengths[:], extra_lengths[:] = lengths[:, :1], extra_lengths[:, :1]

    def given(x):
        return (None, x[:, 0], x)[ranks]

    arrays = [jnp.zeros(shape, jnp.int32), given(lengths)]
    wanted = [shape, None if ranks == 0 else lengths]
    if extra is not None:
        arrays += [jnp.zeros(extra_shape, jnp.int32)]
        wanted += [extra_shape]
    if extra == "lengths":
        arrays += [given(extra_lengths)]
        wanted += [None if ranks == 0 else extra_lengths]
    actual = fm.get_sparse_seqlens(*arrays)
    assert actual.dtype == jnp.int32
    assert actual.tolist() == expected_seqlens(*wanted)


def test_to_local_slots_cuts_a_pool():
    """Each slot of the pool is found in one run, at its place there; nothing else in any."""
    count, runs = 48, 4
    outside = [-1, -49, count * runs, count * runs + 5, 2**31 - 1, -(2**31)]
    indices = np.concatenate([np.arange(count * runs), outside]).astype(np.int32).reshape(1, 2, -1)
    found = np.full(indices.shape, -1)
    for run in range(runs):
        local = np.asarray(fm.to_local_slots(indices, run * count, count))
        assert local.dtype == np.int32
        traced = jax.jit(lambda x, first: fm.to_local_slots(x, first, 48))(indices, run * count)
        np.testing.assert_array_equal(traced, local)
        assert ((local >= -1) & (local < count)).all()
        assert (found[local >= 0] == -1).all(), "a slot in two runs"
        found = np.where(local >= 0, local + run * count, found)
    valid = (indices >= 0) & (indices < count * runs)
    np.testing.assert_array_equal(found, np.where(valid, indices, -1))


@pytest.mark.parametrize("first", [0, 1, 2**30, 2**31 - 2, 2**31 - 1, -1, -(2**31)])
def test_to_local_slots_never_overflows(first):
    """Slots and first slots may be any int32; a negative slot is never valid."""
    indices = np.array([-(2**31), -(2**31) + 1, -1, 0, 1, 5, 2**30, 2**31 - 2, 2**31 - 1], np.int32)
    for count in (1, 5, 2**31 - 1):
        expected = [
            i - first if i >= 0 and 0 <= i - first < count else -1 for i in indices.tolist()
        ]
        assert fm.to_local_slots(indices, jnp.int32(first), count).tolist() == expected


def test_under_strict_configurations():
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        indices = jnp.arange(6, dtype=jnp.int32).reshape(1, 2, 3)
        assert fm.to_local_slots(indices, 2, 3).tolist() == [[[-1, -1, 0], [1, 2, -1]]]
        lengths = fm.get_sparse_seqlens(indices, jnp.ones(1, jnp.int32), indices)
        assert (lengths.dtype, lengths.tolist()) == (jnp.int32, [67, 67])
