"""What a call has to do: the figures that XLA cannot know of a custom call."""

import jax
import numpy as np

from ._checks import check_axis, static_bool, static_int


def decode_cost(
    q: jax.Array | jax.ShapeDtypeStruct,
    k_cache: jax.Array | jax.ShapeDtypeStruct,
    cache_seqlens: np.ndarray | jax.Array,
    head_dim_v: int,
    causal: bool = False,
) -> dict[str, float]:
    """The work of one call of `flash_mla_with_kvcache`, under the names that XLA gives it.

    To XLA the cost of a custom call is unknown, so that `cost_analysis()` of a program leaves the
    kernel out: add this to it, once for each call. It is the least that the call has to do, each
    operand and result moved once; not the kernel's padding of query rows, nor its partial results.

    Args:
      q: [b, s_q, h_q, d_k]; of this and of k_cache only shape and dtype matter.
      k_cache: [num_blocks, page_block_size, h_kv, d_k].
      cache_seqlens: [b] integers, tokens of each sequence; values, not a traced array. A negative
        one counts as 0.
      head_dim_v: d_v.
      causal: as in the call.

    Returns:
      "flops": of the two products, a multiply-add counted as 2.
      "transcendentals": exponentials, one a score.
      "bytes accessed": the tokens' rows of the cache, their page ids, q, lengths, out and lse.

    Raises:
      TypeError, ValueError: an argument is not as described.
    """
    if isinstance(cache_seqlens, jax.core.Tracer):
        raise TypeError(
            f"cache_seqlens must be values, got the traced {cache_seqlens}; call decode_cost "
            "outside jit"
        )
    b, s_q, h_q, d_k = q.shape
    _, page, h_kv, _ = k_cache.shape
    d_v, causal = static_int("head_dim_v", head_dim_v), static_bool("causal", causal)
    lengths = np.maximum(np.asarray(cache_seqlens, np.int64), 0)
    check_axis("cache_seqlens", lengths, 0, b, "the batch of q")

    hidden = np.arange(s_q)[::-1] if causal else np.zeros(s_q, np.int64)  # of each query
    scores = h_q * int(np.maximum(lengths[:, None] - hidden, 0).sum())
    tokens, pages = int(lengths.sum()), int((-(-lengths // page)).sum())
    values = tokens * h_kv * d_k + b * s_q * h_q * (d_k + d_v)  # in q's dtype
    return {
        "flops": float(2 * scores * (d_k + d_v)),
        "transcendentals": float(scores),
        "bytes accessed": float(values * q.dtype.itemsize + 4 * (pages + b + b * s_q * h_q)),
    }
