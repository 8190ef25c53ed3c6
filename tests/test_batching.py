"""The page manager and the continuous batching of examples/models.

Most tests run a toy model with integers in its cache. A cache entry is a token and a hash of all
tokens up to it, computed from the entry before. The next token is a hash of all entries. So a wrong
page, a wrong length, a lost or doubled token, or a page shared with a sequence that began otherwise
changes the generated tokens.
"""

import dataclasses
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import stateful
from hypothesis import strategies as st

import jax_flashmla as mla
from examples.models.batching import ContinuousBatcher, make_step
from examples.models.block_manager import BlockManager, OutOfPages

pytestmark = pytest.mark.usefixtures("quick_compile")
settings = functools.partial(hypothesis.settings, deadline=None, derandomize=True, database=None)

# -------------------- The block manager

PAGE = 4


def test_sequences_share_published_pages():
    manager = BlockManager(8, PAGE)
    prompt = list(range(11))
    assert manager.allocate("a", prompt) == 0
    assert manager.allocate("early", prompt) == 0  # nothing is published yet
    manager.free("early")
    manager.publish("a", prompt, 11)
    assert manager.allocate("b", [*prompt[:8], 99]) == 8
    assert manager.allocate("c", [7, *prompt[1:]]) == 0  # the same tokens after another page
    a, b, c = map(manager.pages, "abc")
    assert a[:2] == b[:2]
    assert len({*a, *b, *c}) == 7
    assert manager.num_free == 1
    manager.free("a")
    assert manager.num_free == 2  # b still has the other two
    manager.check()


def test_the_last_token_is_never_taken_from_the_cache():
    manager = BlockManager(8, PAGE)
    prompt = list(range(8))
    manager.allocate("a", prompt)
    manager.publish("a", prompt, 8)
    assert manager.allocate("b", prompt) == 4


def test_only_written_pages_are_published():
    manager = BlockManager(8, PAGE)
    prompt = list(range(12))
    manager.allocate("a", prompt)
    manager.publish("a", prompt, 7)
    assert manager.allocate("b", prompt) == 4


def test_a_free_page_is_found_until_it_is_handed_out():
    manager = BlockManager(5, PAGE)
    prompt = list(range(13))
    manager.allocate("a", prompt)
    manager.publish("a", prompt, 13)
    pages = manager.pages("a")
    manager.free("a")
    manager.allocate("b", [50, 51, 52, 53, 54])  # gets the two pages without content
    assert not set(manager.pages("b")) & set(pages[:3])
    assert manager.allocate("c", prompt[:9]) == 8
    assert manager.pages("c") == pages[:3]  # hands out the third page: its content is gone
    manager.free("b")
    manager.free("c")
    assert manager.allocate("d", prompt) == 8
    assert manager.pages("d")[:2] == pages[:2]
    manager.check()


def test_pages_without_content_are_handed_out_first():
    manager = BlockManager(3, PAGE)
    manager.allocate("a", [1] * 8)
    manager.publish("a", [1] * 8, 8)
    manager.allocate("b", [2])
    blank = manager.pages("b")
    manager.free("a")
    manager.free("b")  # freed last, handed out first
    manager.allocate("c", [3])
    assert manager.pages("c") == blank


def test_a_call_that_fails_changes_nothing():
    manager = BlockManager(4, PAGE)
    manager.allocate("a", [1] * 9)
    for call in (
        lambda: manager.allocate("b", [2] * 5),
        lambda: manager.allocate("b", [2] * 4, reserve=1),
        lambda: manager.grow("a", 17),
    ):
        with pytest.raises(OutOfPages, match="1 are free"):
            call()
        manager.check()
        assert (manager.num_free, len(manager.pages("a"))) == (1, 3)
    assert manager.grow("a", 12) == []
    assert len(manager.grow("a", 13)) == 1


