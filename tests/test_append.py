"""append_kv_cache and get_slot_mapping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expected import expected_append

import jax_flashmla as fm

INT32_MAX = 2**31 - 1


def random_cache(shape, dtype, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("page", "h_kv", "d_k"), [(64, 1, 576), (16, 1, 576), (3, 2, 7), (1, 1, 1), (256, 8, 576)]
)
def test_append(page, h_kv, d_k, dtype, implementation):
    k_cache = random_cache((6, page, h_kv, d_k), dtype)
    slots = np.random.default_rng(1).permutation(6 * page)[:11].astype(np.int32)
    slots = np.concatenate([slots, [-1, -7, 6 * page, INT32_MAX, -(2**31)]]).astype(np.int32)
    new_kv = random_cache((len(slots), h_kv, d_k), dtype, 2)
    actual = fm.append_kv_cache(
        *map(jnp.asarray, (k_cache, new_kv, slots)), implementation=implementation
    )
    assert actual.dtype == k_cache.dtype
    np.testing.assert_array_equal(actual, expected_append(k_cache, new_kv, slots))


def test_append_without_a_head_axis(implementation):
    k_cache, new_kv = random_cache((2, 64, 1, 576), "bfloat16"), random_cache((3, 576), "bfloat16")
    slots = jnp.array([1, 100, 5], jnp.int32)
    actual = fm.append_kv_cache(
        jnp.asarray(k_cache), jnp.asarray(new_kv), slots, implementation=implementation
    )
    np.testing.assert_array_equal(actual, expected_append(k_cache, new_kv[:, None], slots.tolist()))


def test_equal_slots_either_wins(implementation):
    k_cache = jnp.zeros((2, 64, 1, 576), jnp.bfloat16)
    new_kv = jnp.stack([jnp.full((1, 576), v, jnp.bfloat16) for v in (1, 2)])
    actual = fm.append_kv_cache(
        k_cache, new_kv, jnp.array([70, 70], jnp.int32), implementation=implementation
    )
    assert len(np.unique(actual[1, 6])) == 1
    assert float(actual[1, 6, 0, 0]) in (1, 2)
    assert np.count_nonzero(actual) == 576


def test_append_nothing(implementation):
    k_cache = jnp.ones((2, 64, 1, 576), jnp.bfloat16)
    actual = fm.append_kv_cache(
        k_cache, k_cache[0, :0], jnp.zeros(0, jnp.int32), implementation=implementation
    )
    np.testing.assert_array_equal(actual, k_cache)


def test_append_in_a_loop_of_layers(implementation):
    """All layers' pages in one buffer, the slots offset by layer."""
    layers, pages, page, steps = 3, 4, 16, 20
    rows = random_cache((steps, layers, 2, 1, 576), "bfloat16")
    table = jnp.array([[0, 3], [1, 2]], jnp.int32)

    def step(t, k_cache):
        slots = fm.get_slot_mapping(table, jnp.full((2, 1), t, jnp.int32), page)[:, 0]

        def layer(k_cache, i):
            new = jnp.asarray(rows)[t, i]
            layer_slots = slots + i * pages * page
            return fm.append_kv_cache(
                k_cache, new, layer_slots, implementation=implementation
            ), None

        return jax.lax.scan(layer, k_cache, jnp.arange(layers, dtype=jnp.int32))[0]

    k_cache = jnp.zeros((layers * pages, page, 1, 576), jnp.bfloat16)
    run = jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c), donate_argnums=0)
    actual = np.asarray(run(k_cache)).reshape(layers, pages, page, 1, 576)
    for i in range(layers):
        for sequence in range(2):
            tokens = actual[i, np.asarray(table)[sequence]].reshape(-1, 1, 576)
            np.testing.assert_array_equal(tokens[:steps], rows[:, i, sequence])
            assert not tokens[steps:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("tested", ["cuda", "xla"])
def test_append_past_int32(tested):
    pages = 2**31 // (64 * 576) + 100
    slots = np.array([0, pages * 64 - 1, pages * 64, 63, (pages - 50) * 64], np.int32)
    new_kv = random_cache((len(slots), 1, 576), "bfloat16")

    @jax.jit
    def run(new_kv, slots):
        k_cache = jnp.zeros((pages, 64, 1, 576), jnp.bfloat16)
        k_cache = fm.append_kv_cache(k_cache, new_kv, slots, implementation=tested)
        written = k_cache[slots // 64, slots % 64]
        return written, jnp.any(k_cache != 0, axis=(2, 3)).sum()

    written, count = run(jnp.asarray(new_kv), jnp.asarray(slots))
    inside = slots < pages * 64
    np.testing.assert_array_equal(np.asarray(written)[inside], new_kv[inside])
    assert int(count) == inside.sum()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k_cache": jnp.zeros((2, 16, 576))}, ValueError, r"k_cache .*got \[2, 16, 576\]"),
        ({"k_cache": jnp.zeros((2, 16, 1, 8), jnp.int8)}, TypeError, "k_cache .*got int8"),
        ({"new_kv": jnp.zeros((3, 1, 8), jnp.bfloat16)}, TypeError, "new_kv .*got bfloat16"),
        ({"new_kv": jnp.zeros((3, 1, 9))}, ValueError, "new_kv .*must be 8"),
        ({"new_kv": jnp.zeros((3, 2, 8))}, ValueError, "new_kv .*must be 1"),
        ({"new_kv": jnp.zeros((4, 8))}, ValueError, "slot_mapping .*must be 4"),
        ({"new_kv": jnp.zeros(8)}, ValueError, r"new_kv .*got \[8\]"),
        ({"slot_mapping": jnp.zeros((3, 1), jnp.int32)}, ValueError, r"slot_mapping .*\[3, 1\]"),
        ({"slot_mapping": jnp.zeros(3, jnp.uint32)}, TypeError, "slot_mapping .*got uint32"),
        ({"implementation": None}, ValueError, "implementation .*got None"),
    ],
)
def test_append_misuse(changes, error, message):
    arguments = {
        "k_cache": jnp.zeros((2, 16, 1, 8)),
        "new_kv": jnp.zeros((3, 1, 8)),
        "slot_mapping": jnp.zeros(3, jnp.int32),
        "implementation": "xla",
    }
    with pytest.raises(error, match=message):
        fm.append_kv_cache(**{**arguments, **changes})


