"""Continuous batching: requests join and leave between steps, without a new compilation.

    step = make_step(forward, params, config)
    batcher = ContinuousBatcher(
        step, cache, num_blocks=1000, page_block_size=64, max_batch=32, max_blocks=128, chunk=64
    )
    request = batcher.submit(prompt, max_tokens=100)
    while batcher.busy:
        for request in batcher.step():  # those that got a token
            print(request.number, request.tokens[-1])

A request is what a user submits: a prompt and how to answer it. While it runs it is one sequence of
the batch, and it has one of max_batch slots (in this file a slot is a row of the batch, not a place
in the cache). Some tokens of a request are in the cache already. A step reads the others, at most
`chunk` of them. So a prompt is read in chunks. A request that decodes has exactly one token left to
read. A request that lost its pages has no token in the cache and reads all of them again. While any
request has more than one token left, steps are `chunk` wide, and requests that decode take part
with one token. Otherwise steps are 1 wide. No other shape is compiled.

Pages: requests are admitted in the order of submission. The next one is admitted when there are
pages for all tokens that it has, and one more for each running request. When a running request
needs a page and none is free, the one that was submitted last gives up its pages and its slot. It
keeps its tokens and is the next to be admitted. The request that was submitted first never gives up
its pages, and any request fits into the pool alone (`submit` checks that). So all of them finish.
"""

import collections
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .block_manager import BlockManager, OutOfPages
from .request import Request, check_integer, check_option, check_tokens


