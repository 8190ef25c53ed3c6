"""Runs the cases: compiles, times, checks, profiles, and keeps the results file."""

import collections
import dataclasses
import math
import statistics
import time
import traceback

import cards
import ceilings
import jax
import jax.numpy as jnp
import numpy as np
import overlap
import workloads
from peers import FlashMLA, find_flashmla
from power import Meter, sustain
from rounds import Compiler, Inputs, OpRound, Shapes, make_pool
from timing import time_rounds

MAX_REL_ERR = 1e-2
BASELINE_CALLS = 2


def select_cases(options):
    if options.smoke:
        cases = workloads.SMOKE
    elif options.quick or (options.profile and not options.cases):
        cases = workloads.QUICK
    else:
        cases = workloads.all_cases()
    wanted = [part for part in options.cases.split(",") if part]
    if wanted:
        pool = cases if options.smoke else workloads.all_cases()
        cases = [case for case in pool if any(part in f"{case.name}$" for part in wanted)]
    replacement = {"dtype": options.dtype, "page_block_size": options.page_block_size}
    return [dataclasses.replace(case, **replacement) for case in cases]


def open_peer(options):
    if options.no_peer:
        return None
    path = find_flashmla(options.flashmla)
    if path is None:
        print("no FlashMLA: give --flashmla or install vllm==0.26.0; timing without it")
        return None
    try:
        return FlashMLA(path)
    except Exception as error:
        print(f"FlashMLA does not load, timing without it: {type(error).__name__}: {error}")
        return None


class Machine:
    """What all sections share: the card, the peer, clock and power."""

    def __init__(self, options):
        self.card = cards.card_of(jax.devices()[0].device_kind)
        self.peer = open_peer(options)
        self.meter = Meter(found=not options.smoke)

    @property
    def sm_clock(self):
        return self.meter.nvml.mhz if self.meter.nvml is not None else None


