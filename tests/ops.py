"""The table of ops. A row has what the tests of common properties need to know about one op.

A property that every op must have (vmap gives what a loop gives, a donated cache stays in place,
a program for a GPU calls the kernel once, ...) is tested once, over the rows of this table:

    @ops.each()                         # every row
    @ops.each(lambda row: row.targets)  # the rows of ops that have a kernel

A new op adds a row to ROWS, with its operands, its call and its expected results. What only this op
does is tested in its own file.
"""

import dataclasses
import functools
from collections.abc import Callable

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import samples
from cases import D_K, D_V, UNUSED_ENTRY
from expected import expected_append, expected_merge, slow_schedule
from lowering import APPEND, DECODE, SCHEDULE, SCHEDULE_AND_DECODE, SPARSE_DECODE, struct

import jax_flashmla as fm


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array that a call takes.

    Attributes:
      name: as in error messages.
      axes: the names of its axes, such as "b max_blocks"; `OpRow.sizes` says how long they are.
        Axis 0 is the one that grows when vmap folds a mapped axis into the operand.
      dtype: of its elements.
      draw: (rng, shape, sizes) -> random values for a call with these sizes.
    """

    name: str
    axes: str
    dtype: str
    draw: Callable

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.dtype, jnp.floating)

    def shape(self, sizes):
        return tuple(sizes[axis] for axis in self.axes.split())

    def example(self, rng, sizes):
        values = self.draw(rng, self.shape(sizes), sizes)
        return np.asarray(values).astype(jnp.dtype(self.dtype))

    def structs(self, sizes, **options):
        return struct(self.shape(sizes), jnp.dtype(self.dtype), **options)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule as an operand: a pytree, made for random lengths by `make(lengths)`.

    A schedule of other lengths gives right results too, so it need not fit the other operands.
    """

    make: Callable
    name: str = "schedule"
    axes: str = "b"
    is_float: bool = False

    def example(self, rng, sizes):
        lengths = draw_lengths(rng, (sizes["b"],), sizes).astype(np.int32)
        return jax.tree.map(np.asarray, self.make(jnp.asarray(lengths)))

    def structs(self, sizes, **options):
        made = jax.eval_shape(self.make, struct((sizes["b"],), jnp.int32))
        return jax.tree.map(lambda x: struct(x.shape, x.dtype, **options), made)


