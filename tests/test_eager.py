"""Eager calls, and strict configurations."""

import cases
import jax
import jax.numpy as jnp
from cases import D_V, Case

import jax_flashmla as fm


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
        schedule = fm.get_mla_metadata(lengths, 4, 2, implementation=implementation)
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *schedule,
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