class ContinuousBatcher:
    """Runs requests through a step function of fixed shapes.

    Args:
      step: step(cache, tokens, block_table, cache_seqlens, num_new) -> (result, cache), jitted,
        with the cache donated; `make_step` makes one.
          tokens i32 [max_batch, s_q], where s_q is `chunk` or 1: the new tokens of a slot are its
            last num_new columns
          block_table i32 [max_batch, max_blocks]: pages 0 .. num_blocks - 1, -1 where there is none
          cache_seqlens i32 [max_batch]: tokens of each sequence, including the new ones
          num_new i32 [max_batch]: 0 for an idle slot, whose length is 0 too
          result: the next tokens, ints [max_batch]; or logits [max_batch, vocab], of which the
            batcher takes the largest
        With `options` there is a sixth argument, a dict of arrays [max_batch].
      cache: the cache, with the pages of all layers in one buffer. It is donated: afterwards use
        `batcher.cache`.
      num_blocks: pages of each layer.
      page_block_size: tokens of a page.
      max_batch: number of batch slots.
      max_blocks: width of the block table, and so the largest number of pages of a request.
      chunk: the largest number of a prompt's tokens that a step reads.
      eos: the tokens that end a request.
      options: names and defaults of the sampling options that a request may set. Floats become f32,
        ints i32. There is always one more, "seed", u32, by default the request's number.
      vocab: the number of tokens that the model knows. `submit` refuses others. Without it,
        `submit` refuses only what is no int32, and a token that the model does not know gives
        whatever the step function makes of it.
    """

    def __init__(
        self,
        step: Callable,
        cache: jax.Array,
        *,
        num_blocks: int,
        page_block_size: int,
        max_batch: int,
        max_blocks: int,
        chunk: int,
        eos: Collection[int] = (),
        options: Mapping[str, float | int] | None = None,
        vocab: int | None = None,
    ):
        for name, value in (("max_batch", max_batch), ("max_blocks", max_blocks), ("chunk", chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.cache = cache
        self.manager = BlockManager(num_blocks, page_block_size)
        self._step = step
        self._chunk = chunk
        self._eos = frozenset(eos)
        self._vocab = vocab
        self._options = None
        if options is not None:
            self._options = {k: check_option(k, value, value) for k, value in options.items()}
        self._slots: list[Request | None] = [None] * max_batch
        self._waiting: collections.deque[Request] = collections.deque()
        self._table = np.full((max_batch, max_blocks), -1, np.int32)
        self._submitted = 0

    @property
    def busy(self) -> bool:
        """Whether any request is not finished."""
        return bool(self._waiting) or any(True for _ in self._running())

    def submit(
        self, prompt: Sequence[int], max_tokens: int, *, seed: int | None = None, **options
    ) -> Request:
        """Queues a request. It joins the batch in one of the next steps.

        Args:
          prompt: its tokens, at least one.
          max_tokens: the largest number of tokens to generate.
          seed, options: for sampling. The tokens depend on the request's seed and its own tokens,
            not on the other requests in the batch.

        Raises:
          ValueError: the prompt is empty or has a token that the model does not know, max_tokens is
            below 1, an option is unknown, a value has the wrong type or is out of range, or the
            request needs more pages than there are. Then nothing is queued, and the other requests
            go on.
        """
        # One step runs all requests. So a value that no step can take must not get that far.
        tokens = check_tokens("prompt", prompt, self._vocab)
        max_tokens = check_integer("max_tokens", max_tokens, 1)
        unknown = sorted(options.keys() - (self._options or {}).keys())
        if unknown or (seed is not None and self._options is None):
            known = "none" if self._options is None else ["seed", *self._options]
            raise ValueError(f"unknown options {unknown or ['seed']}; this batcher has {known}")
        # The last generated token is never written to the cache.
        needed = self.manager.pages_for(len(tokens) + max_tokens - 1)
        limit = min(self.manager.num_blocks, self._table.shape[1])
        if needed > limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and max_tokens={max_tokens} may need {needed} "
                f"pages, but a sequence can have {limit}, the smaller of num_blocks and max_blocks"
            )
        number = self._submitted
        seed = number % 2**32 if seed is None else check_integer("seed", seed, 0, 2**32 - 1)
        options = {name: check_option(name, x, self._options[name]) for name, x in options.items()}
        chosen = {"seed": seed, **(self._options or {}), **options}
        self._submitted += 1
        request = Request(number, tokens, len(tokens), max_tokens, chosen)
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request now. Does nothing if it is finished."""
        if request.finish_reason is not None:
            return
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self._release(request)
        request.finish_reason = "cancelled"

    def step(self) -> list[Request]:
        """Runs one step. Returns the requests that got a token, the last one in their `tokens`."""
        self._grow()
        self._admit()
        if not any(True for _ in self._running()):
            return []
        num_new, inputs = self._inputs()
        result, self.cache = self._step(self.cache, *inputs)
        if result.ndim == 2:
            result = jnp.argmax(result, axis=-1)
        return self._advance(num_new, np.asarray(result))

    def run(self) -> None:
        """Steps until all requests are finished."""
        while self.busy:
            self.step()

    def _running(self) -> Iterator[tuple[int, Request]]:
        return ((slot, request) for slot, request in enumerate(self._slots) if request is not None)

    def _grow(self) -> None:
        """Gives each running request the page for its next token, the oldest request first."""
        for slot, request in sorted(self._running(), key=lambda item: item[1].number):
            while self._slots[slot] is request:
                try:
                    new = self.manager.grow(request.number, len(request.tokens))
                except OutOfPages:
                    self._preempt(max((r for _, r in self._running()), key=lambda r: r.number))
                    continue
                held = self.manager.pages_for(len(request.tokens))
                self._table[slot, held - len(new) : held] = new
                break

    def _admit(self) -> None:
        """Puts waiting requests into idle slots, in order, while there are pages."""
        for slot, occupant in enumerate(self._slots):
            if occupant is not None or not self._waiting:
                continue
            request = self._waiting[0]
            # Reserve a page for each running request, or the new one would soon lose its pages.
            reserve = sum(1 for _ in self._running())
            try:
                reused = self.manager.allocate(request.number, request.tokens, reserve)
            except OutOfPages:
                return  # nobody overtakes it, or a long request might never be admitted
            self._waiting.popleft()
            request.cached = request.reused = reused
            pages = self.manager.pages(request.number)
            self._table[slot, : len(pages)] = pages
            self._slots[slot] = request

    def _inputs(self) -> tuple[np.ndarray, list]:
        """num_new, and the arguments of the step function after the cache.

        All arrays are new, because the device may still be reading those of the step before.
        """
        batch, chunk = len(self._slots), self._chunk
        lengths, num_new = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
        for slot, request in self._running():
            num_new[slot] = min(len(request.tokens) - request.cached, chunk)
            lengths[slot] = request.cached + num_new[slot]
        tokens = np.zeros((batch, chunk if num_new.max() > 1 else 1), np.int32)
        for slot, request in self._running():
            tokens[slot, -num_new[slot] :] = request.tokens[request.cached : lengths[slot]]
        inputs = [tokens, self._table.copy(), lengths, num_new]
        return num_new, inputs if self._options is None else [*inputs, self._option_arrays()]

    def _option_arrays(self) -> dict[str, np.ndarray]:
        arrays = {"seed": np.zeros(len(self._slots), np.uint32)}
        for name, default in self._options.items():
            dtype = np.float32 if isinstance(default, float) else np.int32
            arrays[name] = np.full(len(self._slots), default, dtype)
        for slot, request in self._running():
            for name, value in request.options.items():
                arrays[name][slot] = value
        return arrays

    def _advance(self, num_new: np.ndarray, next_tokens: np.ndarray) -> list[Request]:
        """Updates the requests after a step."""
        served = []
        for slot, request in list(self._running()):
            request.cached += int(num_new[slot])
            self.manager.publish(request.number, request.tokens, request.cached)
            if request.cached < len(request.tokens):
                continue  # in the middle of its prompt
            request.tokens.append(int(next_tokens[slot]))
            served.append(request)
            if request.tokens[-1] in self._eos:
                request.finish_reason = "stop"
            elif len(request.tokens) == request.prompt_length + request.max_tokens:
                request.finish_reason = "length"
            if request.finish_reason is not None:
                self._release(request)
        return served

    def _preempt(self, request: Request) -> None:
        """Puts a request back at the front of the queue: all others there were submitted later."""
        self._release(request)
        request.preemptions += 1
        self._waiting.appendleft(request)

    def _release(self, request: Request) -> None:
        slot = self._slots.index(request)
        self._slots[slot] = None
        self._table[slot] = -1
        self.manager.free(request.number)


def make_step(forward: Callable, params, config, sample: Callable | None = None) -> Callable:
    """Makes the step function of `ContinuousBatcher` from a model's forward function.

    Args:
      forward: forward(params, config, cache, tokens, block_table, cache_seqlens, num_new) ->
        (logits f32 [b, vocab] of each sequence's last token, cache).
      params: the weights, a pytree of arrays.
      config: static; passed to forward.
      sample: None for greedy. For a batcher with `options`, a function of one sequence,
        sample(logits f32 [vocab], key, **options) -> int, which is mapped over the batch. The key
        is made of the request's seed and its number of tokens, so the drawn token does not depend
        on the slot or on other requests.
        For a function f of whole batches: lambda x, key, **options: f(x[None], key, **options)[0]

    Returns:
      The jitted function. It donates the cache.
    """

    # The weights are an argument. As constants of the program they would be in memory twice.
    @functools.partial(jax.jit, donate_argnames="cache")
    def step(params, cache, tokens, block_table, cache_seqlens, num_new, options=None):
        logits, cache = forward(params, config, cache, tokens, block_table, cache_seqlens, num_new)
        if sample is None:
            return jnp.argmax(logits, axis=-1), cache

        def sample_one(logits, length, seed, **options):
            return sample(logits, jax.random.fold_in(jax.random.key(seed), length), **options)

        return jax.vmap(sample_one)(logits, cache_seqlens, **options), cache

    return functools.partial(step, params)