class Bench:
    """What some cases share: the options, the pool, the peer, the compiled functions."""

    kinds = ("given", "made")  # of ours: with metadata given, or made by each call
    sets_checked = None  # all
    sample = None  # of sequences that are checked: all
    fixed_split_size = None  # of the metadata that is given: the default schedule

    def __init__(self, options, cases, machine):
        self.options, self.cases, self.machine = options, cases, machine
        self.peer = machine.peer
        self.pool = make_pool(cases, self.calls)
        self.pool.block_until_ready()
        self.compiler = Compiler()

    def calls(self, case):
        return 2 if self.options.smoke else case.calls

    def loops(self, case):
        if self.options.profile:
            return 1  # the kernels of one round, and nothing else
        return 2 if self.options.smoke else case.loops

    def peer_for(self, case):
        return self.peer if self.peer is not None and self.peer.supports(case) else None

    def has_baseline(self, case):
        stored = workloads.stored_peers().get(case, {})
        full = not (self.options.quick or self.options.profile)
        return self.options.smoke or (full and "jax_xla_us" in stored)

    def outs_checked(self, case):
        return len(self.kinds) + (self.peer_for(case) is not None)

    def compile(self):
        """Starts all compilations, then waits for them."""
        implementation = self.options.implementation
        for case in self.cases:
            key = case.shape_key
            shapes = Shapes(
                case, self.pool.shape[0], self.calls(case), self.loops(case),
                fixed_split_size=self.fixed_split_size,
            )  # fmt: skip
            submit = self.compiler.submit
            submit((key, "draw"), shapes.draw)
            submit((key, "metadata"), shapes.metadata, implementation)
            for kind in self.kinds:
                submit((key, kind), shapes.round, implementation, kind == "made")
            if self.options.profile:
                continue
            submit((key, "errors"), shapes.errors, self.outs_checked(case), self.sample)
            if self.has_baseline(case):
                submit((key, "xla-metadata"), shapes.metadata, "xla")
                submit((key, "xla"), shapes.round, "xla", False, BASELINE_CALLS)
        self.compiler.wait()

    def inputs(self, case):
        draw = self.compiler[case.shape_key, "draw"]
        return Inputs(case, draw, self.pool, self.calls(case))

    def op_round(self, case, inputs, kind):
        metadata = ()
        if kind == "given":
            metadata = self.compiler[case.shape_key, "metadata"](inputs.lengths)
        function = self.compiler[case.shape_key, kind]
        return OpRound(function, inputs, metadata, self.calls(case), self.loops(case))

    def baseline_us(self, case, inputs):
        metadata = self.compiler[case.shape_key, "xla-metadata"](inputs.lengths)
        baseline = OpRound(self.compiler[case.shape_key, "xla"], inputs, metadata, BASELINE_CALLS)
        timing = time_rounds(
            {"xla": baseline.round}, repeats=3, seconds=self.options.seconds, rest=self.options.rest
        )
        return timing["xla"].us

    def check(self, case, inputs, results):
        """The largest (rel_err, lse_err) over all input sets: one pair for each result."""
        errors = self.compiler[case.shape_key, "errors"]
        found = []
        sets = list(zip(inputs.qs, inputs.tables, strict=True))[: self.sets_checked]
        for i, (q, table) in enumerate(sets):
            outs, lses = [r.outs[i] for r in results], [r.lses[i] for r in results]
            found.append(errors(inputs.pool, q, table, inputs.lengths, outs, lses))
        return np.max(np.asarray(jax.device_get(found), np.float64), axis=0).T

    def rivals(self, case, inputs):
        """({name: round}, their results): ours, then the peer if there is one."""
        ours = {kind: self.op_round(case, inputs, kind) for kind in self.kinds}
        rounds = {kind: op_round.round for kind, op_round in ours.items()}
        results, peer = list(ours.values()), self.peer_for(case)
        if peer is not None:
            try:
                rounds["peer"], theirs = peer.prepare(
                    case, inputs.pool, inputs.qs, inputs.tables, inputs.lengths
                )
                results.append(theirs)
            except Exception as error:
                print(f"{case.name}: no peer: {type(error).__name__}: {error}", flush=True)
                results.append(results[0])  # the compiled check takes that many results
        return rounds, results

    def measure(self, case):
        """One result row."""
        options, inputs = self.options, self.inputs(case)
        rounds, results = self.rivals(case, inputs)
        times = time_rounds(
            rounds,
            repeats=options.repeats,
            seconds=options.seconds,
            rest=options.rest,
            sm_clock=self.machine.sm_clock,
        )
        found = self.check(case, inputs, results)
        row = self.row(case, times, found)
        if self.has_baseline(case):
            row["jax_us"] = round(self.baseline_us(case, inputs), 1)
        return row | self.sustained(case, rounds, times)

    def row(self, case, times, found):
        us, ours = times["given"].us, len(self.kinds)
        floor = case.floor_us(self.machine.card)
        peer_us = times["peer"].us if "peer" in times else None
        row = case.row() | {"us": round(us, 2)}
        if "made" in times:
            row["us_with_metadata"] = round(times["made"].us, 2)
        row |= {
            "floor_us": round(floor, 2),
            "of_floor": round(floor / us, 4),
            "peer": self.peer.name if peer_us else None,
            "peer_us": round(peer_us, 2) if peer_us else None,
            "ratio": round(peer_us / us, 4) if peer_us else None,
            "rel_err": float(f"{np.max(found[:ours, 0]):.3g}"),
            "lse_err": float(f"{np.max(found[:ours, 1]):.3g}"),
            "spread": round(times["given"].spread, 4),
            "host_us": round(times["given"].host_us, 2),
            "sm_mhz": times["given"].sm_mhz,
        }
        if peer_us:
            row["peer_rel_err"] = float(f"{found[ours, 0]:.3g}")
        return row

    def sustained(self, case, rounds, times):
        """The columns of lasting load, for the cases that the card's power limits."""
        seconds, columns = self.options.sustain, {}
        if not seconds or not (workloads.is_sustained(case) or self.options.smoke):
            return columns
        for prefix, name in (("", "given"), ("peer_", "peer")):
            if name not in rounds:
                continue
            time.sleep(self.options.rest)
            found = sustain(rounds[name], times[name].us, seconds, self.machine.meter)
            columns[f"{prefix}sustained_us"] = round(found.us, 2)
            columns[f"{prefix}sustained_mhz"] = found.mhz
            columns[f"{prefix}sustained_watts"] = found.watts
        time.sleep(4 * self.options.rest)  # the next case begins as cool as the others
        return columns

    def profile(self, case):
        """Prints the kernels of one round each; returns the largest overlap of our calls."""
        inputs, peer = self.inputs(case), self.peer_for(case)
        found = []
        for kind in self.kinds:
            op_round = self.op_round(case, inputs, kind)
            scratch = self.compiler[case.shape_key, kind].memory_analysis().temp_size_in_bytes
            title = f"{case.name}, ours, metadata {kind}, {scratch / 1e6:.1f} MB of scratch in all"
            found.append(print_kernels(title, op_round.round))
        if peer is not None:
            round_, _ = peer.prepare(case, inputs.pool, inputs.qs, inputs.tables, inputs.lengths)
            print_kernels(f"{case.name}, {peer.name}", round_)
        return max((value for value in found if value is not None), default=None)


