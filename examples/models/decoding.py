"""Runs a fixed batch: reads the prompts in chunks, then decodes in a jitted loop.

This is for sequences that begin together and whose largest lengths are known. `allocate` gives each
its pages once, and nothing goes back to the host between steps. Where requests come and go, share
pages, or may run out of pages, use `Decoder.batcher`. It runs the model with batching.py, which
manages the pages and looks at each step's tokens on the host.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .batching import ContinuousBatcher, make_step
from .model import forward, init_cache
from .parallel import Layout
from .request import check_tokens
from .sampling import greedy, sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of the sequences of a batch. Each call donates all of it."""

    cache: jax.Array
    block_table: jax.Array  # [b, max_blocks] i32
    lengths: jax.Array  # [b] i32: tokens in the cache
    token: jax.Array  # [b] i32: the newest token, not yet in the cache
    done: jax.Array  # [b] bool: that token is the last
    key: jax.Array  # from jax.random


def allocate(lengths, page_block_size, groups=1):
    """Pages for sequences that grow to `lengths` tokens: (block_table, pages_per_layer).

    Each sequence keeps its pages, which are consecutive. With `groups`, consecutive sequences form
    groups of equal size; each group has a pool of its own, with pages from 0 on. All pools have
    the same size.
    """
    pages = -(-np.asarray(lengths) // page_block_size)
    by_group = pages.reshape(groups, -1)
    first = (np.cumsum(by_group, axis=1) - by_group).reshape(-1, 1)
    column = np.arange(max(1, pages.max()))
    table = np.where(column < pages[:, None], first + column, -1).astype(np.int32)
    return table, max(1, int(by_group.sum(axis=1).max()))


class Decoder:
    """A model and the options of running it, for any number of batches.

    Compiles once for each batch size, width of the block table and number of pages.

    Args:
      params: from weights.py, placed by `layout`.
      config: a ModelConfig.
      layout: the devices.
      temperature, top_p: as in sampling.py. Temperature 0 takes the most likely token.
      chunk: number of tokens of each prompt that one call reads.
    """

    def __init__(
        self, params, config, *, layout=None, temperature=0.0, top_p=1.0, chunk=128,
        implementation="auto", eos=None,
    ):  # fmt: skip
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature must be a number of at least 0, got {temperature}")
        if not 0 <= top_p <= 1:
            raise ValueError(f"top_p must be from 0 to 1, got {top_p}")
        self.params, self.config, self.chunk = params, config, chunk
        self.layout = layout = layout or Layout()
        self.eos = config.eos if eos is None else tuple(eos)
        self.temperature, self.top_p = temperature, top_p
        self._implementation = implementation
        rows, whole = layout.by_sequence, PartitionSpec()
        state = State(rows, rows, rows, rows, rows, whole)
        self._params_specs = layout.params(config)
        # The jitted function of `prefill`: (params, state, tokens i32 [b, chunk], lengths i32 [b]
        # with these tokens) -> state.
        self.read_program = layout.jit(
            self._read_chunk, (self._params_specs, state, rows, rows), state, donate_argnums=1
        )
        self._programs = {}
        self._decode_specs = (self._params_specs, state), (rows, state)

    def start(self, batch, lengths, *, page_block_size=64, dtype=None, seed=0):
        """An empty state for sequences that grow to at most `lengths` [batch] tokens."""
        self.layout.check(self.config, batch)
        table, pages = allocate(lengths, page_block_size, self.layout.groups)
        zeros = np.zeros(batch, np.int32)
        rows, put = self.layout.by_sequence, self.layout.put
        return State(
            self._empty_cache(pages, page_block_size, dtype),
            *(put(jnp.asarray(x), rows) for x in (table, zeros, zeros, np.zeros(batch, bool))),
            put(jax.random.key(seed), PartitionSpec()),
        )

    def batcher(self, slots, longest, *, num_blocks=None, page_block_size=64, dtype=None):
        """A ContinuousBatcher that runs this model.

        Args:
          slots: the largest number of sequences at a time.
          longest: tokens of the longest sequence, including the generated ones.
          num_blocks: pages of each layer, by default enough for `slots` of the longest sequences.

        Raises:
          ValueError: the layout is dp, where each device has a pool of pages of its own.
        """
        if self.layout.kind == "dp":
            raise ValueError('continuous batching needs one pool of pages: parallel is "dp"')
        self.layout.check(self.config, slots)
        max_blocks = -(-longest // page_block_size)
        num_blocks = num_blocks or slots * max_blocks
        whole = PartitionSpec()
        run = self.layout.shard(self._forward, (self._params_specs, *[whole] * 5), (whole, whole))

        def sample_one(logits, key):
            return sample(logits[None], key, self.temperature, self.top_p)[0]

        step = make_step(
            lambda params, config, *arrays: run(params, *arrays),
            self.params,
            self.config,
            sample_one if self.temperature else None,
        )
        return ContinuousBatcher(
            step,
            self._empty_cache(num_blocks, page_block_size, dtype),
            num_blocks=num_blocks,
            page_block_size=page_block_size,
            max_batch=slots,
            max_blocks=max_blocks,
            chunk=self.chunk,
            eos=self.eos,
            options={},  # a request has a seed and no other option
            vocab=self.config.vocab,
        )

    def _empty_cache(self, pages, page_block_size, dtype):
        """A pool with the pages of all layers, for each group of sequences."""

        def make():
            one = init_cache(
                self.config, pages, page_block_size, dtype or self.params["embedding"].dtype
            )
            return jnp.tile(one, (self.layout.groups, 1, 1, 1))

        return jax.jit(make, out_shardings=self.layout.sharding(self.layout.by_sequence))()

    def prefill(self, state, prompts):
        """Reads the prompts into an empty state. The returned state has each answer's first token.

        Prompts are lists of tokens, one for each sequence of the state. They are padded on the left
        to a multiple of the chunk, so that all of them end in the last chunk.

        Raises:
          ValueError: the number of prompts is not that of the sequences, or a prompt is empty or
            has a token that is not in the model's vocabulary.
        """
        if len(prompts) != len(state.lengths):
            raise ValueError(f"{len(prompts)} prompts, but {len(state.lengths)} sequences")
        vocab = self.config.vocab
        prompts = [check_tokens(f"prompt {i}", p, vocab) for i, p in enumerate(prompts)]
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        width = -(-int(lengths.max()) // self.chunk) * self.chunk
        padded = np.stack([np.pad(p, (width - len(p), 0)) for p in prompts]).astype(np.int32)
        rows = self.layout.by_sequence
        for end in range(self.chunk, width + 1, self.chunk):
            tokens = self.layout.put(padded[:, end - self.chunk : end], rows)
            read = self.layout.put(np.maximum(lengths - (width - end), 0), rows)
            state = self.read_program(self.params, state, tokens, read)
        return state

    def decode(self, state, steps):
        """Decodes up to `steps` tokens of each sequence: (tokens i32 [b, steps], state).

        The first of them is state.token. After the end of a sequence, tokens are -1.
        """
        return self.program(steps)(self.params, state)

    def program(self, steps):
        """The jitted function of `decode`: (params, state) -> (tokens, state)."""
        if steps not in self._programs:
            run = functools.partial(self._run_steps, steps=steps)
            self._programs[steps] = self.layout.jit(run, *self._decode_specs, donate_argnums=1)
        return self._programs[steps]

    # -------------------- Inside jit, on one device's arrays

    def _forward(self, params, cache, tokens, block_table, cache_seqlens, num_new):
        return forward(
            params, self.config, cache, tokens, block_table, cache_seqlens, num_new,
            tensor_axis=self.layout.tensor_axis, implementation=self._implementation,
        )  # fmt: skip

    def _choose(self, logits, key):
        if self.temperature == 0:
            return greedy(logits)
        return sample(logits, self.layout.device_key(key), self.temperature, self.top_p)

    def _read_chunk(self, params, state, tokens, lengths):
        return self._advance(params, state, tokens, lengths, lengths - state.lengths)

    def _step(self, params, state):
        live = (~state.done).astype(jnp.int32)
        return self._advance(params, state, state.token[:, None], state.lengths + live, live)

    def _advance(self, params, state, tokens, lengths, new):
        """Runs `tokens`, of which `new` are new. `lengths` include them. Returns the new state."""
        logits, cache = self._forward(
            params, state.cache, tokens, state.block_table, jnp.where(new > 0, lengths, 0), new
        )
        key, now = jax.random.split(state.key)
        token = self._choose(logits, now)
        return dataclasses.replace(state, cache=cache, lengths=lengths, token=token, key=key)

    def _run_steps(self, params, state, *, steps):
        def body(carry):
            i, tokens, state = carry
            tokens = tokens.at[:, i].set(jnp.where(state.done, -1, state.token))
            ended = jnp.isin(state.token, jnp.array(self.eos or (-1,), jnp.int32))
            state = dataclasses.replace(state, done=state.done | ended)
            return i + 1, tokens, self._step(params, state)

        def unfinished(carry):
            return (carry[0] < steps) & ~jnp.all(carry[2].done)

        tokens = jnp.full_like(state.token, -1, shape=(*state.token.shape, steps))
        first = jnp.zeros_like(state.token[0])  # varies over the devices, as the loop's state does
        _, tokens, state = jax.lax.while_loop(unfinished, body, (first, tokens, state))
        return tokens, state
