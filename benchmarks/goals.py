"""The goals: what share of the floor, or how many microseconds, each regime is to reach.

Where a goal refers to a peer's stored figure, that figure is scaled by how much slower (or faster)
the card of the run is than the one that the figure was measured on, by at most 5%.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

import cards
import workloads

PEER_FIGURES = ("flashmla_us", "fa3_us", "flashinfer_us")
MAX_SCALING = 0.05
MEAN_OVER_PEERS = 1.33
METADATA_US, METADATA_BATCH = 3.0, 1024
# Where the floor is lower than this, no goal is stricter than floor / 0.95 + 4.5 us.
SHORT_FLOOR_US, SHORT_SHARE, SHORT_EXTRA_US = 100.0, 0.95, 4.5
LONG_US = {16: 14.0, 32: 14.0, 64: 16.0, 128: 20.0, 256: 30.0}  # by h_q * s_q


def apply_to(results):
    """Whether the results are of the card that goals and stored figures are of."""
    return cards.card_of(results["device"]) is cards.H200


def rows_of(case):
    return case.h_q * case.s_q


def shape(case):
    return case.batch, case.mean_len


def is_large(case):
    return case.batch >= 64 and case.mean_len >= 4096


def best_stored_us(case):
    """The best figure of any peer that is stored for this case, or None."""
    stored = workloads.stored_peers().get(case, {})
    return min((stored[key] for key in PEER_FIGURES if stored.get(key)), default=None)


def slowdown(case, ceilings):
    """What a stored figure takes on the card of the run, over what it took."""
    stored = workloads.stored_ceilings()
    key = "matmul_bf16_tflops" if case.compute_us() > case.memory_us() else "read_gbs"
    if not ceilings.get(key):
        return 1.0
    return min(max(stored[key] / ceilings[key], 1 - MAX_SCALING), 1 + MAX_SCALING)


def best_peer_us(case, ceilings):
    best = best_stored_us(case)
    return None if best is None else best * slowdown(case, ceilings)


@dataclasses.dataclass(frozen=True)
class Regime:
    name: str
    goal: str
    covers: Callable  # of a case
    limit_us: Callable  # of a case and the ceilings of the run; None: no goal
    metadata: bool = False  # about us_with_metadata - us
    measure: str = "share"  # or "us", "times the best peer": what the worst case is told in

    def limit(self, case, ceilings):
        """The microseconds that meet the goal, or None."""
        found = self.limit_us(case, ceilings)
        if found is None or self.metadata or case.floor_us() >= SHORT_FLOOR_US:
            return found
        return max(found, case.floor_us() / SHORT_SHARE + SHORT_EXTRA_US)

    def taken(self, row):
        return row["us_with_metadata"] - row["us"] if self.metadata else row["us"]


def share(least):
    return lambda case, _: case.floor_us() / least


def times_peer(factor):
    def limit(case, ceilings):
        best = best_peer_us(case, ceilings)
        return None if best is None else best / factor

    return limit


REGIMES = [
    Regime("bandwidth-bound, uniform", "95% of the floor",
           lambda c: is_large(c) and not c.varlen and rows_of(c) <= 64, share(0.95)),
    Regime("short or ragged", "88% of the floor",
           lambda c: (shape(c) in ((128, 1024), (32, 4096)) or c.varlen) and rows_of(c) <= 64,
           share(0.88)),
    Regime("compute-bound", "92% of the floor",
           lambda c: is_large(c) and rows_of(c) >= 128, share(0.92)),
    Regime("compute-bound, 128 x 1024", "82% of the floor",
           lambda c: shape(c) == (128, 1024) and rows_of(c) >= 128, share(0.82)),
    Regime("compute-bound, 32 x 4096", "85% of the floor",
           lambda c: shape(c) == (32, 4096) and rows_of(c) >= 128, share(0.85)),
    Regime("small batch, 1 x 32768", "14, 14, 16, 20, 30 us at 16 to 256 rows",
           lambda c: shape(c) == (1, 32768), lambda c, _: LONG_US.get(rows_of(c)), measure="us"),
    Regime("small batch, 1 x 131072 and 8 x 8192", "1.5 times the best peer",
           lambda c: shape(c) in ((1, 131072), (8, 8192)), times_peer(1.5),
           measure="times the best peer"),
    Regime("latency, 1 x 4096", "8 us", lambda c: shape(c) == (1, 4096), lambda *_: 8.0,
           measure="us"),
    Regime("metadata made by the call", "adds at most 3 us",
           lambda c: c.batch <= METADATA_BATCH, lambda *_: METADATA_US, metadata=True,
           measure="us"),
    Regime("everywhere", "not below the best peer", lambda c: True, times_peer(1.0),
           measure="times the best peer"),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one row does in one regime."""

    regime: Regime
    case: workloads.Case
    us: float
    limit: float
    best_peer: float | None

    @property
    def met(self):
        return self.us <= self.limit

    def __str__(self):
        """The figure that the regime is about."""
        if self.regime.measure == "share":
            return f"{self.case.floor_us() / self.us:.1%}"
        if self.regime.measure == "us":
            return f"{self.us:.1f} us"
        return f"{self.best_peer / self.us:.2f} times"

    def miss(self):
        """One line about a missed goal."""
        return (
            f"{self.regime.name}: {self.case.name} {self}, {self.us:.1f} us where "
            f"{self.limit:.1f} are the goal"
        )


