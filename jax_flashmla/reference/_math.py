"""Integer arithmetic that several references use."""

import jax


def ceil_div(x: jax.Array, divisor: jax.Array | int) -> jax.Array:
    """x / divisor, rounded up. Without the usual x + divisor - 1, which could overflow."""
    return x // divisor + (x % divisor > 0).astype(x.dtype)
