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
from core import bench, check, plain, report
from core.inputs import DTYPES, random_pool
from core.op import Case, Op
from flash_attention import FlashAttention

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata, get_sparse_seqlens

HEAD_DIM_V, PAGE, FIXED_SPLIT_SIZE = 512, 64, 512


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
    """16 times what a round names, or 5 GB: what one list named, another one seldom does."""
    needs = [(case.lists * case.tokens, 16 * calls(case)) for case in cases]
    return random_pool(needs, PAGE, cases[0].d_k, DTYPES[cases[0].dtype])


def make_lists(case, pool, calls):
    """The lengths of the lists; for each call independent random lists, all of them valid."""
    rng, shape = np.random.default_rng(0), (calls, case.batch, case.s_q)
    sizes = {"main": case.topk} | ({"extra": case.extra_topk} if case.extra_topk else {})
    slots = pool.shape[0] * pool.shape[1]
    drawn = {
        name: rng.integers(slots, size=(*shape, n), dtype=np.int32) for name, n in sizes.items()
    }
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
    """The results of attend(q [n, h, d], rows, slots, seen) -> (out [n, h, d_v], lse [n, h])."""
    lists, q = own
    rows, flat = pool.reshape(-1, case.d_k), q.reshape(case.lists, case.h_q, case.d_k)
    out, lse = attend(flat, rows, *joined(case, lengths, lists))
    lse = jnp.swapaxes(lse.reshape(case.batch, case.s_q, case.h_q), 1, 2)
    return out.reshape(*q.shape[:3], HEAD_DIM_V), lse


def call_plain(case, pool, lengths, own):
    def attend(q, rows, slots, seen):
        found = plain.attend(q[:, None], rows[slots], seen[:, None], HEAD_DIM_V, case.d_k**-0.5)
        return found[0][:, 0], found[1][..., 0]

    return on_lists(case, attend, pool, lengths, own)


def check_results(case, pool, lengths, own, found):
    attend = functools.partial(check.attend_rows, d_v=HEAD_DIM_V, scale=case.d_k**-0.5)
    expected = on_lists(case, attend, pool, lengths, own)
    return check.compare(expected, found, rel_err=check.relative, lse_err=check.largest_difference)


def find_flash_attention(options):
    def lists(case, lengths, own):
        return joined(case, lengths, own[0])[0], own[1].reshape(case.lists, case.h_q, case.d_k)

    return None if options.smoke else FlashAttention(lists, options)


CASES = [
    *(SparseDecode(h, b, k) for k in (2048, 512) for h in (8, 16, 32, 64, 128)
      for b in (1, 8, 32, 128)),
    *(SparseDecode(h, b, 128, extra, d_k=512) for extra in (512, 1024) for h in (64, 128)
      for b in (1, 32, 128)),
]  # fmt: skip
OTHER_HEADS = [SparseDecode(h, b, 2048) for h in (20, 40, 48, 96) for b in (1, 32, 128)]
BASELINE = [SparseDecode(h, b, 2048) for h in (16, 128) for b in (1, 32, 128)]
BASELINE.append(SparseDecode(128, 128, 128, 1024, d_k=512))


def label_of(row):
    extra = f" + {row['extra_topk']}" if row["extra_topk"] else ""
    return f"{row['batch']} x {row['topk']}{extra}"


KERNEL = Op(
    "sparse_decode", CASES, quick=CASES[4:20:5] + CASES[40:52:4],
    smoke=[SparseDecode(4, 2, 100), SparseDecode(4, 3, 70, 40, d_k=512)],
    pool=make_pool, lists=make_lists, draw=draw_queries, prepare=make_schedule, call=call,
    check=check_results, limits={"rel_err": 1e-2, "lse_err": 1e-3},
    pool_key=lambda case: (case.dtype, case.d_k),
    labels="batch x tokens", label=label_of,
    heading=lambda row: f"d_k {row['d_k']}, h_q {row['h_q']}, {row['dtype']}",
)  # fmt: skip