@dataclasses.dataclass(frozen=True)
class Result:
    """A result of a call: the names of its axes, and its dtype."""

    axes: str
    dtype: str


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class OpRow:
    """An op, or one way to call it.

    Attributes:
      name: in the names of tests.
      operands: what `call` takes, in order.
      results: what `call` gives, in order.
      call: (*arrays, implementation=...) -> a result or a pytree of results.
      expected: (*numpy arrays) -> the results, worked out independently.
      assert_close: (actual, expected) -> raises where they differ by too much; takes tuples.
      sizes: the length of each axis in small calls that the kernel can run too.
      primitive: the op's name in jaxprs; None if it is made of JAX's own ops.
      public_name: the op's name in messages; default: as in jaxprs.
      targets: how often a call calls each FFI target; none without a kernel.
      targets_under_vmap: the same under vmap; default: as without vmap.
      attributes: of each target, regular expressions that must be found in its attributes.
      scratch: how many results of the last FFI target the op drops.
      made: how many operands of the last FFI target the op makes itself, the last of them.
      caches: the operands that grow with the context, which nothing may copy. All of them have the
        axis `pages`.
      in_place: whether the one cache is updated in place and returned as the one result. Under vmap
        it must then be mapped.
      batch: the axis of independent sequences or tokens, into which vmap folds the mapped axis.
      splits: how jax.shard_map may split a call: for each kind of parallelism the axes that are
        split, by name.
      gaps: calls without a kernel: (changed sizes, changed dtype or None, options of the call, the
        reason as a regular expression).
      symbolic: the axes that may be symbolic in an exported program.
      cost: (*structs, lengths) -> the op's work, as in `jax_flashmla.decode_cost`; or None.
      samples: (implementation) -> None, small calls that together run all of the op's kernels, for
        compute-sanitizer.
      variant: whether the row is another way to call an op that has a row already.
      marks: pytest's marks for all of the row's tests.
    """

    name: str
    operands: tuple
    results: tuple[Result, ...]
    call: Callable
    expected: Callable
    assert_close: Callable
    sizes: dict
    primitive: str | None = None
    public_name: str | None = None
    targets: dict = dataclasses.field(default_factory=dict)
    targets_under_vmap: dict | None = None
    attributes: dict = dataclasses.field(default_factory=dict)
    scratch: int = 0
    made: int = 0
    caches: tuple[str, ...] = ()
    in_place: bool = False
    batch: str | None = "b"
    splits: dict = dataclasses.field(default_factory=dict)
    gaps: tuple = ()
    symbolic: tuple[str, ...] = ()
    cost: Callable | None = None
    samples: tuple = ()
    variant: bool = False
    marks: tuple = ()

    def __repr__(self):
        return self.name

    @property
    def name_in_messages(self) -> str | None:
        return self.public_name or self.primitive

    @property
    def names(self) -> list[str]:
        return [operand.name for operand in self.operands]

    @property
    def cache_indices(self) -> list[int]:
        return [self.names.index(name) for name in self.caches]

    @property
    def cache_index(self) -> int:
        """Of an op that updates its cache in place."""
        (index,) = self.cache_indices
        return index

    @property
    def main_target(self) -> str:
        return list(self.targets)[-1]

    def run(self, *arrays, implementation="auto", **options) -> tuple:
        """The results in a flat tuple."""
        results = self.call(*arrays, implementation=implementation, **options)
        return tuple(jax.tree.leaves(results))

    def with_implementation(self, implementation):
        return functools.partial(self.run, implementation=implementation)

    def example(self, seed=0, **sizes) -> list:
        """Random operands as numpy arrays, each from a seed of its own."""
        return [self.draw(i, seed, **sizes) for i in range(len(self.operands))]

    def draw(self, index, seed, **sizes):
        rng = np.random.default_rng((index, *np.atleast_1d(seed)))
        return self.operands[index].example(rng, self.sizes | sizes)

    def arrays(self, seed=0, **sizes) -> list:
        """The same as jax arrays."""
        return [jax.tree.map(jnp.asarray, x) for x in self.example(seed, **sizes)]

    def structs(self, sharding=None, **sizes) -> list:
        sizes = self.sizes | sizes
        return [operand.structs(sizes, sharding=sharding) for operand in self.operands]

    def check(self, actual, example):
        """Compares results with what is expected of an example's operands."""
        self.assert_close(tuple(actual), tuple(self.expected(*example)))


def each(wanted=lambda row: True):
    """Runs a test for each wanted row of the table, as its argument `row`."""
    rows = [pytest.param(row, id=row.name, marks=row.marks) for row in ROWS if wanted(row)]
    return pytest.mark.parametrize("row", rows)


def runs(row):
    """The implementations to run: the reference everywhere, the kernel on a GPU, with its mark."""
    yield "xla", row.marks
    if row.targets:
        yield "cuda", (*row.marks, pytest.mark.gpu)


def each_run(wanted=lambda row: True):
    """Runs a test for each wanted row and each of its `runs`, as `row` and `implementation`."""
    params = [
        pytest.param(row, implementation, id=f"{row}-{implementation}", marks=marks)
        for row in ROWS
        if wanted(row)
        for implementation, marks in runs(row)
    ]
    return pytest.mark.parametrize(("row", "implementation"), params)


# How operands are drawn.


def draw_values(rng, shape, sizes):
    return cases.random_values(rng, shape, "float32")


def draw_lengths(rng, shape, sizes):
    """Some negative, some beyond three pages."""
    return rng.integers(-2, 3 * sizes["page"], shape)


