"""Measures an Op: compiles its cases, times them beside the peers, checks every result."""

import dataclasses
import functools
import math
import os
import time
import typing

import jax
import numpy as np

from core import cards, ceilings, profiling, report
from core.power import Meter, attempt, sustain
from core.rounds import Compiler, Inputs, OpRound, Programs
from core.run import Run, parse, parser_of
from core.timing import Round, time_rounds

BASELINE_CALLS = 2


class Timed(typing.NamedTuple):
    """A round and what it writes: ours, or one way of a peer."""

    round: Round
    results: list
    way: str | None = None  # None: ours
    column: str | None = None  # where the time goes, if it does not count as a peer


class Machine:
    """What all sections share: the card, the peers, clock and power."""

    def __init__(self, op, options):
        self.card = cards.card_of(jax.devices()[0].device_kind)
        finds = [] if options.no_peer else op.peers
        what = "peer, timing without it"
        found = [attempt(functools.partial(find, options), what) for find in finds]
        self.peers = [peer for peer in found if peer is not None]
        self.meter = Meter(found=not options.smoke)


def significant(error):
    return float(f"{error:.3g}")


def quality(timing, errors):
    """The columns on how good a timing is; errors are {column: error}."""
    return {name: significant(value) for name, value in errors.items()} | {
        "spread": round(timing.spread, 4), "host_us": round(timing.host_us, 2),
    }  # fmt: skip


