"""What is timed beside the table of cases: layers, variants, growth."""

import argparse
import dataclasses

import jax
import layers
import numpy as np
import workloads
from harness import HEADER, Bench, device_works, format_row, guarded, out_of_time
from rounds import DonatedRound, Inputs, Shapes
from timing import time_rounds


def smaller(cases, options):
    """The first of the smoke cases in place of `cases`, where there is no GPU."""
    return workloads.SMOKE[:1] if options.smoke else cases


class LayersBench(Bench):
    """A step of many layers beside as many calls of the kernel alone, on the same pages."""

    kinds = ("given",)
    sets_checked = 1

    def __init__(self, options, cases, machine):
        self.count = 2 if options.smoke else workloads.LAYERS
        super().__init__(options, cases, machine)
        self.peer = None

    def calls(self, case):
        return self.count

    def outs_checked(self, case):
        return 1 + len(layers.FORMS)

    def has_baseline(self, case):
        return False

    def distinct(self, case):
        """How many layers have pages of their own; further ones use those of the first again."""
        return min(self.count, self.pool.shape[0] // case.pages())

    def compile(self):
        for case in self.cases:
            shapes = Shapes(case, self.pool.shape[0], self.count, case.loops)
            for form in layers.FORMS:
                self.compiler.submit(
                    (case.shape_key, form), layers.compile_step,
                    shapes, form, self.count, self.distinct(case), self.options.implementation,
                )  # fmt: skip
        super().compile()

    def inputs(self, case):
        """Every layer's table is that of the first one, moved by whole layers."""
        inputs = Inputs(case, self.compiler[case.shape_key, "draw"], self.pool, self.count)
        first = workloads.page_tables(case, case.pages(), 1)[0]
        firsts = [(i % self.distinct(case)) * case.pages() for i in range(self.count)]
        inputs.tables = [jax.device_put(first + np.int32(page)) for page in firsts]
        return inputs

    def measure_forms(self, case):
        """One row for each form of the step."""
        inputs, options = self.inputs(case), self.options
        alone = self.op_round(case, inputs, "given")
        steps, launches = {}, {}
        for form in layers.FORMS:
            compiled, launches[form] = self.compiler[case.shape_key, form]
            arguments = inputs.qs, inputs.pool, inputs.tables[0], inputs.lengths
            steps[form] = DonatedRound(
                compiled, inputs.poisoned(self.count), arguments, self.count * case.loops
            )
        rounds = {"alone": alone.round} | {form: s.round for form, s in steps.items()}
        times = time_rounds(
            rounds, repeats=options.repeats, seconds=options.seconds, rest=options.rest
        )
        return self.form_rows(case, times, launches, self.check_last(case, inputs, alone, steps))

    def check_last(self, case, inputs, alone, steps):
        """The largest rel_err of each form's last layer."""
        results = [alone, *steps.values()]
        errors = self.compiler[case.shape_key, "errors"]
        found = errors(
            inputs.pool, inputs.qs[-1], inputs.tables[-1], inputs.lengths,
            [result.outs[-1] for result in results], [result.lses[-1] for result in results],
        )  # fmt: skip
        return dict(zip(["alone", *steps], np.asarray(found)[0].tolist(), strict=True))

    def form_rows(self, case, times, launches, errors):
        alone, rows = times["alone"], []
        for form, graphs in launches.items():
            us = times[form].us
            rows.append(
                case.row() | {
                    "form": form, "layers": self.count, "distinct_caches": self.distinct(case),
                    "us": round(us, 2), "alone_us": round(alone.us, 2),
                    "over": round(us / alone.us - 1, 4), "step_us": round(us * self.count, 1),
                    "graph_launches": graphs and graphs[0], "single_launches": graphs and graphs[1],
                    "rel_err": float(f"{errors[form]:.3g}"),
                    "spread": round(times[form].spread, 4),
                    "host_us": round(times[form].host_us, 2),
                }
            )  # fmt: skip
        return rows


def run_layers(options, machine, results, started):
    bench = LayersBench(options, smaller(workloads.LAYER_CASES, options), machine)
    bench.compile()
    for case in bench.cases:
        for row in guarded(results, f"layers {case.name}", bench.measure_forms, case) or []:
            results.add_to("layers", row)
            print(
                f"{case.name:18s} {row['form']:18s} {row['us']:8.2f} us a layer, alone "
                f"{row['alone_us']:8.2f}, {row['over']:+.1%}, graphs {row['graph_launches']}, "
                f"singles {row['single_launches']}, host {row['host_us']}", flush=True,
            )  # fmt: skip
    bench.compiler.close()


class VariantBench(Bench):
    """One dtype and page size of all cases, ours alone."""

    kinds = ("given",)
    sets_checked = 1

    def __init__(self, options, cases, machine):
        super().__init__(options, cases, machine)
        self.peer = None

    def has_baseline(self, case):
        return False

    def columns(self, case):
        """What of a row says how it differs from its twin, beyond the case."""
        return {}


def run_variants(options, machine, results, started):
    """Every variant beside its twin in bf16 with pages of 64, which takes turns with it."""
    twins = smaller(workloads.TWINS, options)
    variants = workloads.VARIANTS[:2] if options.smoke else workloads.VARIANTS
    benches = {}
    for dtype, page in [("bf16", 64), *variants]:
        cases = [dataclasses.replace(c, dtype=dtype, page_block_size=page) for c in twins]
        benches[dtype, page] = VariantBench(options, cases, machine)
        benches[dtype, page].compile()
    run_beside_twins("variants", benches, options, results, started)


class FixedBench(VariantBench):
    """Splits of one fixed size, or of none."""

    def __init__(self, options, cases, machine, fixed_split_size):
        self.fixed_split_size = fixed_split_size
        super().__init__(options, cases, machine)

    def columns(self, case):
        size = self.fixed_split_size
        return {"fixed_split_size": size, "num_parts": case.fixed_parts(size)}


def run_fixed(options, machine, results, started):
    """Splits of a fixed size beside the default schedule, which takes turns with them."""
    cases = smaller(workloads.FIXED_CASES, options)
    sizes = workloads.FIXED_SPLIT_SIZES[:1] if options.smoke else workloads.FIXED_SPLIT_SIZES
    benches = {size: FixedBench(options, cases, machine, size) for size in (None, *sizes)}
    for bench in benches.values():
        bench.compile()
    run_beside_twins("fixed", benches, options, results, started)


def run_beside_twins(section, benches, options, results, started):
    """Every case of the first bench, and what the others make of it."""
    twins = next(iter(benches.values())).cases
    for number, twin in enumerate(twins):
        name = f"{section} {twin.name}"
        if out_of_time(options, results, name, started):
            break
        for row in guarded(results, name, measure_beside_twin, benches, number, options) or []:
            results.add_to(section, row)
            print(
                f"{twin.name:18s} {row['dtype']} page {row['page_block_size']:3d} splits "
                f"{row.get('fixed_split_size', '')!s:4s} {row['us']:8.2f} us, twin "
                f"{row['twin_us']:8.2f}, {row['to_twin']:.3f}", flush=True
            )  # fmt: skip
    for bench in benches.values():
        bench.compiler.close()


def measure_beside_twin(benches, number, options):
    """A row for each bench but the first, which is the twin."""
    cases = {key: bench.cases[number] for key, bench in benches.items()}
    inputs = {key: bench.inputs(cases[key]) for key, bench in benches.items()}
    ours = {key: b.op_round(cases[key], inputs[key], "given") for key, b in benches.items()}
    times = time_rounds(
        {key: op_round.round for key, op_round in ours.items()},
        repeats=options.repeats, seconds=options.seconds, rest=options.rest,
    )  # fmt: skip
    (twin, *variants), rows = benches, []
    for key in variants:
        found = benches[key].check(cases[key], inputs[key], [ours[key]])
        us, twin_us = times[key].us, times[twin].us
        floor = cases[key].floor_us(benches[key].machine.card)
        rows.append(
            cases[key].row() | benches[key].columns(cases[key]) | {
                "us": round(us, 2), "twin_us": round(twin_us, 2),
                "to_twin": round(us / twin_us, 4), "floor_us": round(floor, 2),
                "of_floor": round(floor / us, 4), "rel_err": float(f"{found[0, 0]:.3g}"),
                "spread": round(times[key].spread, 4), "host_us": round(times[key].host_us, 2),
            }
        )  # fmt: skip
    return rows


class GrowthBench(Bench):
    """Ours and the peer over series of cases, some of them very large: few calls and checks."""

    sets_checked = 1
    sample = 4

    def __init__(self, options, cases, machine):
        brief = {"repeats": min(options.repeats, 3), "rest": min(options.rest, 0.02)}
        options = argparse.Namespace(**vars(options) | brief)
        super().__init__(options, cases, machine)

    def calls(self, case):
        """Fewer than elsewhere where one call takes long."""
        return min(super().calls(case), max(1, round(2000 / case.floor_us())))

    def has_baseline(self, case):
        return False

    def sustained(self, case, rounds, times):
        return {}


def run_growth(options, machine, results, started):
    cases = workloads.growth_cases()
    bench = GrowthBench(options, cases[:1] if options.smoke else cases, machine)
    bench.compile()
    print(HEADER, flush=True)
    for case in bench.cases:
        name = f"growth {case.name}"
        if out_of_time(options, results, f"{name} and larger", started):
            break
        row = guarded(results, name, bench.measure, case)
        if row is not None:
            results.add_to("growth", row)
            print(format_row(case, row), flush=True)
        elif not device_works():
            print("the device no longer works; stopping", flush=True)
            break
    bench.compiler.close()
