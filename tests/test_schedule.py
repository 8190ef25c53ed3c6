"""get_mla_metadata: its integers against a slow loop, and that they cover all work once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from expected import OVERHEAD, TILE, slow_fixed_schedule, slow_schedule

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")

LENGTHS = {
    "one": [4096],
    "one short": [1],
    "one empty": [0],
    "uniform": [4096] * 128,
    "nearly uniform": [4096] * 127 + [4352],
    "not quite uniform": [4096] * 127 + [4800],
    "ragged": [1, 64, 65, 0, 8192, 63, 128, 300, 0, 0, 77, 12345],
    "empty": [0] * 7,
    "empty at the ends": [0, 0, 500, 0],
    "negative": [-1, 100, -(2**31), 64],
    "long": [131072, 5],
    "largest": [2**31 - 1] * 3,
    "few and equal": [8192] * 8,
    "few and nearly equal": [8192, 8100, 8192, 7900, 8000],
    "few, one a little shorter": [320, 256, 320],
    "many": list(range(3000)),
}
# Lengths, fixed_split_size and max_seqlen, all in tokens.
FIXED = {
    "ragged": ([0, 1, 63, 64, 65, 127, 128, 129, 400, 512, 385], 128, 512),
    "beyond the bound": ([513, 100000, 3, 2**31 - 1, 512], 128, 512),
    "negative": ([-1, 200, -(2**31)], 64, 256),
    "one split": ([0, 70, 640, 641], 640, 600),
    "no multiple": ([1000, 999, 961, 960, 0], 192, 1000),
    "one sequence": ([5000], 64, 8192),
    "huge splits": ([5000, 2**31 - 1], 2**31 - 64, 2**31 - 1),
    "many": (list(range(3000)), 256, 4096),
}
# num_sms of a call with 128 rows and one KV head: two SMs a part
NUM_SMS = [1, 2, 7, 132, 200]


def make(lengths, num_sms, implementation, **options):
    metadata, num_splits = fm.get_mla_metadata(
        jnp.asarray(lengths, jnp.int32),
        128,
        1,
        num_sms=num_sms,
        implementation=implementation,
        **options,
    )
    return metadata, np.asarray(num_splits)


def make_fixed(lengths, size, max_seqlen, implementation="xla"):
    options = {"fixed_split_size": size, "max_seqlen": max_seqlen}
    return make(lengths, None, implementation, **options)


@pytest.mark.parametrize("num_sms", NUM_SMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_integers(lengths, num_sms, implementation):
    metadata, num_splits = make(lengths, num_sms, implementation)
    assert metadata.num_parts == max(1, num_sms // 2)
    assert_integers(metadata, num_splits, slow_schedule(lengths, metadata.num_parts, rows=128))


@pytest.mark.parametrize(("rows", "h_kv"), [(1, 1), (16, 1), (64, 1), (8, 16), (256, 1), (9000, 2)])
@pytest.mark.parametrize("lengths", [[4096], [20000, 3, 9000], [64] * 40, [30, 900] * 70])
def test_integers_by_query_rows(lengths, rows, h_kv, implementation):
    metadata, num_splits = fm.get_mla_metadata(
        jnp.asarray(lengths, jnp.int32), rows, h_kv, num_sms=132, implementation=implementation
    )
    expected = slow_schedule(lengths, metadata.num_parts, rows * h_kv)
    assert_integers(metadata, np.asarray(num_splits), expected)


@pytest.mark.parametrize(
    ("batch", "length", "rows", "h_kv", "tiles"),
    [
        (1, 4096, 16, 1, 1),
        (1, 8192, 16, 1, 2),
        (1, 8192, 16, 2, 2),
        (1, 8192, 64, 1, 2),
        (1, 4096, 128, 1, 2),
        (2, 2048, 128, 1, 2),
        (1, 16384, 128, 1, 4),
        (1, 8192, 512, 1, 8),  # of 16 parts
        (1, 1024, 100000, 1, 16),  # of one part
    ],
)
def test_small_work_makes_fewer_parts(batch, length, rows, h_kv, tiles):
    metadata, num_splits = fm.get_mla_metadata(
        jnp.full(batch, length, jnp.int32), rows, h_kv, num_sms=132, implementation="xla"
    )
    splits = -(-length // TILE // tiles)
    np.testing.assert_array_equal(num_splits, np.arange(batch + 1) * splits)
    bounds = np.asarray(metadata.part_bounds)[:splits]
    np.testing.assert_array_equal(bounds, [(0, s * tiles) for s in range(splits)])


def assert_integers(metadata, num_splits, expected):
    actual = metadata.part_bounds, metadata.first_part, num_splits
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == np.int32
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(("lengths", "size", "max_seqlen"), FIXED.values(), ids=FIXED)
def test_integers_of_fixed_splits(lengths, size, max_seqlen, implementation, machine):
    """The SM count is never read."""
    machine.cannot_count_sms()
    metadata, num_splits = make_fixed(lengths, size, max_seqlen, implementation)
    assert metadata.num_parts == len(lengths) * -(-max_seqlen // size)
    assert metadata.fixed_split_size == size
    assert_integers(metadata, num_splits, slow_fixed_schedule(lengths, size, max_seqlen))


def test_fixed_splits_of_traced_lengths(implementation):
    """One compiled function serves all lengths, under strict configurations too."""

    @jax.jit
    def make_traced(lengths):
        return fm.get_mla_metadata(
            lengths, 128, 1, fixed_split_size=128, max_seqlen=512, implementation=implementation
        )

    with (
        jax.enable_x64(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        for lengths in ([0, 1, 128, 400], [129, 10000, -7, 64]):
            expected = slow_fixed_schedule(lengths, 128, 512)
            assert_integers(*make_traced(jnp.asarray(lengths, jnp.int32)), expected)


@pytest.mark.parametrize("num_sms", NUM_SMS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_tile_has_one_owner(lengths, num_sms):
    """All parts together have every tile of a sequence once, in the splits of num_splits."""
    b = len(lengths)
    tiles = [min(-(-max(n, 0) // TILE), 2**30 // b - OVERHEAD) for n in lengths]
    pieces = assert_one_owner(*make(lengths, num_sms, "xla"), tiles)
    for p in range(max(1, num_sms // 2)):  # scratch memory holds two partial results for each part
        shared = [i for i in range(b) if len(pieces[i]) > 1 and p in [x[0] for x in pieces[i]]]
        assert len(shared) <= 2


@pytest.mark.parametrize(("lengths", "size", "max_seqlen"), FIXED.values(), ids=FIXED)
def test_each_tile_has_one_owner_in_fixed_splits(lengths, size, max_seqlen):
    """The same, and a part has tiles of only one sequence."""
    tiles = [-(-max(n, 0) // TILE) for n in lengths]
    pieces = assert_one_owner(*make_fixed(lengths, size, max_seqlen), tiles)
    parts = [part for sequence in pieces for part, _, _ in sequence]
    assert len(set(parts)) == len(parts)
    for count, sequence in zip(tiles, pieces, strict=True):
        ends = [end for _, _, end in sequence]
        assert ends == [(s + 1) * size // TILE for s in range(len(ends) - 1)] + [count]


def assert_one_owner(metadata, num_splits, tiles):
    """Walks from bound to bound; returns each sequence's pieces: (part, first tile, end tile)."""
    bounds = [tuple(map(int, bound)) for bound in metadata.part_bounds]
    first_part = np.asarray(metadata.first_part).tolist()
    b = len(tiles)
    assert bounds[0] == (0, 0)
    assert bounds[-1] == (b, 0)
    pieces = [[] for _ in tiles]
    for p in range(metadata.num_parts):
        (i, tile), (last, last_tile) = bounds[p : p + 2]
        assert (i, tile) <= (last, last_tile)
        while (i, tile) < (last, last_tile):
            end = last_tile if i == last else tiles[i]
            pieces[i].append((p, tile, end))
            i, tile = i + 1, 0
    for i in range(b):
        parts = [part for part, _, _ in pieces[i]]
        assert parts == list(range(first_part[i], first_part[i] + len(parts)))
        assert len(parts) == num_splits[i + 1] - num_splits[i] >= 1
        edges = [tile for _, tile, _ in pieces[i]] + [pieces[i][-1][2]]
        assert edges[0] == 0
        assert edges[-1] == tiles[i]
        assert tiles[i] == 0 or all(x < y for x, y in itertools.pairwise(edges))
    return pieces


