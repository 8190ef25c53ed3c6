"""Runs the cases: compiles, times, checks, profiles, and keeps the results file."""

import collections
import dataclasses
import json
import math
import pathlib
import statistics
import subprocess
import time
import traceback

import ceilings
import jax
import jax.numpy as jnp
import numpy as np
import overlap
import workloads
from peers import FlashMLA, find_flashmla
from rounds import Compiler, Inputs, OpRound, Shapes, make_pool
from timing import open_sm_clock, time_rounds

HERE = pathlib.Path(__file__).resolve().parent
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


def commit_of(options):
    if options.commit:
        return options.commit
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40",
               "--exclude=*"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


class Results:
    """The results file, rewritten whole after every row."""

    def __init__(self, path, append, device, commit):
        self.path, self.kept = path, []
        self.data = {"device": device, "commit": commit, "ceilings": {}, "rows": []}
        if append and path is not None and path.exists():
            old = json.loads(path.read_text())
            if (old["device"], old["commit"]) == (device, commit):
                self.kept, self.data["ceilings"] = old["rows"], old["ceilings"]
        self.errors = []

    def add(self, case, row):
        self.data["rows"].append(row)
        self.kept = [old for old in self.kept if workloads.case_of(old) != case]
        self.save()

    def save(self):
        if self.path is None:
            return
        order = {case: i for i, case in enumerate(workloads.all_cases())}
        rows = self.kept + self.data["rows"]
        rows.sort(key=lambda row: order.get(workloads.case_of(row), len(order)))
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = {key: value for key, value in self.data.items() if key != "rows"}
        if self.errors:
            head["errors"] = self.errors
        text = json.dumps(head, indent=1)[:-2] + ',\n "rows": [\n' + lines + "\n ]\n}\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.path)


class Bench:
    """What all cases share: the options, the pool, the peer, the compiled functions."""

    def __init__(self, options, cases):
        self.options, self.cases = options, cases
        self.peer = open_peer(options)
        self.sm_clock = None if options.smoke else open_sm_clock()
        self.pool = make_pool(cases, self.calls)
        self.pool.block_until_ready()
        self.compiler = Compiler()

    def calls(self, case):
        return 3 if self.options.smoke else case.calls

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
        return 2 + (self.peer_for(case) is not None)

    def compile(self):
        """Starts all compilations, then waits for them."""
        implementation = self.options.implementation
        for case in self.cases:
            key = case.shape_key
            shapes = Shapes(case, self.pool.shape[0], self.calls(case), self.loops(case))
            submit = self.compiler.submit
            submit((key, "draw"), shapes.draw)
            submit((key, "metadata"), shapes.metadata, implementation)
            submit((key, "given"), shapes.round, implementation, False)
            submit((key, "made"), shapes.round, implementation, True)
            if self.options.profile:
                continue
            submit((key, "errors"), shapes.errors, self.outs_checked(case))
            if self.has_baseline(case):
                submit((key, "xla-metadata"), shapes.metadata, "xla")
                submit((key, "xla"), shapes.round, "xla", False, BASELINE_CALLS)
        self.compiler.wait()

    def inputs(self, case):
        draw = self.compiler[case.shape_key, "draw"]
        return Inputs(case, draw, self.pool, self.calls(case))

    def given(self, case, inputs):
        metadata = self.compiler[case.shape_key, "metadata"](inputs.lengths)
        function = self.compiler[case.shape_key, "given"]
        return OpRound(function, inputs, metadata, self.calls(case), self.loops(case))

    def made(self, case, inputs):
        function = self.compiler[case.shape_key, "made"]
        return OpRound(function, inputs, (), self.calls(case), self.loops(case))

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
        for i, (q, table) in enumerate(zip(inputs.qs, inputs.tables, strict=True)):
            outs, lses = [r.outs[i] for r in results], [r.lses[i] for r in results]
            found.append(errors(inputs.pool, q, table, inputs.lengths, outs, lses))
        return np.max(np.asarray(jax.device_get(found), np.float64), axis=0).T

    def measure(self, case):
        """One result row."""
        options, inputs, peer = self.options, self.inputs(case), self.peer_for(case)
        given, made = self.given(case, inputs), self.made(case, inputs)
        results = [given, made]
        rounds = {"given": given.round, "made": made.round}
        if peer is not None:
            try:
                rounds["peer"], theirs = peer.prepare(
                    case, inputs.pool, inputs.qs, inputs.tables, inputs.lengths
                )
                results.append(theirs)
            except Exception as error:
                print(f"{case.name}: no peer: {type(error).__name__}: {error}", flush=True)
                results.append(given)  # the compiled check takes three results
        times = time_rounds(
            rounds,
            repeats=options.repeats,
            seconds=options.seconds,
            rest=options.rest,
            sm_clock=self.sm_clock,
        )
        found = self.check(case, inputs, results)
        return self.row(case, times, found, inputs)

    def row(self, case, times, found, inputs):
        us, floor = times["given"].us, case.floor_us()
        peer_us = times["peer"].us if "peer" in times else None
        row = case.row() | {
            "us": round(us, 2),
            "us_with_metadata": round(times["made"].us, 2),
            "floor_us": round(floor, 2),
            "of_floor": round(floor / us, 4),
            "peer": self.peer.name if peer_us else None,
            "peer_us": round(peer_us, 2) if peer_us else None,
            "ratio": round(peer_us / us, 4) if peer_us else None,
            "rel_err": float(f"{np.max(found[:2, 0]):.3g}"),
            "lse_err": float(f"{np.max(found[:2, 1]):.3g}"),
            "spread": round(times["given"].spread, 4),
            "host_us": round(times["given"].host_us, 2),
            "sm_mhz": times["given"].sm_mhz,
        }
        if peer_us:
            row["peer_rel_err"] = float(f"{found[2, 0]:.3g}")
        if self.has_baseline(case):
            row["jax_us"] = round(self.baseline_us(case, inputs), 1)
        return row

    def profile(self, case):
        """Prints the kernels of one round each; returns the largest overlap of our calls."""
        inputs, peer = self.inputs(case), self.peer_for(case)
        found = []
        for kind, make in {"given": self.given, "made": self.made}.items():
            op_round = make(case, inputs)
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
    late = "  (the host is late)" if row["host_us"] > 0.8 * row["us"] else ""
    wrong = "" if row["rel_err"] <= MAX_REL_ERR else "  WRONG"
    return (
        f"{case.name:24s} {row['us']:8.2f} {row['us_with_metadata']:8.2f} "
        f"{row['floor_us']:8.2f} {row['of_floor']:6.1%} {peer_us:8.2f} {ratio:6.3f} "
        f"{row['rel_err']:8.1e} {row['spread']:6.1%} {row['sm_mhz'] or 0:5d}{late}{wrong}"
    )