def print_kernels(title, round_):
    lines, found = overlap.summarize(overlap.record(round_), round_.calls)
    print("\n".join([title, *lines]), flush=True)
    return found


HEADER = (
    f"{'case':24s} {'us':>8s} {'+meta':>8s} {'floor':>8s} {'share':>6s} {'peer us':>8s} "
    f"{'ratio':>6s} {'rel_err':>8s} {'spread':>6s} {'MHz':>5s}"
)


def format_row(case, row):
    peer_us, ratio = row["peer_us"] or math.nan, row["ratio"] or math.nan
    with_metadata = row.get("us_with_metadata", math.nan)
    late = "  (the host is late)" if row["host_us"] > 0.8 * row["us"] else ""
    wrong = "" if row["rel_err"] <= MAX_REL_ERR else "  WRONG"
    return (
        f"{case.name:24s} {row['us']:8.2f} {with_metadata:8.2f} "
        f"{row['floor_us']:8.2f} {row['of_floor']:6.1%} {peer_us:8.2f} {ratio:6.3f} "
        f"{row['rel_err']:8.1e} {row['spread']:6.1%} {row['sm_mhz'] or 0:5d}{late}{wrong}"
    )


def device_works():
    try:
        return int(jnp.arange(4).sum()) == 6
    except Exception:
        return False


def guarded(results, name, function, *args):
    """What `function` returns; None, with a line in the results' errors, if it fails."""
    try:
        return function(*args)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        results.errors.append(f"{name}: {text[:300]}")
        print(f"{name:24s} FAILED {text[:400]}", flush=True)
        if len(results.errors) == 1:
            traceback.print_exc()
        return None


def out_of_time(options, results, what, started):
    """Whether the budget is spent, which is then noted."""
    if time.monotonic() - started <= options.budget:
        return False
    results.errors.append(f"out of time: {what}")
    print(results.errors[-1], flush=True)
    return True


def run_all(bench, results, started):
    """Measures every case; a case that fails is noted and the others go on."""
    print(HEADER, flush=True)
    for number, case in enumerate(bench.cases):
        left = f"{len(bench.cases) - number} cases left, from {case.name}"
        if out_of_time(bench.options, results, left, started):
            break
        row = guarded(results, case.name, bench.measure, case)
        if row is None:
            if not device_works():
                print("the device no longer works; stopping", flush=True)
                break
            continue
        results.add(case, row)
        print(format_row(case, row), flush=True)
    results.save()


def profile_all(bench):
    """Profiles every case; status 1 if calls of ours overlap or none could be profiled."""
    found = []
    for case in bench.cases:
        try:
            found.append(bench.profile(case))
        except Exception:
            traceback.print_exc()
    known = [value for value in found if value is not None]
    worst = max(known, default=math.nan)
    print(f"largest overlap of two of our calls, {len(known)} cases: {worst:.2f} us")
    return 0 if worst <= 0 else 1


def print_summary(rows):
    groups = collections.defaultdict(list)
    for row in rows:
        if row["ratio"]:
            groups["all"].append(row["ratio"])
            groups["batch >= 64" if row["batch"] >= 64 else "batch < 64"].append(row["ratio"])
    for name, ratios in groups.items():
        mean = statistics.geometric_mean(ratios)
        print(f"{name}: {len(ratios)} cases, geometric mean {mean:.3f}, least {min(ratios):.3f}")


def run_cases(options, machine, results, cases, started):
    """The cases of the table, or their profile; the exit status."""
    bench = Bench(options, cases, machine)
    bench.compile()
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    if options.profile:
        return profile_all(bench)
    if not options.quick:
        results.data["ceilings"] = ceilings.measure(bench.pool, 256 if options.smoke else 8192)
        print(results.data["ceilings"], flush=True)
    run_all(bench, results, started)
    print_summary(results.data["rows"])
    bench.compiler.close()
    return 0
