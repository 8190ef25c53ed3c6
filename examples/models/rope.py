"""Rotary positions (https://arxiv.org/abs/2104.09864) with YaRN (2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np


def frequencies(config):
    """The angle per position of each pair of columns, in radians: numpy f32 [rope_dim / 2].

    Over the trained length a pair makes some number of turns. YaRN keeps the frequency of pairs
    with more than beta_fast turns and divides that of pairs with less than beta_slow by its factor.
    Between the two it interpolates linearly.
    """
    dim, theta, yarn = config.rope_dim, config.rope_theta, config.yarn
    plain = theta ** (-np.arange(0, dim, 2) / dim)
    if yarn is None:
        return plain.astype(np.float32)

    def pair_that_turns(times):
        return dim * math.log(yarn.original_length / (times * 2 * math.pi)) / 2 / math.log(theta)

    low, high = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    slowed = np.clip((np.arange(dim // 2) - low) / ((high - low) or 1e-3), 0, 1)
    return (plain * (1 - slowed) + plain / yarn.factor * slowed).astype(np.float32)


def rotation(config, positions):
    """(cosine, sine) of i32 positions [...], each f32 [..., rope_dim / 2]."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(config)
    size = config.yarn.rotation_scale if config.yarn else 1.0
    return jnp.cos(angle) * size, jnp.sin(angle) * size


def rotate(x, rotation, interleave):
    """Rotates the pairs of columns of x [..., rope_dim].

    With `interleave` a pair is two adjacent columns, else the same column of both halves. The
    result has the first columns of all pairs, then the second ones. This order does not change the
    product of a query and a key, because both have it.
    """
    cosine, sine = rotation
    first, second = (x[..., 0::2], x[..., 1::2]) if interleave else jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)
