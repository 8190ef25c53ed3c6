"""The cost of a call, which XLA does not know for custom calls."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import (
    check_array,
    check_axis,
    check_decode_shapes,
    check_offset_has_mask,
    describe,
    static_bool,
)

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def decode_cost(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    cache_seqlens: np.ndarray | jax.Array,
    head_dim_v: int,
    causal: bool = False,
    *,
    causal_offset: np.ndarray | jax.Array | None = None,
) -> dict[str, float]:
    """The work of one call of `flash_mla_with_kvcache`, under the names that XLA gives it.

    XLA does not know the cost of a custom call, so `cost_analysis()` of a program leaves the kernel
    out. Add this to it, once for each call. It is the least work that the call has to do, with each
    operand and result moved once. It counts neither the kernel's padding of query rows nor its
    partial results.

    Args:
      q: [b, s_q, h_q, d_k]. Only shape and dtype of this and of k_cache matter.
      k_cache: [num_blocks, page_block_size, h_kv, d_k].
      cache_seqlens: [b] integers, tokens of each sequence; not a traced array. A negative one
        counts as 0.
      head_dim_v: d_v.
      causal: as in the call.
      causal_offset: [b] integers as in the call, not a traced array; default 0, only with
        causal. Tokens that it hides from every query of a sequence are not counted.

    Returns:
      "flops": of the two products, a multiply-add counted as 2.
      "transcendentals": exponentials, one a score.
      "bytes accessed": the tokens' rows of the cache, their page ids, q, lengths, offsets, out and
        lse.

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
    b, s_q, h_q, d_k = q.shape
    _, page, h_kv, _ = k_cache.shape
    lengths = np.maximum(_values("cache_seqlens", cache_seqlens, b), 0)
    visible = np.broadcast_to(lengths[:, None], (b, s_q))  # tokens that each query sees
    integers = b  # counts lengths, offsets and page ids
    if causal:
        visible = visible - np.arange(s_q)[::-1]
    if causal_offset is not None:
        check_offset_has_mask(causal)
        visible = visible + _values("causal_offset", causal_offset, b)[:, None]
        integers += b
    visible = np.clip(visible, 0, lengths[:, None])

    tokens, scores = visible.max(axis=1), h_q * int(visible.sum())
    integers += int((-(-tokens // page)).sum())
    values = int(tokens.sum()) * h_kv * d_k + b * s_q * h_q * (d_k + d_v)  # in q's dtype
    return {
        "flops": float(2 * scores * (d_k + d_v)),
        "transcendentals": float(scores),
        "bytes accessed": float(values * q.dtype.itemsize + 4 * (integers + b * s_q * h_q)),
    }


def _with_shape(name: str, x: Any) -> Any:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return x
    raise TypeError(f"{name} must be an array or a jax.ShapeDtypeStruct, got {describe(x)}")


def _values(name: str, x: Any, b: int) -> Any:
    """i64 [b], wide enough for sums of any int32."""
    if any(isinstance(value, jax.core.Tracer) for value in jax.tree.leaves(x)):
        raise TypeError(f"{name} must be values, got the traced {x}; call decode_cost outside jit")
    try:
        values = np.asarray(x)
    except ValueError:  # lists of several lengths
        values = np.asarray(None)
    if not np.issubdtype(values.dtype, np.integer):
        raise TypeError(f"{name} must be {b} integers, got {describe(x)}")
    check_array(name, values, "b")
    check_axis(name, values, 0, b, "the batch of q")
    return values.astype(np.int64)
