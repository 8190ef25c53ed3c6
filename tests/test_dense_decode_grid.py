"""FlashMLA's own dense grid, 2,336 calls, against float32 on the same device.

Slow work happens once or off the main thread. A few threads compile the calls ahead, one program
for each shape. Random values are drawn once on the device. One program computes the expected
results of all shapes with the same padded sizes; it walks over pairs of a sequence and a KV head
("items").
"""

import concurrent.futures
import dataclasses
import os

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_K, D_V, Case

import jax_flashmla as fm

PAGE = 64
ROW_BUCKETS = (64, 128, 256, 512)  # query rows of an item, padded
ITEM_BUCKETS = (64, 1024)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one compiled call serves."""

    b: int
    s_q: int
    h_q: int
    h_kv: int
    causal: bool

    def __str__(self):
        causal = "-causal" if self.causal else ""
        return f"b{self.b}-sq{self.s_q}-hq{self.h_q}-hkv{self.h_kv}{causal}"

    @property
    def group(self) -> int:
        return self.h_q // self.h_kv

    @property
    def padded(self) -> tuple[int, int]:
        """(items, rows) after padding."""
        items, rows = self.b * self.h_kv, self.s_q * self.group
        return tuple(
            next(size for size in buckets if size >= n)
            for n, buckets in ((items, ITEM_BUCKETS), (rows, ROW_BUCKETS))
        )


def by_shape(grid) -> dict[Shape, list[Case]]:
    groups = {}
    for case in grid:
        shape = Shape(case.b, case.s_q, case.h_q, case.h_kv, case.causal)
        groups.setdefault(shape, []).append(case)
    return groups


GRID = by_shape(cases.dense_grid())


def to_items(x, shape):
    """[b, s_q, h_q, ...] -> [items, rows, ...], padded; rows are ordered (s, g)."""
    items, rows = shape.padded
    x = x.reshape(shape.b, shape.s_q, shape.h_kv, shape.group, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1).reshape(shape.b * shape.h_kv, shape.s_q * shape.group, *x.shape[4:])
    padding = [(0, items - x.shape[0]), (0, rows - x.shape[1])] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, padding)


@jax.jit
def random_rows(keys):
    """bf16 [len(keys) * 64, D_K], normal with a deviation of 0.1 within [-1, 1]."""

    def draw(key):
        values = jax.random.normal(key, (64, D_K), jnp.float32) / 10
        return jnp.clip(values, -1, 1).astype(jnp.bfloat16)

    return jax.lax.map(draw, keys, batch_size=512).reshape(-1, D_K)


@jax.jit
def poison(rows, live_slots, h_kv):
    """NaN in the slots of each page from live_slots on."""
    row = jnp.arange(rows.shape[0], dtype=jnp.int32)
    live = row // h_kv % PAGE < live_slots[row // (h_kv * PAGE)]
    return jnp.where(live[:, None], rows, jnp.nan)


@jax.jit
def compare(q, out, lse, rows, table, lengths, items, h_kv, group, s_q, causal):
    """Compares items with plain attention in float32.

    Returns:
      counts i32 [2]: elements of out and of lse that are off, or not finite where they should be
        and the reverse; sums f32 [2]: squared differences of out, squares of both.
    """
    positions = jnp.arange(table.shape[1] * PAGE, dtype=jnp.int32)
    row = jnp.arange(q.shape[1], dtype=jnp.int32)

    def one(item, state):
        counts, sums = state
        sequence, head = item // h_kv, item % h_kv
        length = lengths[sequence]
        live = positions < length
        page_ids = jnp.repeat(table[sequence], PAGE)
        slot = jnp.where(live, page_ids * PAGE + positions % PAGE, 0)
        kv = jnp.where(live[:, None], rows[slot * h_kv + head], 0).astype(jnp.float32)
        scores = jnp.dot(q[item].astype(jnp.float32), kv.T, precision="highest") * D_K**-0.5
        seen = length - jnp.where(causal, s_q - 1 - row // group, 0)
        scores = jnp.where(positions < seen[:, None], scores, -jnp.inf)
        some = seen > 0
        maximum = jnp.where(some, scores.max(axis=1), 0)
        weights = jnp.exp(scores - maximum[:, None])
        total = jnp.where(some, weights.sum(axis=1), 1)
        expected = jnp.dot(weights, kv[:, :D_V], precision="highest") / total[:, None]
        expected = expected.astype(out.dtype).astype(jnp.float32)
        expected_lse = jnp.where(some, maximum + jnp.log(total), jnp.inf)

        valid = row < s_q * group
        actual = out[item].astype(jnp.float32)
        off = is_off(actual, expected, 8e-4, 2.01 / 128) & valid[:, None]
        lse_off = is_off(lse[item], expected_lse, 1e-6, 8.01 / 65536) & valid
        difference = jnp.where(valid[:, None], actual - expected, 0)
        squares = jnp.where(valid[:, None], actual**2 + expected**2, 0)
        return (
            counts + jnp.stack([off.sum(dtype=jnp.int32), lse_off.sum(dtype=jnp.int32)]),
            sums + jnp.stack([(difference**2).sum(), squares.sum()]),
        )

    return jax.lax.fori_loop(0, items, one, (jnp.zeros(2, jnp.int32), jnp.zeros(2)))


def is_off(actual, expected, atol, rtol):
    """Which elements differ by more than both tolerances, or are inf or NaN on one side only."""
    error = jnp.abs(actual - expected)
    close = (error < atol) | (error < rtol * (jnp.abs(expected) + 1e-6))
    same = (actual == expected) | (jnp.isnan(actual) & jnp.isnan(expected))
    return ~jnp.where(jnp.isfinite(expected), close, same)


class Grid:
    """The arrays that all calls share, and their compiled functions."""

    def __init__(self, groups, implementation):
        self.implementation = implementation
        flat = [case for group in groups.values() for case in group]
        pages = {case: -(-case.lengths() // PAGE) for case in flat}
        self.table_width = int(max(n.max() for n in pages.values()))
        # One array of rows serves as a pool of pages with any number of KV heads.
        unit = PAGE * int(np.lcm.reduce([case.h_kv for case in flat]))
        rows = max(int(n.sum() + 1) * PAGE * case.h_kv for case, n in pages.items())
        self.num_rows = -(-rows // unit) * unit
        self.max_b = max(case.b for case in flat)
        queries = max(case.b * case.s_q * case.h_q for case in flat)
        keys = jax.random.split(jax.random.key(0), self.num_rows // 64 + -(-queries // 64))
        self.rows = random_rows(keys[: self.num_rows // 64])
        self.queries = random_rows(keys[self.num_rows // 64 :])
        self.pool = concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        self.calls = {shape: self.pool.submit(self.compile, shape) for shape in groups}

    def close(self):
        self.pool.shutdown(cancel_futures=True)

    def compile(self, shape):
        """The op on this shape, its results as items."""

        def call(queries, rows, table, lengths):
            q = queries[: shape.b * shape.s_q * shape.h_q]
            q = q.reshape(shape.b, shape.s_q, shape.h_q, D_K)
            out, lse = fm.flash_mla_with_kvcache(
                q,
                rows.reshape(-1, PAGE, shape.h_kv, D_K),
                table[: shape.b],
                lengths[: shape.b],
                D_V,
                causal=shape.causal,
                implementation=self.implementation,
            )
            return tuple(to_items(x, shape) for x in (q, out, lse.transpose(0, 2, 1)))

        arrays = (
            jax.ShapeDtypeStruct(self.queries.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct(self.rows.shape, jnp.bfloat16),
            jax.ShapeDtypeStruct((self.max_b, self.table_width), jnp.int32),
            jax.ShapeDtypeStruct((self.max_b,), jnp.int32),
        )
        return jax.jit(call).lower(*arrays).compile()

    def layout(self, case):
        """Pages for a case's sequences, shuffled: (table, lengths, live slots of each page)."""
        rng = np.random.default_rng(case.seed)
        lengths = np.zeros(self.max_b, np.int32)
        lengths[: case.b] = case.lengths()
        used = -(-lengths // PAGE)
        ids = rng.permutation(self.num_rows // (PAGE * case.h_kv))[: used.sum()]
        position = np.concatenate([np.arange(n) for n in used])
        sequence = np.repeat(np.arange(self.max_b), used)
        table = np.full((self.max_b, self.table_width), cases.UNUSED_ENTRY, np.int32)
        table[sequence, position] = ids
        live = np.zeros(self.num_rows // PAGE, np.int32)
        live[ids] = np.minimum(lengths[sequence] - position * PAGE, PAGE)
        return table, lengths, live

    def run(self, case, shape, disturb=lambda out, lse: (out, lse)):
        """Runs one case; (counts, sums) of `compare`, still on the device."""
        table, lengths, live = map(jnp.asarray, self.layout(case))
        rows = poison(self.rows, live, shape.h_kv)
        call = self.calls[shape].result()
        q, out, lse = call(self.queries, rows, table, lengths)
        out, lse = disturb(out, lse)
        items = shape.b * shape.h_kv
        sizes = (items, shape.h_kv, shape.group, shape.s_q, shape.causal)
        return compare(q, out, lse, rows, table, lengths, *sizes)


def failure(result) -> str | None:
    """What is wrong with the result of a case, or None."""
    (out_off, lse_off), (difference, squares) = jax.device_get(result)
    if out_off or lse_off:
        return f"{out_off} elements of out and {lse_off} of lse are off"
    # 1 - 2 <a, e> / (<a, a> + <e, e>), in a form that does not cancel
    if squares > 1e-12 and not difference / squares < 5e-6:
        return f"cosine difference {difference / squares}"
    return None


@pytest.fixture(scope="module")
def grid(request):
    """Compiles what the selected tests need."""
    selected = [
        item.callspec.params["shape"]
        for item in request.session.items
        if item.module is request.module and item.originalname == "test_grid"
    ]
    grid = Grid({shape: GRID[shape] for shape in selected}, "cuda")
    yield grid
    grid.close()


@pytest.mark.gpu
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_grid(shape, grid):
    results = {case: grid.run(case, shape) for case in GRID[shape]}
    failures = {str(case): failure(result) for case, result in results.items()}
    assert not {case: text for case, text in failures.items() if text}


@pytest.fixture(scope="module")
def small_grid():
    """A few cases on any machine, to show that the comparison works and fails where it should."""
    groups = by_shape(
        [
            Case(3, 2, 100, 6, 3, varlen=True, causal=True, zeros=True),
            Case(3, 2, 40, 6, 3, causal=True),
            Case(2, 4, 130, 2, 2, varlen=True),
        ]
    )
    grid = Grid(groups, "xla")
    yield grid, [(case, shape) for shape, group in groups.items() for case in group]
    grid.close()


def test_comparison_passes(small_grid):
    grid, small = small_grid
    for case, shape in small:
        assert failure(grid.run(case, shape)) is None


@pytest.mark.parametrize(
    ("disturb", "message"),
    [
        (lambda out, lse: (out.at[0, 0, 5].add(0.01), lse), "1 elements of out"),
        (lambda out, lse: (out, lse.at[1, 1].add(0.01)), "1 of lse"),
        (lambda out, lse: (out, lse.at[1, 1].set(jnp.inf)), "1 of lse"),
        (lambda out, lse: (out.at[0, 1, 0].set(jnp.nan), lse), "1 elements of out"),
        (lambda out, lse: (out + jnp.bfloat16(4e-4), lse), "cosine difference"),
    ],
)
def test_comparison_fails(small_grid, disturb, message):
    grid, small = small_grid
    case, shape = small[-1]
    assert message in failure(grid.run(case, shape, disturb))


def test_comparison_sees_empty_rows(small_grid):
    grid, small = small_grid
    case, shape = small[0]
    empty = int(np.argmin(case.lengths()))
    assert case.lengths()[empty] == 0

    def disturb(out, lse):
        return out, jnp.where(jnp.isinf(lse), -lse, lse)

    heads, rows = shape.h_kv, shape.s_q * shape.group
    empties = int((case.lengths() == 0).sum())
    assert f"{empties * heads * rows} of lse" in failure(grid.run(case, shape, disturb))
