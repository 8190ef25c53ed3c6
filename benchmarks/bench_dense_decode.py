"""Times dense MLA decode beside FlashMLA: benchmarks/results/<card>.json.

    python benchmarks/bench_dense_decode.py             all 113 cases, some minutes
    python benchmarks/bench_dense_decode.py --quick     a dozen cases, under a minute
    python benchmarks/bench_dense_decode.py --profile   kernel by kernel, and whether calls overlap
    python benchmarks/bench_dense_decode.py --smoke     tiny shapes on the CPU: does the script run

README.md beside this file says how FlashMLA is found, and by which rules the timing goes.
"""

import dataclasses
import functools
import math
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
from core import bench, check, peers, plots, report
from core.inputs import page_tables, random_pool
from core.op import Case, Op, Peer

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

HEAD_DIM_K, HEAD_DIM_V = 576, 512
DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
CHECKED_TOKENS = 4096  # at a time, in float32


@dataclasses.dataclass(frozen=True)
class DenseDecode(Case):
    """`batch` sequences of `mean_len` tokens, or of around as many; causal where s_q is above 1."""

    h_q: int
    s_q: int
    batch: int
    mean_len: int
    varlen: bool = False
    dtype: str = "bf16"
    page_block_size: int = 64

    @property
    def name(self):
        tail = "v" if self.varlen else ""
        tail += "" if self.dtype == "bf16" else f"-{self.dtype}"
        tail += "" if self.page_block_size == 64 else f"-p{self.page_block_size}"
        return f"h{self.h_q}-s{self.s_q}-{self.batch}x{self.mean_len}{tail}"

    @property
    def shape_key(self):
        return dataclasses.replace(self, varlen=False)

    @property
    def causal(self):
        return self.s_q > 1

    def lengths(self):
        """The sequence lengths; ragged ones are the same draw in every run."""
        if not self.varlen:
            return [self.mean_len] * self.batch
        rng, spread = random.Random(0), self.mean_len / 2
        return [int(max(rng.normalvariate(self.mean_len, spread), 2)) for _ in range(self.batch)]

    def flops(self):
        return 2 * self.h_q * self.s_q * sum(self.lengths()) * (HEAD_DIM_K + HEAD_DIM_V)

    def token_bytes(self):
        return 2 * sum(self.lengths()) * HEAD_DIM_K

    def moved_bytes(self):
        """The cache and the queries are read, the results are written."""
        rows = self.batch * self.s_q * self.h_q
        return self.token_bytes() + 2 * rows * (HEAD_DIM_K + HEAD_DIM_V)

    def pages(self):
        """How many pages a call reads."""
        return sum(math.ceil(n / self.page_block_size) for n in self.lengths())

    @functools.cached_property
    def table_width(self):
        """Columns of the block table: the same for a uniform case and its ragged twin."""
        ragged = dataclasses.replace(self, varlen=self.batch > 1)
        return math.ceil(max(self.mean_len, *ragged.lengths()) / self.page_block_size)


def make_pool(cases, calls):
    needs = [(case.pages() * case.page_block_size, calls(case)) for case in cases]
    return random_pool(needs, cases[0].page_block_size, HEAD_DIM_K, DTYPES[cases[0].dtype])


def make_lists(case, pool, calls):
    """The lengths, which all calls share, and the block table of each call."""
    lengths = np.asarray(case.lengths(), np.int32)
    page, width = case.page_block_size, case.table_width
    return lengths, list(page_tables(case.lengths(), page, width, pool.shape[0], calls))


def draw_queries(case, key):
    shape = case.batch, case.s_q, case.h_q, HEAD_DIM_K
    return jax.random.normal(key, shape, DTYPES[case.dtype])


def make_schedule(case, implementation, lengths, **options):
    return get_mla_metadata(
        lengths, case.s_q * case.h_q, 1, implementation=implementation, **options
    )


def call(case, implementation, pool, lengths, schedule, own):
    table, q = own
    return flash_mla_with_kvcache(
        q, pool, table, lengths, HEAD_DIM_V, *(schedule or ()), causal=case.causal,
        implementation=implementation,
    )  # fmt: skip


