"""What every script shares: its options, its time, its results file, its exit status."""

import argparse
import pathlib
import time
import traceback

import jax
import jax.numpy as jnp

from core import cards
from core.results import Results, commit_of


def parser_of(doc, sections):
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on the CPU, no peer")
    parser.add_argument("--out", type=pathlib.Path, help="results file of a full run "
                        "(benchmarks/results/<card>.json)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also measure what the file has of "
                        "this commit")  # fmt: skip
    parser.add_argument("--budget", type=float, default=540, help="stop after so many seconds; the "
                        "same command goes on")  # fmt: skip
    parser.add_argument("--commit", help="commit to record, where there is no .git")
    parser.add_argument("--repeats", type=int, default=7, help="repeats of a timing")
    parser.add_argument("--rest", type=float, default=0.05, help="seconds before a burst")
    parser.add_argument("--sections", default=",".join(sections), help="some of %(default)s")
    return parser


def parse(parser, argv, sections):
    options = parser.parse_args(argv)
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - set(sections):
        parser.error(f"--sections has {', '.join(sections)}, not {', '.join(sorted(unknown))}")
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
        options.repeats, options.rest = min(options.repeats, 3), 0.0
    return options


def device_works():
    try:
        return int(jnp.arange(4).sum()) == 6
    except Exception:
        return False


class Run:
    """A run of a script: the rows that it adds to a file, as far as its time goes."""

    def __init__(self, options, suffix="", full=True, devices=1):
        self.options, self.started, self.wrong = options, time.monotonic(), []
        device = jax.devices()[0]
        name = f"{device.device_kind}, {getattr(device, 'core_count', 0)} SMs"
        name = name if devices == 1 else f"{devices} x {name}"
        default = cards.results_path(device.device_kind, suffix)
        path = options.out or (default if full and not options.smoke else None)
        self.results = Results(path, name, commit_of(options), jax.__version__)
        print(f"{name}, jax {jax.__version__}, commit {self.results.stamp['commit']}", flush=True)

    def elapsed(self):
        return time.monotonic() - self.started

    def wanted(self, op, section, case):
        """Whether a row has to be measured: the file does not have it of this commit."""
        return self.options.again or not self.results.has(op, section, case)

    def out_of_time(self, what):
        """Whether the budget is spent, which is then noted."""
        if self.elapsed() <= self.options.budget:
            return False
        self.error(f"out of time: {what}; the same command goes on from there")
        return True

    def error(self, text):
        self.results.errors.append(text)
        print(text, flush=True)

    def guarded(self, name, function, *args):
        """What `function` returns. If it fails: None, and a line in the results' errors."""
        try:
            return function(*args)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.error(f"{name}: FAILED {text[:400]}")
            if len(self.results.errors) == 1:
                traceback.print_exc()
        if not device_works():
            self.finish()
            raise SystemExit("the device no longer works")
        return None

    def measure_each(self, op, section, cases, measure, text):
        """Adds the rows of each case, measure(case) -> {name: row}, and prints text(name, row).

        A case that fails is noted and the others go on. Wrong results fail the run.
        """
        for number, case in enumerate(cases):
            left = f"{section}: {len(cases) - number} cases left, from {case.name}"
            if self.out_of_time(left):
                break
            rows = self.guarded(f"{section} {case.name}", measure, case) or {}
            for name, row in rows.items():
                wrong = op.wrong(row)
                if wrong:
                    self.wrong.append(f"{section} {name}: WRONG, {wrong}")
                self.results.add(op.name, section, name, row)
                print(f"{text(name, row)}{'  WRONG' if wrong else ''}", flush=True)

    def finish(self):
        """Writes the file a last time; returns the exit status."""
        self.results.save()
        errors = self.wrong + self.results.errors
        print(f"{len(self.results.rows)} rows, {len(errors)} errors, {self.elapsed():.0f} s")
        print(*errors, sep="\n", flush=True)
        return 1 if errors else 0
