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


def test_cost_of_lists():
    """Counted entry by entry; a slot that several entries name is moved once."""
    rng = np.random.default_rng(0)
    b, s_q, h_q = 3, 2, 8
    pools = {"": (5, 4), "extra_": (3, 2)}  # pages and their tokens
    lists = {
        "": rng.integers(-5, 25, (b, s_q, 30)).astype(np.int32),
        "extra_": rng.integers(-2, 8, (b, s_q, 7)),
    }
    lengths = {"": np.array([[30, 4], [99, 0], [-3, 8]]), "extra_": np.array([7, 2, 0])}
    scores = rows = integers = 0
    for name, (pages, page) in pools.items():
        named, used = [], 0
        for i, s in np.ndindex(b, s_q):
            length = lengths[name][i] if lengths[name].ndim == 1 else lengths[name][i, s]
            entries = lists[name][i, s, : max(length, 0)]
            used += len(entries)
            named += [slot for slot in entries.tolist() if 0 <= slot < pages * page]
        scores += h_q * len(named)
        rows += len(set(named))
        integers += used + b * s_q
    q, k_cache = struct((b, s_q, h_q, D_K)), struct((5, 4, 1, D_K))
    options = {"indices": lists[""].tolist(), "topk_length": lengths[""]}
    options |= {"extra_k_cache": struct((3, 2, 1, D_K)), "extra_topk_length": lengths["extra_"]}
    options["extra_indices_in_kvcache"] = jnp.asarray(lists["extra_"], jnp.int32)
    assert fm.decode_cost(q, k_cache, None, D_V, **options) == {
        "flops": 2.0 * scores * (D_K + D_V),
        "transcendentals": float(scores),
        "bytes accessed": 2 * (rows * D_K + b * s_q * h_q * (D_K + D_V))
        + 4 * (integers + b * s_q * h_q),  # indices, lengths, lse
    }
    whole = fm.decode_cost(q, k_cache, None, D_V, indices=np.full((b, s_q, 30), 7))
    assert whole["transcendentals"] == h_q * b * s_q * 30
    assert whole["bytes accessed"] == 2 * (D_K + b * s_q * h_q * (D_K + D_V)) + 4 * b * s_q * (
        30 + 1 + h_q
    )


LISTS = {"indices": np.zeros((2, 1, 3), np.int32)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"cache_seqlens": [1, 2]},
            ValueError,
            r"^cache_seqlens must be None with indices, got \[",
        ),
        ({"causal": True}, ValueError, "^causal must be False with indices"),
        ({"indices": None}, TypeError, "^cache_seqlens must be an array, got None; .*pass indices"),
        (
            {"indices": np.zeros((2, 1, 3))},
            TypeError,
            r"^indices must be \[b, s_q, topk\] integers",
        ),
        (
            {"indices": np.zeros((2, 3), int)},
            ValueError,
            r"^indices must have shape \[b, s_q, topk",
        ),
        ({"indices": np.zeros((3, 1, 3), int)}, ValueError, "^indices .*axis 0 must be 2"),
        (
            {"indices": np.zeros((2, 1, 0), int)},
            ValueError,
            "^indices must have at least one entry",
        ),
        ({"topk_length": [1, 2, 3]}, ValueError, "^topk_length .*axis 0 must be 2"),
        ({"topk_length": [[1, 1], [2, 2]]}, ValueError, "^topk_length .*axis 1 must be 1"),
        ({"topk_length": 3}, ValueError, r"^topk_length must have shape \[b\] or \[b, s_q\]"),
        (
            {"extra_topk_length": [1, 2]},
            ValueError,
            "^extra_topk_length holds the lengths of extra",
        ),
        ({"extra_k_cache": struct((9, 2, 1, D_K))}, ValueError, "come as a pair"),
        (
            {"extra_k_cache": struct((9, 2, 1, D_V)), "extra_indices_in_kvcache": [[[1]], [[1]]]},
            ValueError,
            "^extra_k_cache .*axis 3 must be 576",
        ),
        (
            {"extra_k_cache": struct((9, 2, 2, D_K)), "extra_indices_in_kvcache": [[[1]], [[1]]]},
            ValueError,
            r"^extra_k_cache has shape \[9, 2, 2, 576\], but axis 2 must be 1, the KV heads",
        ),
    ],
)
def test_misuse_of_the_cost_of_lists(changes, error, message):
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    arguments = {"cache_seqlens": None, "causal": False, **LISTS, **changes}
    fm.decode_cost(q, k_cache, None, D_V, **LISTS)
    with pytest.raises(error, match=message):
        fm.decode_cost(q, k_cache, head_dim_v=D_V, **arguments)


def test_cost_of_lists_without_indices():
    q, k_cache = struct((2, 1, 4, D_K)), struct((9, 64, 1, D_K))
    with pytest.raises(ValueError, match=r"^topk_length belongs to a call with indices"):
        fm.decode_cost(q, k_cache, [1, 2], D_V, topk_length=[1, 1])
    with pytest.raises(TypeError, match=r"indices must be values.*outside jit"):
        jax.jit(lambda x: fm.decode_cost(q, k_cache, None, D_V, indices=x))(LISTS["indices"])


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
