"""FlashMLA's own grid of sparse decode, 4,896 calls, against float32 on the same device.

Every test is one `Shape`: one compiled program with a call for each batch size, run for all Flags.
The lists of a smaller batch are the first ones of the largest batch, so one computation of the
expected results serves all of them. As in the dense grid, a few threads compile ahead, and random
values are drawn on the device.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import random

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_dense_decode_grid
from cases import D_V, SparseCase
from lowering import struct
from sparse_calls import check, sparse_decode
from test_dense_decode_grid import is_off

BATCHES = (4, 74, 321)
TOKEN_BUCKETS = (128, 640, 1152, 2624, 4096)  # entries of both lists of a query, padded


@dataclasses.dataclass(frozen=True)
class Cache:
    """A cache and its lists: tokens of each sequence, entries of a list, page size."""

    s_k: int
    topk: int
    page: int

    @property
    def capacity(self):
        """Slots of each sequence."""
        return -(-self.s_k // self.page) * self.page

    def __str__(self):
        return f"{self.s_k}-{self.topk}-{self.page}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one compiled program serves."""

    d_k: int
    h_q: int
    s_q: int
    main: Cache
    extra: Cache | None = None
    has_sink: bool = True

    def __str__(self):
        extra = f"-extra-{self.extra}" if self.extra else ""
        sink = "" if self.has_sink else "-no-sink"
        return f"d{self.d_k}-hq{self.h_q}-sq{self.s_q}-{self.main}{extra}{sink}"

    @property
    def caches(self):
        return (self.main,) if self.extra is None else (self.main, self.extra)

    @property
    def bucket(self):
        entries = sum(cache.topk for cache in self.caches)
        return next(size for size in TOKEN_BUCKETS if size >= entries)


@dataclasses.dataclass(frozen=True)
class Flags:
    """How the values of a call are drawn."""

    varlen: bool = True
    topk_length: bool = False
    extra_topk_length: bool = False
    all_invalid: bool = False
    zeros: bool = False  # about half of the sequences are empty

    def __str__(self):
        names = [f.name for f in dataclasses.fields(self) if getattr(self, f.name)]
        return "-".join(names) or "plain"


CACHES = (
    Cache(512, 64, 2), Cache(512, 64, 64), Cache(512, 64, 69), Cache(1024, 576, 2),
    Cache(1024, 576, 61), Cache(2046, 2048, 2), Cache(2046, 2048, 64), Cache(2046, 2048, 576),
)  # fmt: skip
CORNER_CACHES = (Cache(512, 64, 61), Cache(650, 576, 53))


def flags_of(shape):
    """FlashMLA's: without any lengths there are sequences of one length too."""
    for extra in (False, True) if shape.extra else (False,):
        for main in (False, True):
            for varlen in (True,) if main or extra else (True, False):
                yield Flags(varlen, main, extra)


def flashmla_grid() -> dict[Shape, list[Flags]]:
    grid = {}

    def shapes(caches, queries, **options):
        for d_k, h_q, s_q, main in itertools.product((576, 512), (64, 128), queries, caches):
            for extra in (None, *caches) if d_k == 512 else (None,):
                yield Shape(d_k, h_q, s_q, main, extra, **options)

    for shape in shapes(CACHES, (1, 3)):
        grid[shape] = list(flags_of(shape))
    for sink in (True, False):
        for shape in shapes(CORNER_CACHES, (3,), has_sink=sink):
            grid[shape] = [
                dataclasses.replace(flags, all_invalid=invalid, zeros=zeros)
                for flags in flags_of(shape)
                for invalid, zeros in itertools.product((True, False), repeat=2)
                if invalid or zeros or sink
            ]
    return grid


GRID = flashmla_grid()


