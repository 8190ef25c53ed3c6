"""Softmax attention of a few queries over many tokens, in chunks that bound the temporary memory.

Shapes: those of the package, and
  rows    queries that share a KV head, s_q * h_q / h_kv
  width   the most tokens that a sequence can have
  tokens  of a chunk, for each sequence
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._math import ceil_div

# A chunk holds some tokens of some sequences. It should keep a GPU busy, and no more.
_CHUNK_BYTES = 2**26  # of its K, scores and weights
# Tokens of a sequence in a chunk, at most. A loop over chunks of the same sequences ends with the
# longest of them, and a GPU waits for its host in every step of it. So most sequences are one
# chunk. Groups of them are a loop too, whose length is known. The price: short sequences in wide
# tables read up to this many tokens.
_MAX_CHUNK_TOKENS = 32768
_SYMBOLIC_CHUNK_TOKENS = 4096  # the same where the batch (then in one group) or width is symbolic


@dataclasses.dataclass(frozen=True)
class Source:
    """Tokens that the queries attend to.

    Attributes:
      arrays: what `read` needs of each sequence, each with the batch as axis 0.
      needed: i32 [b], how many units of each sequence must be read, counted from its first.
      units: the most units of a sequence. A unit is a page, or a token.
      unit_tokens: tokens in a unit.
      read: (arrays, units) -> (K [b, h_kv, tokens, d_k], which of it is seen: bool
        [b, 1 or rows, tokens]). `units` i32 [n] counts from 0; those past the last hold nothing. K
        is finite where no row sees it, because 0 * NaN is NaN.
    """

    arrays: tuple[jax.Array, ...]
    needed: jax.Array
    units: Any
    unit_tokens: int
    read: Callable[[tuple[jax.Array, ...], jax.Array], tuple[jax.Array, jax.Array]]


def attend(
    q: jax.Array,
    sources: Sequence[Source],
    sink: jax.Array | None,
    *,
    head_dim_v: int,
    softmax_scale: float,
) -> tuple[jax.Array, jax.Array]:
    """One softmax over the tokens of all sources.

    Online softmax (https://arxiv.org/abs/1805.02867) over chunks, with a running maximum and sum.
    Sums and the softmax are float32. Products of 16-bit values are exact, and the softmax's weights
    are rounded to q's dtype for their product with V. With float32 inputs all is float32.

    Args:
      q: [b, h_kv, rows, d_k].
      sources: at least one.
      sink: f32 [b, h_kv, rows], or None. It multiplies out by sigmoid(lse - sink).
      head_dim_v: V is the first head_dim_v columns of K.
      softmax_scale: of the scores.

    Returns:
      out [b, h_kv, rows, head_dim_v] in q's dtype, lse f32 [b, h_kv, rows]: 0 and +inf where a row
      sees no token.
    """
    b, h_kv, rows, d_k = q.shape
    token_bytes = h_kv * (d_k * q.dtype.itemsize + rows * (4 + q.dtype.itemsize))
    sources = [source for source in sources if source.units != 0]
    group, steps = _chunk_sizes(b, _CHUNK_BYTES // token_bytes, sources)

    def attend_group(
        q: jax.Array, sink: jax.Array | None, each: Sequence[tuple[Any, ...]]
    ) -> tuple[jax.Array, jax.Array]:
        state: tuple[jax.Array, ...] | None = None
        for source, step, (needed, arrays) in zip(sources, steps, each, strict=True):
            state = _add_source(
                state, q, source.read, arrays, needed, step, source.units, softmax_scale
            )
        return _finish(q, state, sink, head_dim_v)

    each = [(source.needed, source.arrays) for source in sources]
    if group == b:
        return attend_group(q, sink, each)

    # Groups of sequences. The last one begins earlier if it would not fit: slices are clamped. Then
    # it computes a few sequences again.
    def body(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = i * group
        operands = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, first, group), (q, sink, each)
        )
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(result, part, first, 0)
            for result, part in zip(results, attend_group(*operands), strict=True)
        )

    results = (jnp.zeros_like(q[..., :head_dim_v]), jnp.zeros_like(q[..., 0], jnp.float32))
    out, lse = jax.lax.fori_loop(0, -(-b // group), body, results)
    return out, lse


def _chunk_sizes(b: Any, tokens: int, sources: Sequence[Source]) -> tuple[Any, list[int]]:
    """How many sequences a chunk has, and how many units of each source; `tokens` is the budget."""
    steps = []
    for source in sources:
        known = isinstance(b, int) and isinstance(source.units, int)
        most = min(tokens, _MAX_CHUNK_TOKENS if known else _SYMBOLIC_CHUNK_TOKENS)
        step = max(1, most // source.unit_tokens)
        steps.append(_even(source.units, step) if isinstance(source.units, int) else step)
    if not isinstance(b, int) or not sources:
        return b, steps
    longest = sum(s * source.unit_tokens for s, source in zip(steps, sources, strict=True))
    group = _even(b, max(1, tokens // longest))
    return group, steps


def _even(total: int, most: int) -> int:
    """The size of parts of `total`, all about equal and at most `most`."""
    parts = -(-total // most)
    return -(-total // max(parts, 1))


def _add_source(
    state: tuple[jax.Array, ...] | None,
    q: jax.Array,
    read: Callable[..., tuple[jax.Array, jax.Array]],
    arrays: tuple[jax.Array, ...],
    needed: jax.Array,
    step: int,
    units: Any,
    softmax_scale: float,
) -> tuple[jax.Array, ...]:
    """The state (maximum, sum, weighted sum of K) of online softmax after one more source."""

    def add_chunk(i: Any, state: tuple[jax.Array, ...] | None) -> tuple[jax.Array, ...]:
        kv, seen = read(arrays, i * step + jnp.arange(step, dtype=jnp.int32))
        return _add_chunk(state, q, kv, seen, softmax_scale)

    if isinstance(units, int) and units == step:
        return add_chunk(0, state)
    if state is None:
        zeros = jnp.zeros_like(q, jnp.float32)
        state = (zeros[..., 0] - jnp.inf, zeros[..., 0], zeros)
    result: tuple[jax.Array, ...] = jax.lax.fori_loop(
        jnp.int32(0), ceil_div(jnp.max(needed), step), add_chunk, state
    )
    return result


def _add_chunk(
    state: tuple[jax.Array, ...] | None,
    q: jax.Array,
    kv: jax.Array,
    seen: jax.Array,
    softmax_scale: float,
) -> tuple[jax.Array, ...]:
    scores = _product("bhrd,bhtd->bhrt", q, kv) * softmax_scale
    scores = jnp.where(seen[:, None], scores, -jnp.inf)
    maximum = scores.max(axis=-1)
    if state is not None:
        maximum = jnp.maximum(maximum, state[0])
    finite = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights = jnp.exp(scores - finite[..., None])
    total = weights.sum(axis=-1)
    # All columns of K, of which V is a part: a slice of K would be a copy.
    acc = _product("bhrt,bhtd->bhrd", weights.astype(q.dtype), kv)
    if state is not None:
        fade = jnp.exp(state[0] - finite)
        total += state[1] * fade
        acc += state[2] * fade[..., None]
    return maximum, total, acc


def _product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """The einsum of two arrays in float32."""
    exact = functools.partial(jnp.einsum, subscripts, precision="highest")
    if x.dtype == jnp.float32:
        return exact(x, y)
    # On some CPUs XLA compiles products of 16-bit arrays with float32 sums, and cannot run them.
    result: jax.Array = jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: exact(x.astype(jnp.float32), y.astype(jnp.float32)),
        default=functools.partial(jnp.einsum, subscripts, preferred_element_type=jnp.float32),
    )
    return result


def _finish(
    q: jax.Array,
    state: tuple[jax.Array, ...] | None,
    sink: jax.Array | None,
    head_dim_v: int,
) -> tuple[jax.Array, jax.Array]:
    if state is None:
        return jnp.zeros_like(q[..., :head_dim_v]), jnp.full_like(q[..., 0], jnp.inf, jnp.float32)
    maximum, total, acc = state
    empty = total == 0
    factor = 1 / jnp.where(empty, 1, total)
    lse = jnp.where(empty, 0, maximum) + jnp.log(jnp.where(empty, 1, total))
    if sink is not None:
        factor *= jax.nn.sigmoid(lse - sink)
    out = jnp.where(empty[..., None], 0, acc[..., :head_dim_v] * factor[..., None])
    return out.astype(q.dtype), jnp.where(empty, jnp.inf, lse)
