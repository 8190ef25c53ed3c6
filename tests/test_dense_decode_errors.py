"""Wrong arguments of flash_mla_with_kvcache: the error names the argument and its value."""

import jax
import jax.numpy as jnp
import pytest
from cases import D_K, D_V

import jax_flashmla as fm


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


def some_schedule(b=2, rows=4, h_kv=1):
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
        ({"attn_sink": jnp.zeros(3)}, ValueError, r"^attn_sink .*axis 0 must be 4, the heads of q"),
        ({"attn_sink": jnp.zeros((2, 4))}, ValueError, r"^attn_sink must have shape \[h_q\], got"),
        ({"attn_sink": jnp.zeros(4, jnp.float16)}, TypeError, "^attn_sink .*float32, got float16"),
        ({"implementation": "triton"}, ValueError, "implementation must be one of .*'triton'"),
        ({"num_splits": jnp.zeros(3, jnp.int32)}, ValueError, "None for tile_scheduler_metadata"),
        ({"tile_scheduler_metadata": some_schedule()[0]}, ValueError, "None for num_splits"),
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
def test_schedule_of_another_call(made_for, message):
    schedule, num_splits = some_schedule(**made_for)
    with pytest.raises(ValueError, match=message):
        call_with(tile_scheduler_metadata=schedule, num_splits=num_splits)
    with pytest.raises(ValueError, match=message):  # also where all arrays are traced
        jax.eval_shape(
            lambda m, n: call_with(tile_scheduler_metadata=m, num_splits=n), schedule, num_splits
        )


def test_schedule_of_another_kind():
    schedule, num_splits = some_schedule()
    with pytest.raises(TypeError, match=r"tile_scheduler_metadata must be .*got .* of type tuple"):
        call_with(tile_scheduler_metadata=(schedule,), num_splits=num_splits)
    with pytest.raises(ValueError, match=r"num_splits .*must be 3"):
        call_with(tile_scheduler_metadata=schedule, num_splits=num_splits[1:])
    call_with(tile_scheduler_metadata=schedule, num_splits=num_splits)


def test_traced_softmax_scale():
    with pytest.raises(TypeError, match=r"softmax_scale must be a static .*traced"):
        jax.jit(lambda scale: call_with(softmax_scale=scale))(0.1)
