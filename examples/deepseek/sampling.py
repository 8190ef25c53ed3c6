"""The next token from its logits, inside jit."""

import jax
import jax.numpy as jnp


def greedy(logits):
    """The likeliest token: f32 [b, vocab] -> i32 [b]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def sample(logits, key, temperature, top_p=1.0):
    """Draws tokens.

    Args:
      logits: f32 [b, vocab].
      key: of jax.random.
      temperature: scalar or [b], may be traced; 0 takes the likeliest token.
      top_p: scalar or [b], may be traced: draws from the likeliest tokens, as few of them as are
        top_p likely together; the likeliest is always among them.

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
    before = jnp.cumsum(likely, axis=-1) - likely  # of those likelier than each
    # The likeliest is wanted even at 0, and at 1 all are, whatever rounding makes of their sum.
    wanted = (before < top_p) | (top_p >= 1) | (jnp.arange(logits.shape[-1]) == 0)
    drawn = jax.random.categorical(key, jnp.where(wanted, ordered, -jnp.inf))
    drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=1)[:, 0]
    return jnp.where(temperature[:, 0] > 0, drawn, tokens[:, 0]).astype(jnp.int32)