def test_errors_of_the_block_manager():
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        BlockManager(0, PAGE)
    with pytest.raises(ValueError, match="page_block_size must be at least 1, got -1"):
        BlockManager(1, -1)
    manager = BlockManager(4, PAGE)
    manager.allocate("a", [1, 2])
    with pytest.raises(ValueError, match="'a' holds pages already"):
        manager.allocate("a", [1])
    with pytest.raises(ValueError, match="must not be empty"):
        manager.allocate("b", [])
    with pytest.raises(ValueError, match=r"at most the 9 tokens given and the 4 .*got 5"):
        manager.publish("a", [1] * 9, 5)
    for call in (manager.free, manager.pages, lambda name: manager.grow(name, 1)):
        with pytest.raises(ValueError, match="'b' holds no pages"):
            call("b")


@pytest.mark.parametrize("wrong", ["_references", "_free", "_digest_of", "_page_of"])
def test_check_finds_inconsistent_records(wrong):
    manager = BlockManager(4, PAGE)
    manager.allocate("a", [1] * 6)
    manager.publish("a", [1] * 6, 6)
    manager.check()
    records, page = getattr(manager, wrong), manager.pages("a")[0]
    if wrong == "_references":
        records[page] += 1
    elif wrong == "_free":
        records[page] = None
    else:
        records.popitem()
    with pytest.raises(RuntimeError):
        manager.check()


