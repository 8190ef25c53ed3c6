"""With splits of a fixed size the kernel's results for a sequence do not depend on its batch."""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_V, UNUSED_ENTRY

import jax_flashmla as fm

WIDTH = 40  # of the table, in pages of 64; max_seqlen is below its tokens in some calls, else above


@dataclasses.dataclass(frozen=True)
class Call:
    """What must be equal in all decodes of a sequence."""

    h_q: int
    s_q: int
    fixed_split_size: int
    max_seqlen: int
    dtype: str = "bfloat16"
    implementation: str = "cuda"

    def __str__(self):
        return "-".join(map(str, dataclasses.astuple(self)[:-1]))

    def lengths(self):
        """Around the ends of splits and of the bound, up to what the table holds."""
        size, capacity = self.fixed_split_size, 64 * WIDTH
        ends = [0, 64, size, 2 * size, 3 * size, self.max_seqlen, capacity - 1]
        around = {end + step for end in ends for step in (-1, 0, 1)} | {self.s_q, 700}
        return [n for n in sorted(around) if 0 <= n <= capacity]

    def inputs(self):
        """Sequences with these lengths, and one that needs a page which is not in the pool."""
        lengths = [*self.lengths(), 300]
        case = cases.Case(len(lengths), self.s_q, 0, self.h_q, dtype=self.dtype)
        inputs = cases.make_inputs(case, lengths=lengths, max_blocks=WIDTH)
        inputs.block_table[-1, 1] = UNUSED_ENTRY
        return inputs

    def decode(self, q, k_cache, block_table, lengths):
        """(out, lse), the schedule made for these lengths."""
        metadata = fm.get_mla_metadata(
            lengths,
            self.s_q * self.h_q,
            1,
            fixed_split_size=self.fixed_split_size,
            max_seqlen=self.max_seqlen,
            implementation=self.implementation,
        )
        return fm.flash_mla_with_kvcache(
            q, k_cache, block_table, lengths, D_V, *metadata,
            causal=self.s_q > 1, implementation=self.implementation,
        )  # fmt: skip


# The largest number of splits of a sequence decides which kernel puts its partial results together.
CALLS = [
    Call(16, 1, 256, 2048),
    Call(16, 2, 256, 2048),
    Call(128, 1, 256, 2048),
    Call(128, 2, 256, 2048),
    Call(16, 1, 256, 2048, "float16"),
    Call(16, 1, 4096, 4096),  # one split
    Call(16, 1, 512, 1024),  # two, and sequences longer than max_seqlen
    Call(16, 1, 64, 640),
    Call(128, 1, 64, 640),  # more splits than a lane group has in flight
    Call(128, 1, 64, 2048),
    Call(16, 1, 64, 3072),
    Call(16, 1, 64, 8192),
]


def batches(count):
    """Batches of several sizes. Each is a list of sequence numbers."""
    rng = np.random.default_rng(0)
    everyone = np.arange(count)
    yield from (everyone, everyone[::-1], rng.permutation(count))
    yield from (np.array([i, count - 1 - i]) for i in everyone)
    yield from (rng.integers(0, count, size) for size in (3, 7, 7, 64, 131, 200))


def bits(result, i):
    """Out and lse of sequence i, NaN and signs included."""
    return tuple(np.asarray(x)[i].tobytes() for x in result)


class Solo:
    """The results of each sequence decoded alone, and batches to compare with them."""

    def __init__(self, call):
        self.call, self.inputs = call, call.inputs()
        self.q, self.k_cache, self.table, self.lengths = self.inputs.device_arrays()
        self.count = len(self.lengths)
        self.decode = jax.jit(call.decode)
        self.results = [self.batch(np.array([i])) for i in range(self.count)]

    def arrays(self, numbers):
        return self.q[numbers], self.k_cache, self.table[numbers], self.lengths[numbers]

    def batch(self, numbers):
        return self.decode(*self.arrays(numbers))

    def assert_same(self, result, numbers):
        for i, number in enumerate(numbers):
            same = bits(result, i) == bits(self.results[number], 0)
            assert same, f"length {self.lengths[number]} at {i} of {len(numbers)}"


@pytest.fixture(scope="module", params=CALLS, ids=str)
def solo(request):
    return Solo(request.param)


@pytest.mark.gpu
def test_alone_it_is_right(solo):
    expected = cases.expected_decode(solo.inputs, causal=solo.call.s_q > 1)
    results = [np.concatenate(x) for x in zip(*solo.results, strict=True)]
    cases.assert_decode_close(results, expected)


