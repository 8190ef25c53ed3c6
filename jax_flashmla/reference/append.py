"""The reference of append: writes tokens into a paged cache."""

import jax
import jax.numpy as jnp


def append(k_cache: jax.Array, new_kv: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Writes new_kv [tokens, h_kv, d_k] to slot_mapping i32 [tokens] of k_cache.

    A slot outside the pool writes nothing. XLA updates k_cache in place if the old one is not used
    afterwards.
    """
    pages, page = k_cache.shape[:2]
    # A negative index would count from the end. Make it the first index past the pool, which
    # mode="drop" ignores.
    page_id = jnp.where(slot_mapping < 0, pages, slot_mapping // page)
    return k_cache.at[page_id, slot_mapping % page].set(new_kv, mode="drop")
