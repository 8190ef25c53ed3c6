"""The reference of decode: attention of a few queries over a paged cache."""

from typing import Any

import jax
import jax.numpy as jnp

from ._math import ceil_div

# Decode reads the cache in chunks: large enough to keep a machine busy, small enough to bound the
# temporary memory.
_CHUNK_TOKENS = 1024  # of each sequence
_CHUNK_ELEMENTS = 2**25  # of K in float32
_SYMBOLIC_BATCH = 128  # assumed for a symbolic batch (jax.export) when the chunk's size is chosen


def _size_or(dim: Any, default: int) -> int:
    """A dimension, or `default` if it is symbolic."""
    return dim if isinstance(dim, int) else default


def decode(
    q: jax.Array,
    k_cache: jax.Array,
    block_table: jax.Array,
    cache_seqlens: jax.Array,
    causal_offset: jax.Array | None = None,
    *,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q over a paged cache, float32 throughout.

    Online softmax (https://arxiv.org/abs/1805.02867) over chunks of pages, for all sequences at
    once, with a running maximum and sum, up to the end of the longest sequence. So the temporary
    memory does not grow with the table or the cache.

    Args:
      q: [b, s_q, h_q, d_k].
      k_cache: [pages, page, h_kv, d_k], in q's dtype.
      block_table: i32 [b, mb].
      cache_seqlens: i32 [b].
      causal_offset: i32 [b], or None for 0.
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

    out, lse = _attend(
        _rows_by_kv_head(q, h_kv).astype(jnp.float32) * softmax_scale,
        k_cache,
        pages_to_read,
        length,
        jnp.repeat(visible, h_q // h_kv, axis=1),
        head_dim_v,
    )
    out = jnp.where(unreadable[:, None, None, None], jnp.nan, out)
    lse = jnp.where(unreadable[:, None, None], jnp.nan, lse)
    out = out.reshape(b, h_kv, s_q, -1, head_dim_v).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(b, h_kv, s_q, -1).transpose(0, 1, 3, 2)
    return out.reshape(b, s_q, h_q, head_dim_v).astype(q.dtype), lse.reshape(b, h_q, s_q)


def _add_offset(visible: jax.Array, offset: jax.Array, length: jax.Array) -> jax.Array:
    """visible + offset clipped to [0, length], without an int32 overflow; visible <= length."""
    return jnp.maximum(visible + jnp.clip(offset, -length, length - visible), 0)


def _rows_by_kv_head(q: jax.Array, h_kv: int) -> jax.Array:
    """[b, s_q, h_q, d] -> [b, h_kv, s_q * h_q / h_kv, d], the queries that share a KV head."""
    b, s_q, h_q, d = q.shape
    return q.reshape(b, s_q, h_kv, h_q // h_kv, d).transpose(0, 2, 1, 3, 4).reshape(b, h_kv, -1, d)


def _attend(
    q: jax.Array,
    k_cache: jax.Array,
    page_ids: jax.Array,
    length: jax.Array,
    visible: jax.Array,
    head_dim_v: int,
) -> tuple[jax.Array, jax.Array]:
    """Online softmax over chunks of pages.

    Args:
      q: f32 [b, h_kv, rows, d_k], scaled.
      page_ids: i32 [b, mb], -1 where there is nothing to read.
      visible: i32 [b, rows], the tokens that each row sees.

    Returns:
      out f32 [b, h_kv, rows, head_dim_v], lse f32 [b, h_kv, rows]: 0 and +inf where a row sees
      no token.
    """
    b, h_kv, rows, d_k = q.shape
    page = k_cache.shape[1]
    mb = page_ids.shape[1]
    if mb == 0 or k_cache.shape[0] == 0:
        return jnp.zeros_like(q[..., :head_dim_v]), jnp.full_like(q[..., 0], jnp.inf)
    elements = _size_or(b, _SYMBOLIC_BATCH) * page * h_kv * d_k  # of one page of each sequence
    step = min(_CHUNK_TOKENS // page, _CHUNK_ELEMENTS // elements)  # pages a chunk
    step = max(1, min(_size_or(mb, step), step))

    def attend_chunk(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        maximum, total, acc = state
        index = i * step + jnp.arange(step, dtype=jnp.int32)
        ids = jnp.take(page_ids, index, axis=1, mode="fill", fill_value=-1)
        token = index[:, None] * page + jnp.arange(page, dtype=jnp.int32)[None]
        token = token.reshape(1, -1)
        live = jnp.repeat(ids >= 0, page, axis=1) & (token < length[:, None])
        # Gather pages by their id. A flat token index may not fit into int32.
        kv = k_cache[jnp.maximum(ids, 0)].reshape(b, step * page, h_kv, d_k)
        # Unused slots may hold NaN, and 0 * NaN is NaN. So make them 0 before any product.
        kv = jnp.where(live[:, :, None, None], kv, 0).astype(jnp.float32)

        scores = jnp.einsum("bhrd,bthd->bhrt", q, kv, precision="highest")
        seen = live[:, None, :] & (token[None] < visible[:, :, None])
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        finite = jnp.where(new_maximum == -jnp.inf, 0, new_maximum)
        weights = jnp.exp(scores - finite[..., None])
        fade = jnp.exp(maximum - finite)
        values = jnp.einsum("bhrt,bthd->bhrd", weights, kv[..., :head_dim_v], precision="highest")
        return new_maximum, total * fade + weights.sum(axis=-1), acc * fade[..., None] + values

    one_a_row = q[..., 0]
    state = (
        jnp.full_like(one_a_row, -jnp.inf),
        jnp.zeros_like(one_a_row),
        jnp.zeros_like(q[..., :head_dim_v]),
    )
    last = jnp.max(jnp.where(page_ids >= 0, jnp.arange(1, mb + 1, dtype=jnp.int32)[None], 0))
    chunks = ceil_div(last, step)
    maximum, total, acc = jax.lax.fori_loop(jnp.int32(0), chunks, attend_chunk, state)
    empty = total == 0
    out = jnp.where(empty[..., None], 0, acc / jnp.where(empty, 1, total)[..., None])
    return out, jnp.where(empty, jnp.inf, maximum + jnp.log(total))