@pytest.mark.gpu
def test_in_any_batch(solo):
    for numbers in batches(solo.count):
        solo.assert_same(solo.batch(numbers), numbers)


@pytest.mark.gpu
def test_in_a_table_of_another_width(solo):
    """Only max_seqlen counts, not what the table could hold."""
    numbers = np.arange(solo.count)
    q, k_cache, table, lengths = solo.arrays(numbers)
    wider = jnp.pad(table, [(0, 0), (0, 9)], constant_values=UNUSED_ENTRY)
    solo.assert_same(solo.decode(q, k_cache, wider, lengths), numbers)


@pytest.mark.gpu
def test_in_other_pages(solo):
    """The same tokens in another pool, which has more pages than there were."""
    numbers = np.arange(solo.count)
    q, k_cache, table, lengths = (np.asarray(x) for x in solo.arrays(numbers))
    moved = np.random.default_rng(2).permutation(len(k_cache) + 100)[: len(k_cache)]
    pool = np.full_like(k_cache, np.nan, shape=(len(k_cache) + 100, *k_cache.shape[1:]))
    pool[moved] = k_cache
    table = np.where(table == UNUSED_ENTRY, table, moved[table % len(moved)]).astype(np.int32)
    solo.assert_same(solo.decode(*map(jnp.asarray, (q, pool, table, lengths))), numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("num_sms", [1, 78, 1000])
def test_on_any_number_of_sms(num_sms, solo, machine):
    machine.has_sms(num_sms)
    numbers = np.arange(solo.count)[::-1]
    run = jax.jit(lambda *arrays: solo.call.decode(*arrays))  # one that was not traced before
    solo.assert_same(run(*solo.arrays(numbers)), numbers)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(5,), (2, 3)], ids=str)
def test_under_vmap(shape, solo):
    """Batches of four, in as many axes; then the cache mapped as well."""
    numbers = np.random.default_rng(1).integers(0, solo.count, (*shape, 4))
    for cache_axis in (None, 0):
        run, arrays = solo.call.decode, list(solo.arrays(numbers))
        for size in reversed(shape):
            run = jax.vmap(run, (0, cache_axis, 0, 0))
            if cache_axis == 0:
                arrays[1] = jnp.stack([arrays[1]] * size)
        result = jax.jit(run)(*arrays)
        flat = [np.asarray(x).reshape(-1, *x.shape[len(shape) + 1 :]) for x in result]
        solo.assert_same(flat, numbers.reshape(-1))


@pytest.mark.gpu
@pytest.mark.parametrize("s_q", [1, 2])
def test_in_a_loop_in_which_lengths_grow(s_q):
    """Every step's results in a batch are those alone, across the ends of splits and tiles."""
    solo = Solo(Call(16, s_q, 128, 512))
    # The pool has no unused slots, so every prefix of a sequence is a valid sequence.
    k_cache = jnp.nan_to_num(solo.k_cache)
    steps, starts = 140, np.array([2, 120, 250, 384, 65], np.int32)
    numbers = np.full(len(starts), solo.count - 2)  # the longest one

    def generate(q, table, starts):
        def step(lengths, _):
            return lengths + 1, solo.call.decode(q, k_cache, table, lengths)

        return jax.lax.scan(step, starts, length=steps)[1]

    run, arrays = jax.jit(generate), (solo.q[numbers], solo.table[numbers], jnp.asarray(starts))
    together = run(*arrays)
    for i in range(len(starts)):
        alone = run(*(x[i : i + 1] for x in arrays))
        for a, b in zip(alone, together, strict=True):
            assert np.asarray(a[:, 0]).tobytes() == np.asarray(b[:, i]).tobytes()


def test_what_is_compared_finds_a_single_bit():
    """The comparison sees the sign of a zero and the place of a NaN. Runs on a CPU too."""
    call = Call(2, 1, 64, 64 * WIDTH, implementation="xla")
    solo = Solo(call)
    numbers = np.array([0, solo.count - 1])
    result = [np.concatenate([np.asarray(solo.results[i][k]) for i in numbers]) for k in (0, 1)]
    assert (result[0][0] == 0).all()  # length 0
    assert np.isnan(result[1][1]).all()  # a page that is not in the pool
    solo.assert_same(result, numbers)
    for k, i, value in ((0, 0, -0.0), (0, 1, 1), (1, 0, 88), (1, 1, np.inf)):
        changed = [x.copy() for x in result]
        changed[k][i].reshape(-1)[-1] = value
        with pytest.raises(AssertionError, match=f"at {i} of 2"):
            solo.assert_same(changed, numbers)
