"""The reference of the tile schedule of a decode step."""

from typing import Any

import jax
import jax.numpy as jnp

from .._constants import (
    ALIGNED_TOLERANCE,
    JOIN_COST,
    JOIN_ROWS,
    JOINED_SPLITS,
    MAX_JOIN_ROWS,
    MAX_JOIN_WORK,
    MAX_MIN_PART,
    SEQUENCE_OVERHEAD,
    TILE_TOKENS,
    TOTAL_COST_LIMIT,
)
from ._math import ceil_div


def schedule(cache_seqlens: jax.Array, *, num_parts: int, rows: int) -> tuple[jax.Array, ...]:
    """Cuts the work of all sequences into `num_parts` runs of equal cost.

    Put the sequences on a line, each as SEQUENCE_OVERHEAD units and then one unit a tile. Part p
    gets the `payload` units from p * payload on. A cut inside a sequence's overhead moves to the
    sequence's start.

    Parts may instead be aligned to the sequences: each part holds equally many whole sequences, or
    each sequence has equally many parts. Then fewer sequences are split, which saves time, because
    partial results must be put together. Aligned parts are used if the largest of them exceeds
    `payload` by at most 1 / ALIGNED_TOLERANCE. If a sequence has two parts, the first one gets one
    tile more, so that the second one's result is ready when the first one ends.

    Args:
      cache_seqlens: i32 [b], tokens of each sequence; negative ones count as 0.
      num_parts: the number of runs. The last ones are empty if the work is small (JOIN_COST).
      rows: query rows of a sequence over all KV heads, s_q * h_q.

    Returns:
      part_bounds: i32 [num_parts + 1, 2], (sequence, tile) at which each part starts. (i, 0) lies
        before sequence i, (b, 0) after the last one.
      first_part: i32 [b], the part that makes a sequence's first split.
      num_splits: i32 [b + 1], prefix sum of the splits of each sequence; each has at least one.
    """
    b = cache_seqlens.shape[0]
    length = jnp.maximum(cache_seqlens, 0)
    tiles = ceil_div(length, TILE_TOKENS)
    tiles = jnp.minimum(tiles, TOTAL_COST_LIMIT // b - SEQUENCE_OVERHEAD)
    end = jnp.cumsum(tiles + SEQUENCE_OVERHEAD, dtype=jnp.int32)
    total = end[-1]
    smallest = _smallest_part(total, rows)
    payload = jnp.maximum(ceil_div(total, num_parts), smallest)

    sequences = -(-b // num_parts)  # whole sequences in an aligned part
    # Aligned parts of a sequence; more than one only if `sequences` is 1.
    parts = jnp.maximum(jnp.asarray(num_parts // b, jnp.int32), 1)
    last = jnp.minimum(jnp.arange(1, num_parts + 1, dtype=jnp.int32) * sequences, b) - 1
    whole = jnp.max(jnp.diff(end[last], prepend=0))
    largest = jnp.where(parts == 1, whole, jnp.max(ceil_div(tiles, parts)))
    aligned = largest - payload <= payload // ALIGNED_TOLERANCE
    tiles_a_split = jnp.maximum(ceil_div(tiles, parts), smallest)
    tiles_a_split += (parts == JOINED_SPLITS).astype(jnp.int32)
    return tuple(
        jnp.where(aligned, ours, theirs).astype(jnp.int32)
        for ours, theirs in zip(
            _aligned_parts(tiles, tiles_a_split, sequences, parts, num_parts=num_parts),
            _equal_parts(tiles, end, payload, num_parts),
            strict=True,
        )
    )


def _smallest_part(total: jax.Array, rows: int) -> jax.Array:
    """The minimum size of a part, in tiles, if all work costs `total`; see JOIN_COST."""
    work = jnp.minimum(total, MAX_JOIN_WORK) * min(rows + JOIN_ROWS, MAX_JOIN_ROWS)
    tiles = jnp.arange(1, MAX_MIN_PART, dtype=jnp.int32)
    return 1 + jnp.sum(JOIN_COST * tiles**2 < work, dtype=jnp.int32)


def fixed_schedule(
    cache_seqlens: jax.Array, *, num_parts: int, fixed_split_size: int
) -> tuple[jax.Array, ...]:
    """Cuts each sequence into splits of `fixed_split_size` tokens, whatever else is in the batch.

    Each sequence has num_parts / b parts of its own. Those past its end are empty. The last split
    of a longer sequence holds all tokens that are left.

    Args:
      cache_seqlens: i32 [b], tokens of each sequence; negative ones count as 0.
      num_parts: a multiple of b.
      fixed_split_size: tokens, a multiple of TILE_TOKENS.

    Returns:
      part_bounds, first_part, num_splits: as of `schedule`.
    """
    tiles = ceil_div(jnp.maximum(cache_seqlens, 0), TILE_TOKENS)
    tiles_a_split = jnp.full_like(tiles, fixed_split_size // TILE_TOKENS)
    parts = num_parts // tiles.shape[0]  # of a sequence
    return _aligned_parts(tiles, tiles_a_split, 1, parts, num_parts=num_parts)


def _equal_parts(
    tiles: jax.Array, end: jax.Array, payload: jax.Array, num_parts: int
) -> tuple[jax.Array, ...]:
    """The schedule of parts of `payload` units each; `end`: where each sequence ends."""
    b = tiles.shape[0]
    start = end - tiles - SEQUENCE_OVERHEAD
    # An empty sequence has only its overhead. Its one split belongs to the part in which that
    # overhead ends.
    first_part = jnp.minimum(start + SEQUENCE_OVERHEAD, end - 1) // payload
    splits = (end - 1) // payload - first_part + 1

    cut = jnp.arange(num_parts + 1, dtype=jnp.int32) * payload
    # Compare with every end: unlike searchsorted, this works for a symbolic batch (jax.export).
    sequence = jnp.sum(end[None] <= cut[:, None], axis=1, dtype=jnp.int32)
    tile = cut - start[jnp.minimum(sequence, b - 1)] - SEQUENCE_OVERHEAD
    past_end = (sequence == b) | (jnp.arange(num_parts + 1) == num_parts)
    part_bounds = jnp.stack(
        [jnp.where(past_end, b, sequence), jnp.where(past_end, 0, jnp.maximum(tile, 0))], axis=1
    )
    return part_bounds, first_part, _prefix_sum(splits)


def _aligned_parts(
    tiles: jax.Array, tiles_a_split: jax.Array, sequences: Any, parts: Any, *, num_parts: int
) -> tuple[jax.Array, ...]:
    """The schedule of `sequences` whole sequences a part, or of `parts` parts a sequence."""
    b = tiles.shape[0]
    splits = jnp.clip(ceil_div(tiles, tiles_a_split), 1, parts)
    part = jnp.arange(num_parts + 1, dtype=jnp.int32)
    sequence, split = jnp.minimum(part // parts * sequences, b), part % parts
    inside = jnp.minimum(sequence, b - 1)
    # A short sequence needs fewer parts than it has. Those past its end are empty.
    empty = (split >= splits[inside]) | (sequence == b)
    part_bounds = jnp.stack(
        [
            jnp.where(empty, jnp.minimum(sequence + 1, b), sequence),
            jnp.where(empty, 0, split * tiles_a_split[inside]),
        ],
        axis=1,
    )
    first_part = jnp.arange(b, dtype=jnp.int32) // sequences * parts
    return part_bounds, first_part, _prefix_sum(splits)


def _prefix_sum(splits: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.zeros_like(splits[:1]), jnp.cumsum(splits, dtype=jnp.int32)])
