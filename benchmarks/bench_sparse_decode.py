"""Times sparse MLA decode beside FlashAttention-3: benchmarks/results/<card>_sparse.json.

    python benchmarks/bench_sparse_decode.py           all cases, twice ten minutes
    python benchmarks/bench_sparse_decode.py --quick   some cases, a minute
    python benchmarks/bench_sparse_decode.py --smoke   tiny shapes on the CPU: does the script run

README.md beside this file says how FlashAttention-3 is found, and by which rules the timing goes.
"""

import dataclasses
import functools
import sys
from typing import ClassVar

import bench_dense_decode as dense
import jax
import jax.numpy as jnp
import numpy as np
from core import bench, check, peers, plain, report
from core.inputs import DTYPES, MAX_POOL_TOKENS, random_pool
from core.op import Case, Op, Peer

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, get_sparse_seqlens

HEAD_DIM_V, PAGE, ROPE, FIXED_SPLIT_SIZE = 512, 64, 64, 512
NUM_SPLITS = (0, 1, 2, 4, 8, 16, 32)  # of FlashAttention-3; with 0 it chooses


@dataclasses.dataclass(frozen=True)
class SparseDecode(Case):
    """Every query of h_q heads reads a list of topk tokens, and one of extra_topk."""

    max_calls: ClassVar[int] = 512

    h_q: int
    batch: int
    topk: int
    extra_topk: int = 0
    d_k: int = 576
    s_q: int = 1
    dtype: str = "bf16"

    @property
    def name(self):
        tail = f"+{self.extra_topk}" if self.extra_topk else ""
        tail += "" if self.dtype == "bf16" else f"-{self.dtype}"
        return f"h{self.h_q}-d{self.d_k}-{self.batch}x{self.topk}{tail}"

    @property
    def lists(self):
        return self.batch * self.s_q

    @property
    def tokens(self):
        """Of one query."""
        return self.topk + self.extra_topk

    def flops(self):
        return 2 * self.h_q * self.lists * self.tokens * (self.d_k + HEAD_DIM_V)

    def token_bytes(self):
        return 2 * self.lists * self.tokens * self.d_k

    def moved_bytes(self):
        """The tokens and the queries are read, the results are written."""
        return self.token_bytes() + 2 * self.lists * self.h_q * (self.d_k + HEAD_DIM_V)


class AsManyTokens(dense.DenseDecode):
    max_calls = SparseDecode.max_calls


class AsManyNopeTokens(AsManyTokens):
    d_k = 512


def as_dense(case):
    """The case of the dense op with as many tokens for each query."""
    kind = AsManyTokens if case.d_k == AsManyTokens.d_k else AsManyNopeTokens
    return kind(case.h_q, case.s_q, case.batch, case.tokens, dtype=case.dtype)


def make_pool(cases, calls):
    """So large that the L2 holds 1% of it, as lists may name what another one named."""
    most = 2 * max(case.lists * case.tokens for case in cases)
    tokens = most if calls(cases[0]) == 2 else MAX_POOL_TOKENS
    return random_pool([(tokens, 1)], PAGE, cases[0].d_k, DTYPES[cases[0].dtype])


def make_lists(case, pool, calls):
    """The lengths of the lists; for each call independent random lists, all of them valid."""
    rng, shape = np.random.default_rng(0), (calls, case.batch, case.s_q)
    sizes = {"main": case.topk} | ({"extra": case.extra_topk} if case.extra_topk else {})
    slots = pool.shape[0] * pool.shape[1]
    drawn = {name: rng.integers(slots, size=(*shape, n), dtype=np.int32) for name, n in sizes.items()}
    lengths = {name: np.full(shape[1:], n, np.int32) for name, n in sizes.items()}
    return lengths, [{name: x[i] for name, x in drawn.items()} for i in range(calls)]


def draw_queries(case, key):
    return jax.random.normal(key, (case.batch, case.s_q, case.h_q, case.d_k), DTYPES[case.dtype])


def make_schedule(case, implementation, lengths, **options):
    lists = [jnp.zeros((case.batch, case.s_q, n), jnp.int32) for n in (case.topk, case.extra_topk)]
    extra = (lists[1], lengths["extra"]) if case.extra_topk else ()
    seqlens = get_sparse_seqlens(lists[0], lengths["main"], *extra)
    return get_mla_metadata(seqlens, case.h_q, 1, implementation=implementation, **options)


def call(case, implementation, pool, lengths, schedule, own):
    """Both lists name tokens of the same pool."""
    lists, q = own
    extra = {} if not case.extra_topk else {
        "extra_k_cache": pool, "extra_indices_in_kvcache": lists["extra"],
        "extra_topk_length": lengths["extra"],
    }  # fmt: skip
    return flash_mla_with_kvcache(
        q, pool, None, None, HEAD_DIM_V, *(schedule or ()), indices=lists["main"],
        topk_length=lengths["main"], implementation=implementation, **extra,
    )  # fmt: skip