def check_results(case, pool, lengths, own, found, sample=None):
    """Beside float32; with a `sample` only so many sequences, the first and the last included."""
    if sample is not None and sample < case.batch:
        picked = np.linspace(0, case.batch - 1, sample).astype(int)
        lengths, own, found = jax.tree.map(lambda x: x[picked], (lengths, own, found))
    table, q = own
    page = pool.shape[1]
    pages = min(max(CHECKED_TOKENS // page, 1), table.shape[1])
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages)))

    def one_sequence(one):
        q, table, length = one
        # The first key that each query does not see.
        end = length - (jnp.arange(case.s_q)[::-1] if case.causal else 0)

        def tokens(i):
            ids = jax.lax.dynamic_slice_in_dim(table, i * pages, pages)
            seen = i * pages * page + jnp.arange(pages * page) < jnp.reshape(end, (-1, 1))
            return pool[ids].reshape(-1, HEAD_DIM_K), seen

        return check.attend(q, tokens, -(-length // (pages * page)), HEAD_DIM_V, HEAD_DIM_K**-0.5)

    batch = math.gcd(len(lengths), 4)
    expected = jax.lax.map(one_sequence, (q, table, lengths), batch_size=batch)
    return check.compare(expected, found, rel_err=check.relative, lse_err=check.largest_difference)


class FlashMLA(Peer):
    """FlashMLA's dense decode as vllm ships it. It pads few heads to 64 rows by itself."""

    def __init__(self, path, version=None):
        import torch

        torch.ops.load_library(str(path))
        self._op = torch.ops._flashmla_C.dense_decode_fwd
        self.name = f"FlashMLA ({peers.version_of(path, version)})"

    def ways(self, case):
        return [""] if case.page_block_size == 64 else None

    def prepare(self, case, way, pool, lengths, owns):
        def prepare(arrays, first):
            def run(one, schedule, splits):
                (pool, lengths), (table, q), scale = arrays, one, HEAD_DIM_K**-0.5
                return self._op(q, pool, HEAD_DIM_V, lengths, table, scale, case.causal, schedule,
                                splits, None)  # fmt: skip

            schedule, splits = run(first, None, None)[2:4]
            return lambda one: run(one, schedule, splits)[:2], (schedule, splits)

        return peers.graph_round(prepare, (pool, lengths), owns)


def find_flashmla(options):
    if options.smoke:
        return None
    path = peers.find_library("_flashmla_C.abi3.so", "FLASHMLA_SO")
    if path is None:
        print("no FlashMLA: set FLASHMLA_SO or install vllm; timing without it")
        return None
    return FlashMLA(path, options.vllm)


SHAPES = [
    *((1, length) for length in (4096, 32768, 131072)), (8, 8192), (32, 4096), (32, 4096, True),
    *((*shape, varlen) for shape in ((64, 8192), (128, 1024), (128, 4096), (128, 8192))
      for varlen in (False, True)),
]  # fmt: skip
CASES = [DenseDecode(h, s, *shape) for s in (1, 2) for h in (16, 32, 64, 128) for shape in SHAPES]
CASES.insert(4 * len(SHAPES), DenseDecode(128, 1, 132, 32768))


def label_of(row):
    return f"{row['batch']} x {row['mean_len']}" + (" varlen" if row["varlen"] else "")


def heading_of(row):
    return f"s_q {row['s_q']}, h_q {row['h_q']}, {row['dtype']}, page {row['page_block_size']}"


QUICK = [
    DenseDecode(*shape)
    for shape in (
        (16, 1, 1, 4096), (16, 1, 1, 32768), (16, 1, 128, 1024, True), (16, 1, 128, 4096),
        (16, 1, 128, 4096, True), (32, 1, 64, 8192), (64, 1, 128, 4096, True), (128, 1, 1, 32768),
        (128, 1, 32, 4096), (128, 1, 128, 1024), (128, 1, 128, 4096), (128, 1, 128, 4096, True),
        (128, 2, 128, 4096),
    )
]  # fmt: skip
BASELINE = [DenseDecode(128, 1, *shape) for shape in ((1, 32768), (32, 4096), (64, 8192))]
BASELINE += [DenseDecode(h, s, 128, 4096) for h, s in ((16, 1), (128, 1), (128, 2))]

OP = Op(
    "dense_decode", CASES, quick=QUICK,
    smoke=[DenseDecode(4, 1, 2, 100), DenseDecode(4, 2, 3, 70, varlen=True)],
    pool=make_pool, lists=make_lists, draw=draw_queries, prepare=make_schedule, call=call,
    check=check_results, limits={"rel_err": 1e-2, "lse_err": 1e-3}, peers=[find_flashmla],
    pool_key=lambda case: (case.dtype, case.page_block_size), baseline=BASELINE,
    is_sustained=lambda c: c.h_q * c.s_q >= 128 and c.batch >= 64 and c.mean_len >= 4096,
    labels="batch x length", label=label_of, heading=heading_of,
)  # fmt: skip


ABOUT = """
`flash_mla_with_kvcache`, d_k 576, d_v 512, one KV head; `s_q` 2 is causal. "+ schedule" is a call
that makes its own schedule. The peer is {peer}. Floor: 2·h_q·s_q·Σlen·(d_k+d_v) FLOP; the bytes of
cache, queries and outputs."""


def report_on(page, rows, plot):
    """The part of docs/performance.md on this op; its picture is written to `plot`."""
    rows_of_op = report.of(rows, OP.name, "table")
    if not rows_of_op:
        return
    names = ", ".join(sorted({row["peer"] for row in rows_of_op if row["peer"]}))
    page.add("## Dense decode", report.wrapped(ABOUT.format(peer=names or "absent")))
    page.add(report.summary(rows_of_op))
    if names:
        draw_ratios([row for row in rows_of_op if row["ratio"]], plot, page.card)
        page.add(f"![time of FlashMLA over ours, by case]({plot.name})")
    report.op_tables(page, OP, rows)


# Light to dark with the number of heads.
COLORS = {16: "#9ecae1", 32: "#4292c6", 64: "#08519c", 128: "#081d58"}


def draw_ratios(rows, plot, card):
    """The picture of the README: every case's ratio, a line for each batch x length."""
    lines = {}
    for row in sorted(rows, key=lambda r: (r["batch"], r["mean_len"], r["varlen"], r["h_q"])):
        dot = row["ratio"], COLORS[row["h_q"]], row["s_q"] == 1
        lines.setdefault(label_of(row).replace("x", plots.TIMES), []).append(dot)
    legend = [(f"{heads} heads", color, True) for heads, color in COLORS.items()]
    legend.append(("hollow: 2 queries a sequence", "#57606a", False))
    plots.draw_ratios(
        plot, f"Dense decode beside FlashMLA, one {card}", f"batch {plots.TIMES} length",
        "FlashMLA's time / ours: right of 1.0 we are faster", lines, legend,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(bench.main(OP, __doc__))
