"""Inputs of decode, dense and sparse, the expected results, and the tolerances."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

D_K, D_V = 576, 512
UNUSED_ENTRY = 2147480000  # in table entries that must not be read
INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: the shapes, and how its sequences' lengths are drawn."""

    b: int
    s_q: int
    s_k: int  # tokens of each sequence, or their mean
    h_q: int
    h_kv: int = 1
    varlen: bool = False
    causal: bool = False
    zeros: bool = False  # about half of the sequences are empty
    page: int = 64
    dtype: str = "bfloat16"
    seed: int = 0
    d_k: int = D_K

    def __str__(self):
        d_k = "" if self.d_k == D_K else f"-d{self.d_k}"
        flags = "".join(f"-{f}" for f in ("varlen", "causal", "zeros") if getattr(self, f))
        return (
            f"b{self.b}-sq{self.s_q}-sk{self.s_k}-hq{self.h_q}-hkv{self.h_kv}{flags}"
            f"-page{self.page}-{self.dtype}{d_k}"
        )

    def lengths(self) -> np.ndarray:
        """i32 [b]; uniform, or normal around s_k and at least s_q."""
        rng = np.random.default_rng((self.seed, self.b, self.s_q, self.s_k))
        lengths = np.full(self.b, self.s_k)
        if self.varlen:
            lengths = np.maximum(rng.normal(self.s_k, self.s_k / 2, self.b), self.s_q)
        if self.zeros:
            lengths = np.where(rng.random(self.b) < 0.5, 0, lengths)
        return lengths.astype(np.int32)


def dense_grid() -> list[Case]:
    """FlashMLA's own correctness and corner cases of the dense decode."""
    heads = [
        (h_q, h_kv)
        for h_q in (1, 3, 9, 63, 64, 126, 128)
        for h_kv in (1, 2, 3, 8)
        if h_q % h_kv == 0
    ]
    flags = (False, True)
    correctness = [
        Case(b, s_q, s_k, h_q, h_kv, varlen, causal)
        for b, s_q, (h_q, h_kv), causal, s_k, varlen in itertools.product(
            (1, 2, 6, 64), (1, 2, 4), heads, flags, (20, 140, 4096), flags
        )
    ]
    corner = [
        Case(128, 2, 4096, h_q, h_kv, varlen=True, causal=causal, zeros=True)
        for (h_q, h_kv), causal in itertools.product(heads, flags)
    ]
    return correctness + corner


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of one call, as numpy arrays, in the order of the op's arguments."""

    q: np.ndarray
    k_cache: np.ndarray
    block_table: np.ndarray
    cache_seqlens: np.ndarray

    def device_arrays(self):
        return tuple(jnp.asarray(x) for x in dataclasses.astuple(self))

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def zeros(*shape, dtype=jnp.bfloat16):
    return jnp.zeros(shape, dtype)


def random_values(rng, shape, dtype):
    """Normal with a deviation of 0.1, within [-1, 1]."""
    values = rng.standard_normal(shape, dtype=np.float32) / 10
    return np.clip(values, -1, 1).astype(jnp.dtype(dtype))


