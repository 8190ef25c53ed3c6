"""Writing tokens into a paged cache, in plain JAX."""

import jax
import jax.numpy as jnp


def append(k_cache: jax.Array, new_kv: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Writes new_kv [tokens, h_kv, d_k] into slots i32 [tokens] of k_cache.

    A slot outside the pool writes nothing. XLA keeps the update in place where k_cache is dead
    afterwards.
    """
    pages, page = k_cache.shape[:2]
    # A negative index would count from the end: it becomes one behind the pool, which is dropped.
    page_id = jnp.where(slot_mapping < 0, pages, slot_mapping // page)
    return k_cache.at[page_id, slot_mapping % page].set(new_kv, mode="drop")
