"""A program that jax.export wrote with an earlier version of the library still runs.

tests/data/step_f0d944e.bin is `exported(step)` as commit f0d944e wrote it, with JAX 0.10.2. Never
write it anew: a change that fails here breaks the programs that users have stored.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jax_flashmla as fm

STORED = Path(__file__).with_name("data") / "step_f0d944e.bin"
B, S_Q, H_Q, PAGES, PAGE, WIDTH = 3, 2, 4, 8, 16, 4
TARGETS = {
    "jax_flashmla_append_kv": 1,
    "jax_flashmla_dense_decode": 2,
    "jax_flashmla_schedule_and_decode": 1,
    "jax_flashmla_tile_scheduler": 1,
}


def step(q, k_cache, block_table, cache_seqlens, offset, new_kv, slots, schedule):
    """Every op, and decode with each kind of schedule; a `schedule` is an argument and a result."""
    k_cache = fm.append_kv_cache(k_cache, new_kv, slots)
    arrays = (q, k_cache, block_table, cache_seqlens, 512)
    made = fm.get_mla_metadata(cache_seqlens, S_Q * H_Q, 1, num_sms=7)
    return {
        "cache": k_cache,
        "schedule": made,
        "given schedule": schedule,
        "own schedule": fm.flash_mla_with_kvcache(*arrays, softmax_scale=0.25),
        "made schedule": fm.flash_mla_with_kvcache(*arrays, *made, causal=True),
        "fixed splits": fm.flash_mla_with_kvcache(
            *arrays, *schedule, causal=True, causal_offset=offset
        ),
    }


def arguments():
    """Of `step`. Slot 127 is in the pool's last page, which no sequence uses."""
    rng = np.random.default_rng(0)
    cache_seqlens = jnp.array([40, 0, 63], jnp.int32)
    return (
        jnp.asarray(rng.standard_normal((B, S_Q, H_Q, 576)), jnp.bfloat16),
        jnp.asarray(rng.standard_normal((PAGES, PAGE, 1, 576)), jnp.bfloat16),
        jnp.array([[2, 0, 1, -1], [-1] * 4, [3, 4, 5, 6]], jnp.int32),
        cache_seqlens,
        jnp.array([-3, 0, -20], jnp.int32),
        jnp.asarray(rng.standard_normal((3, 1, 576)), jnp.bfloat16),
        jnp.array([17, -1, 127], jnp.int32),
        fm.get_mla_metadata(
            cache_seqlens, S_Q * H_Q, 1, fixed_split_size=64, max_seqlen=256, implementation="xla"
        ),
    )


def exported(function):
    """The program for a CPU and for a GPU."""
    fresh = jax.jit(lambda *args: function(*args))  # JAX remembers how it lowered a function
    program = export.export(
        fresh, platforms=("cpu", "cuda"), disabled_checks=fm.EXPORT_DISABLED_CHECKS
    )
    return program(*arguments())


@pytest.fixture
def stored():
    return export.deserialize(bytearray(STORED.read_bytes()))


def kernel_calls(program):
    """Each call of a kernel, sorted: target, attributes, types of operands and results."""
    lines = re.findall(r"stablehlo\.custom_call (@jax_flashmla_.*)", program.mlir_module())
    return sorted(re.sub(r"%[\w#]+|loc\(.*", "%", line) for line in lines)


@pytest.mark.usefixtures("kernels")
def test_kernels_are_called_as_before(stored):
    """Today's programs and the stored one agree on everything that a handler sees."""
    calls = kernel_calls(stored)
    counts = {target: sum(f"@{target}(" in call for call in calls) for target in TARGETS}
    assert counts == TARGETS
    assert kernel_calls(exported(step)) == calls


def assert_as_today(stored, exact):
    """Compares the program's results with what the ops give now: those in `exact` bit for bit."""
    actual, expected = stored.call(*arguments()), jax.jit(step)(*arguments())
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for name in actual:
        pairs = zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name]), strict=True)
        for a, e in pairs:
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            a, e = (np.asarray(x, np.float64) for x in (a, e))
            if name in exact:
                np.testing.assert_array_equal(a, e)
            else:
                # Softmax weights that are rounded to bfloat16 differ from float32 by 2**-9.
                np.testing.assert_allclose(a, e, rtol=2**-7, atol=3e-3)
    assert np.isinf(actual["own schedule"][1]).sum() == S_Q * H_Q  # of the empty sequence
    assert np.isfinite(actual["made schedule"][1][0]).all()
    metadata, num_splits = actual["given schedule"]
    assert isinstance(metadata, fm.TileSchedulerMetadata)
    assert (metadata.batch, metadata.num_parts, metadata.fixed_split_size) == (B, 4 * B, 64)
    assert num_splits.tolist() == [0, 1, 2, 3]


COPIES = {"cache", "schedule", "given schedule"}


def test_results_on_a_cpu(stored):
    if jax.default_backend() != "cpu":
        pytest.skip("the default backend is not a CPU")
    assert_as_today(stored, exact=COPIES)


@pytest.mark.gpu
def test_results_on_a_gpu(stored):
    """The same bits, except if they depend on the number of SMs: the stored program is for 132."""
    assert_as_today(stored, exact=COPIES | {"made schedule", "fixed splits"})