class Bench:
    """What cases that share a pool have in common: the pool, the peers, the compiled programs."""

    def __init__(
        self, op, cases, run, machine, *, alone=False, sets_checked=None, max_round_us=math.inf,
        repeats=None, rest=None, pool=None,
    ):  # fmt: skip
        """Draws the pool, if there is none yet.

        Args:
          op, cases: an Op, and some of its cases that have one pool key.
          run, machine: as above.
          alone: whether only calls with what is prepared given to them are timed: no call that
            prepares for itself, no peer, no baseline.
          sets_checked: how many calls of a round are checked; None: all.
          max_round_us: a round has fewer calls where this would be passed at the floor.
          repeats, rest: of a timing, instead of the run's.
          pool: that of another Bench.
        """
        self.op, self.cases, self.options, self.machine = op, cases, run.options, machine
        self.kinds = ("given",) if alone or op.prepare is None else ("given", "made")
        self.sets_checked, self.max_round_us = sets_checked, max_round_us
        self.alone, self.peers = alone, [] if alone else machine.peers
        self.repeats = repeats or self.options.repeats
        self.rest = self.options.rest if rest is None else rest
        drawn = op.pool(cases, self.calls) if pool is None else pool
        self.pool = jax.block_until_ready(drawn)
        self.compiler = Compiler()
        self.beside = {}
        others = {} if alone or self.options.profile else op.beside
        for column, (other, change) in others.items():
            changed = [found for case in cases if (found := change(case)) is not None]
            if changed:
                self.beside[column] = (
                    change,
                    Bench(other, changed, run, machine, alone=True, pool=self.pool),
                )

    def calls(self, case):
        if self.options.smoke:
            return 2
        if math.isinf(self.max_round_us):
            return case.calls
        return min(case.calls, max(1, round(self.max_round_us / case.floor_us())))

    def loops(self, case):
        if self.options.profile:
            return 1  # the kernels of one round, and nothing else
        return 2 if self.options.smoke else case.loops

    def ways(self, case):
        return [(peer, way) for peer in self.peers for way in peer.ways(case) or ()]

    def has_baseline(self, case):
        brief = self.alone or self.options.quick or self.options.profile
        return bool(self.op.baseline) and not brief and (
            self.options.smoke or case in self.op.baseline
        )  # fmt: skip

    def compile(self):
        """Starts all compilations, then waits for them."""
        benches = [self, *(bench for _, bench in self.beside.values())]
        for bench in benches:
            bench.submit()
        for bench in benches:
            bench.compiler.wait()

    def submit(self):
        """Starts the compilations of its own cases."""
        implementation, submit = self.options.implementation, self.compiler.submit
        for case in self.cases:
            key = case.shape_key
            programs = Programs(self.op, case, self.pool, self.calls(case), self.loops(case))
            submit((key, "draw"), programs.draw)
            if self.op.prepare is not None:
                submit((key, "prepare"), programs.prepare, implementation)
            for kind in self.kinds:
                submit((key, kind), programs.round, implementation, kind)
            if self.options.profile:
                continue
            submit((key, "check"), programs.check, len(self.kinds) + len(self.ways(case)))
            if self.has_baseline(case):
                if self.op.prepare is not None:
                    submit((key, "prepare-xla"), programs.prepare, "xla")
                submit((key, "xla"), programs.round, "xla", "given", BASELINE_CALLS)
                if self.op.plain is not None:
                    submit((key, "plain"), programs.round, "plain", "made", BASELINE_CALLS)

    def inputs(self, case):
        draw = self.compiler[case.shape_key, "draw"]
        return Inputs(self.op, case, draw, self.pool, self.calls(case))

    def op_round(self, case, inputs, kind):
        """Our round of a kind; "xla" and "plain" are those of the baselines."""
        key, prepared = case.shape_key, None
        calls, loops = self.calls(case), self.loops(case)
        if kind not in ("made", "plain") and self.op.prepare is not None:
            prepare = "prepare-xla" if kind == "xla" else "prepare"
            prepared = self.compiler[key, prepare](inputs.shared)
        if kind in ("xla", "plain"):
            calls, loops = BASELINE_CALLS, 1
        return OpRound(self.compiler[key, kind], inputs, prepared, calls, loops)

    def times(self, rounds, repeats=None, **options):
        return time_rounds(rounds, repeats=repeats or self.repeats, rest=self.rest, **options)

    def check(self, case, inputs, results):
        """{column: the largest error over the calls that are checked, for each of `results`}."""
        check, found = self.compiler[case.shape_key, "check"], []
        for i, own in enumerate(inputs.owns[: self.sets_checked]):
            each = [result[i] for result in results]
            found.append(check(inputs.pool, inputs.shared, own, each))
        found = jax.device_get(found)
        return {name: np.max([one[name] for one in found], axis=0).tolist() for name in found[0]}

    def prepared(self, case, inputs):
        """{name: Timed}: ours by kind, each way of each peer that works, other ops beside it."""
        found = {}
        for kind in self.kinds:
            ours = self.op_round(case, inputs, kind)
            found[kind] = Timed(ours.round, ours.results)
        for peer, way in self.ways(case):
            name = f"{peer.name}, {way}" if way else peer.name
            arguments = case, way, inputs.pool, inputs.shared, inputs.owns
            prepared = attempt(functools.partial(peer.prepare, *arguments), f"{name}, {case.name}")
            if prepared is not None:
                label = prepared[0].label
                found[f"{name}, {label}" if label else name] = Timed(*prepared, way, peer.column)
        for column, (change, bench) in self.beside.items():
            if (other := change(case)) is not None:
                what = f"{column}, {case.name}"
                timed = attempt(functools.partial(bench.as_column, other), what)
                found |= {} if timed is None else {column: timed._replace(column=column)}
        return found

    def as_column(self, case):
        """A round that is timed beside another op; its results are checked here."""
        inputs = self.inputs(case)
        ours = self.op_round(case, inputs, "given")
        ours.round.enqueue()
        ours.round.wait()
        errors = {name: one[0] for name, one in self.check(case, inputs, [ours.results]).items()}
        if wrong := self.op.wrong(errors):
            raise ValueError(f"wrong results: {wrong}")
        return Timed(ours.round, ours.results, "")

    def measure(self, case):
        """{the case's name: its result row}."""
        inputs = self.inputs(case)
        timed = self.prepared(case, inputs)
        rounds = {name: each.round for name, each in timed.items()}
        times = self.times(rounds, sm_clock=self.machine.meter.sm_clock)
        results = [each.results for each in timed.values() if each.column is None]
        missing = len(self.kinds) + len(self.ways(case)) - len(results)
        found = self.check(case, inputs, results + missing * results[:1])  # it takes that many
        checked = [name for name, each in timed.items() if each.column is None]
        errors = {name: dict(zip(checked, found[name], strict=False)) for name in found}
        row = self.row(case, times, errors)
        right = [n for n, e in errors["rel_err"].items() if e <= self.op.limits["rel_err"]]
        row |= peer_columns(row["us"], timed, times, errors["rel_err"], right)
        if self.has_baseline(case):
            kinds = {"jax_us": "xla"} | ({} if self.op.plain is None else {"plain_us": "plain"})
            slow = {name: self.op_round(case, inputs, k).round for name, k in kinds.items()}
            row |= {name: round(t.us, 1) for name, t in self.times(slow, repeats=3).items()}
        return {case.name: row | self.sustained(case, rounds, times, row["peer"])}

    def row(self, case, times, errors):
        """Our columns."""
        floor, ours = case.floor_us(self.machine.card), times["given"]
        row = case.row() | {"us": round(ours.us, 2)}
        if "made" in times:
            row["us_with_schedule"] = round(times["made"].us, 2)
        row |= {"floor_us": round(floor, 2), "of_floor": round(floor / ours.us, 4)}
        largest = {name: np.max([of[kind] for kind in self.kinds]) for name, of in errors.items()}
        row |= quality(ours, largest)
        return row | {"host_bound": ours.host_bound, "sm_mhz": ours.sm_mhz}

    def sustained(self, case, rounds, times, peer):
        """The columns of sustained load, for the cases that the card's power limits."""
        seconds, columns = self.options.sustain, {}
        wanted = self.op.is_sustained and (self.options.smoke or self.op.is_sustained(case))
        if not seconds or not wanted:
            return columns
        for prefix, name in (("", "given"), ("peer_", peer)):
            if name is None:
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
        found = []
        for name, timed in self.prepared(case, self.inputs(case)).items():
            title, ours = name, timed.way is None
            if ours:
                memory = self.compiler[case.shape_key, name].memory_analysis()
                scratch = memory.temp_size_in_bytes / 1e6
                title = f"ours, schedule {name}, {scratch:.1f} MB of scratch in all"
            lines, overlap = profiling.summarize(profiling.record(timed.round), timed.round.calls)
            print(f"{case.name}, {title}", *lines, sep="\n", flush=True)
            found.append(overlap if ours else None)
        return max((value for value in found if value is not None), default=None)


