"""The cost of a call, which XLA does not know for custom calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    check_array,
    check_axis,
    check_decode_shapes,
    check_extra_cache,
    check_extra_pair,
    check_given,
    check_list_lengths,
    check_lists,
    check_no_lists,
    check_offset_has_mask,
    check_only_lists,
    describe,
    static_bool,
)

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def decode_cost(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    cache_seqlens: np.ndarray | jax.Array | None,
    head_dim_v: int,
    causal: bool = False,
    *,
    causal_offset: np.ndarray | jax.Array | None = None,
    indices: np.ndarray | jax.Array | None = None,
    topk_length: np.ndarray | jax.Array | None = None,
    extra_k_cache: jax.Array | jax.ShapeDtypeStruct | None = None,
    extra_indices_in_kvcache: np.ndarray | jax.Array | None = None,
    extra_topk_length: np.ndarray | jax.Array | None = None,
) -> dict[str, float]:
    """The work of one call of `flash_mla_with_kvcache`, under the names that XLA gives it.

    XLA does not know the cost of a custom call, so `cost_analysis()` of a program leaves the kernel
    out. Add this to it, once for each call. It is the least work that the call has to do, with each
    operand and result moved once. It counts neither the kernel's padding of query rows nor its
    partial results. With indices, a slot that several queries name is moved once.

    The arrays of integers are values, not traced arrays.

    Args:
      q: [b, s_q, h_q, d_k]. Only shape and dtype of this and of the caches matter.
      k_cache: [num_blocks, page_block_size, h_kv, d_k].
      cache_seqlens: [b] integers, tokens of each sequence. A negative one counts as 0. None with
        indices.
      head_dim_v: d_v.
      causal: as in the call.
      causal_offset: [b] integers as in the call; default 0, only with causal. Tokens that it hides
        from every query of a sequence are not counted.
      indices: [b, s_q, topk] integers as in the call. Those outside the pool are not counted.
      topk_length: [b] or [b, s_q] integers as in the call, default topk.
      extra_k_cache, extra_indices_in_kvcache, extra_topk_length: as in the call.

    Returns:
      "flops": of the two products, a multiply-add counted as 2.
      "transcendentals": exponentials, one a score.
      "bytes accessed": the tokens' rows of the caches, their page ids or indices, q, lengths,
        offsets, out and lse.

    Raises:
      TypeError, ValueError: an argument is not as described.

    Example:
      >>> import jax, jax.numpy as jnp, jax_flashmla as fm
      >>> q = jax.ShapeDtypeStruct((2, 1, 16, 576), jnp.bfloat16)
      >>> k_cache = jax.ShapeDtypeStruct((100, 64, 1, 576), jnp.bfloat16)
      >>> fm.decode_cost(q, k_cache, [1000, 24], 512)["flops"]  # 1024 tokens, 16 heads
      35651584.0
    """
    q, k_cache = _with_shape("q", q), _with_shape("k_cache", k_cache)
    d_v = check_decode_shapes(q, k_cache, head_dim_v, _DTYPES)
    causal = static_bool("causal", causal)
    extra = extra_k_cache, extra_indices_in_kvcache, extra_topk_length
    if indices is None:
        check_no_lists(topk_length, *extra)
        check_given("cache_seqlens", cache_seqlens)
        scores, rows, integers = _dense_work(q, k_cache, cache_seqlens, causal, causal_offset)
    else:
        check_only_lists(
            k_cache, cache_seqlens=cache_seqlens, causal=causal, causal_offset=causal_offset
        )
        scores, rows, integers = _list_work("", q, k_cache, indices, topk_length)
        check_extra_pair(*extra)
        if extra_k_cache is not None:
            extra_k_cache = _with_shape("extra_k_cache", extra_k_cache)
            check_extra_cache(extra_k_cache, q)
            more = _list_work("extra_", q, extra_k_cache, *extra[1:])
            scores, rows, integers = (
                x + y for x, y in zip((scores, rows, integers), more, strict=True)
            )

    b, s_q, h_q, d_k = q.shape
    values = rows * d_k + b * s_q * h_q * (d_k + d_v)  # in q's dtype
    return {
        "flops": float(2 * scores * (d_k + d_v)),
        "transcendentals": float(scores),
        "bytes accessed": float(values * q.dtype.itemsize + 4 * (integers + b * s_q * h_q)),
    }


def _dense_work(
    q: Any, k_cache: Any, cache_seqlens: Any, causal: bool, causal_offset: Any
) -> tuple[int, int, int]:
    """Scores, rows of the cache, and integers read: lengths, offsets and page ids."""
    b, s_q, h_q, _ = q.shape
    _, page, h_kv, _ = k_cache.shape
    lengths = np.maximum(_by_sequence("cache_seqlens", cache_seqlens, b), 0)
    visible = np.broadcast_to(lengths[:, None], (b, s_q))  # tokens that each query sees
    integers = b
    if causal:
        visible = visible - np.arange(s_q)[::-1]
    if causal_offset is not None:
        check_offset_has_mask(causal)
        visible = visible + _by_sequence("causal_offset", causal_offset, b)[:, None]
        integers += b
    visible = np.clip(visible, 0, lengths[:, None])
    tokens = visible.max(axis=1)
    integers += int((-(-tokens // page)).sum())
    return h_q * int(visible.sum()), int(tokens.sum()) * h_kv, integers


def _list_work(
    prefix: str, q: Any, k_cache: Any, indices: Any, topk_length: Any
) -> tuple[int, int, int]:
    """Scores, different rows of one cache, and integers read: indices and lengths."""
    b, s_q, h_q, _ = q.shape
    name = f"{prefix}indices_in_kvcache" if prefix else "indices"
    lists = _integers(name, indices, "[b, s_q, topk]")
    check_lists(name, lists, "q", b, s_q)
    topk = lists.shape[2]
    lengths = np.array([topk])
    if topk_length is not None:
        name = f"{prefix}topk_length"
        lengths = _integers(name, topk_length, "[b, s_q]")
        check_list_lengths(name, lengths, lists)
    lengths = np.clip(lengths[:, None] if lengths.ndim == 1 else lengths, 0, topk)
    lengths = np.broadcast_to(lengths, (b, s_q))
    slots = lists[np.arange(topk) < lengths[..., None]]
    slots = slots[(slots >= 0) & (slots < k_cache.shape[0] * k_cache.shape[1])]
    return h_q * slots.size, np.unique(slots).size, int(lengths.sum()) + b * s_q


def _with_shape(name: str, x: Any) -> Any:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return x
    raise TypeError(f"{name} must be an array or a jax.ShapeDtypeStruct, got {describe(x)}")


def _by_sequence(name: str, x: Any, b: int) -> Any:
    """i64 [b]."""
    values = _integers(name, x, str(b))
    check_array(name, values, "b")
    check_axis(name, values, 0, b, "the batch of q")
    return values


def _integers(name: str, x: Any, shape: str) -> Any:
    """i64, wide enough for sums of any int32; `shape` is for the message."""
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(x)):
        raise TypeError(f"{name} must be values, got the traced {x}; call decode_cost outside jit")
    try:
        values = np.asarray(x)
    except ValueError:  # lists of several lengths
        values = np.asarray(None)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{name} must be {shape} integers, got {describe(x)}")
    return values.astype(np.int64)
