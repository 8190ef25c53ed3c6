"""The ops in pure JAX: what the kernels are tested against, and what runs where they cannot.

Each function takes the arguments of the op of the same name and gives the same results, down to
empty sequences, garbage in unused block-table entries and NaN in unused slots of a page. Shapes:

  b         sequences                     s_q      queries a sequence
  h_q, h_kv query heads, KV heads         d_k, d_v head dims of K and of V (V: the first d_v of K)
  pages     pages in the pool             page     tokens a page
  mb        block-table entries a sequence
"""

import jax
import jax.numpy as jnp

TILE_TOKENS = 64
"""The schedule counts in tiles of this many tokens, whatever the page size."""

REQUEST_OVERHEAD = 2
"""What a request costs beyond its own tiles, in tiles (its prologue and epilogue)."""

JOIN_COST, JOIN_ROWS = 4096, 16
"""Smaller parts end sooner, but leave more partial results to be joined: with W units of work and
parts of t, W / t of them, each of which costs as much as its query rows and JOIN_ROWS more. As
measured, t is best where JOIN_COST * t**2 is W * (rows + JOIN_ROWS)."""

LARGEST_MIN_PART = 8
"""No part is made larger than that for it, in tiles; beyond it the number of parts decides."""

ALIGNED_TOLERANCE = 16
"""Parts are aligned to the requests where that makes the largest one at most a 16th larger."""

JOINED_SPLITS = 2
"""So many splits the decode kernel joins by itself: the block of the first one adds the other."""

_COST_LIMIT = 2**30  # the sum of all costs stays below, so that int32 serves throughout
# What decode reads at a time: enough to keep a machine busy, and a bound on temporary memory.
_CHUNK_TOKENS = 1024  # of each sequence
_CHUNK_ELEMENTS = 2**25  # of K in float32
_SYMBOLIC_BATCH = 128  # what a batch counts for in that bound where jax.export leaves it open


