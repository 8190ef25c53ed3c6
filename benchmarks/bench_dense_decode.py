"""Times dense MLA decode beside FlashMLA: benchmarks/results/<card>.json.

    python benchmarks/bench_dense_decode.py             all 113 cases, some minutes
    python benchmarks/bench_dense_decode.py --quick     a dozen cases, under a minute
    python benchmarks/bench_dense_decode.py --profile   kernel by kernel, and whether calls overlap
    python benchmarks/bench_dense_decode.py --smoke     tiny shapes on the CPU: does the script run

README.md beside this file says how FlashMLA is found, and by which rules the timing goes.
"""

import dataclasses
import sys
from typing import ClassVar

import jax
import numpy as np
from core import bench, check, peers, plain
from core.inputs import DTYPES, PagedDecode, random_pool
from core.op import Op, Peer

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

HEAD_DIM_K, HEAD_DIM_V = 576, 512


@dataclasses.dataclass(frozen=True)
class DenseDecode(PagedDecode):
    """Queries of h_q heads over one KV head."""

    d_k: ClassVar[int] = HEAD_DIM_K

    def flops(self):
        return 2 * self.h_q * self.s_q * sum(self.lengths()) * (self.d_k + HEAD_DIM_V)

    def token_bytes(self):
        return 2 * sum(self.lengths()) * self.d_k

    def moved_bytes(self):
        """The cache and the queries are read, the results are written."""
        rows = self.batch * self.s_q * self.h_q
        return self.token_bytes() + 2 * rows * (self.d_k + HEAD_DIM_V)


def make_pool(cases, calls):
    needs = [(case.pages() * case.page_block_size, calls(case)) for case in cases]
    return random_pool(needs, cases[0].page_block_size, cases[0].d_k, DTYPES[cases[0].dtype])


def draw_queries(case, key):
    shape = case.batch, case.s_q, case.h_q, case.d_k
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
    scale = case.d_k**-0.5
    expected = check.attend_paged(q, pool, table, lengths, HEAD_DIM_V, scale, case.causal)
    return check.compare(expected, found, rel_err=check.relative, lse_err=check.largest_difference)


def call_plain(case, pool, lengths, own):
    table, q = own
    return plain.attend_paged(q, pool, table, lengths, HEAD_DIM_V, case.d_k**-0.5, case.causal)


class FlashMLA(Peer):
    """FlashMLA's dense decode as vllm ships it. It pads few heads to 64 rows by itself."""

    def __init__(self, options):
        functions, self.name = peers.load_flashmla(options)
        self._op = functions.dense_decode_fwd

    def ways(self, case):
        return [""] if case.page_block_size == 64 else None

    def prepare(self, case, way, pool, lengths, owns):
        def prepare(arrays, first):
            def run(one, schedule, splits):
                (pool, lengths), (table, q), scale = arrays, one, case.d_k**-0.5
                return self._op(q, pool, HEAD_DIM_V, lengths, table, scale, case.causal, schedule,
                                splits, None)  # fmt: skip

            schedule, splits = run(first, None, None)[2:4]
            return lambda one: run(one, schedule, splits)[:2], (schedule, splits)

        return peers.graph_round(prepare, (pool, lengths), owns)


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
    pool=make_pool, draw=draw_queries, prepare=make_schedule, call=call,
    lists=lambda case, pool, calls: case.tables(pool.shape[0], calls),
    check=check_results, limits={"rel_err": 1e-2, "lse_err": 1e-3},
    peers=[lambda options: None if options.smoke else FlashMLA(options)],
    pool_key=lambda case: (case.dtype, case.page_block_size), baseline=BASELINE,
    plain=call_plain,
    is_sustained=lambda c: c.h_q * c.s_q >= 128 and c.batch >= 64 and c.mean_len >= 4096,
    labels="batch x length", label=label_of, heading=heading_of,
)  # fmt: skip


ABOUT = """
`flash_mla_with_kvcache`, d_k 576, d_v 512, one KV head; `s_q` 2 is causal. "+ schedule" is a call
that makes its own schedule. The peer is {peer}. The floor counts 2·h_q·s_q·Σlen·(d_k+d_v) FLOP, and
the bytes of cache, queries and outputs."""

if __name__ == "__main__":
    sys.exit(bench.main(OP, __doc__))