def make_inputs(case: Case, *, lengths=None, max_blocks=None) -> Inputs:
    """Random inputs in shuffled pages, with poison in everything that must not be read.

    Unused slots hold NaN, unused table entries UNUSED_ENTRY.
    """
    rng = np.random.default_rng(case.seed)
    lengths = case.lengths() if lengths is None else np.asarray(lengths, np.int32)
    used = -(-np.maximum(lengths, 0) // case.page)  # pages of each sequence
    if max_blocks is None:
        max_blocks = max(1, int(used.max()))
    pages = rng.permutation(int(used.sum()) + 3)
    k_cache = random_values(rng, (len(pages), case.page, case.h_kv, case.d_k), case.dtype)
    unused_slots = np.ones(k_cache.shape[:2], bool)
    table = np.full((case.b, max_blocks), UNUSED_ENTRY, np.int32)
    for i, (length, first) in enumerate(zip(lengths, np.cumsum(used) - used, strict=True)):
        ids = pages[first : first + used[i]]
        table[i, : used[i]] = ids
        tokens = np.arange(max(length, 0))
        unused_slots[ids[tokens // case.page], tokens % case.page] = False
    k_cache[unused_slots] = np.nan
    q = random_values(rng, (case.b, case.s_q, case.h_q, case.d_k), case.dtype)
    return Inputs(q, k_cache, table, lengths)


def expected_decode(
    inputs: Inputs,
    *,
    d_v=D_V,
    softmax_scale=None,
    causal=False,
    causal_offset=None,
    attn_sink=None,
):
    """Unpaged attention in float64, sequence by sequence.

    Returns:
      out f64 [b, s_q, h_q, d_v], lse f64 [b, h_q, s_q].
    """
    b, s_q, h_q, d_k = inputs.q.shape
    pages, page, h_kv, _ = inputs.k_cache.shape
    scale = d_k**-0.5 if softmax_scale is None else softmax_scale
    out = np.zeros((b, s_q, h_q, d_v))
    lse = np.full((b, h_q, s_q), np.inf)
    for i in range(b):
        length = max(int(inputs.cache_seqlens[i]), 0)
        ids = inputs.block_table[i, : -(-length // page)]
        if len(ids) * page < length or any(not 0 <= int(j) < pages for j in ids):
            out[i], lse[i] = np.nan, np.nan
            continue
        tokens = inputs.k_cache[ids].reshape(len(ids) * page, h_kv, d_k)[:length]
        for head in range(h_q):
            kv = tokens[:, head // (h_q // h_kv)].astype(np.float64)
            scores = inputs.q[i, :, head].astype(np.float64) @ kv.T * scale
            for s in range(s_q):
                seen = length
                if causal:
                    offset = 0 if causal_offset is None else int(causal_offset[i])
                    seen = min(max(length - s_q + 1 + s + offset, 0), length)
                if seen == 0:
                    continue
                weights = np.exp(scores[s, :seen] - scores[s, :seen].max())
                out[i, s, head] = weights @ kv[:seen, :d_v] / weights.sum()
                lse[i, head, s] = scores[s, :seen].max() + np.log(weights.sum())
    return with_sink(out, lse, attn_sink)


def with_sink(out, lse, attn_sink):
    """(out, lse), out multiplied by sigmoid(lse - attn_sink). attn_sink: [h_q] or None."""
    if attn_sink is None:
        return out, lse
    with np.errstate(over="ignore", invalid="ignore"):
        factor = 1 / (1 + np.exp(np.asarray(attn_sink, np.float64)[:, None] - lse))
    factor = np.where(lse == np.inf, 1, factor).swapaxes(1, 2)[..., None]
    return out * factor, lse


@dataclasses.dataclass(frozen=True)
class SparseCase:
    """One call with token lists."""

    b: int
    s_q: int
    h_q: int
    topk: int
    extra_topk: int = 0
    d_k: int = D_K
    page: int = 64
    extra_page: int = 64
    dtype: str = "bfloat16"
    seed: int = 0

    def __str__(self):
        extra = f"+{self.extra_topk}-page{self.page}-{self.extra_page}" if self.extra_topk else ""
        return (
            f"b{self.b}-sq{self.s_q}-hq{self.h_q}-topk{self.topk}{extra or f'-page{self.page}'}"
            f"-d{self.d_k}-{self.dtype}"
        )


@dataclasses.dataclass(frozen=True)
class SparseInputs:
    """The arrays of one call with token lists, as numpy arrays, or None."""

    q: np.ndarray
    k_cache: np.ndarray
    indices: np.ndarray
    topk_length: np.ndarray | None = None
    extra_k_cache: np.ndarray | None = None
    extra_indices: np.ndarray | None = None
    extra_topk_length: np.ndarray | None = None
    attn_sink: np.ndarray | None = None

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def sequences(self, chosen):
        """Those at these positions of the batch."""
        fields = ("q", "indices", "topk_length", "extra_indices", "extra_topk_length")
        values = {name: getattr(self, name) for name in fields}
        return self.replace(**{k: v[chosen] for k, v in values.items() if v is not None})


def make_sparse_inputs(case: SparseCase, *, lengths=None, extra_lengths=None) -> SparseInputs:
    """Random inputs with poison in everything that must not be read.

    Every slot that no list names is NaN; the first and the last one are among them. Some entries
    of a list are outside the pool. Those past its length are any integers, slots of NaN too.

    Args:
      case: the shapes.
      lengths, extra_lengths: i32 [b] or [b, s_q] or None, the used entries.
    """
    rng = np.random.default_rng(case.seed)
    q = random_values(rng, (case.b, case.s_q, case.h_q, case.d_k), case.dtype)
    if lengths is not None:
        lengths = np.asarray(lengths, np.int32)
    cache, lists = random_lists(rng, case, case.topk, case.page, lengths)
    inputs = SparseInputs(q, cache, lists, lengths)
    if case.extra_topk:
        if extra_lengths is not None:
            extra_lengths = np.asarray(extra_lengths, np.int32)
        cache, lists = random_lists(rng, case, case.extra_topk, case.extra_page, extra_lengths)
        inputs = inputs.replace(
            extra_k_cache=cache, extra_indices=lists, extra_topk_length=extra_lengths
        )
    return inputs


def random_lists(rng, case, topk, page, lengths):
    """A pool and lists of its slots: (cache, i32 [b, s_q, topk])."""
    slots = -(-(2 * topk + 130) // page) * page
    named = 1 + rng.permutation(slots - 2)[: topk + 64]  # by any list
    lists = rng.choice(named, (case.b, case.s_q, topk))
    lists = np.where(rng.random(lists.shape) < 0.1, outside(rng, lists.shape, slots), lists)
    cache = random_values(rng, (slots, case.d_k), case.dtype)
    used = np.broadcast_to(used_entries(lengths, lists.shape), lists.shape)
    unused = np.setdiff1d(np.arange(slots), lists[used])
    cache[unused] = np.nan
    garbage = rng.choice(unused, lists.shape)
    garbage = np.where(rng.random(lists.shape) < 0.3, outside(rng, lists.shape, slots), garbage)
    lists = np.where(used, lists, garbage).astype(np.int32)
    return cache.reshape(-1, page, 1, case.d_k), lists


def outside(rng, shape, slots):
    """Entries that name no slot of a pool."""
    return rng.choice([-1, -slots, -123456, INT32.min, slots, slots + 1, INT32.max], shape)


def used_entries(lengths, shape):
    """Which entries of lists of this shape are before their end: bool, broadcasts to it."""
    b, s_q, topk = shape
    if lengths is None:
        return np.ones(shape, bool)
    return np.arange(topk) < lengths.reshape(b, -1, 1)


def expected_sparse_decode(inputs: SparseInputs, *, d_v=D_V, softmax_scale=None):
    """Attention over lists in float64, query by query.

    Returns:
      out f64 [b, s_q, h_q, d_v], lse f64 [b, h_q, s_q].
    """
    b, s_q, h_q, d_k = inputs.q.shape
    scale = d_k**-0.5 if softmax_scale is None else softmax_scale
    lists = [(inputs.k_cache, inputs.indices, inputs.topk_length)]
    if inputs.extra_k_cache is not None:
        lists.append((inputs.extra_k_cache, inputs.extra_indices, inputs.extra_topk_length))
    out = np.zeros((b, s_q, h_q, d_v))
    lse = np.full((b, h_q, s_q), np.inf)
    for i, s in np.ndindex(b, s_q):
        tokens = []
        for cache, indices, lengths in lists:
            used = np.broadcast_to(used_entries(lengths, indices.shape), indices.shape)[i, s]
            slots = indices[i, s][used]
            rows = cache.reshape(-1, d_k)
            tokens.append(rows[slots[(slots >= 0) & (slots < len(rows))]])
        kv = np.concatenate(tokens).astype(np.float64)
        if not len(kv):
            continue
        scores = inputs.q[i, s].astype(np.float64) @ kv.T * scale
        maximum = scores.max(axis=1)
        weights = np.exp(scores - maximum[:, None])
        total = weights.sum(axis=1)
        out[i, s] = weights @ kv[:, :d_v] / total[:, None]
        lse[i, :, s] = maximum + np.log(total)
    return with_sink(out, lse, inputs.attn_sink)


def assert_decode_close(actual, expected):
    """Compares (out, lse) with FlashMLA's tolerances."""
    out, lse = (np.asarray(x) for x in actual)
    rounded = expected[0].astype(out.dtype)  # as the op rounds its float32 result
    assert_close("out", out, rounded, atol=8e-4, rtol=2.01 / 128, cosine=5e-6)
    assert_close("lse", lse, expected[1], atol=1e-6, rtol=8.01 / 65536)


def assert_close(name, actual, expected, *, atol, rtol, cosine=None):
    """Each element within atol or within rtol, inf and NaN in the same places."""
    assert actual.shape == expected.shape, (name, actual.shape, expected.shape)
    actual, expected = actual.astype(np.float64), expected.astype(np.float64)
    for value in (np.nan, np.inf, -np.inf):
        ours, theirs = (np.isnan(x) if np.isnan(value) else x == value for x in (actual, expected))
        wrong = np.argwhere(ours != theirs)
        assert not len(wrong), f"{name}: {value} at other places, the first at {wrong[0]}"
    finite = np.isfinite(expected)
    actual, expected = np.where(finite, actual, 0), np.where(finite, expected, 0)
    error = np.abs(actual - expected)
    wrong = np.argwhere((error >= atol) & (error >= rtol * (np.abs(expected) + 1e-6)))
    if len(wrong):
        at = tuple(wrong[0])
        raise AssertionError(
            f"{name}: {len(wrong)} of {error.size} elements are off, the first at {at}: "
            f"{actual[at]} for {expected[at]}"
        )
    squares = (actual**2 + expected**2).sum()
    if cosine is not None and squares > 1e-12:
        # 1 - 2 <a, e> / (<a, a> + <e, e>), in a form that does not cancel
        difference = (error**2).sum() / squares
        assert difference < cosine, f"{name}: cosine difference {difference}"


def assert_bit_equal(actual, expected):
    """Two pytrees of equal shapes, dtypes and bits."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a), np.asarray(e)
        assert (a.shape, a.dtype) == (e.shape, e.dtype)
        assert a.tobytes() == e.tobytes()


def schedules_of_garbage(rng, schedule, limits):
    """Schedules of the same shapes that fit no lengths.

    Yields for each n of `limits` one of random integers from -n to n - 1, and one of sequences that
    are there with any tiles; then some in which the first part alone has work, from a far tile on.
    """
    metadata, num_splits = schedule
    b, parts = metadata.batch, metadata.part_bounds.shape

    def draw(most, shape):
        return jnp.asarray(rng.integers(-most, most, shape), jnp.int32)

    def with_bounds(bounds):
        return dataclasses.replace(metadata, part_bounds=jnp.asarray(bounds, jnp.int32))

    for most in limits:
        yield jax.tree.map(lambda like, most=most: draw(most, like.shape), schedule)
        sequences, tiles = rng.integers(0, b + 1, parts[0]), draw(2**31, parts[0])
        yield with_bounds(np.stack([sequences, tiles], axis=1)), num_splits
    for tile in (2**25 + 7, INT32.max, INT32.min):
        bounds = np.tile([b, 0], (parts[0], 1))
        bounds[0] = 0, tile
        yield with_bounds(bounds), num_splits


def assert_right_again_and_again(run, lengths, calls):
    """Runs `run(lengths, implementation)` -> (out, lse) `calls` times in one program.

    The kernel's first results must be close to the reference's, all others equal to the bit.
    """

    @jax.jit
    def count_wrong(lengths, expected):
        def body(carry, _):
            lengths, wrong = carry
            results = run(lengths, "cuda")
            differs = [(a != e).any() for a, e in zip(results, expected, strict=True)]
            carry = jax.lax.optimization_barrier((lengths, wrong + (differs[0] | differs[1])))
            return carry, None

        return jax.lax.scan(body, (lengths, jnp.int32(0)), length=calls)[0][1]

    first, plain = run(lengths, "cuda"), run(lengths, "xla")
    # Values of up to 5.5, weighed by numbers of 8 bits and rounded to 8 bits, twice: 0.03 at most.
    # A row of wrong queries is off by more than that, mostly by far.
    for name, atol, a, e in zip(("out", "lse"), (0.05, 0.02), first, plain, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=atol, err_msg=name)
    assert count_wrong(lengths, first) == 0
