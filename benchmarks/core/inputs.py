"""Inputs that several ops need: a pool of random tokens, and block tables into it."""

import functools
import math

import jax
import numpy as np

POOL_CHUNK_TOKENS = 65536
MAX_POOL_TOKENS = 67584 * 64  # 5 GB of 576 columns; a call that needs more gets more


def random_pool(needs, page, width, dtype):
    """A random pool [pages, page, 1, width].

    Args:
      needs: (tokens of a call, how many calls) of each case. No two calls of a round share a token
        as long as MAX_POOL_TOKENS allow it.
      page: tokens in a page; it divides 256.
      width: columns of a token.
      dtype: what the pool is of.
    """
    tokens = max(max(one, min(one * calls, MAX_POOL_TOKENS)) for one, calls in needs)
    chunk = min(POOL_CHUNK_TOKENS, -(-tokens // 256) * 256)
    chunks = -(-tokens // chunk)

    @jax.jit
    def draw(key):
        normal = functools.partial(jax.random.normal, shape=(chunk, width), dtype=dtype)
        return jax.lax.map(normal, jax.random.split(key, chunks)).reshape(-1, page, 1, width)

    return draw(jax.random.key(0))


def page_tables(lengths, page, width, pool_pages, sets, seed=0):
    """Block tables i32[sets, batch, width], whose pages are handed out in random order.

    Sets share no page as long as the pool has enough of them. Columns past the end of a sequence
    hold 0.
    """
    rng = np.random.default_rng(seed)
    counts = [math.ceil(length / page) for length in lengths]
    if sum(counts) > pool_pages:
        raise ValueError(f"a call needs {sum(counts)} pages, the pool has {pool_pages}")
    tables = np.zeros((sets, len(lengths), width), np.int32)
    free = rng.permutation(pool_pages)
    for table in tables:
        if len(free) < sum(counts):
            free = rng.permutation(pool_pages)
        taken, free = free[: sum(counts)], free[sum(counts) :]
        for row, pages in zip(table, np.split(taken, np.cumsum(counts)[:-1]), strict=True):
            row[: len(pages)] = pages
    return tables