def draw_offsets(rng, shape, sizes):
    return rng.integers(-2 * sizes["page"], 3, shape)


def draw_tables(rng, shape, sizes):
    """Pages, the third of which may lie outside the pool, and an entry that must not be read.

    Such a page makes a sequence NaN where its length reaches that far. Under vmap it must not be
    taken for a page of the next example's pool.
    """
    table = rng.integers(0, sizes["pages"], shape)
    table[..., 2] = rng.choice([sizes["pages"], 0, -1], table.shape[:-1])
    table[..., 3] = UNUSED_ENTRY
    return table


def draw_slots(rng, shape, sizes):
    """Slots in random order. Two of them are outside the pool: one before it, one behind it."""
    pool = sizes["pages"] * sizes["page"]
    slots = rng.permutation(pool)[: shape[0]]
    slots[rng.permutation(shape[0])[:2]] = [-1 - rng.integers(pool), pool + rng.integers(pool)]
    return slots


def draw_lists(rng, shape, sizes):
    """Slots of a pool, one in five outside it, some of them just after it; some slots twice."""
    page = sizes["page2"] if shape[-1] == sizes["extra_topk"] else sizes["page"]
    pool = sizes["pages"] * page
    slots = rng.integers(0, pool, shape)
    outside = rng.choice([-1, -2 * pool, pool, pool + 3, 2**31 - 1, -(2**31)], shape)
    return np.where(rng.random(shape) < 0.2, outside, slots)


def draw_list_lengths(rng, shape, sizes):
    """Some negative, some beyond the list."""
    return rng.integers(-3, sizes["topk"] + 3, shape)


def draw_sinks(rng, shape, sizes):
    """Some are infinite."""
    sinks = rng.standard_normal(shape)
    return np.where(rng.random(shape) < 0.3, rng.choice([np.inf, -np.inf], shape), sinks)


def draw_lses(rng, shape, sizes):
    """Some are +inf, as for a query that sees no token of a part."""
    return np.where(rng.random(shape) < 0.2, np.inf, 3 * rng.standard_normal(shape))


# flash_mla_with_kvcache.


def decode(q, k_cache, block_table, lengths, *, schedule=(None, None), **options):
    arrays = (q, k_cache, block_table, lengths)
    options = {"causal": True, "head_dim_v": D_V} | options
    metadata, num_splits = schedule
    return fm.flash_mla_with_kvcache(
        *arrays, tile_scheduler_metadata=metadata, num_splits=num_splits, **options
    )


def expected_decode(q, k_cache, block_table, lengths, offset=None, attn_sink=None):
    inputs = cases.Inputs(q, k_cache, block_table, lengths)
    options = {"causal_offset": offset, "attn_sink": attn_sink}
    return cases.expected_decode(inputs, causal=True, **options)


def make_schedule(lengths, **options):
    """For the 8 query rows of the decode rows below."""
    return fm.get_mla_metadata(lengths, 8, 1, num_sms=5, **options)


DECODE_OPERANDS = (
    Operand("q", "b s_q h_q d_k", "bfloat16", draw_values),
    Operand("k_cache", "pages page h_kv d_k", "bfloat16", draw_values),
    Operand("block_table", "b max_blocks", "int32", draw_tables),
    Operand("cache_seqlens", "b", "int32", draw_lengths),
)
# page_block_size is the axis `page`; d_v is not an axis of any operand.
DECODE_SIZES = {
    "b": 2, "s_q": 2, "h_q": 4, "h_kv": 1, "d_k": D_K, "d_v": D_V,
    "pages": 9, "page": 16, "max_blocks": 4,
}  # fmt: skip
DECODE_ATTRIBUTES = ("causal = true", r"softmax_scale = 0\.041666\d+ : f32")  # 576 ** -0.5

