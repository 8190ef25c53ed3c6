"""The cases that are timed: their shapes, lengths, floors and inputs."""

import dataclasses
import functools
import json
import math
import pathlib
import random

import cards
import numpy as np

HEAD_DIM_K = 576
HEAD_DIM_V = 512

# What one timed round must touch so that the L2 (60 MB) does not serve it.
MIN_BYTES_IN_ALL = 300e6
# What one timed round must last so that dispatching it from the host hides behind it.
MIN_ROUND_US = 400.0
MIN_CALLS, MAX_CALLS = 8, 64
# Python takes up to 15 us a call to dispatch a round, so a short one runs several times at once.
MIN_DISPATCH_US, MAX_LOOPS = 60.0, 8

HERE = pathlib.Path(__file__).resolve().parent
PEERS_FILE = HERE / "peers_h200.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of dense decode: `batch` sequences of `mean_len` tokens (or around it)."""

    h_q: int
    s_q: int
    batch: int
    mean_len: int
    varlen: bool = False
    dtype: str = "bf16"
    page_block_size: int = 64
    op: str = "dense_decode"

    @property
    def name(self):
        tail = "v" if self.varlen else ""
        tail += "" if self.dtype == "bf16" else f"-{self.dtype}"
        tail += "" if self.page_block_size == 64 else f"-p{self.page_block_size}"
        return f"h{self.h_q}-s{self.s_q}-{self.batch}x{self.mean_len}{tail}"

    @property
    def causal(self):
        return self.s_q > 1

    def lengths(self):
        """The sequence lengths; ragged ones are the same draw for every run and peer."""
        if not self.varlen:
            return [self.mean_len] * self.batch
        rng = random.Random(0)
        spread = self.mean_len / 2
        return [int(max(rng.normalvariate(self.mean_len, spread), 2)) for _ in range(self.batch)]

    def floor_us(self, card=cards.H200):
        """The time that the chip needs at least, in microseconds."""
        return max(self.compute_us(card), self.memory_us(card))

    def compute_us(self, card=cards.H200):
        """What the arithmetic takes at least."""
        tokens = sum(self.lengths())
        flops = 2 * self.h_q * self.s_q * tokens * (HEAD_DIM_K + HEAD_DIM_V)
        return 1e6 * flops / card.flops

    def memory_us(self, card=cards.H200):
        """What reading the cache and the queries and writing the outputs takes at least."""
        tokens = sum(self.lengths())
        rows = self.batch * self.s_q * self.h_q
        moved = 2 * (tokens * HEAD_DIM_K + rows * (HEAD_DIM_K + HEAD_DIM_V))
        return 1e6 * moved / card.bytes

    def pages(self):
        """How many pages one input set needs."""
        return sum(math.ceil(n / self.page_block_size) for n in self.lengths())

    @functools.cached_property
    def table_width(self):
        """Columns of the block table: one width for a uniform case and its ragged twin."""
        longest = self.mean_len
        if self.batch > 1:
            longest = max(longest, *dataclasses.replace(self, varlen=True).lengths())
        return math.ceil(longest / self.page_block_size)

    @property
    def table_tokens(self):
        """The tokens that a row of the block table has room for."""
        return self.table_width * self.page_block_size

    def fixed_parts(self, fixed_split_size):
        """The parts of a schedule with splits of a fixed size, for all that the table holds."""
        return self.batch * math.ceil(self.table_tokens / fixed_split_size)

    @functools.cached_property
    def calls(self):
        """How many calls, each on an input set of its own, make one timed round."""
        uniform = dataclasses.replace(self, varlen=False)
        bytes_per_set = 2 * HEAD_DIM_K * self.batch * self.mean_len
        calls = max(MIN_BYTES_IN_ALL / bytes_per_set, MIN_ROUND_US / max(uniform.floor_us(), 6.0))
        return min(max(math.ceil(calls), MIN_CALLS), MAX_CALLS)

    @functools.cached_property
    def loops(self):
        """How many times the round runs inside its jitted function."""
        uniform = dataclasses.replace(self, varlen=False)
        return min(math.ceil(MIN_DISPATCH_US / max(uniform.floor_us(), 6.0)), MAX_LOOPS)

    @property
    def shape_key(self):
        """Cases of one key share their compiled functions: a uniform one and its ragged twin."""
        return dataclasses.replace(self, varlen=False)

    def row(self):
        """The columns of a result row that name the case."""
        return {
            "op": self.op,
            "dtype": self.dtype,
            "page_block_size": self.page_block_size,
            "h_q": self.h_q,
            "s_q": self.s_q,
            "batch": self.batch,
            "mean_len": self.mean_len,
            "varlen": self.varlen,
        }


def case_of(row):
    """The case that a row, ours or a stored one of a peer, is about."""
    names = [f.name for f in dataclasses.fields(Case)]
    return Case(**{name: row[name] for name in names if name in row})


@functools.cache
def _peers_file():
    with open(PEERS_FILE, encoding="utf-8") as f:
        return json.load(f)


