"""The reference of decode: attention of a few queries over a paged cache."""

import jax
import jax.numpy as jnp

from ._attention import Source, attend
from ._math import ceil_div


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    causal_offset: jax.Array | None = None,
    attn_sink: jax.Array | None = None,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over a paged cache.

    The cache is read in chunks (see `_attention`), so that the temporary memory does not grow with
    the table or the cache.

    Args:
      q: [b, s_q, h_q, d_k].
      k_cache: [pages, page, h_kv, d_k], in q's dtype.
      block_table: i32 [b, mb].
      cache_seqlens: i32 [b].
      causal_offset: i32 [b], or None for 0.
      attn_sink: f32 [1 or b, h_q]. It multiplies out by sigmoid(lse - sink), and is not in lse.
      head_dim_v, softmax_scale, causal: as of `flash_mla_with_kvcache`.

    Returns:
      out [b, s_q, h_q, head_dim_v] in q's dtype and lse f32 [b, h_q, s_q].
    """
    b, s_q, h_q, d_k = q.shape
    pages, page, h_kv, _ = k_cache.shape
    mb = block_table.shape[1]
    length = jnp.maximum(cache_seqlens, 0)
    needed = ceil_div(length, page)  # pages
    in_pool = (block_table >= 0) & (block_table < pages)
    used = jnp.arange(mb, dtype=jnp.int32)[None] < needed[:, None]
    unreadable = (needed > mb) | jnp.any(used & ~in_pool, axis=1)
    pages_to_read = jnp.where(used & in_pool, block_table, -1)

    visible = jnp.broadcast_to(length[:, None], (b, s_q))  # tokens that each query sees
    if causal:
        visible = visible + (jnp.arange(s_q, dtype=jnp.int32) - (s_q - 1))[None]
        if causal_offset is not None:
            visible = _add_offset(visible, causal_offset[:, None], length[:, None])

    sink = None
    if attn_sink is not None:
        sink = attn_sink.reshape(-1, h_kv, 1, h_q // h_kv)
        sink = jnp.broadcast_to(sink, (b, h_kv, s_q, h_q // h_kv)).reshape(b, h_kv, -1)
    out, lse = attend(
        _rows_by_kv_head(q, h_kv),
        [_pages(k_cache, pages_to_read, length, jnp.repeat(visible, h_q // h_kv, axis=1))],
        sink,
        head_dim_v=head_dim_v,
        softmax_scale=softmax_scale,
    )
    out = jnp.where(unreadable[:, None, None, None], jnp.nan, out)
    lse = jnp.where(unreadable[:, None, None], jnp.nan, lse)
    out = out.reshape(b, h_kv, s_q, -1, head_dim_v).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(b, h_kv, s_q, -1).transpose(0, 1, 3, 2)
    return out.reshape(b, s_q, h_q, head_dim_v), lse.reshape(b, h_q, s_q)


def _add_offset(visible: jax.Array, offset: jax.Array, length: jax.Array) -> jax.Array:
    """visible + offset clipped to [0, length], without an int32 overflow; visible <= length."""
    return jnp.maximum(visible + jnp.clip(offset, -length, length - visible), 0)


def _rows_by_kv_head(q: jax.Array, h_kv: int) -> jax.Array:
    """[b, s_q, h_q, d] -> [b, h_kv, s_q * h_q / h_kv, d], the queries that share a KV head."""
    b, s_q, h_q, d = q.shape
    return q.reshape(b, s_q, h_kv, h_q // h_kv, d).transpose(0, 2, 1, 3, 4).reshape(b, h_kv, -1, d)


def _pages(
    k_cache: jax.Array, page_ids: jax.Array, length: jax.Array, visible: jax.Array
) -> Source:
    """The tokens of pages.

    Args:
      k_cache: [pages, page, h_kv, d_k].
      page_ids: i32 [b, mb], -1 where there is nothing to read.
      length: i32 [b], tokens of each sequence.
      visible: i32 [b, rows], the tokens that each row sees.
    """
    pages, page, h_kv, d_k = k_cache.shape
    mb = page_ids.shape[1]

    def read(arrays: tuple[jax.Array, ...], units: jax.Array) -> tuple[jax.Array, jax.Array]:
        page_ids, length, visible = arrays
        ids = page_ids
        if units.shape != (mb,):
            ids = jnp.take(page_ids, units, axis=1, mode="fill", fill_value=-1)
        token = units[:, None] * page + jnp.arange(page, dtype=jnp.int32)[None]
        token = token.reshape(1, -1)
        live = jnp.repeat(ids >= 0, page, axis=1) & (token < length[:, None])
        # Gather pages by their id. A flat token index may not fit into int32.
        kv = k_cache.at[jnp.maximum(ids, 0)].get(mode="promise_in_bounds")
        kv = kv.reshape(ids.shape[0], -1, h_kv, d_k)
        # Unused slots may hold NaN, and 0 * NaN is NaN. So make them 0 before any product.
        kv = jnp.where(live[:, :, None, None], kv, 0)
        return kv.swapaxes(1, 2), live[:, None] & (token[None] < visible[:, :, None])

    last = jnp.where(page_ids >= 0, jnp.arange(1, mb + 1, dtype=jnp.int32)[None], 0)
    needed = jnp.max(last, axis=1, initial=0)
    return Source((page_ids, length, visible), needed, mb if pages != 0 else 0, page, read)