def device_works():
    try:
        return int(jnp.arange(4).sum()) == 6
    except Exception:
        return False


def run_all(bench, results, started):
    """Measures every case; a case that fails is noted and the others go on."""
    consecutive = 0
    print(HEADER, flush=True)
    for number, case in enumerate(bench.cases):
        if time.monotonic() - started > bench.options.budget:
            left = len(bench.cases) - number
            results.errors.append(f"out of time: {left} cases left, from {case.name}")
            print(results.errors[-1], flush=True)
            break
        try:
            row = bench.measure(case)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            results.errors.append(f"{case.name}: {text[:300]}")
            print(f"{case.name:24s} FAILED {text[:400]}", flush=True)
            consecutive += 1
            if consecutive == 1:
                traceback.print_exc()
            if not device_works():
                print("the device no longer works; stopping", flush=True)
                break
            continue
        consecutive = 0
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


def main(options):
    started = time.monotonic()
    cases = select_cases(options)
    if not cases:
        raise SystemExit(f"no case matches {options.cases!r}")
    device = jax.devices()[0]
    sms = getattr(device, "core_count", 0)
    name = f"{device.device_kind}, {sms} SMs, jax {jax.__version__}"
    print(f"{len(cases)} cases on {name}, implementation {options.implementation}", flush=True)
    bench = Bench(options, cases)
    bench.compile()
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    if options.profile:
        return profile_all(bench)
    results = Results(options.out, options.append, name, commit_of(options))
    if not options.quick:
        results.data["ceilings"] = ceilings.measure(bench.pool, 256 if options.smoke else 8192)
        print(results.data["ceilings"], flush=True)
    run_all(bench, results, started)
    print_summary(results.data["rows"])
    bench.compiler.close()
    print(f"{len(results.data['rows'])} rows, {len(results.errors)} errors, "
          f"{time.monotonic() - started:.0f} s", *results.errors, sep="\n")  # fmt: skip
    wrong = [row for row in results.data["rows"] if not row["rel_err"] <= MAX_REL_ERR]
    return 1 if wrong or results.errors else 0