decode_row = OpRow(
    name="decode",
    primitive="flash_mla_with_kvcache",
    operands=DECODE_OPERANDS,
    results=(Result("b s_q h_q d_v", "bfloat16"), Result("b h_q s_q", "float32")),
    call=decode,
    expected=expected_decode,
    assert_close=cases.assert_decode_close,
    sizes=DECODE_SIZES,
    targets={SCHEDULE_AND_DECODE: 1},
    attributes={SCHEDULE_AND_DECODE: DECODE_ATTRIBUTES},
    scratch=4,
    caches=("k_cache",),
    splits={"data": ("b", "pages"), "tensor": ("h_q",)},
    gaps=(
        ({"d_k": 288}, None, {"head_dim_v": 256}, "not for 288 and 256"),
        ({}, None, {"head_dim_v": 256}, "not for 576 and 256"),
        ({"page": 48}, None, {}, r"page_block_size in .*, not for 48"),
        ({"b": 2**24 + 1}, None, {}, "at most 16777216 sequences, not for 16777217"),
        ({}, "float32", {}, "not for q in float32"),
    ),
    symbolic=("b", "pages", "max_blocks"),
    cost=lambda q, k_cache, table, _, lengths: fm.decode_cost(q, k_cache, lengths, D_V, True),
    samples=samples.DECODE,
)

given_row = dataclasses.replace(
    decode_row,
    name="decode-given-a-schedule",
    variant=True,
    operands=(*DECODE_OPERANDS, Schedule(make_schedule)),
    call=lambda *arrays, **options: decode(*arrays[:-1], schedule=arrays[-1], **options),
    expected=lambda *arrays: expected_decode(*arrays[:-1]),
    targets={DECODE: 1},
    # The schedule of one example does not fit the folded batch: vmap makes one for all of it.
    targets_under_vmap={SCHEDULE: 1, DECODE: 1},
    attributes={DECODE: DECODE_ATTRIBUTES},
    splits={"data": ("b", "pages")},
    cost=None,
    gaps=decode_row.gaps[:1],
    samples=(),
)

offset_row = dataclasses.replace(
    decode_row,
    name="decode-with-causal-offset",
    variant=True,
    operands=(*DECODE_OPERANDS, Operand("causal_offset", "b", "int32", draw_offsets)),
    call=lambda *arrays, **options: decode(*arrays[:-1], causal_offset=arrays[-1], **options),
    gaps=decode_row.gaps[-1:],
    cost=None,
    samples=(),
)

SINK = Operand("attn_sink", "h_q", "float32", draw_sinks)

sink_row = dataclasses.replace(
    decode_row,
    name="decode-with-attn-sink",
    variant=True,
    operands=(*DECODE_OPERANDS, SINK),
    call=lambda *arrays, **options: decode(*arrays[:-1], attn_sink=arrays[-1], **options),
    expected=lambda *arrays: expected_decode(*arrays[:-1], attn_sink=arrays[-1]),
    attributes={SCHEDULE_AND_DECODE: (*DECODE_ATTRIBUTES, "has_attn_sink = true")},
    gaps=decode_row.gaps[-1:],
    cost=None,
    samples=(),
)


# flash_mla_with_kvcache with indices.


def sparse_decode(q, k_cache, indices, topk_length=None, *, schedule=(None, None), **options):
    metadata, num_splits = schedule
    return fm.flash_mla_with_kvcache(
        q, k_cache, None, None, **{"head_dim_v": D_V} | options,
        tile_scheduler_metadata=metadata, num_splits=num_splits,
        indices=indices, topk_length=topk_length,
    )  # fmt: skip


def sparse_decode_of_two_caches(q, k_cache, indices, topk_length, *others, **options):
    names = ("extra_k_cache", "extra_indices_in_kvcache", "extra_topk_length", "attn_sink")
    options |= dict(zip(names, others, strict=True))
    return sparse_decode(q, k_cache, indices, topk_length, **options)


def expected_sparse_decode(*arrays):
    return cases.expected_sparse_decode(cases.SparseInputs(*arrays))