class Calls(stateful.RuleBasedStateMachine):
    """Any sequence of calls. A model of the pool stores, for each token, all tokens up to it."""

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(10, 2)
        self.pool = {}  # (page, offset) -> all tokens up to that one
        self.tokens = {}

    def write(self, name, begin):
        tokens, pages = self.tokens[name], self.manager.pages(name)
        for i in range(begin, len(tokens)):
            self.pool[pages[i // 2], i % 2] = tuple(tokens[: i + 1])

    @stateful.rule(
        name=st.integers(0, 4),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        reserve=st.integers(0, 2),
    )
    def allocate(self, name, tokens, reserve):
        if name in self.tokens:
            return
        free = self.manager.num_free
        try:
            reused = self.manager.allocate(name, tokens, reserve)
        except OutOfPages:
            assert self.manager.num_free == free
            assert free < -(-len(tokens) // 2) + reserve
            return
        assert self.manager.num_free >= reserve
        assert reused < len(tokens)
        self.tokens[name] = list(tokens)
        self.write(name, reused)

    @stateful.rule(name=st.integers(0, 4), token=st.integers(0, 1))
    def grow(self, name, token):
        if name not in self.tokens:
            return
        tokens, before = self.tokens[name], self.manager.pages(name)
        try:
            new = self.manager.grow(name, len(tokens) + 1)
        except OutOfPages:
            assert self.manager.num_free == 0
            return
        assert self.manager.pages(name) == before + new
        tokens.append(token)
        self.write(name, len(tokens) - 1)

    @stateful.rule(name=st.integers(0, 4))
    def publish(self, name):
        if name in self.tokens:
            self.manager.publish(name, self.tokens[name], len(self.tokens[name]))

    @stateful.rule(name=st.integers(0, 4))
    def free(self, name):
        if self.tokens.pop(name, None) is not None:
            self.manager.free(name)

    @stateful.invariant()
    def every_sequence_finds_its_tokens(self):
        self.manager.check()
        for name, tokens in self.tokens.items():
            pages = self.manager.pages(name)
            assert len(pages) == -(-len(tokens) // 2)
            for i in range(len(tokens)):
                assert self.pool[pages[i // 2], i % 2] == tuple(tokens[: i + 1])

    def teardown(self):
        for name in self.tokens:
            self.manager.free(name)
        self.manager.check()
        assert self.manager.num_free == 10


Calls.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestCalls = Calls.TestCase


# -------------------- The toy model

VOCAB, MODULUS = 13, 4093  # products of two numbers below MODULUS are exact in float32
EOS = 5
POOL, WIDTH = 32, 12  # pages of the cache, pages of the longest sequence


def mix(state, token):
    """The hash, an integer, of a hash and a token. For numpy and jax."""
    return (state * 61 + token * 17 + 7) % MODULUS


def solo(prompt, max_tokens, eos=()):
    """The tokens that the toy generates for one prompt, in Python without a cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        total = state = 0
        for token in tokens:
            state = mix(state, token)
            total = mix(total, token + state)
        tokens.append(total % VOCAB)
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def toy_forward(params, config, cache, tokens, block_table, cache_seqlens, num_new):
    """The toy model. Its cache is f32 [pages, page, 1, 2], NaN where nothing was written."""
    page, s_q = cache.shape[1], tokens.shape[1]
    capacity = block_table.shape[1] * page

    def read(cache, positions):  # i32 [b, n] -> i32 [b, n, 2]; an entry never written is -1
        slots = mla.get_slot_mapping(block_table, positions, page)
        entries = cache.reshape(-1, 2).at[slots].get(mode="fill", fill_value=np.nan)
        return jnp.where(jnp.isnan(entries), -1, entries).astype(jnp.int32)

    new = jnp.arange(s_q) >= s_q - num_new[:, None]
    positions = jnp.where(new, cache_seqlens[:, None] - s_q + jnp.arange(s_q), -1)
    begin = cache_seqlens - num_new
    state = jnp.where(begin > 0, read(cache, begin[:, None] - 1)[:, 0, 1], 0)

    def token_by_token(state, column):
        token, is_new = column
        state = jnp.where(is_new, mix(state, token), state)
        return state, state

    _, states = jax.lax.scan(token_by_token, state, (tokens.T, new.T))
    entries = jnp.stack([tokens, states.T], axis=-1).astype(cache.dtype).reshape(-1, 2)
    slots = mla.get_slot_mapping(block_table, positions, page).reshape(-1)
    cache = mla.append_kv_cache(cache, entries, slots, implementation="xla")

    columns = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (len(tokens), capacity))
    everything = read(cache, columns).swapaxes(0, 1)

    def fold(total, item):
        position, entry = item
        return jnp.where(position < cache_seqlens, mix(total, entry.sum(axis=-1)), total), None

    total, _ = jax.lax.scan(fold, jnp.zeros_like(cache_seqlens), (columns[0], everything))
    return jax.nn.one_hot(total % VOCAB, VOCAB) * params, cache


def sample_some(logits, key, temperature, top_k=0):
    """A random token, or the most likely one where the temperature is 0."""
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-3))
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits))


@dataclasses.dataclass
class Toy:
    """The toy as a step function. It counts its compilations and checks its arguments."""

    num_blocks: int
    page: int
    result: str = "tokens"  # or "logits", or "sampled"
    shapes: list = dataclasses.field(default_factory=list)

    def __post_init__(self):
        def forward(params, config, cache, tokens, *rest):
            self.shapes.append(tokens.shape)  # once a compilation
            return toy_forward(params, config, cache, tokens, *rest)

        one = jnp.float32(1)
        if self.result == "logits":
            self.jitted = jax.jit(functools.partial(forward, one, None), donate_argnums=0)
        else:
            sample = sample_some if self.result == "sampled" else None
            self.jitted = make_step(forward, one, None, sample)

    def cache(self):
        return jnp.full((POOL, self.page, 1, 2), jnp.nan, jnp.float32)

    def __call__(self, cache, tokens, block_table, cache_seqlens, num_new, *options):
        for array in (tokens, block_table, cache_seqlens, num_new):
            assert array.dtype == np.int32
        assert ((num_new >= 0) & (num_new <= tokens.shape[1])).all()
        assert ((num_new == 0) == (cache_seqlens == 0)).all()
        assert num_new.any()
        used = -(-cache_seqlens // self.page)
        needed = np.arange(block_table.shape[1]) < used[:, None]
        assert (block_table[needed] >= 0).all()
        assert ((block_table >= -1) & (block_table < self.num_blocks)).all()
        assert (block_table[num_new == 0] == -1).all()
        # No other sequence holds a page that this one writes.
        begins = (cache_seqlens - num_new) // self.page
        for row, begin, end in zip(block_table, begins, used, strict=True):
            for page in row[begin:end]:
                assert (block_table == page).sum() == 1
        return self.jitted(cache, tokens, block_table, cache_seqlens, num_new, *options)


@functools.cache
def optional_toy():
    """A toy whose requests have options. Compiled once too."""
    return Toy(num_blocks=POOL, page=4, result="sampled")


@functools.cache
def compiled_toy(page, batch, chunk):
    """One toy for all examples, so that each shape is compiled once."""
    return Toy(num_blocks=POOL, page=page)


def make_batcher(toy, *, batch=3, chunk=4, eos=(EOS,), **options):
    return ContinuousBatcher(
        toy,
        toy.cache(),
        num_blocks=toy.num_blocks,
        page_block_size=toy.page,
        max_batch=batch,
        max_blocks=WIDTH,
        chunk=chunk,
        eos=eos,
        **options,
    )


def check_records(batcher):
    """Checks the manager, and that only running requests hold pages."""
    manager = batcher.manager
    manager.check()
    held = set()
    for _, request in batcher._running():
        pages = manager.pages(request.number)
        assert len(pages) >= manager.pages_for(request.cached)
        held.update(pages)
    assert len(held) + manager.num_free == manager.num_blocks


def run_checked(batcher, arrivals=(), limit=3000):
    """Runs until all requests are finished. arrivals: (step, function to call then), in order."""
    arrivals, streams = list(arrivals), {}
    for step in range(limit):
        while arrivals and arrivals[0][0] <= step:
            arrivals.pop(0)[1]()
        if not arrivals and not batcher.busy:
            break
        served = batcher.step()
        for request in served:
            streams.setdefault(request, []).append(request.tokens[-1])
        check_records(batcher)
    assert not batcher.busy, "requests never finish"
    assert batcher.manager.num_free == batcher.manager.num_blocks, "pages leak"
    for request, stream in streams.items():  # each token is reported once
        assert request.generated[-len(stream) :] == stream
        assert request.finish_reason is not None


def assert_solo(request, eos=(EOS,)):
    expected = solo(request.tokens[: request.prompt_length], request.max_tokens, eos)
    if request.finish_reason == "cancelled":
        expected = expected[: len(request.generated)]
    assert request.generated == expected
    if request.finish_reason != "cancelled":
        assert request.finish_reason == ("stop" if expected[-1] in eos else "length")


# -------------------- Continuous batching

PREFIXES = tuple(tuple((i * 7 + p * p * 3) % VOCAB for i in range(17)) for p in range(3))


@st.composite
def requests(draw):
    """(step of arrival, prompt, max_tokens, number of steps until it is cancelled, or None)."""
    prefix = draw(st.sampled_from(PREFIXES))[: draw(st.integers(0, 17))]
    tail = draw(st.lists(st.integers(0, VOCAB - 1), max_size=6))
    cancelled = draw(st.one_of(st.none(), st.none(), st.none(), st.integers(0, 12)))
    prompt = (*prefix, *tail) or (1,)
    return draw(st.integers(0, 25)), prompt, draw(st.integers(1, 18)), cancelled


@settings(max_examples=250)
@hypothesis.given(
    arriving=st.lists(requests(), min_size=1, max_size=9),
    page=st.sampled_from([2, 4]),
    shape=st.sampled_from([(1, 4), (3, 4), (4, 1)]),
    spare=st.integers(0, 8),
    eos=st.sampled_from([(), (EOS,)]),
)
def test_every_request_gets_the_tokens_of_its_solo_run(arriving, page, shape, spare, eos):
    batch, chunk = shape
    width = WIDTH * page
    arriving = [(at, prompt[: width - n + 1], n, c) for at, prompt, n, c in arriving if n < width]
    largest = max(-(-(len(prompt) + n - 1) // page) for _, prompt, n, _ in arriving)
    toy = compiled_toy(page, batch, chunk)
    toy.num_blocks = min(largest + spare, POOL)  # as many as one request needs, and a few more
    batcher = make_batcher(toy, batch=batch, chunk=chunk, eos=eos)

    made, events = [], []

    def arrive(prompt, max_tokens):
        made.append(batcher.submit(prompt, max_tokens))

    for number, (at, prompt, n, cancelled) in enumerate(sorted(arriving, key=lambda r: r[0])):
        events.append((at, 0, number, functools.partial(arrive, prompt, n)))
        if cancelled is not None:
            cancel = functools.partial(lambda i: batcher.cancel(made[i]), number)
            events.append((at + cancelled, 1, number, cancel))
    events.sort(key=lambda event: event[:3])
    run_checked(batcher, [(event[0], event[3]) for event in events])

    assert len(made) == len(arriving)
    for request in made:
        assert_solo(request, eos)
    assert len(toy.shapes) == len(set(toy.shapes)) <= 2
    assert set(toy.shapes) <= {(batch, chunk), (batch, 1)}


def test_preempted_requests_resume():
    toy = Toy(num_blocks=9, page=2)
    batcher = make_batcher(toy, eos=())
    made = [batcher.submit(PREFIXES[i][: 3 + i], 11) for i in range(3)]
    run_checked(batcher)
    assert made[0].preemptions == 0  # the oldest keeps its pages
    assert sum(request.preemptions for request in made) >= 2
    for request in made:
        assert_solo(request, ())
    assert sorted(toy.shapes) == [(3, 1), (3, 4)]


def test_a_preempted_request_is_admitted_before_waiting_ones():
    batcher = make_batcher(Toy(num_blocks=7, page=2), batch=2, eos=())
    made = [batcher.submit(PREFIXES[i][:3], 10) for i in range(3)]
    while batcher.busy:
        batcher.step()
        if made[1] in batcher._waiting:
            assert made[2] in batcher._waiting
    assert made[1].preemptions
    for request in made:
        assert_solo(request, ())


def test_a_new_request_is_not_preempted_at_once():
    batcher = make_batcher(Toy(num_blocks=4, page=2), eos=())
    made = [batcher.submit(PREFIXES[i][:3], 4) for i in range(2)]
    run_checked(batcher)
    assert [request.preemptions for request in made] == [0, 0]


def test_a_common_prefix_is_read_once():
    toy = Toy(num_blocks=POOL, page=2)
    batcher = make_batcher(toy, eos=())
    first = batcher.submit(PREFIXES[0], 8)
    for _ in range(5):  # 17 tokens in chunks of 4
        assert not first.generated
        batcher.step()
    assert first.generated
    second = batcher.submit([*PREFIXES[0], 1], 3)
    batcher.step()
    assert second.reused == 16
    assert len(second.generated) == 1
    third = batcher.submit([*PREFIXES[0][:7], *PREFIXES[1][7:]], 3)
    run_checked(batcher)
    assert (first.reused, third.reused) == (0, 6)
    for request in (first, second, third):
        assert_solo(request, ())


def test_a_preempted_request_finds_pages_that_are_still_free():
    toy = Toy(num_blocks=10, page=2)
    batcher = make_batcher(toy, eos=())
    made = [batcher.submit(PREFIXES[0][:5], 12), batcher.submit(PREFIXES[1][:9], 6)]
    run_checked(batcher)
    assert made[1].preemptions
    assert made[1].reused
    for request in made:
        assert_solo(request, ())


def test_requests_decode_while_others_read_their_prompts():
    batcher = make_batcher(Toy(num_blocks=POOL, page=4), eos=())
    first = batcher.submit([1], 20)
    batcher.step()
    long = batcher.submit(PREFIXES[0], 2)
    for _ in range(5):
        batcher.step()
    assert (len(first.generated), len(long.generated)) == (6, 1)


def test_a_step_returns_the_requests_that_got_a_token():
    batcher = make_batcher(Toy(num_blocks=POOL, page=4), eos=())
    assert batcher.step() == []
    one, five = batcher.submit([1], 2), batcher.submit([1, 2, 3, 4, 5], 1)
    assert batcher.busy
    assert [batcher.step() for _ in range(3)] == [[one], [one, five], []]
    assert (one.finish_reason, five.finish_reason) == ("length", "length")
    assert not batcher.busy


def test_a_step_function_may_return_logits():
    batcher = make_batcher(Toy(num_blocks=POOL, page=4, result="logits"))
    made = [batcher.submit(prefix, 8) for prefix in PREFIXES]
    run_checked(batcher)
    for request in made:
        assert_solo(request)


def test_a_cancelled_request_frees_its_pages():
    batcher = make_batcher(Toy(num_blocks=POOL, page=4), batch=1)
    running, waiting = batcher.submit(PREFIXES[0], 8), batcher.submit(PREFIXES[1], 8)
    batcher.step()
    for request in (waiting, running, running):
        batcher.cancel(request)
        assert request.finish_reason == "cancelled"
    assert not batcher.busy
    assert batcher.manager.num_free == POOL


def test_errors_of_submit():
    batcher = make_batcher(Toy(num_blocks=5, page=4))
    for prompt, max_tokens, message in (
        ([], 1, "prompt must have at least one token"),
        ([1], 0, "max_tokens must be at least 1, got 0"),
        ([1] * 20, 2, r"may need 6 pages, but a sequence can have 5"),
    ):
        with pytest.raises(ValueError, match=message):
            batcher.submit(prompt, max_tokens)
    with pytest.raises(ValueError, match=r"unknown options \['temperature'\].* has none"):
        batcher.submit([1], 1, temperature=1.0)
    with pytest.raises(ValueError, match=r"unknown options \['seed'\].* has none"):
        batcher.submit([1], 1, seed=1)
    assert not batcher.busy
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        make_batcher(Toy(num_blocks=5, page=4), chunk=0)


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "options", "message"),
    [
        ([1, VOCAB], 4, {}, r"prompt\[1\] must be from 0 to 12, got 13"),
        ([-1], 4, {}, r"prompt\[0\] must be from 0 to 12, got -1"),
        ([2**31], 4, {}, r"prompt\[0\] must be from 0 to 12, got 2147483648"),
        ([1.5], 4, {}, r"prompt\[0\] must be an int, got 1.5"),
        ("hot", 4, {}, r"prompt\[0\] must be an int, got 'h'"),
        (7, 4, {}, "prompt must be a list of tokens, got 7"),
        ([1], 2.5, {}, "max_tokens must be an int, got 2.5"),
        ([1], "4", {}, "max_tokens must be an int, got '4'"),
        ([1], None, {}, "max_tokens must be an int, got None"),
        ([1], 4, {"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
        ([1], 4, {"seed": 2**32}, "seed must be from 0 to 4294967295, got 4294967296"),
        ([1], 4, {"seed": 0.5}, "seed must be an int, got 0.5"),
        ([1], 4, {"temperature": "hot"}, "temperature must be a finite float32 .*, got 'hot'"),
        ([1], 4, {"temperature": None}, "temperature must be a finite float32 .*, got None"),
        ([1], 4, {"temperature": float("nan")}, "temperature must be a finite float32 .*, got nan"),
        ([1], 4, {"temperature": -np.inf}, "temperature must be a finite float32 .*, got -inf"),
        ([1], 4, {"temperature": 1e39}, "temperature must be a finite float32 .*, got 1e\\+39"),
        ([1], 4, {"temperature": [1.0]}, "temperature must be a finite float32 .*, got"),
        ([1], 4, {"top_k": 2.5}, "top_k must be an int, got 2.5"),
        ([1], 4, {"top_k": 2**31}, "top_k must be from -2147483648 to 2147483647"),
    ],
)
def test_what_no_step_can_run_is_refused_when_submitted(prompt, max_tokens, options, message):
    """The request that is there before goes on."""
    batcher = make_batcher(optional_toy(), options={"temperature": 0.0, "top_k": 0}, vocab=VOCAB)
    before = batcher.submit([3, 1], 4)
    batcher.step()
    with pytest.raises(ValueError, match=message):
        batcher.submit(prompt, max_tokens, **options)
    after = batcher.submit(np.array([3, VOCAB - 1]), np.int64(4), temperature=np.float32(0))
    run_checked(batcher)
    assert_solo(before)
    assert_solo(after)
    assert after.number == 1


def test_default_options_are_checked_too():
    with pytest.raises(ValueError, match="temperature must be a finite float32 number, got inf"):
        make_batcher(optional_toy(), options={"temperature": float("inf")})


# -------------------- Sampling


def test_samples_do_not_depend_on_other_requests():
    asked = [
        (PREFIXES[0][:5], {"temperature": 1.0}),
        (PREFIXES[1][:3], {}),
        (PREFIXES[0][:6], {"temperature": 0.5, "seed": 2**32 - 1}),
        (PREFIXES[2][:4], {"temperature": 2.0}),
    ]
    toy = Toy(num_blocks=10, page=2, result="sampled")

    def submit(batcher, number):
        prompt, options = asked[number]
        return batcher.submit(prompt, 12, **{"seed": number, **options})

    batcher = make_batcher(toy, eos=(), options={"temperature": 0.0})
    together = [submit(batcher, number) for number in range(4)]
    run_checked(batcher)
    assert any(request.preemptions for request in together)
    assert sorted(toy.shapes) == [(3, 1), (3, 4)]

    for number, request in enumerate(together):
        alone = make_batcher(toy, eos=(), options={"temperature": 0.0})
        expected = submit(alone, number)
        run_checked(alone)
        assert request.generated == expected.generated
    assert_solo(together[1], ())  # temperature 0: greedy
    generated = {tuple(request.generated) for request in together}
    greedy = {tuple(solo(prompt, 12)) for prompt, _ in asked}
    assert len(generated & greedy) == 1


def test_the_default_seed_is_the_number_of_the_request():
    toy = Toy(num_blocks=POOL, page=2, result="sampled")
    batcher = make_batcher(toy, eos=(), options={"temperature": 100.0})  # nearly uniform
    made = [batcher.submit([1, 2], 12, **options) for options in ({}, {}, {"seed": 0})]
    run_checked(batcher)
    first, second, third = (request.generated for request in made)
    assert first == third != second
    assert len(set(first)) > 3  # each token has a key of its own


# -------------------- A model with attention

LATENT, ROPE, HEADS, NOPE, MODEL, TOKENS = 12, 4, 3, 8, 16, 24


def attention_weights():
    shapes = {
        "embedding": (TOKENS, MODEL),
        "query": (MODEL, HEADS, NOPE + ROPE),
        "kv_down": (MODEL, LATENT + ROPE),
        "key_up": (HEADS, NOPE, LATENT),
        "value_up": (HEADS, LATENT, NOPE),
        "out": (HEADS, NOPE, MODEL),
        "head": (MODEL, TOKENS),
    }
    rng = np.random.default_rng(0)
    scale = {"embedding": 1.0, "query": 0.6, "out": 0.6}
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(scale.get(name, 0.3))
        for name, shape in shapes.items()
    }


def rotate(x, positions):
    """x [..., n, heads, ROPE] by positions [..., n]. For numpy and jax."""
    angle = positions[..., None, None] * np.array([1.0, 0.1], np.float32)
    a, b = x[..., : ROPE // 2], x[..., ROPE // 2 :]
    module = jnp if isinstance(x, jax.Array) else np
    cos, sin = module.cos(angle), module.sin(angle)
    return module.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def attention_forward(w, config, cache, tokens, block_table, cache_seqlens, num_new):
    """One layer of MLA with absorption, on the paged cache."""
    b, s_q = tokens.shape
    new = jnp.arange(s_q) >= s_q - num_new[:, None]
    positions = jnp.where(new, cache_seqlens[:, None] - s_q + jnp.arange(s_q), -1)
    x = w["embedding"][tokens]
    query = jnp.einsum("bnm,mhe->bnhe", x, w["query"])
    q_latent = jnp.einsum("bnhe,hec->bnhc", query[..., :NOPE], w["key_up"])
    q = jnp.concatenate([q_latent, rotate(query[..., NOPE:], positions)], axis=-1)
    down = x @ w["kv_down"]
    k_rope = rotate(down[:, :, None, LATENT:], positions)[:, :, 0]
    entries = jnp.concatenate([down[..., :LATENT], k_rope], axis=-1)
    slots = mla.get_slot_mapping(block_table, positions, cache.shape[1])
    cache = mla.append_kv_cache(
        cache, entries.reshape(b * s_q, -1), slots.reshape(-1), implementation="xla"
    )
    attended, _ = mla.flash_mla_with_kvcache(
        q,
        cache,
        block_table,
        cache_seqlens,
        LATENT,
        softmax_scale=(NOPE + ROPE) ** -0.5,
        causal=True,
        implementation="xla",
    )
    values = jnp.einsum("bhc,hcv->bhv", attended[:, -1], w["value_up"])
    x = x[:, -1] / 4 + jnp.einsum("bhv,hvm->bm", values, w["out"])
    return x @ w["head"], cache


def attention_solo(w, prompt, max_tokens):
    """The same model on one sequence in float64: keys and values of every head, no pages."""
    w = {name: weight.astype(np.float64) for name, weight in w.items()}
    tokens = list(prompt)
    for _ in range(max_tokens):
        x, positions = w["embedding"][tokens], np.arange(len(tokens))
        query = np.einsum("m,mhe->he", x[-1], w["query"])
        q_rope = rotate(query[None, :, NOPE:], positions[-1:])[0]
        down = x @ w["kv_down"]
        key = np.einsum("tc,hec->the", down[:, :LATENT], w["key_up"])
        value = np.einsum("tc,hcv->thv", down[:, :LATENT], w["value_up"])
        scores = np.einsum("he,the->ht", query[:, :NOPE], key)
        scores += q_rope @ rotate(down[:, None, LATENT:], positions)[:, 0].T
        scores *= (NOPE + ROPE) ** -0.5
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x[-1] / 4 + np.einsum("ht,thv,hvm->m", weights, value, w["out"])
        tokens.append(int(np.argmax(x @ w["head"])))
    return tokens[len(prompt) :]


def test_a_model_with_attention_gets_the_tokens_of_solo_runs():
    w, page = attention_weights(), 4
    rng = np.random.default_rng(1)
    common = rng.integers(0, TOKENS, 9)
    prompts = [[*common, *rng.integers(0, TOKENS, n)] for n in (1, 0, 6)]
    prompts += [list(rng.integers(0, TOKENS, n)) for n in (1, 14)]
    batcher = ContinuousBatcher(
        make_step(attention_forward, w, None),
        jnp.full((12, page, 1, LATENT + ROPE), jnp.nan, jnp.float32),
        num_blocks=12,
        page_block_size=page,
        max_batch=3,
        max_blocks=10,
        chunk=5,
    )
    made = []
    arrivals = [
        (4 * i, lambda p=p: made.append(batcher.submit(p, 16))) for i, p in enumerate(prompts)
    ]
    run_checked(batcher, arrivals)
    assert any(request.preemptions for request in made)
    assert any(request.reused for request in made)
    for request, prompt in zip(made, prompts, strict=True):
        assert request.generated == attention_solo(w, prompt, 16)
    # The tokens must vary, or a wrong model could give them too.
    assert len({token for request in made for token in request.generated}) > 6
