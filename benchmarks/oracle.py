"""What every timed output is compared with: the same attention in float32."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from workloads import HEAD_DIM_K, HEAD_DIM_V

BLOCK_TOKENS = 4096


def _attend(pool, q, table, length, causal, pages_per_step):
    """One sequence, in float32, some pages at a time: (out [s, h, d_v], lse [h, s])."""
    page = pool.shape[1]
    tokens = pages_per_step * page
    s_q = q.shape[0]
    q = q.astype(jnp.float32) * HEAD_DIM_K**-0.5
    # The first key that query s does not see.
    end = length - (jnp.arange(s_q)[::-1] if causal else jnp.zeros(s_q, jnp.int32))
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def step(i, carry):
        top, total, acc = carry
        pages = jax.lax.dynamic_slice_in_dim(table, i * pages_per_step, pages_per_step)
        kv = pool[pages, :, 0].reshape(tokens, HEAD_DIM_K).astype(jnp.float32)
        seen = i * tokens + jnp.arange(tokens)[None] < end[:, None]
        scores = jnp.where(seen[:, None], dot("shd,td->sht", q, kv), -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)
        p = jnp.exp(scores - base[..., None])
        fade = jnp.exp(top - base)
        acc = acc * fade[..., None] + dot("sht,td->shd", p, kv[:, :HEAD_DIM_V])
        return new_top, total * fade + p.sum(-1), acc

    shape = q.shape[:2]
    start = (jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros((*shape, HEAD_DIM_V)))
    top, total, acc = jax.lax.fori_loop(0, (length + tokens - 1) // tokens, step, start)
    out = acc / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(total), jnp.inf)
    return out, lse.T


@functools.partial(jax.jit, static_argnames=("causal", "sample"))
def errors(pool, q, table, lengths, outs, lses, *, causal, sample=None):
    """How far each of `outs` and `lses`, all of one input set, is from float32.

    Returns (rel_err, lse_err), one entry for each out: |out - ref| / |ref| over the whole
    batch, and the largest difference of an lse. A NaN anywhere makes the entry NaN. With a
    `sample` only so many sequences are looked at, the first, the last and some between.
    """
    if sample is not None and sample < q.shape[0]:
        picked = np.linspace(0, q.shape[0] - 1, sample).astype(int)
        q, table, lengths, outs, lses = jax.tree.map(
            lambda x: x[picked], (q, table, lengths, outs, lses)
        )
    batch, width = table.shape
    page = pool.shape[1]
    pages_per_step = min(max(BLOCK_TOKENS // page, 1), width)
    table = jnp.pad(table, ((0, 0), (0, -width % pages_per_step)))

    def sequence(operands):
        q, table, length, outs, lses = operands
        ref, ref_lse = _attend(pool, q, table, length, causal, pages_per_step)
        difference = [jnp.sum((out.astype(jnp.float32) - ref) ** 2) for out in outs]
        lse_difference = [
            jnp.max(jnp.where(lse == ref_lse, 0.0, jnp.abs(lse - ref_lse))) for lse in lses
        ]
        return jnp.stack(difference), jnp.sum(ref**2), jnp.stack(lse_difference)

    operands = (q, table, lengths, outs, lses)
    difference, size, lse_difference = jax.lax.map(
        sequence, operands, batch_size=math.gcd(batch, 4)
    )
    return jnp.sqrt(difference.sum(0) / size.sum()), lse_difference.max(0)