def sparse_cost(q, k_cache, indices, lengths):
    """Of lists that share no slot, in a pool that holds them all."""
    b, s_q, topk = indices.shape
    k_cache = struct((b * s_q * topk, *k_cache.shape[1:]), k_cache.dtype)
    indices = np.arange(b * s_q * topk).reshape(indices.shape)
    return fm.decode_cost(q, k_cache, None, D_V, indices=indices, topk_length=lengths)


def make_list_schedule(lengths):
    """For the two queries a sequence, and the 4 heads, of the sparse decode rows below."""
    return fm.get_mla_metadata(jnp.repeat(lengths, 2), 4, 1, num_sms=5)


SPARSE_OPERANDS = (
    *DECODE_OPERANDS[:2],
    Operand("indices", "b s_q topk", "int32", draw_lists),
)
LIST_LENGTHS = Operand("topk_length", "b s_q", "int32", draw_list_lengths)
NO_EXTRA = ("has_extra = false", "has_attn_sink = false")

sparse_row = OpRow(
    name="sparse-decode",
    primitive="sparse_flash_mla_with_kvcache",
    public_name="flash_mla_with_kvcache with indices",
    operands=SPARSE_OPERANDS,
    results=decode_row.results,
    call=sparse_decode,
    expected=expected_sparse_decode,
    assert_close=cases.assert_decode_close,
    sizes={
        "b": 2, "s_q": 2, "h_q": 4, "h_kv": 1, "d_k": D_K, "d_v": D_V,
        "pages": 9, "page": 16, "topk": 70, "page2": 5, "extra_topk": 21,
    },
    targets={SPARSE_DECODE: 1},
    attributes={SPARSE_DECODE: (*DECODE_ATTRIBUTES[1:], *NO_EXTRA, "has_schedule = false")},
    scratch=4,
    made=2,  # topk_length, twice
    caches=("k_cache",),
    splits={"data": ("b", "pages"), "tensor": ("h_q",)},
    gaps=(
        ({"d_k": 288}, None, {"head_dim_v": 256}, "not for 288 and 256"),
        ({}, None, {"head_dim_v": 256}, "not for 576 and 256"),
        ({"b": 2**23 + 1}, None, {}, r"at most 16777216 token lists .*, not for 16777218"),
        ({"topk": 2**29}, None, {}, "indices of at most 536870911 entries, not for 536870912"),
        ({}, "float32", {}, "not for q in float32"),
    ),
    symbolic=("b", "pages"),
    cost=sparse_cost,
    samples=samples.SPARSE_DECODE,
)  # fmt: skip

sparse_given_row = dataclasses.replace(
    sparse_row,
    name="sparse-decode-given-a-schedule",
    variant=True,
    operands=(*SPARSE_OPERANDS, LIST_LENGTHS, Schedule(make_list_schedule)),
    call=lambda *arrays, **options: sparse_decode(*arrays[:-1], schedule=arrays[-1], **options),
    expected=lambda *arrays: expected_sparse_decode(*arrays[:-1]),
    targets_under_vmap={SCHEDULE: 1, SPARSE_DECODE: 1},
    attributes={SPARSE_DECODE: (*DECODE_ATTRIBUTES[1:], *NO_EXTRA, "has_schedule = true")},
    made=0,
    splits={"data": ("b", "pages")},
    gaps=sparse_row.gaps[:1],
    cost=None,
    samples=(),
)

two_caches_row = dataclasses.replace(
    sparse_row,
    name="sparse-decode-of-two-caches",
    variant=True,
    operands=(
        *SPARSE_OPERANDS,
        LIST_LENGTHS,
        Operand("extra_k_cache", "pages page2 h_kv d_k", "bfloat16", draw_values),
        Operand("extra_indices_in_kvcache", "b s_q extra_topk", "int32", draw_lists),
        Operand("extra_topk_length", "b s_q", "int32", draw_list_lengths),
        SINK,
    ),
    call=sparse_decode_of_two_caches,
    expected=expected_sparse_decode,
    attributes={
        SPARSE_DECODE: ("has_extra = true", "has_attn_sink = true", "has_schedule = false")
    },
    made=1,  # the lengths for the schedule
    caches=("k_cache", "extra_k_cache"),
    gaps=(
        ({"extra_topk": 2**29}, None, {}, "extra_indices_in_kvcache of at most 536870911 entries"),
        *sparse_row.gaps[-1:],
    ),
    cost=None,
    samples=(),
)