def fixed_splits(case, implementation, lengths):
    longest = -(-case.topk // 64) * 64 + case.extra_topk if case.extra_topk else case.topk
    size = {"fixed_split_size": FIXED_SPLIT_SIZE, "max_seqlen": longest}
    return make_schedule(case, implementation, lengths, **size)


def next_heads(case):
    return dataclasses.replace(case, h_q=64 if case.h_q < 64 else 128)


def if_invariance_is_timed(case):
    return case if case.h_q not in (8, 32, 64) and case.topk != 512 else None


OP = dataclasses.replace(
    KERNEL, peers=[find_flash_attention], baseline=BASELINE, plain=call_plain,
    beside={
        "dense_us": (dense.OP, as_dense),
        "fixed_us": (dataclasses.replace(KERNEL, prepare=fixed_splits), if_invariance_is_timed),
    },
)  # fmt: skip
HEADS_OP = dataclasses.replace(
    OP, cases=OTHER_HEADS, quick=OTHER_HEADS[1::6], smoke=[SparseDecode(3, 2, 100)], baseline=(),
    beside={"next_us": (KERNEL, next_heads)},
)  # fmt: skip


def run_heads(run, machine, op):
    cases = bench.select_cases(HEADS_OP, run.options)
    cases = [case for case in cases if run.wanted(op.name, "heads", case.name)]
    if cases:
        bench.measure_all(run, bench.Bench(HEADS_OP, cases, run, machine), "heads")


def worst(rows, of):
    """Such as "1.06 (h16-d576-32x2048)": the largest `of` of a row that has one."""
    found = [(value, row["case"]) for row in rows if (value := of(row)) is not None]
    return "{:.3f} ({})".format(*max(found)) if found else "not measured"


def to(column):
    return lambda row: row["us"] / row[column] if row.get(column) else None


def goals(rows):
    """What the figures of a card come to, a line each."""
    table, heads = (report.of(rows, OP.name, section) for section in ("table", "heads"))
    peered = [row for row in table if row["ratio"] and row["topk"] == 2048]
    few = [row for row in peered if row["batch"] <= 8]
    large = [row for row in table if row["batch"] >= 32]
    means = " and ".join(f"{report.mean(r['ratio'] for r in part):.3f}" for part in (peered, few))
    least = min((row["ratio"], row["case"]) for row in peered) if peered else "not measured"
    wide = [row for row in large if row["h_q"] == 128]
    narrow = [row for row in large if row["h_q"] != 128]
    return [
        f"ratio, top-k 2048: geometric mean of all and of batch 1 and 8 {means}, least {least}",
        f"time over the dense kernel's, batch 32 and 128: h_q 128 {worst(wide, to('dense_us'))}, "
        f"others {worst(narrow, to('dense_us'))}",
        f"other heads, time over that of the next of 64 and 128: {worst(heads, to('next_us'))}",
        "a call without a schedule, us more: "
        + worst(table, lambda row: row["us_with_schedule"] - row["us"]),
        f"splits of {FIXED_SPLIT_SIZE} tokens, times: "
        + worst(table, lambda row: row["fixed_us"] / row["us"] if row.get("fixed_us") else None),
    ]


def print_goals(run, machine, op):
    print(*goals(run.results.rows), sep="\n", flush=True)


SECTIONS = {"table": bench.table, "heads": run_heads, "goals": print_goals}

ABOUT = """
`flash_mla_with_kvcache` with `indices`: each query attends to a list of tokens of its own, drawn at
random from a pool of 5 GB; "128 + 512" is a list and an extra list. d_v is 512. "+ schedule" is a
call that makes its own schedule. The peer is {peer}, with pages of one token, its metadata made
beforehand and the best of several numbers of splits; an extra list is joined to the list
beforehand. "dense us" is our dense kernel over as many tokens in pages of 64, "fixed us" ours with
splits of 512 tokens, whose results do not depend on the batch. The floor counts
2·h_q·tokens·(d_k+d_v) FLOP, and the bytes of tokens, queries and outputs."""

if __name__ == "__main__":
    sys.exit(bench.main(OP, __doc__, sections=SECTIONS, suffix="_sparse"))