def peer_columns(us, timed, times, errors, right):
    """The fastest way of any peer that is right, each of several, and what has its own column."""
    others = {name: each for name, each in timed.items() if each.way is not None}
    beside = {x.column: round(times[name].us, 2) for name, x in others.items() if x.column}
    theirs = [name for name, each in others.items() if not each.column]
    for name in set(theirs) - set(right):
        print(f"{name} is wrong, rel_err {errors[name]}, and does not count", flush=True)
    theirs = [name for name in theirs if name in right]
    if not theirs:
        return {"peer": None, "peer_us": None, "ratio": None} | beside
    best = min(theirs, key=lambda name: times[name].us)
    peer_us = times[best].us
    columns = {"peer": best, "peer_us": round(peer_us, 2), "ratio": round(peer_us / us, 4)}
    columns["peer_rel_err"] = significant(errors[best])
    if len(theirs) > 1:
        columns |= {f"peer_{timed[n].way}_us": round(times[n].us, 2) for n in theirs}
    return columns | beside


HEADER = (
    f"{'case':24s} {'us':>8s} {'+sched':>8s} {'floor':>8s} {'share':>6s} {'peer us':>8s} "
    f"{'ratio':>6s} {'rel_err':>8s} {'spread':>6s} {'MHz':>5s}"
)


def text_of(name, row):
    made, peer_us, ratio = (
        row.get(key) or math.nan for key in ("us_with_schedule", "peer_us", "ratio")
    )
    late = "  (the host may be too slow)" if row["host_bound"] else ""
    return (
        f"{name:24s} {row['us']:8.2f} {made:8.2f} {row['floor_us']:8.2f} {row['of_floor']:6.1%} "
        f"{peer_us:8.2f} {ratio:6.3f} {row['rel_err']:8.1e} {row['spread']:6.1%} "
        f"{row['sm_mhz'] or 0:5d}{late}"
    )