# get_mla_metadata.


def expected_schedule(lengths):
    return slow_schedule(lengths.tolist(), num_parts=5, rows=8)


def assert_integers(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == jnp.int32
        np.testing.assert_array_equal(a, e)


schedule_row = OpRow(
    name="schedule",
    primitive="get_mla_metadata",
    operands=(DECODE_OPERANDS[3],),
    results=(Result("bounds 2", "int32"), Result("b", "int32"), Result("b+1", "int32")),
    call=make_schedule,
    expected=expected_schedule,
    assert_close=assert_integers,
    sizes={"b": 3, "page": 1000, "bounds": 6, "2": 2, "b+1": 4},  # of 5 parts
    targets={SCHEDULE: 1},
    targets_under_vmap={},  # a decode under vmap drops what this gives, so it is left to XLA
    attributes={SCHEDULE: ("rows = 8 : i64",)},
    gaps=(({"b": 2**24 + 1}, None, {}, "at most 16777216 sequences, not for 16777217"),),
    splits={"data": ("b",)},
    symbolic=("b",),
    samples=(),  # those of decode make schedules
)


# append_kv_cache.

append_row = OpRow(
    name="append",
    primitive="append_kv_cache",
    operands=(
        DECODE_OPERANDS[1],
        Operand("new_kv", "tokens h_kv d_k", "bfloat16", draw_values),
        Operand("slot_mapping", "tokens", "int32", draw_slots),
    ),
    results=(Result("pages page h_kv d_k", "bfloat16"),),
    call=fm.append_kv_cache,
    expected=lambda *arrays: (expected_append(*arrays),),
    assert_close=cases.assert_bit_equal,
    sizes={"pages": 4, "page": 16, "h_kv": 1, "d_k": D_K, "tokens": 5},
    targets={APPEND: 1},
    caches=("k_cache",),
    in_place=True,
    batch="tokens",
    splits={"data": ("pages", "tokens")},
    symbolic=("tokens", "pages"),
    samples=(),  # those of decode append
)


# merge_attention_states: no kernel, and so no primitive of its own.


def merge(outs, lses, *, implementation):
    return fm.merge_attention_states(outs, lses)


def assert_merged(actual, expected):
    for name, a, e in zip(("out", "lse"), actual, expected, strict=True):
        cases.assert_close(name, np.asarray(a), e, atol=2e-6, rtol=1e-6)


merge_row = OpRow(
    name="merge",
    operands=(
        Operand("outs", "n b s_q h_q d_v", "float32", draw_values),
        Operand("lses", "n b h_q s_q", "float32", draw_lses),
    ),
    results=(Result("b s_q h_q d_v", "float32"), Result("b h_q s_q", "float32")),
    call=merge,
    expected=expected_merge,
    assert_close=assert_merged,
    sizes={"n": 3, "b": 2, "s_q": 2, "h_q": 3, "d_v": 16},
    splits={"data": ("b",), "tensor": ("h_q",)},
    symbolic=("n", "b"),
)


merge_sink_row = dataclasses.replace(
    merge_row,
    name="merge-with-attn-sink",
    variant=True,
    operands=(*merge_row.operands, SINK),
    call=lambda *arrays, implementation: fm.merge_attention_states(
        *arrays[:2], attn_sink=arrays[2]
    ),
    expected=lambda outs, lses, attn_sink: cases.with_sink(*expected_merge(outs, lses), attn_sink),
)


ROWS = [
    decode_row,
    given_row,
    offset_row,
    sink_row,
    sparse_row,
    sparse_given_row,
    two_caches_row,
    schedule_row,
    append_row,
    merge_row,
    merge_sink_row,
]
