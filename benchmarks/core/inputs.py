"""Inputs that several ops need: the shape of a decode, a pool of random tokens, block tables."""

import dataclasses
import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np

from core.op import Case

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}

POOL_CHUNK_TOKENS = 65536
MAX_POOL_TOKENS = 67584 * 64  # 5 GB of 576 columns; a call that needs more gets more


@dataclasses.dataclass(frozen=True)
class PagedDecode(Case):
    """`batch` sequences of `mean_len` tokens, or of around as many; causal where s_q is above 1."""

    h_q: int
    s_q: int
    batch: int
    mean_len: int
    varlen: bool = False
    dtype: str = "bf16"
    page_block_size: int = 64

    @property
    def name(self):
        tail = "v" if self.varlen else ""
        tail += "" if self.dtype == "bf16" else f"-{self.dtype}"
        tail += "" if self.page_block_size == 64 else f"-p{self.page_block_size}"
        return f"h{self.h_q}-s{self.s_q}-{self.batch}x{self.mean_len}{tail}"

    @property
    def shape_key(self):
        return dataclasses.replace(self, varlen=False)

    @property
    def causal(self):
        return self.s_q > 1

    def lengths(self):
        """The sequence lengths; ragged ones are the same draw in every run."""
        if not self.varlen:
            return [self.mean_len] * self.batch
        rng, spread = random.Random(0), self.mean_len / 2
        return [int(max(rng.normalvariate(self.mean_len, spread), 2)) for _ in range(self.batch)]

    def pages(self):
        """How many pages a call reads."""
        return sum(math.ceil(n / self.page_block_size) for n in self.lengths())

    @functools.cached_property
    def table_width(self):
        """Columns of the block table: the same for a uniform case and its ragged twin."""
        ragged = dataclasses.replace(self, varlen=self.batch > 1)
        return math.ceil(max(self.mean_len, *ragged.lengths()) / self.page_block_size)

    def tables(self, pool_pages, calls):
        """The lengths, which all calls share, and the block table of each call."""
        lengths, page = self.lengths(), self.page_block_size
        tables = page_tables(lengths, page, self.table_width, pool_pages, calls)
        return np.asarray(lengths, np.int32), list(tables)


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