def joined(case, lengths, lists):
    """(slots, seen) [lists, tokens]: both lists in one, and what of it counts."""
    slots = jnp.concatenate(list(lists.values()), axis=-1).reshape(case.lists, case.tokens)
    parts = [jnp.arange(x.shape[-1]) < lengths[n][..., None] for n, x in lists.items()]
    return slots, jnp.concatenate(parts, axis=-1).reshape(slots.shape)


def on_lists(case, attend, pool, lengths, own):
    """attend(q [n, h, d], rows, slots, seen) -> out [n, h, d_v], lse [n, h], as the op's results."""
    lists, q = own
    rows, flat = pool.reshape(-1, case.d_k), q.reshape(case.lists, case.h_q, case.d_k)
    out, lse = attend(flat, rows, *joined(case, lengths, lists))
    lse = jnp.swapaxes(lse.reshape(case.batch, case.s_q, case.h_q), 1, 2)
    return out.reshape(*q.shape[:3], HEAD_DIM_V), lse


def call_plain(case, pool, lengths, own):
    def attend(q, rows, slots, seen):
        found = plain.attend(
            q[:, None], rows[slots], seen[:, None], HEAD_DIM_V, case.d_k**-0.5
        )
        return found[0][:, 0], found[1][..., 0]

    return on_lists(case, attend, pool, lengths, own)


def check_results(case, pool, lengths, own, found):
    attend = functools.partial(check.attend_rows, d_v=HEAD_DIM_V, scale=case.d_k**-0.5)
    expected = on_lists(case, attend, pool, lengths, own)
    return check.compare(expected, found, rel_err=check.relative, lse_err=check.largest_difference)


class FlashAttention(Peer):
    """FlashAttention-3 as vllm calls it: pages of one token, the joined list as the page table.

    Its metadata is made beforehand, which vllm does for dense decode only. Without rotary columns
    the queries of that part are zero, and its keys any columns.
    """

    def __init__(self, options):
        self._ops, self.name = peers.load_flash_attention(options)

    def ways(self, case):
        return [""] if case.h_q in HEADS else None

    def prepare(self, case, way, pool, lengths, owns):
        slots = [joined(case, lengths, lists)[0] for lists, _ in owns]
        counts = jnp.full(case.lists, case.tokens, jnp.int32)
        starts = jnp.arange(case.lists + 1, dtype=jnp.int32)
        zero = jnp.zeros((case.lists, case.h_q, ROPE), pool.dtype)
        arrays = pool.reshape(-1, 1, 1, case.d_k), counts, starts, zero
        inputs = [
            (s, q.reshape(case.lists, case.h_q, -1)) for s, (_, q) in zip(slots, owns, strict=True)
        ]
        few = [n for n in NUM_SPLITS if n <= max(1, case.tokens // 64) and n * case.lists <= 1024]
        return peers.fastest_round({
            f"num_splits {n}": peers.graph_round(
                functools.partial(self._prepare, case, n), arrays, inputs
            )
            for n in few
        })  # fmt: skip

    def _prepare(self, case, splits, arrays, first):
        rows, counts, starts, zero = arrays
        v, rope = rows[..., :HEAD_DIM_V], rows[..., case.d_k - ROPE :]
        k, n = (rows[..., :ROPE] if case.d_k == HEAD_DIM_V else rope), case.lists
        none, whole = (None,) * 8, (-1, -1)  # no new keys, no rotation, no scales; no window
        metadata = self._ops.get_scheduler_metadata(
            n, 1, case.tokens, case.h_q, 1, ROPE, HEAD_DIM_V, rows.dtype, counts, starts, None, None,
            None, None, 1, 0, True, *whole, False, splits, None, 0,
        )  # fmt: skip

        def run(one):
            slots, q = one
            q_rope = zero if case.d_k == HEAD_DIM_V else q[..., HEAD_DIM_V:]
            out, lse = self._ops.fwd(
                q_rope, k, v, None, None, q[..., :HEAD_DIM_V], None, starts, None, None, None,
                counts, 1, case.tokens, slots, *none, case.d_k**-0.5, True, *whole, 0.0, True,
                metadata, splits, None, 0, None, 1, 0, None,
            )[:2]  # fmt: skip
            shape = case.batch, case.s_q, case.h_q
            lse = lse.transpose(0, 1).reshape(shape).transpose(1, 2)
            return out.reshape(*shape, HEAD_DIM_V), lse

        return run, metadata
