"""Plain JAX: the program that one would write without this library, to compare with."""

import jax.numpy as jnp


def attend(q, kv, seen, d_v, scale):
    """Two einsums and a softmax. The einsums read 16-bit inputs as they are and sum in float32.

    Args:
      q: [b, s, h, d].
      kv: [b, n, d], the tokens of each sequence, gathered.
      seen: [b, s or 1, n], which of them a query attends to.
      d_v: a value is the first d_v columns of its token.
      scale: of the scores.

    Returns:
      out [b, s, h, d_v] in q's dtype, lse f32 [b, h, s].
    """
    scores = jnp.einsum("bshd,bnd->bshn", q, kv, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, :, None], scores, -jnp.inf)
    top = scores.max(-1, keepdims=True)
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    p = (weights / total).astype(kv.dtype)
    out = jnp.einsum("bshn,bnv->bshv", p, kv[..., :d_v], preferred_element_type=jnp.float32)
    return out.astype(q.dtype), jnp.swapaxes((top + jnp.log(total))[..., 0], 1, 2)


def attend_paged(q, pool, table, lengths, d_v, scale, causal):
    """`attend` over a paged cache: pool [pages, page, 1, d], table [b, m], lengths [b]."""
    kv = pool[table].reshape(len(table), -1, pool.shape[-1])
    offset = jnp.arange(q.shape[1])[::-1] if causal else jnp.zeros(1, jnp.int32)
    seen = jnp.arange(kv.shape[1]) < (lengths[:, None] - offset)[..., None]
    return attend(q, kv, seen, d_v, scale)
