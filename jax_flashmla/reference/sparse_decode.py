"""The reference of sparse decode: attention of each query over its own list of tokens."""

from typing import Any

import jax
import jax.numpy as jnp

from ._attention import Source, attend

_INT32_MAX = 2**31 - 1


def sparse_decode(
    q: jax.Array,
    k_cache: jax.Array,
    indices: jax.Array,
    topk_length: jax.Array,
    extra_k_cache: jax.Array | None = None,
    extra_indices: jax.Array | None = None,
    extra_topk_length: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    *,
    head_dim_v: int,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Attention of every query over the tokens that its list names.

    An entry is a slot of the pool: page * page size + offset. It is masked, and nothing is read, if
    it is outside the pool or not among the first topk_length of its list. A slot that is named
    twice counts twice. With an extra cache there is one softmax over the tokens of both lists.

    Args:
      q: [b, s_q, h_q, d_k].
      k_cache: [pages, page, 1, d_k], in q's dtype.
      indices: i32 [b, s_q, topk].
      topk_length: i32 [b, s_q]; clamped to 0..topk.
      extra_k_cache: [pages, page, 1, d_k], with its own number and size of pages.
      extra_indices, extra_topk_length: as indices and topk_length, for the extra cache.
      attn_sink: f32 [1 or b, h_q]. It multiplies out by sigmoid(lse - sink), and is not in lse.
      head_dim_v, softmax_scale: as of `flash_mla_with_kvcache`.

    Returns:
      out [b, s_q, h_q, head_dim_v] in q's dtype and lse f32 [b, h_q, s_q]: 0 and +inf for a query
      with no valid token.
    """
    b, s_q, h_q, d_k = q.shape
    sources = [_list_of_tokens(k_cache, indices, topk_length)]
    if extra_k_cache is not None:
        sources.append(_list_of_tokens(extra_k_cache, extra_indices, extra_topk_length))
    sink = None
    if attn_sink is not None:
        sink = jnp.broadcast_to(attn_sink[:, None], (b, s_q, h_q)).reshape(b * s_q, 1, h_q)
    out, lse = attend(
        q.reshape(b * s_q, 1, h_q, d_k),
        sources,
        sink,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
    )
    lse = lse.reshape(b, s_q, h_q).transpose(0, 2, 1)
    return out.reshape(b, s_q, h_q, head_dim_v), lse


def _list_of_tokens(k_cache: jax.Array, indices: Any, length: Any) -> Source:
    """A list for each query, all queries in one axis."""
    pages, page, _, d_k = k_cache.shape
    topk = indices.shape[2]
    slots = pages * page
    rows = k_cache.reshape(slots, d_k)
    last = min(slots - 1, _INT32_MAX) if isinstance(slots, int) else slots - 1
    listed = jnp.arange(topk, dtype=jnp.int32)[None, None] < length[..., None]
    valid = listed & (indices >= 0) & (indices <= last)
    slot = jnp.where(valid, indices, -1).reshape(-1, topk)

    def read(arrays: tuple[jax.Array, ...], units: jax.Array) -> tuple[jax.Array, jax.Array]:
        (slot,) = arrays
        if units.shape != (topk,):
            slot = jnp.take(slot, units, axis=1, mode="fill", fill_value=-1)
        seen = slot >= 0
        kv = rows.at[jnp.maximum(slot, 0)].get(mode="promise_in_bounds")
        # Slots that nothing names may hold NaN, and 0 * NaN is NaN.
        kv = jnp.where(seen[..., None], kv, 0)
        return kv[:, None], seen[:, None]

    needed = jnp.clip(length, 0, topk).reshape(-1)
    return Source((slot,), needed, topk if pages != 0 else 0, 1, read)
