"""Chooses the next token from logits, inside jit."""

import jax
import jax.numpy as jnp


def greedy(logits):
    """The most likely token: f32 [b, vocab] -> i32 [b]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits, key, temperature, top_p=1.0):
    """Draws tokens.

    Args:
      logits: f32 [b, vocab].
      key: from jax.random.
      temperature: scalar or [b], may be traced. 0 takes the most likely token.
      top_p: scalar or [b], may be traced. Draws from the smallest set of most likely tokens whose
        probabilities sum to at least top_p. The most likely token is always in it.

    Returns:
      i32 [b].
    """
    temperature, top_p = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), logits.shape[:1])[:, None]
        for x in (temperature, top_p)
    )
    scaled = logits / jnp.maximum(temperature, 1e-6)
    ordered, tokens = jax.lax.top_k(scaled, logits.shape[-1])
    likely = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely  # the sum over more likely tokens
    # The most likely token is kept even at 0. At 1 all are, even if their sum is rounded past 1.
    wanted = (before < top_p) | (top_p >= 1) | (jnp.arange(logits.shape[-1]) == 0)
    drawn = jax.random.categorical(key, jnp.where(wanted, ordered, -jnp.inf))
    drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]
    return jnp.where(temperature[:, 0] > 0, drawn, tokens[:, 0]).astype(jnp.int32)
