"""Every op called eagerly, with jit disabled, and under JAX's strict configurations."""

import contextlib

import cases
import jax
import jax.numpy as jnp
import ops
import pytest
from cases import D_V, Case

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


@contextlib.contextmanager
def heard_events():
    """Collects the names of the slow things that JAX does, such as tracing or compiling."""
    events = []

    def listen(event, duration, **_):
        events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@ops.each(lambda row: row.primitive)
def test_eager_calls_compile_once(row):
    """They compile again only for other shapes."""
    arrays, others = row.arrays(), row.arrays(**{row.batch: row.sizes[row.batch] + 1})
    row.run(*arrays)
    with heard_events() as events:
        for _ in range(3):
            row.run(*arrays)
    assert not [event for event in events if "trace" in event or "compile" in event]
    with heard_events() as events:
        row.run(*others)
    assert [event for event in events if "compile" in event], "the listener hears nothing"


@ops.each_run()
def test_with_jit_disabled(row, implementation):
    """Eager and jitted calls give the same results as without jax_disable_jit."""
    run = row.with_implementation(implementation)
    with jax.disable_jit():
        results = run(*row.arrays()), jax.jit(run)(*row.arrays())
    for actual in results:
        row.check(actual, row.example())


@contextlib.contextmanager
def strict_configuration():
    """Models may run with 64-bit types, or with implicit promotions forbidden."""
    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        yield


@ops.each_run()
def test_under_strict_configurations(row, implementation):
    run = row.with_implementation(implementation)
    with strict_configuration():
        arrays = row.arrays()
        once = jax.jit(run)(*arrays)
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), arrays)
        twice = jax.jit(jax.vmap(run))(*stacked)
    for actual in (once, [x[0] for x in twice], [x[1] for x in twice]):
        for x, result in zip(actual, row.results, strict=True):
            assert x.dtype == result.dtype
        row.check(actual, row.example())


def test_decode_step_under_strict_configurations(implementation):
    """Slots, an append, a schedule and attention with two KV heads."""
    inputs = cases.make_inputs(Case(3, 2, 100, 4, 2, varlen=True, causal=True))

    def step(q, k_cache, block_table, lengths):
        nowhere = fm.get_slot_mapping(block_table, lengths[:, None] - (1 << 20), 64)[:, 0]
        k_cache = fm.append_kv_cache(k_cache, q[:, 0, :2], nowhere, implementation=implementation)
        schedule = fm.get_mla_metadata(lengths, 4, 2, implementation=implementation)
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *schedule,
            causal=True, implementation=implementation,
        )  # fmt: skip

    with strict_configuration():
        arrays = inputs.device_arrays()
        results = [jax.jit(step)(*arrays)]
        out, lse = jax.jit(jax.vmap(step))(*(jnp.stack([x, x]) for x in arrays))
    results += [(out[i], lse[i]) for i in range(2)]
    for actual in results:
        cases.assert_decode_close(actual, cases.expected_decode(inputs, causal=True))
