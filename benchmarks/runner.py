"""Runs what is asked for: the cases of the table, and the sections beside it."""

import time

import cards
import jax
import sections
from harness import MAX_REL_ERR, Machine, guarded, out_of_time, run_cases, select_cases
from results_file import SECTIONS, Results, commit_of


def run_sections(options, machine, results, started):
    """The sections that are asked for, one after the other."""
    for name in SECTIONS:
        if not getattr(options, name) or out_of_time(options, results, name, started):
            continue
        results.begin(name)
        run = getattr(sections, f"run_{name}")
        guarded(results, name, run, options, machine, results, started)
        results.save()
        print(f"{name}: after {time.monotonic() - started:.0f} s", flush=True)


def main(options):
    started = time.monotonic()
    cases = select_cases(options)
    if not cases:
        raise SystemExit(f"no case matches {options.cases!r}")
    device = jax.devices()[0]
    sms = getattr(device, "core_count", 0)
    name = f"{device.device_kind}, {sms} SMs, jax {jax.__version__}"
    print(f"{len(cases) if options.table else 0} cases on {name}, "
          f"implementation {options.implementation}", flush=True)  # fmt: skip
    machine = Machine(options)
    append = options.append if options.table else "sections"
    path = options.out or (cards.results_path(device.device_kind) if options.full else None)
    results = Results(path, append, name, commit_of(options))
    status = run_cases(options, machine, results, cases, started) if options.table else 0
    if options.profile:
        return status
    run_sections(options, machine, results, started)
    print(f"{len(results.data['rows'])} rows, {len(results.errors)} errors, "
          f"{time.monotonic() - started:.0f} s", *results.errors, sep="\n")  # fmt: skip
    rows = results.data["rows"] + [row for s in results.sections.values() for row in s["rows"]]
    wrong = [row for row in rows if not row["rel_err"] <= MAX_REL_ERR]
    return 1 if wrong or results.errors else 0