def test_grid_is_whole():
    """The number of calls is FlashMLA's, which has sequences of one length in one batch only."""
    calls = [(shape, flags) for shape, all_flags in GRID.items() for flags in all_flags]
    assert len(calls) == len(set(calls)) == 1920
    assert sum(len(BATCHES) if flags.varlen else 1 for _, flags in calls) == 4896


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_values(key, rows, d_k, deviation):
    """bf16 [rows, d_k], normal within [-1, 1]."""

    def draw(key):
        values = jax.random.normal(key, (64, d_k), jnp.float32) * deviation
        return jnp.clip(values, -1, 1).astype(jnp.bfloat16)

    return jax.lax.map(draw, jax.random.split(key, -(-rows // 64)), batch_size=512).reshape(-1, d_k)


def draw_lists(key, lengths, full, all_invalid, *, cache, s_q):
    """Distinct slots of each sequence in random order, then -1: (lists, their lengths).

    The slots of sequence i are the i-th run of `cache.capacity`.
    """
    b = lengths.shape[0]
    for_order, for_length = jax.random.split(key)
    token = jnp.arange(cache.capacity, dtype=jnp.int32)
    order = jax.random.uniform(for_order, (b, s_q, cache.capacity))
    order = jnp.where(token < lengths[:, None, None], order, 2 + token)
    tokens = jnp.argsort(order, axis=-1)[..., : cache.topk].astype(jnp.int32)
    tokens = jnp.where(tokens < lengths[:, None, None], tokens, -1)
    padding = cache.topk - tokens.shape[-1]
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, max(padding, 0))), constant_values=-1)
    first = jnp.arange(b, dtype=jnp.int32)[:, None, None] * cache.capacity
    lists = jnp.where((tokens < 0) | all_invalid, -1, tokens + first)
    some = jax.random.randint(for_length, (b, s_q), 0, cache.topk + 1)
    return lists, jnp.where(full, cache.topk, some)


def live_entries(lists, lengths):
    """The slots that a query attends to; -1 elsewhere."""
    listed = jnp.arange(lists.shape[-1], dtype=jnp.int32) < lengths[..., None]
    return jnp.where(listed, lists, -1)


def poisoned_pools(rows, first, lists, lengths, *, cache, batches):
    """A cache for each batch size, from rows[first:], NaN where no list names the slot."""
    pools = []
    for b in batches:
        slots = b * cache.capacity
        live = live_entries(lists[:b], lengths[:b]).reshape(-1)
        live = jnp.where(live < 0, slots, live)
        named = jnp.zeros(slots, bool).at[live].set(True, mode="drop")
        values = jax.lax.dynamic_slice_in_dim(rows, first, slots)
        pool = jnp.where(named[:, None], values, jnp.nan)
        pools.append(pool.reshape(-1, cache.page, 1, rows.shape[1]))
    return pools


def call_all(queries, pools, lists, lengths, sink, *, shape, batches, shift, implementation):
    """The op for each batch size; and the slots of all lists, in one pool of both caches."""
    results = []
    for i, b in enumerate(batches):
        count = b * shape.s_q * shape.h_q
        q = queries[:count].reshape(b, shape.s_q, shape.h_q, shape.d_k)
        given = {"indices": lists[0][:b], "topk_length": lengths[0][:b]}
        if shape.extra:
            given["extra_k_cache"] = pools[1][i]
            given["extra_indices_in_kvcache"] = lists[1][:b]
            given["extra_topk_length"] = lengths[1][:b]
        if shape.has_sink:
            given["attn_sink"] = sink
        out, lse = sparse_decode(
            q, pools[0][i], softmax_scale=shape.d_k**-0.55, implementation=implementation, **given
        )
        results.append((out.reshape(-1, *out.shape[2:]), lse.swapaxes(1, 2).reshape(-1, shape.h_q)))
    slots = [live_entries(*x) for x in zip(lists, lengths, strict=True)]
    slots = jnp.concatenate([jnp.where(x < 0, -1, x + i * shift) for i, x in enumerate(slots)], -1)
    slots = slots.reshape(-1, slots.shape[-1])
    padding = ((0, 0), (0, shape.bucket - slots.shape[1]))
    return results, jnp.pad(slots, padding, constant_values=-1)