@functools.cache
def stored_peers():
    """Measured figures of the peers: {case: row of peers_h200.json}."""
    return {case_of(row): row for row in _peers_file()["dense"]}


def stored_ceilings():
    """The ceilings of the card that the peers' figures were measured on."""
    return _peers_file()["ceilings"]


def all_cases():
    return list(stored_peers())


def is_anchor(case):
    """Whether the peer must reproduce its stored figure here for the run to count."""
    return case in stored_peers() and (
        case.batch >= 64 and case.mean_len >= 4096 and not case.varlen
    )


QUICK = [
    Case(16, 1, 1, 4096),
    Case(16, 1, 1, 32768),
    Case(16, 1, 128, 1024, varlen=True),
    Case(16, 1, 128, 4096),
    Case(16, 1, 128, 4096, varlen=True),
    Case(32, 1, 64, 8192),
    Case(64, 1, 128, 4096, varlen=True),
    Case(128, 1, 1, 32768),
    Case(128, 1, 32, 4096),
    Case(128, 1, 128, 1024),
    Case(128, 1, 128, 4096),
    Case(128, 1, 128, 4096, varlen=True),
    Case(128, 2, 128, 4096),
]

# What a model runs, with its layers in one jitted function.
LAYERS = 61
LAYER_CASES = [Case(16, 1, 128, 4096), Case(128, 1, 128, 4096), Case(16, 1, 1, 4096)]

# What is timed in other forms beside its bf16, page 64 twin.
TWINS = [
    Case(16, 1, 128, 4096),
    Case(128, 1, 128, 4096),
    Case(16, 1, 64, 8192),
    Case(16, 1, 128, 1024),
]
VARIANTS = [("fp16", 64), ("bf16", 16), ("bf16", 32), ("bf16", 128), ("bf16", 256)]

# What is timed with splits of a fixed size, beside the default schedule.
FIXED_CASES = [
    Case(h, 1, batch, length)
    for h in (16, 128)
    for batch, length in ((1, 32768), (8, 8192), (32, 4096), (128, 4096), (128, 1024))
]
FIXED_SPLIT_SIZES = (256, 1024, 4096)  # tokens

GROWTH_HEADS = (16, 128)
GROWTH_LENGTH, GROWTH_BATCHES = 4096, tuple(2**i for i in range(13))
GROWTH_LENGTHS = tuple(4**i for i in range(3, 11))  # 64 to 1M
GROWTH_LENGTH_BATCHES = (1, 128)
GROWTH_RAGGED_LENGTH, GROWTH_RAGGED_BATCHES = 512, (256, 1024, 4096)
MAX_GROWTH_TOKENS = 2**24  # 19 GB: no page is read twice in a call


def growth_cases():
    """Series over the batch, uniform and ragged, and over the length.

    What a peer may not bear comes last.
    """
    cases = [Case(h, 1, batch, GROWTH_LENGTH) for h in GROWTH_HEADS for batch in GROWTH_BATCHES]
    cases += [
        Case(h, 1, batch, GROWTH_RAGGED_LENGTH, varlen=True)
        for h in GROWTH_HEADS
        for batch in GROWTH_RAGGED_BATCHES
    ]
    cases += [
        Case(h, 1, batch, length)
        for h in GROWTH_HEADS
        for batch in GROWTH_LENGTH_BATCHES
        for length in GROWTH_LENGTHS
        if batch * length <= MAX_GROWTH_TOKENS
    ]

    def order(case):
        return case.batch > 1024, case.batch * case.mean_len, case.batch, case.h_q

    return sorted(set(cases), key=order)


def scratch_bytes(row):
    """The partial results of a call whose schedule has row["num_parts"] parts."""
    rows = row["s_q"] * row["h_q"]
    return row["num_parts"] * (2 * rows * (2 * HEAD_DIM_V + 5 * 4) + -(-rows // 64) * 128)


def is_sustained(case):
    """Whether the card's power limits the case, so that it is timed under lasting load too."""
    return case.h_q * case.s_q >= 128 and case.batch >= 64 and case.mean_len >= 4096


SMOKE = [
    Case(4, 1, 2, 100),
    Case(4, 2, 3, 70, varlen=True),
]


def page_tables(case, pool_pages, sets, seed=0):
    """Block tables i32[sets, batch, width] over one pool, its pages handed out in random order.

    Sets share no page as long as the pool has enough of them; columns past the end of a
    sequence hold 0.
    """
    rng = np.random.default_rng(seed)
    needed = case.pages()
    if needed > pool_pages:
        raise ValueError(f"{case.name} needs {needed} pages, the pool has {pool_pages}")
    tables = np.zeros((sets, case.batch, case.table_width), np.int32)
    free = rng.permutation(pool_pages)
    for table in tables:
        if len(free) < needed:
            free = rng.permutation(pool_pages)
        taken, free = free[:needed], free[needed:]
        start = 0
        for row, length in zip(table, case.lengths(), strict=True):
            count = math.ceil(length / case.page_block_size)
            row[:count] = taken[start : start + count]
            start += count
    return tables