def outcomes(results):
    """Every row in every regime that covers it."""
    found, ceilings = [], results["ceilings"]
    for row in results["rows"]:
        case = workloads.case_of(row)
        for regime in REGIMES:
            limit = regime.limit(case, ceilings) if regime.covers(case) else None
            if limit is not None:
                best = best_peer_us(case, ceilings)
                found.append(Outcome(regime, case, regime.taken(row), limit, best))
    return found


@dataclasses.dataclass(frozen=True)
class SectionGoal:
    """What the rows of a section may take more than what they stand beside."""

    name: str
    goal: str
    section: str
    covers: Callable  # of a row
    excess: Callable  # of a row
    most: float
    unit: str = "{:+.1%}"

    def rows(self, results):
        return [row for row in results.get(self.section, {"rows": []})["rows"] if self.covers(row)]

    def tell(self, row):
        form = row.get("form") or f"{row['dtype']} page {row['page_block_size']}"
        return f"{workloads.case_of(row).name} {form}: {self.unit.format(self.excess(row))}"


def more_than_twin(row):
    return row["to_twin"] - 1


def is_page(*sizes):
    return lambda row: row["dtype"] == "bf16" and row["page_block_size"] in sizes


SECTION_GOALS = [
    SectionGoal("a step of 61 layers, 128 x 4096", "at most 3% over the kernel alone", "layers",
                lambda row: row["batch"] == 128 and row["form"] in ("unrolled", "scan"),
                lambda row: row["over"], 0.03),
    SectionGoal("a step of 61 layers, 1 x 4096, unrolled", "at most 1 us a layer more", "layers",
                lambda row: row["batch"] == 1 and row["form"] == "unrolled",
                lambda row: row["us"] - row["alone_us"], 1.0, "{:+.2f} us"),
    SectionGoal("fp16", "at most 3% over bf16", "variants",
                lambda row: row["dtype"] == "fp16", more_than_twin, 0.03),
    SectionGoal("pages of 128 and 256", "at most 2% over pages of 64", "variants",
                is_page(128, 256), more_than_twin, 0.02),
    SectionGoal("pages of 32", "at most 5% over pages of 64", "variants",
                is_page(32), more_than_twin, 0.05),
]  # fmt: skip


def section_cells(results):
    """As `table_cells`, for the sections that were measured."""
    lines = []
    for goal in SECTION_GOALS:
        if rows := goal.rows(results):
            met = sum(goal.excess(row) <= goal.most for row in rows)
            worst = max(rows, key=goal.excess)
            lines.append([goal.name, goal.goal, f"{met} of {len(rows)}", goal.tell(worst)])
    return lines


def section_misses(results):
    """One line for every goal of a section that is missed, or was not measured."""
    lines = []
    for goal in SECTION_GOALS:
        rows = goal.rows(results)
        lines += [f"{goal.name}: {goal.tell(r)}" for r in rows if not goal.excess(r) <= goal.most]
        lines += [] if rows else [f"{goal.name}: missing"]
    return lines


def mean_over_peers(results):
    """The geometric mean of the best peer's time over ours; NaN if no figure is stored."""
    pairs = [
        (best_peer_us(workloads.case_of(row), results["ceilings"]), row["us"])
        for row in results["rows"]
    ]
    ratios = [best / us for best, us in pairs if best is not None]
    return statistics.geometric_mean(ratios) if ratios else math.nan


def table_cells(results):
    """[regime, goal, cases met, the worst one] of each regime that covers a row."""
    found = outcomes(results)
    lines = []
    for regime in REGIMES:
        ours = [outcome for outcome in found if outcome.regime is regime]
        if not ours:
            continue
        worst = max(ours, key=lambda outcome: outcome.us / outcome.limit)
        met = sum(outcome.met for outcome in ours)
        lines.append(
            [regime.name, regime.goal, f"{met} of {len(ours)}", f"{worst.case.name}: {worst}"]
        )
    lines += section_cells(results)
    mean = mean_over_peers(results)
    if math.isnan(mean):
        return lines
    verdict = "met" if mean >= MEAN_OVER_PEERS else "missed"
    goal = f"{MEAN_OVER_PEERS} times the best peer"
    return [*lines, ["everywhere, geometric mean", goal, verdict, f"{mean:.2f} times"]]


def misses(results):
    """One line for every goal that is missed."""
    lines = [outcome.miss() for outcome in outcomes(results) if not outcome.met]
    measured = {workloads.case_of(row) for row in results["rows"]}
    lines += [f"{case.name}: missing" for case in workloads.all_cases() if case not in measured]
    mean = mean_over_peers(results)
    if not mean >= MEAN_OVER_PEERS:
        lines.append(f"everywhere: geometric mean over the best peer {mean:.3f}")
    return lines + section_misses(results)