def measure_all(run, bench, section, text=text_of, header=HEADER):
    """The rows of every case of a bench."""
    bench.compile()
    print(f"compiled after {run.elapsed():.0f} s", header, sep="\n", flush=True)
    run.measure_each(bench.op, section, bench.cases, bench.measure, text)


def groups(op, cases):
    """Cases that share a pool."""
    found = {}
    for case in cases:
        found.setdefault(op.pool_key(case), []).append(case)
    return found.values()


def select_cases(op, options):
    brief = op.quick and (options.quick or (options.profile and not options.cases))
    cases = op.smoke if options.smoke else op.quick if brief else op.cases
    changes = dict(change.split("=") for change in options.set.split(",") if change)
    changes = {key: type(getattr(cases[0], key))(value) for key, value in changes.items()}
    wanted = [part for part in options.cases.split(",") if part] or [""]
    return [
        dataclasses.replace(case, **changes)
        for case in cases
        if any(part in f"{case.name}$" for part in wanted)
    ]


def table(run, machine, op):
    """All cases of the op, beside its peers."""
    cases = select_cases(op, run.options)
    if not cases:
        raise SystemExit(f"no case matches {run.options.cases!r}")
    cases = [case for case in cases if run.wanted(op.name, "table", case.name)]
    print(f"{len(cases)} cases to measure")
    for group in groups(op, cases):
        bench = Bench(op, group, run, machine)
        if not (run.options.quick or run.options.smoke):
            largest = max(jax.tree.leaves(bench.pool), key=lambda x: x.nbytes)
            run.results.data["ceilings"] = ceilings.measure(largest) | run.results.stamp
        measure_all(run, bench, "table")
        del bench  # and its pool, before there is another
    print(report.summary(report.of(run.results.rows, op.name, "table")), flush=True)


# A kernel launched as a programmatic dependent may start this much before the one ahead of it has
# ended. It then waits for that one: 0.06 to 0.29 us were seen on an H200.
MAX_OVERLAP_US = 0.5


def profile(run, machine, op):
    """Profiles every case; status 1 if calls of ours overlap or none could be profiled."""
    found = []
    for group in groups(op, select_cases(op, run.options)):
        bench = Bench(op, group, run, machine)
        bench.compile()
        found += [run.guarded(case.name, bench.profile, case) for case in group]
        del bench
    known = [value for value in found if value is not None]
    worst = max(known, default=math.nan)
    print(f"largest overlap of two of our calls, {len(known)} cases: {worst:.2f} us")
    return 0 if worst <= MAX_OVERLAP_US else 1


def parse_arguments(doc, argv, sections):
    parser = parser_of(doc, sections)
    parser.add_argument("--cases", default="", help="only cases whose name holds one of these, "
                        "comma-separated; $ is the end of a name")  # fmt: skip
    parser.add_argument("--set", default="", help="a change to all cases: dtype=fp16")
    parser.add_argument("--quick", action="store_true", help="few cases, 3 repeats")
    parser.add_argument("--profile", action="store_true", help="the kernels of each case's round")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--vllm", help="version of the peer's vllm, where its wheel is not there")
    parser.add_argument("--sustain", type=float, default=0.15, help="seconds of sustained load for "
                        "the cases that power limits; 0: none")  # fmt: skip
    options = parse(parser, argv, sections)
    if options.smoke:
        options.sustain = 0.01
    if options.quick:
        options.repeats = min(options.repeats, 3)
    options.implementation = "xla" if options.smoke else "cuda"
    # PyTorch needs a share of the memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    if options.profile and not options.smoke:
        flag = "--xla_enable_command_buffers_during_profiling=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    return options


def main(op, doc, argv=None, sections=None, suffix=""):
    """Runs the sections that are asked for, functions of (run, machine, op): the exit status."""
    sections = sections or {"table": table}
    options = parse_arguments(doc, argv, sections)
    full = not (options.quick or options.profile or options.cases or options.set)
    run, machine = Run(options, suffix, full), Machine(op, options)
    if options.profile:
        return profile(run, machine, op)
    for name in options.sections:
        if not run.out_of_time(name):
            run.guarded(name, sections[name], run, machine, op)
            print(f"{name}: after {run.elapsed():.0f} s", flush=True)
    return run.finish()