def compare(queries, rows, slots, sink, results):
    """Compares the results of all batch sizes with plain attention in float32.

    Returns:
      counts i32 [batch sizes, 2]: elements of out and of lse that are off; sums f32 [batch sizes,
      2]: squared differences of out, squares of both.
    """
    n, d_k = slots.shape[0], rows.shape[1]
    h_q = results[0][0].shape[1]
    q = queries[: n * h_q].reshape(n, h_q, d_k)
    together = max(g for g in (1, 3, 9, 107) if n % g == 0 and g * slots.shape[1] <= 2**17)

    def expected_of(group):
        q, slots = group
        live = slots >= 0
        kv = jnp.where(live[..., None], rows[jnp.maximum(slots, 0)], 0).astype(jnp.float32)
        product = functools.partial(jnp.einsum, precision="highest")
        scores = product("nhd,ntd->nht", q.astype(jnp.float32), kv) * d_k**-0.55
        scores = jnp.where(live[:, None], scores, -jnp.inf)
        some = live.any(axis=-1)[:, None]
        maximum = jnp.where(some, scores.max(axis=-1), 0)
        weights = jnp.exp(scores - maximum[..., None])
        total = jnp.where(some, weights.sum(axis=-1), 1)
        lse = maximum + jnp.log(total)
        factor = jnp.where(some, jax.nn.sigmoid(lse - sink), 0) / total
        out = product("nht,ntd->nhd", weights, kv[..., :D_V]) * factor[..., None]
        return out, jnp.where(some, lse, jnp.inf)

    groups = (x.reshape(n // together, together, *x.shape[1:]) for x in (q, slots))
    expected = jax.lax.map(expected_of, tuple(groups))
    expected_out, expected_lse = (x.reshape(n, *x.shape[2:]) for x in expected)
    expected_out = expected_out.astype(jnp.bfloat16).astype(jnp.float32)
    counts, sums = [], []
    for out, lse in results:
        m = out.shape[0]
        actual = out.astype(jnp.float32)
        off = is_off(actual, expected_out[:m], 1e-3, 2.01 / 128)
        lse_off = is_off(lse, expected_lse[:m], 1e-6, 8.01 / 65536)
        counts.append(jnp.stack([off.sum(dtype=jnp.int32), lse_off.sum(dtype=jnp.int32)]))
        squares = actual**2 + expected_out[:m] ** 2
        sums.append(jnp.stack([((actual - expected_out[:m]) ** 2).sum(), squares.sum()]))
    return jnp.stack(counts), jnp.stack(sums)


class Grid:
    """The arrays that all calls share, and their compiled functions."""

    def __init__(self, shapes, implementation, batches=BATCHES):
        self.batches, self.implementation = batches, implementation
        caches = {cache for shape in shapes for cache in shape.caches}
        self.num_rows = -(-batches[-1] * max(cache.capacity for cache in caches) // 64) * 64
        queries = batches[-1] * max(shape.s_q * shape.h_q for shape in shapes)
        self.rows, self.queries = {}, {}
        for d_k in {shape.d_k for shape in shapes}:
            keys = jax.random.split(jax.random.key(d_k))
            self.rows[d_k] = random_values(keys[0], 2 * self.num_rows, d_k, 0.1)
            self.queries[d_k] = random_values(keys[1], queries, d_k, 1.0)
        self.pool = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.compiled = {}
        for shape in shapes:
            self.compile_all(shape)

    def close(self):
        self.pool.shutdown(cancel_futures=True)

    def compile(self, name, function, *structs):
        """Starts to compile a function, unless one of this name is there."""
        if name not in self.compiled:
            self.compiled[name] = self.pool.submit(
                lambda: jax.jit(function).lower(*structs).compile()
            )

    def compile_all(self, shape):
        b, s_q, d_k, h_q = self.batches[-1], shape.s_q, shape.d_k, shape.h_q
        flag = struct((), bool)
        rows, queries = (struct(x[d_k].shape) for x in (self.rows, self.queries))
        sink = struct((h_q,), jnp.float32)
        lists, lengths, pools = [], [], []
        for cache in shape.caches:
            lists.append(struct((b, s_q, cache.topk), jnp.int32))
            lengths.append(struct((b, s_q), jnp.int32))
            pages = cache.capacity // cache.page  # of a sequence
            pools.append([struct((n * pages, cache.page, 1, d_k)) for n in self.batches])
            draw = functools.partial(draw_lists, cache=cache, s_q=s_q)
            key, drawn = jax.eval_shape(jax.random.key, 0), struct((b,), jnp.int32)
            self.compile(("draw", cache, s_q), draw, key, drawn, flag, flag)
            poison = functools.partial(poisoned_pools, cache=cache, batches=self.batches)
            structs = (rows, struct((), jnp.int32), lists[-1], lengths[-1])
            self.compile(("poison", cache, s_q, d_k), poison, *structs)
        call = functools.partial(
            call_all,
            shape=shape,
            batches=self.batches,
            shift=self.num_rows,
            implementation=self.implementation,
        )
        self.compile(shape, call, queries, pools, lists, lengths, sink)
        results = [
            (struct((n * s_q, h_q, D_V)), struct((n * s_q, h_q), jnp.float32)) for n in self.batches
        ]
        slots = struct((b * s_q, shape.bucket), jnp.int32)
        name = ("compare", s_q, d_k, h_q, shape.bucket)
        self.compile(name, compare, queries, rows, slots, sink, results)

    def get(self, *name):
        return self.compiled[name if len(name) > 1 else name[0]].result()

    def run(self, shape, flags, seed=0, disturb=lambda results: results):
        """Runs the calls of all batch sizes; (counts, sums) of `compare`, still on the device."""
        rng = np.random.default_rng(seed)
        rows, queries = self.rows[shape.d_k], self.queries[shape.d_k]
        lists, lengths, pools = [], [], []
        for i, cache in enumerate(shape.caches):
            given = flags.extra_topk_length if i else flags.topk_length
            drawn, length = self.get("draw", cache, shape.s_q)(
                jax.random.key(2 * seed + i),
                jnp.asarray(self.sequence_lengths(rng, cache, shape, flags)),
                jnp.asarray(not given),
                jnp.asarray(flags.all_invalid),
            )
            poison = self.get("poison", cache, shape.s_q, shape.d_k)
            pools.append(poison(rows, jnp.int32(i * self.num_rows), drawn, length))
            lists.append(drawn)
            lengths.append(length)
        sink = jnp.asarray(random_sink(rng, shape.h_q), jnp.float32)
        results, slots = self.get(shape)(queries, pools, lists, lengths, sink)
        results = disturb(results)
        if not shape.has_sink:
            sink = jnp.full_like(sink, -jnp.inf)
        name = ("compare", shape.s_q, shape.d_k, shape.h_q, shape.bucket)
        return self.get(*name)(queries, rows, slots, sink, results)

    def sequence_lengths(self, rng, cache, shape, flags):
        b = self.batches[-1]
        lengths = np.full(b, cache.s_k)
        if flags.varlen:
            lengths = np.clip(rng.normal(cache.s_k, cache.s_k / 2, b), shape.s_q, cache.s_k)
        if flags.zeros:
            lengths = np.where(rng.random(b) < 0.5, 0, lengths)
        return lengths.astype(np.int32)


def random_sink(rng, h_q):
    """Normal; 5 of 16 are +inf, 5 of 16 -inf."""
    kind = rng.integers(0, 16, h_q)
    sink = rng.standard_normal(h_q)
    return np.where(kind < 5, np.inf, np.where(kind < 10, -np.inf, sink))


def failure(result) -> str | None:
    """What is wrong with the results of the batch sizes, or None."""
    for i, one in enumerate(zip(*jax.device_get(result), strict=True)):
        if wrong := test_dense_decode_grid.failure(one):
            return f"batch {i}: {wrong}"
    return None


@pytest.fixture(scope="module")
def grid(request):
    """Compiles what the selected tests need."""
    selected = [
        item.callspec.params["shape"]
        for item in request.session.items
        if item.module is request.module and item.originalname == "test_grid"
    ]
    grid = Grid(selected, "cuda")
    yield grid
    grid.close()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(shape, grid):
    results = {flags: grid.run(shape, flags, i) for i, flags in enumerate(GRID[shape])}
    failures = {str(flags): failure(result) for flags, result in results.items()}
    assert not {flags: text for flags, text in failures.items() if text}


def grid_sample():
    """Some shapes, for a batch of 3 with lengths."""
    for shape in random.Random(0).sample([s for s in GRID if s.h_q == 64], 16):
        main, extra = shape.main, shape.extra or Cache(0, 0, 64)
        yield SparseCase(
            3, shape.s_q, 64, main.topk, extra.topk, shape.d_k, main.page, extra.page
        )  # fmt: skip


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("case", list(grid_sample()), ids=str)
def test_sample_against_float64(case, implementation):
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, case.topk + 1, 3)
    inputs = cases.make_sparse_inputs(case, lengths=lengths)
    sink = random_sink(rng, case.h_q).astype(np.float32)
    check(inputs.replace(attn_sink=sink), implementation, softmax_scale=case.d_k**-0.55)


@pytest.fixture(scope="module")
def small_grid():
    """A few shapes on any machine, to show that the comparison works and fails where it should."""
    shapes = [
        Shape(512, 2, 3, Cache(50, 64, 7), Cache(90, 40, 2)),
        Shape(576, 3, 1, Cache(100, 30, 61), has_sink=False),
    ]
    grid = Grid(shapes, "xla", batches=(2, 3))
    yield grid, shapes
    grid.close()


SMALL_FLAGS = [
    Flags(), Flags(varlen=False), Flags(topk_length=True), Flags(extra_topk_length=True),
    Flags(all_invalid=True), Flags(zeros=True, topk_length=True, extra_topk_length=True),
]  # fmt: skip


@pytest.mark.parametrize("flags", SMALL_FLAGS, ids=str)
def test_comparison_passes(small_grid, flags):
    grid, shapes = small_grid
    for shape in shapes:
        assert failure(grid.run(shape, flags)) is None


def disturbed(change_out, change_lse):
    """Changes the results of the second batch size."""
    return lambda results: [results[0], (change_out(results[1][0]), change_lse(results[1][1]))]


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (disturbed(lambda out: out.at[1, 0, 5].add(0.05), lambda lse: lse), "1 elements of out"),
        (disturbed(lambda out: out.at[0, 1, 0].set(jnp.nan), lambda lse: lse), "1 elements of out"),
        (disturbed(lambda out: out, lambda lse: lse.at[1, 1].add(0.01)), "0 elements of out and 1"),
        (disturbed(lambda out: out, lambda lse: lse.at[1, 1].set(jnp.inf)), "and 1 of lse"),
        (disturbed(lambda out: out * jnp.bfloat16(1.0078), lambda lse: lse), "cosine difference"),
    ],
)
def test_comparison_fails(small_grid, disturb, message):
    grid, shapes = small_grid
    text = failure(grid.run(shapes[1], Flags(varlen=False), disturb=disturb))
    assert text.startswith("batch 1: ")
    assert message in text


def test_comparison_sees_empty_lists(small_grid):
    grid, shapes = small_grid
    minus = disturbed(lambda out: out, lambda lse: -lse)
    text = failure(grid.run(shapes[0], Flags(all_invalid=True), disturb=minus))
    assert f"{3 * 3 * 2} of lse" in text
