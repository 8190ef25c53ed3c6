"""How far timed results are from those in float32."""

import functools
import math

import jax
import jax.numpy as jnp

CHECKED_TOKENS = 4096  # at a time, in float32


def relative(found, expected):
    """|found - expected| / |expected|; NaN if anything in `found` is."""
    return jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def largest_difference(found, expected):
    """The largest difference of an entry; equal infinities do not differ, NaN does."""
    return jnp.max(jnp.where(found == expected, 0.0, jnp.abs(found - expected)))


def compare(expected, found, **columns):
    """{column: [the error of each of found]}.

    Args:
      expected: the results in float32.
      found: tuples of results.
      columns: for each result, the name of its column and how it is compared.
    """
    return {
        name: jnp.stack([measure(results[i], expected[i]) for results in found])
        for i, (name, measure) in enumerate(columns.items())
    }


def attend(q, tokens, steps, d_v, scale):
    """Attention of one sequence in float32, some tokens at a time.

    Args:
      q: [s, h, d].
      tokens: (i) -> (the tokens of step i [t, d], which of them each query sees [s or 1, t]).
      steps: how many steps.
      d_v: a value is the first d_v columns of its token.
      scale: of the scores.

    Returns:
      out [s, h, d_v], lse [h, s]; a query that sees no token has 0 and +inf.
    """
    q = q.astype(jnp.float32) * scale
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(i, carry):
        top, total, acc = carry
        kv, seen = tokens(i)
        kv = kv.astype(jnp.float32)
        scores = jnp.where(seen[:, None], dot("shd,td->sht", q, kv), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        p = jnp.exp(scores - base[..., None])
        fade = jnp.exp(top - base)
        acc = acc * fade[..., None] + dot("sht,td->shd", p, kv[:, :d_v])
        return new_top, total * fade + p.sum(-1), acc

    shape = q.shape[:2]
    start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, d_v))
    top, total, acc = jax.lax.fori_loop(0, steps, step, start)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    return out, jnp.where(total > 0, top + jnp.log(total), jnp.inf).T


def attend_rows(q, rows, slots, seen, d_v, scale):
    """`attend` of each query over the rows that it names.

    Args:
      q: [n, h, d]. rows: [m, d]. slots, seen: [n, t], the rows, and which of them count.

    Returns:
      out [n, h, d_v], lse [n, h].
    """

    def one_query(one):
        q, slots, seen = one
        out, lse = attend(q[None], lambda _: (rows[slots], seen[None]), 1, d_v, scale)
        return out[0], lse[:, 0]

    return jax.lax.map(one_query, (q, slots, seen), batch_size=math.gcd(len(q), 4))


def attend_paged(q, pool, table, lengths, d_v, scale, causal):
    """`attend` of every sequence over a paged cache: out [b, s, h, d_v], lse [b, h, s]."""
    page, d_k = pool.shape[1], pool.shape[-1]
    pages = min(max(CHECKED_TOKENS // page, 1), table.shape[1])
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))

    def one_sequence(one):
        q, table, length = one
        # The first key that each query does not see.
        end = length - (jnp.arange(q.shape[0])[::-1] if causal else 0)

        def tokens(i):
            ids = jax.lax.dynamic_slice_in_dim(table, i * pages, pages)
            seen = i * pages * page + jnp.arange(pages * page) < jnp.reshape(end, (-1, 1))
            return pool[ids].reshape(-1, d_k), seen

        return attend(q, tokens, -(-length // (pages * page)), d_v, scale)

    return jax.lax.map(one_sequence, (q, table, lengths), batch_size=math.gcd(len(lengths), 4))
