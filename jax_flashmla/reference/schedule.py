"""The tile schedule of a decode step, in plain JAX."""

import jax
import jax.numpy as jnp

from ._math import ceil_div

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
    tiles = ceil_div(length, TILE_TOKENS)
    tiles = jnp.minimum(tiles, _COST_LIMIT // b - REQUEST_OVERHEAD)
    end = jnp.cumsum(tiles + REQUEST_OVERHEAD, dtype=jnp.int32)
    start = end - tiles - REQUEST_OVERHEAD
    total = end[-1]
    smallest = _smallest_part(total, rows)
    payload = jnp.maximum(ceil_div(total, num_parts), smallest)

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
    largest = jnp.where(parts == 1, whole, jnp.max(ceil_div(tiles, parts)))
    aligned = largest - payload <= payload // ALIGNED_TOLERANCE
    tiles_a_split = jnp.maximum(ceil_div(tiles, parts), smallest)
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
    tiles = ceil_div(jnp.maximum(cache_seqlens, 0), TILE_TOKENS)
    tiles_a_split = jnp.full_like(tiles, fixed_split_size // TILE_TOKENS)
    parts = num_parts // tiles.shape[0]  # of a request
    return _aligned_parts(tiles, tiles_a_split, 1, parts, num_parts=num_parts)


def _aligned_parts(tiles, tiles_a_split, requests, parts, *, num_parts):
    """The schedule of parts that hold `requests` whole requests, or `parts` parts a request."""
    b = tiles.shape[0]
    splits = jnp.clip(ceil_div(tiles, tiles_a_split), 1, parts)
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