def test_parts_share_the_work():
    metadata, _ = make([4096] * 100, 132, "xla")
    cost = [int(i) * (64 + OVERHEAD) + int(t) for i, t in metadata.part_bounds]
    assert max(np.diff(cost)) <= -(-cost[-1] // metadata.num_parts) + OVERHEAD


@pytest.mark.parametrize("length", [64, 1024, 4096, 32768])
def test_equal_lengths_stay_whole_where_that_costs_little(length):
    _, num_splits = make([length] * 128, 132, "xla")
    np.testing.assert_array_equal(num_splits, np.arange(129))


@pytest.mark.parametrize(
    ("batch", "length", "splits"), [(64, 8192, 2), (32, 4096, 4), (8, 8192, 16)]
)
def test_equal_lengths_get_equal_splits(batch, length, splits):
    metadata, num_splits = fm.get_mla_metadata(
        jnp.full(batch, length, jnp.int32), 64, 1, num_sms=132, implementation="xla"
    )
    np.testing.assert_array_equal(num_splits, np.arange(batch + 1) * splits)
    step = length // TILE // splits + (splits == 2)  # the first of two has one more tile
    bounds = [(i, s * step) for i in range(batch) for s in range(splits)]
    np.testing.assert_array_equal(metadata.part_bounds[: len(bounds)], bounds)


@pytest.mark.parametrize(
    ("rows", "h_kv", "num_sms", "parts"),
    [
        (1, 1, None, 132),
        (64, 1, None, 132),
        (65, 1, None, 66),
        (512, 1, 132, 16),
        (64, 8, 132, 16),
        (128, 100, 132, 1),
        (16, 1, 78, 78),
    ],
)
def test_number_of_parts(rows, h_kv, num_sms, parts, machine):
    machine.has_no_gpu()
    metadata, _ = fm.get_mla_metadata(
        jnp.ones(2, jnp.int32), rows, h_kv, num_sms=num_sms, implementation="xla"
    )
    assert (metadata.batch, metadata.num_heads_per_head_k, metadata.num_heads_k) == (2, rows, h_kv)
    assert metadata.num_parts == parts
    assert metadata.part_bounds.shape == (parts + 1, 2)
    assert metadata.first_part.shape == (2,)


@pytest.mark.gpu
def test_parts_follow_the_device():
    metadata, _ = fm.get_mla_metadata(jnp.ones(2, jnp.int32), 1, 1, implementation="cuda")
    assert metadata.num_parts == jax.local_devices(backend="cuda")[0].core_count


def test_metadata_is_a_pytree():
    metadata, _ = make([10, 20], 132, "xla")
    leaves, structure = jax.tree.flatten(metadata)
    assert [leaf.dtype for leaf in leaves] == [jnp.int32, jnp.int32]
    again = jax.tree.unflatten(structure, leaves)
    assert (again.batch, again.num_parts) == (2, 66)
    other, _ = make([10, 20, 30], 100, "xla")  # batch and parts follow from the arrays
    assert (other.batch, other.num_parts) == (3, 50)
    assert structure == jax.tree.structure(other)
    other, _ = fm.get_mla_metadata(jnp.ones(2, jnp.int32), 64, 1, implementation="xla")
    assert structure != jax.tree.structure(other)


def test_fixed_splits_are_part_of_the_pytree():
    metadata, _ = make_fixed([10, 200], 64, 256)
    leaves, structure = jax.tree.flatten(metadata)
    assert len(leaves) == 2
    again = jax.tree.unflatten(structure, leaves)
    assert (again.num_parts, again.fixed_split_size) == (8, 64)
    default, _ = make([10, 200], 16, "xla")
    assert (default.num_parts, default.fixed_split_size) == (8, None)
    assert structure != jax.tree.structure(default)
    assert jax.jit(lambda m: m)(metadata).fixed_split_size == 64


def test_in_a_loop_and_under_vmap(implementation):
    def total(lengths):
        def body(i, sum_):
            _, num_splits = fm.get_mla_metadata(
                lengths + 1000 * i, 128, 1, num_sms=132, implementation=implementation
            )
            return sum_ + num_splits[-1]

        return jax.lax.fori_loop(0, 4, body, jnp.int32(0))

    rows = jnp.array([[5, 6000, 0], [1, 1, 1], [70000, 3, 900]], jnp.int32)
    expected = [
        sum(slow_schedule((row + 1000 * i).tolist(), 66, rows=128)[2][-1] for i in range(4))
        for row in np.asarray(rows)
    ]
    assert jax.jit(jax.vmap(total))(rows).tolist() == expected
    assert [int(jax.jit(total)(row)) for row in rows] == expected


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((jnp.ones((2, 1), jnp.int32), 1, 1), {}, ValueError, r"cache_seqlens .*got \[2, 1\]"),
        ((jnp.ones(2), 1, 1), {}, TypeError, "cache_seqlens .*got float32"),
        ((jnp.ones(0, jnp.int32), 1, 1), {}, ValueError, "cache_seqlens must hold at least one"),
        ((jnp.ones(2, jnp.int32), 0, 1), {}, ValueError, "num_heads_per_head_k .*got 0"),
        ((jnp.ones(2, jnp.int32), 1.5, 1), {}, TypeError, "num_heads_per_head_k .*got 1.5"),
        ((jnp.ones(2, jnp.int32), 1, -2), {}, ValueError, "num_heads_k .*got -2"),
        ((jnp.ones(2, jnp.int32), 1, jnp.int32(1)), {}, TypeError, "num_heads_k must be a static"),
        ((jnp.ones(2, jnp.int32), 1, 1), {"num_sms": 0}, ValueError, "num_sms .*got 0"),
        ((jnp.ones(2, jnp.int32), 1, 1), {"implementation": "gpu"}, ValueError, "got 'gpu'"),
    ],
)
def test_misuse(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fm.get_mla_metadata(*arguments, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fixed_split_size": 100}, ValueError, "fixed_split_size must be a multiple .*got 100"),
        ({"fixed_split_size": 0}, ValueError, "fixed_split_size must be .*got 0"),
        ({"fixed_split_size": -64}, ValueError, "fixed_split_size must be .*got -64"),
        ({"fixed_split_size": 64.0}, TypeError, "fixed_split_size must be a static .*got 64.0"),
        ({"fixed_split_size": 2**31}, ValueError, "fixed_split_size must fit .*got 2147483648"),
        ({"max_seqlen": 0}, ValueError, "max_seqlen must be .*got 0"),
        ({"max_seqlen": jnp.int32(9)}, TypeError, "max_seqlen must be a static Python int"),
        ({"max_seqlen": 2**31}, ValueError, "max_seqlen must fit .*got 2147483648"),
        ({"max_seqlen": None}, ValueError, "both or neither, got None for max_seqlen"),
        ({"fixed_split_size": None}, ValueError, "both or neither, got None for fixed_split_size"),
        ({"num_sms": 132}, ValueError, "num_sms changes nothing .*got 132"),
    ],
)
def test_misuse_of_fixed_splits(options, error, message):
    options = {"fixed_split_size": 64, "max_seqlen": 512} | options
    with pytest.raises(error, match=message):
        fm.get_mla_metadata(jnp.ones(2, jnp.int32), 1, 1, **options)


def test_traced_split_sizes():
    def make_traced(size, longest):
        lengths = jnp.ones(2, jnp.int32)
        return fm.get_mla_metadata(lengths, 1, 1, fixed_split_size=size, max_seqlen=longest)

    with pytest.raises(TypeError, match=r"fixed_split_size must be a static .*traced"):
        jax.jit(lambda size: make_traced(size, 512))(64)
    with pytest.raises(TypeError, match=r"max_seqlen must be a static .*traced"):
        jax.jit(lambda longest: make_traced(64, longest))(512)