def test_slot_mapping():
    table = jnp.array([[7, 2, -1], [0, INT32_MAX, 5]], jnp.int32)
    positions = jnp.array(
        [[0, 15, 16, 31, 32, 48, -1], [0, 16, 32, 47, 48, INT32_MAX, -(2**31)]], jnp.int32
    )
    actual = fm.get_slot_mapping(table, positions, 16)
    assert actual.dtype == jnp.int32
    assert actual.tolist() == [[112, 127, 32, 47, -1, -1, -1], [0, -1, 80, 95, -1, -1, -1]]


def test_slot_mapping_reaches_the_last_slot():
    last = (INT32_MAX - 63) // 64  # the last page whose slots are all int32
    table = jnp.array([[last, last + 1]], jnp.int32)
    actual = fm.get_slot_mapping(table, jnp.array([[63, 64]], jnp.int32), 64)
    assert actual.tolist() == [[last * 64 + 63, -1]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((jnp.zeros(3, jnp.int32), jnp.zeros((1, 1), jnp.int32), 16), ValueError, "block_table"),
        ((jnp.zeros((2, 3), jnp.int32), jnp.zeros(2, jnp.int32), 16), ValueError, "positions"),
        (
            (jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 1, 7), jnp.int32), 16),
            ValueError,
            r"^positions must have shape \[b, n\], got \[2, 1, 7\]; for token lists pass "
            r"positions\.reshape\(b, -1\), and \.reshape\(positions\.shape\) the result",
        ),
        ((jnp.zeros((2, 3)), jnp.zeros((2, 1), jnp.int32), 16), TypeError, "block_table"),
        ((jnp.zeros((2, 3), jnp.int32), jnp.zeros((3, 1), jnp.int32), 16), ValueError, "positions"),
        ((jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 1), jnp.int32), 0), ValueError, "got 0"),
    ],
)
def test_slot_mapping_misuse(arguments, error, message):
    with pytest.raises(error, match=message):
        fm.get_slot_mapping(*arguments)