def schedule(cache_seqlens: jax.Array, *, num_parts: int, rows: int) -> tuple[jax.Array, ...]:
    """Cuts the work of all requests into `num_parts` runs of equal cost.

    The requests stand on a line, each as REQUEST_OVERHEAD units and then one unit a tile; part p
    gets the units from p * payload on. A cut inside a request's overhead moves to its start.

    If parts aligned to the requests, of equally many whole requests each or equally many parts a
    request, make the largest one at most 1 / ALIGNED_TOLERANCE larger than that, they are taken:
    fewer requests are split, and joining partial results costs more. Of two parts a request the
    first one gets a tile more, so that it finds the other one's result when it ends.

    Args:
      cache_seqlens: i32 [b], tokens of each sequence; negative ones count as 0.
      num_parts: the number of runs; the last ones are empty where the work is small (JOIN_COST).
      rows: query rows of a sequence, those of all KV heads, s_q * h_q.

    Returns:
      part_bounds: i32 [num_parts + 1, 2], (request, tile) at which each part starts. (i, 0) lies
        before request i, (b, 0) behind the last one.
      first_part: i32 [b], the part that makes a request's first split.
      num_splits: i32 [b + 1], prefix sum of the splits of each request; each has at least one.
    """
    b = cache_seqlens.shape[0]
    length = jnp.maximum(cache_seqlens, 0)
    tiles = _ceil_div(length, TILE_TOKENS)
    tiles = jnp.minimum(tiles, _COST_LIMIT // b - REQUEST_OVERHEAD)
    end = jnp.cumsum(tiles + REQUEST_OVERHEAD, dtype=jnp.int32)
    start = end - tiles - REQUEST_OVERHEAD
    total = end[-1]
    smallest = _smallest_part(total, rows)
    payload = jnp.maximum(_ceil_div(total, num_parts), smallest)

    # An empty request ends with its overhead, so that its one split belongs to the part in which
    # that overhead ends.
    first_part = jnp.minimum(start + REQUEST_OVERHEAD, end - 1) // payload
    splits = (end - 1) // payload - first_part + 1
    num_splits = jnp.concatenate(
        [jnp.zeros_like(end[:1]), jnp.cumsum(splits, dtype=jnp.int32)], axis=0
    )

    cut = jnp.arange(num_parts + 1, dtype=jnp.int32) * payload
    # Comparing with every end is a search that also serves a symbolic batch (jax.export).
    request = jnp.sum(end[None] <= cut[:, None], axis=1, dtype=jnp.int32)
    tile = cut - start[jnp.minimum(request, b - 1)] - REQUEST_OVERHEAD
    behind = (request == b) | (jnp.arange(num_parts + 1) == num_parts)
    part_bounds = jnp.stack(
        [jnp.where(behind, b, request), jnp.where(behind, 0, jnp.maximum(tile, 0))], axis=1
    )

    requests = -(-b // num_parts)  # of an aligned part, or
    parts = jnp.maximum(jnp.asarray(num_parts // b, jnp.int32), 1)  # aligned parts of a request
    last = jnp.minimum(jnp.arange(1, num_parts + 1, dtype=jnp.int32) * requests, b) - 1
    whole = jnp.max(jnp.diff(end[last], prepend=0))
    largest = jnp.where(parts == 1, whole, jnp.max(_ceil_div(tiles, parts)))
    aligned = largest - payload <= payload // ALIGNED_TOLERANCE
    tiles_a_split = jnp.maximum(_ceil_div(tiles, parts), smallest)
    tiles_a_split += (parts == JOINED_SPLITS).astype(jnp.int32)
    equal = part_bounds, first_part, num_splits
    return tuple(
        jnp.where(aligned, ours, theirs).astype(jnp.int32)
        for ours, theirs in zip(
            _aligned_parts(tiles, tiles_a_split, requests, parts, num_parts=num_parts),
            equal,
            strict=True,
        )
    )


def _smallest_part(total, rows):
    """The tiles of the smallest part that is worth its partial results, where all cost `total`."""
    work = jnp.minimum(total, 2**17) * min(rows + JOIN_ROWS, 2**13)  # more would change nothing
    tiles = jnp.arange(1, LARGEST_MIN_PART, dtype=jnp.int32)
    return 1 + jnp.sum(JOIN_COST * tiles**2 < work, dtype=jnp.int32)


def fixed_schedule(
    cache_seqlens: jax.Array, *, num_parts: int, fixed_split_size: int
) -> tuple[jax.Array, ...]:
    """Cuts each request into splits of `fixed_split_size` tokens, whatever else is in the batch.

    Each has num_parts / b parts of its own, those behind its end empty. The last split of a
    request that is longer than they hold has all that is left.

    Args:
      cache_seqlens: i32 [b], tokens of each sequence; negative ones count as 0.
      num_parts: a multiple of b.
      fixed_split_size: tokens, a multiple of TILE_TOKENS.

    Returns:
      part_bounds, first_part, num_splits: as of `schedule`.
    """
    tiles = _ceil_div(jnp.maximum(cache_seqlens, 0), TILE_TOKENS)
    tiles_a_split = jnp.full_like(tiles, fixed_split_size // TILE_TOKENS)
    parts = num_parts // tiles.shape[0]  # of a request
    return _aligned_parts(tiles, tiles_a_split, 1, parts, num_parts=num_parts)


def _aligned_parts(tiles, tiles_a_split, requests, parts, *, num_parts):
    """The schedule of parts that hold `requests` whole requests, or `parts` parts a request."""
    b = tiles.shape[0]
    splits = jnp.clip(_ceil_div(tiles, tiles_a_split), 1, parts)
    part = jnp.arange(num_parts + 1, dtype=jnp.int32)
    request, split = jnp.minimum(part // parts * requests, b), part % parts
    inside = jnp.minimum(request, b - 1)
    # The parts that a short request leaves over are empty.
    empty = (split >= splits[inside]) | (request == b)
    part_bounds = jnp.stack(
        [
            jnp.where(empty, jnp.minimum(request + 1, b), request),
            jnp.where(empty, 0, split * tiles_a_split[inside]),
        ],
        axis=1,
    )
    first_part = jnp.arange(b, dtype=jnp.int32) // requests * parts
    num_splits = jnp.concatenate([jnp.zeros_like(splits[:1]), jnp.cumsum(splits, dtype=jnp.int32)])
    return part_bounds, first_part, num_splits


def _ceil_div(x, divisor):
    """Without the sum that could overflow."""
    return x // divisor + (x % divisor > 0).astype(x.dtype)


def _size(dim, otherwise: int) -> int:
    """A dimension where it is known, `otherwise` where it is symbolic."""
    return dim if isinstance(dim, int) else otherwise


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

    Walks over the pages of all sequences at once with a running maximum and sum, as far as the
    longest sequence reaches: the temporary memory does not grow with the table or the cache.

    Args:
      q: [b, s_q, h_q, d_k].
      k_cache: [pages, page, h_kv, d_k], in q's dtype.
      block_table: i32 [b, mb].
      cache_seqlens: i32 [b].
      causal_offset: i32 [b], or None for 0.

    Returns:
      out [b, s_q, h_q, head_dim_v] in q's dtype and lse f32 [b, h_q, s_q].
    """
    b, s_q, h_q, d_k = q.shape
    pages, page, h_kv, _ = k_cache.shape
    mb = block_table.shape[1]
    length = jnp.maximum(cache_seqlens, 0)
    needed = _ceil_div(length, page)  # pages
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


def _add_offset(visible, offset, length):
    """visible + offset within [0, length], for visible <= length, without an int32 overflow."""
    return jnp.maximum(visible + jnp.clip(offset, -length, length - visible), 0)


def _rows_by_kv_head(q, h_kv):
    """[b, s_q, h_q, d] -> [b, h_kv, s_q * h_q / h_kv, d], the queries that share a KV head."""
    b, s_q, h_q, d = q.shape
    return q.reshape(b, s_q, h_kv, h_q // h_kv, d).transpose(0, 2, 1, 3, 4).reshape(b, h_kv, -1, d)


def _attend(q, k_cache, page_ids, length, visible, head_dim_v):
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
    elements = _size(b, _SYMBOLIC_BATCH) * page * h_kv * d_k  # of one page of each sequence
    step = min(_CHUNK_TOKENS // page, _CHUNK_ELEMENTS // elements)  # pages a chunk
    step = max(1, min(_size(mb, step), step))

    def attend_chunk(i, state):
        maximum, total, acc = state
        index = i * step + jnp.arange(step, dtype=jnp.int32)
        ids = jnp.take(page_ids, index, axis=1, mode="fill", fill_value=-1)
        token = index[:, None] * page + jnp.arange(page, dtype=jnp.int32)[None]
        token = token.reshape(1, -1)
        live = jnp.repeat(ids >= 0, page, axis=1) & (token < length[:, None])
        # Pages are gathered by their id, never by a flat token index, which int32 may not hold.
        kv = k_cache[jnp.maximum(ids, 0)].reshape(b, step * page, h_kv, d_k)
        # Unused slots may hold NaN, and 0 * NaN is NaN: they become 0 before any product.
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
    chunks = _ceil_div(last, step)
    maximum, total, acc = jax.lax.fori_loop(jnp.int32(0), chunks, attend_chunk, state)
    empty = total == 0
    out = jnp.where(empty[..., None], 0, acc / jnp.where(empty, 1, total)[..., None])
    return out, jnp.where(empty, jnp.inf, maximum + jnp.log(total))


def append(k_cache: jax.Array, new_kv: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Writes new_kv [tokens, h_kv, d_k] into slots i32 [tokens] of k_cache.

    A slot outside the pool writes nothing. XLA keeps the update in place where k_cache is dead
    afterwards.
    """
    pages, page = k_cache.shape[:2]
    # A negative index would count from the end: it becomes one behind the pool, which is dropped.
    page_id = jnp.where(slot_mapping < 0, pages, slot_mapping // page)
    return k_cache.at[page_id, slot_mapping % page].set(new_kv, mode="drop")
