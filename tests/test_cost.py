"""decode_cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V
from decode_step import serve_for, serve_inputs
from lowering import (
    struct,
)

import jax_flashmla as fm


@pytest.mark.parametrize(
    ("causal", "offset", "seen"),
    [
        (False, None, [70, 0, 0, 1]),
        (True, None, [70, 0, 0, 1]),
        (True, [-6, 5, 5, 2**31 - 1], [64, 0, 0, 1]),
        (True, [1, -1, 0, -(2**31)], [70, 0, 0, 0]),
    ],
)
def test_cost(causal, offset, seen):
    """Counted query by query; `seen` is what the last one of a sequence sees."""
    lengths = np.array([70, 0, -3, 1], np.int32)
    q, k_cache = struct((4, 3, 8, D_K)), struct((9, 64, 2, D_K), jnp.bfloat16)
    scores = 0
    for n, moved in zip(lengths.tolist(), offset or [0] * 4, strict=True):
        for i in range(3):
            boundary = n - 3 + i + moved if causal else n
            scores += 8 * sum(j <= boundary for j in range(n))
    ids = sum(-(-n // 64) for n in seen)
    assert fm.decode_cost(q, k_cache, lengths, D_V, causal, causal_offset=offset) == {
        "flops": 2.0 * scores * (D_K + D_V),
        "transcendentals": float(scores),
        "bytes accessed": 2 * (sum(seen) * 2 * D_K + 4 * 3 * 8 * (D_K + D_V))  # cache, q and out
        + 4 * (ids + 4 + (4 if offset else 0) + 4 * 3 * 8),  # page ids, lengths, offsets, lse
    }


def test_cost_is_in_units_of_xla():
    """Against what XLA counts for attention over one plain sequence."""
    q, kv = struct((16, D_K), jnp.float32), struct((500, D_K), jnp.float32)

    def plain(q, kv):
        return jax.nn.softmax(q @ kv.T) @ kv[:, :D_V]

    theirs = jax.jit(plain).lower(q, kv).cost_analysis()
    ours = fm.decode_cost(
        struct((1, 1, 16, D_K), jnp.float32), struct((8, 64, 1, D_K), jnp.float32), [500], D_V
    )
    assert ours.keys() <= theirs.keys()
    assert ours["flops"] == pytest.approx(theirs["flops"], rel=0.01)
    assert ours["transcendentals"] == pytest.approx(theirs["transcendentals"], rel=0.01)


@pytest.mark.gpu
def test_xla_counts_no_flops_for_the_kernel():
    arrays, after = serve_inputs(2, 10, 4)
    analysis = jax.jit(serve_for("cuda")).lower(*arrays).compile().cost_analysis()
    ours = fm.decode_cost(arrays[0], arrays[2], after.cache_seqlens, D_V)
    assert (analysis or {}).get("flops", 0) < 0.01 * ours["flops"]


@pytest.mark.parametrize(
    ("lengths", "d_v", "causal", "error", "message"),
    [
        ([1, 2, 3], D_V, False, ValueError, r"cache_seqlens has shape \[3\].*must be 2"),
        ([1, 2], 512.0, False, TypeError, "head_dim_v must be a static Python int"),
        ([1, 2], D_V, 1, TypeError, "causal must be a static Python bool"),
        ([[1, 2]], D_V, False, ValueError, r"cache_seqlens must have shape \[b\], got \[1, 2\]"),
    ],
)
def test_misuse_of_the_cost(lengths, d_v, causal, error, message):
    with pytest.raises(error, match=message):
        fm.decode_cost(struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K)), lengths, d_v, causal)


def test_cost_of_traced_lengths():
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    with pytest.raises(TypeError, match=r"cache_seqlens must be values.*outside jit"):
        jax.jit(lambda n: fm.decode_cost(q, k_cache, n, D_V))(jnp.ones(2, jnp.int32))
    with pytest.raises(TypeError, match=r"cache_seqlens must be values.*outside jit"):
        jax.jit(lambda n: fm.decode_cost(q, k_cache, [n[0], 3], D_V))(jnp.ones(2, jnp.int32))


def test_cost_of_an_offset_without_a_mask():
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    with pytest.raises(ValueError, match="causal_offset moves the boundary"):
        fm.decode_cost(q, k_cache, [1, 2], D_V, causal_offset=[0, 0])
    with pytest.raises(ValueError, match=r"causal_offset has shape \[3\].*must be 2"):
        fm.decode_cost(q, k_cache, [1, 2], D_V, causal=True, causal_offset=[0, 0, 0])
