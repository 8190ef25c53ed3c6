"""Times dense MLA decode in other forms than bench_dense_decode.py does, into the same file.

    python benchmarks/bench_dense_sections.py                    all four sections
    python benchmarks/bench_dense_sections.py --sections layers  a jitted step of 61 layers
    python benchmarks/bench_dense_sections.py --sections variants,fixed
    python benchmarks/bench_dense_sections.py --sections growth  batch 1 to 4096, length 64 to 1M

variants: fp16 and other page sizes. fixed: splits of a fixed size. The ABOUT texts below say what
stands beside each section, README.md by which rules it is timed.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable

import bench_dense_decode as dense
import jax
import jax.numpy as jnp
import numpy as np
from bench_dense_decode import HEAD_DIM_V, OP, DenseDecode
from core import bench, launches, plots, report
from core.bench import Bench
from core.op import Op
from core.rounds import DonatedRound, Programs, in_turns

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

LAYERS = 61
LAYER_CASES = [DenseDecode(h, 1, b, 4096) for h, b in ((16, 128), (128, 128), (16, 1))]
# How a step is written, and what XLA is told.
FORMS = {
    "unrolled": (False, {}),
    "scan": (True, {}),
    "scan, graphs of 1": (True, {"xla_gpu_graph_min_graph_size": 1}),
}

TWINS = [
    DenseDecode(*shape)
    for shape in ((16, 1, 128, 4096), (128, 1, 128, 4096), (16, 1, 64, 8192), (16, 1, 128, 1024))
]
VARIANTS = [("fp16", 64), ("bf16", 16), ("bf16", 32), ("bf16", 128), ("bf16", 256)]

FIXED_CASES = [
    DenseDecode(h, 1, batch, length)
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
GROWTH_ROUND_US, GROWTH_REPEATS, GROWTH_REST, GROWTH_SAMPLE = 2000, 3, 0.02, 4


# -------------------- Layers


def step(results, qs, pool, table, lengths, *, case, scan, distinct, implementation):
    """All layers, one for each of `results`. Layer i has the pages of layer i % distinct.

    Scanned they share the last queries and write the last buffer in turn: a model would make the
    queries in the loop's body and use the result there, while slices of stacked queries and
    results are copies.
    """
    schedule = get_mla_metadata(lengths, case.s_q * case.h_q, 1, implementation=implementation)

    def layer(i, q):
        return flash_mla_with_kvcache(
            q, pool, table + (i % distinct) * case.pages(), lengths, HEAD_DIM_V, *schedule,
            causal=case.causal, implementation=implementation,
        )  # fmt: skip

    if not scan:
        return [layer(i, q) for i, q in enumerate(qs)]
    layers = jnp.arange(len(results), dtype=jnp.int32)
    last, _ = jax.lax.scan(lambda _, i: (layer(i, qs[-1]), None), results[-1], layers)
    return [*results[:-1], last]


def compile_step(programs, form, layers, distinct, implementation):
    """(the compiled program of a form, the launches of one step): see launches.compile_and_count.

    The program takes the step `programs.loops` times.
    """
    scan, options = FORMS[form]

    def lower(loops):
        def steps(results, qs, pool, table, lengths):
            def turn(results, lengths):
                return step(
                    results, qs, pool, table, lengths, case=programs.case, scan=scan,
                    distinct=distinct, implementation=implementation,
                )  # fmt: skip

            return in_turns(turn, loops, results, lengths)

        table, q = programs.own
        return jax.jit(steps, donate_argnums=0, keep_unused=True).lower(
            [programs.result] * layers, [q] * layers, programs.pool, table, programs.shared
        )

    compiled, counts = launches.compile_and_count(lower(1), layers, options)
    if programs.loops > 1:
        compiled = lower(programs.loops).compile(compiler_options=options)
    return compiled, counts


class LayersBench(Bench):
    """A step of many layers beside as many calls of the kernel alone, on the same pages."""

    def __init__(self, cases, run, machine):
        self.count = 2 if run.options.smoke else LAYERS
        super().__init__(OP, cases, run, machine, alone=True)

    def calls(self, case):
        return self.count

    def distinct(self, case):
        """How many layers have pages of their own; further ones use those of the first again."""
        return min(self.count, self.pool.shape[0] // case.pages())

    def compile(self):
        for case in self.cases:
            programs = Programs(self.op, case, self.pool, self.count, self.loops(case))
            for form in FORMS:
                self.compiler.submit(
                    (case.shape_key, form), compile_step, programs, form, self.count,
                    self.distinct(case), self.options.implementation,
                )  # fmt: skip
            self.compiler.submit((case.shape_key, "check"), programs.check, 1 + len(FORMS))
        super().compile()

    def inputs(self, case):
        """Every layer's table is that of the first one, moved by whole layers."""
        inputs = super().inputs(case)
        _, (first,) = self.op.lists(case, np.empty((case.pages(), *self.pool.shape[1:2])), 1)
        firsts = [(i % self.distinct(case)) * case.pages() for i in range(self.count)]
        tables = [jax.device_put(first + np.int32(page)) for page in firsts]
        inputs.owns = [(table, q) for table, (_, q) in zip(tables, inputs.owns, strict=True)]
        return inputs

    def measure(self, case):
        """A row for each form."""
        inputs = self.inputs(case)
        rounds, counts = {"alone": self.op_round(case, inputs, "given")}, {}
        qs, table = [q for _, q in inputs.owns], inputs.owns[0][0]
        for form in FORMS:
            compiled, counts[form] = self.compiler[case.shape_key, form]
            arguments = qs, inputs.pool, table, inputs.shared
            calls = self.count * self.loops(case)
            rounds[form] = DonatedRound(compiled, inputs.poisoned(self.count), arguments, calls)
        times = self.times({name: each.round for name, each in rounds.items()})
        last = [each.results[-1] for each in rounds.values()]
        check = self.compiler[case.shape_key, "check"]
        found = check(inputs.pool, inputs.shared, inputs.owns[-1], last)
        rows, alone = {}, times["alone"].us
        for i, (form, graphs) in enumerate(counts.items(), 1):
            us = times[form].us
            errors = {name: values[i] for name, values in found.items()}
            rows[row_name(case, form)] = case.row() | {
                "form": form, "layers": self.count, "distinct_caches": self.distinct(case),
                "us": round(us, 2), "alone_us": round(alone, 2), "over": round(us / alone - 1, 4),
                "step_us": round(us * self.count, 1),
                "graph_launches": graphs and graphs[0], "single_launches": graphs and graphs[1],
                **bench.quality(times[form], errors),
            }  # fmt: skip
        return rows


def smaller(cases, run):
    """The first of the smoke cases in place of `cases`, where there is no GPU."""
    return OP.smoke[:1] if run.options.smoke else cases


def row_name(case, form):
    return f"{case.name}, {form}"


def wanted(run, section, cases, forms):
    """The cases of which a form has to be measured."""
    return [
        case for case in smaller(cases, run)
        if any(run.wanted(OP.name, section, row_name(case, form)) for form in forms)
    ]  # fmt: skip


def run_layers(run, machine, op):
    def text(name, row):
        return (
            f"{name:32s} {row['us']:8.2f} us a layer, alone {row['alone_us']:8.2f}, "
            f"{row['over']:+.1%}, graphs {row['graph_launches']}, commands "
            f"{row['single_launches']}, host {row['host_us']}"
        )

    cases = wanted(run, "layers", LAYER_CASES, FORMS)
    if cases:
        bench.measure_all(run, LayersBench(cases, run, machine), "layers", text, header="")


# -------------------- Variants and fixed splits, each beside its twin


@dataclasses.dataclass(frozen=True)
class Form:
    """A form of the op: what it does to a case, and the columns that tell it from its twin."""

    op: Op = OP
    change: Callable = lambda case: case
    columns: Callable = lambda case: {}


def run_variants(run, machine, op):
    def form(dtype, page):
        return Form(change=lambda c: dataclasses.replace(c, dtype=dtype, page_block_size=page))

    variants = [("bf16", 64), *(VARIANTS[:2] if run.options.smoke else VARIANTS)]
    forms = {f"{dtype}, page {page}": form(dtype, page) for dtype, page in variants}
    run_beside_twins(run, machine, "variants", TWINS, forms)


def table_tokens(case):
    """The tokens that a row of the block table has room for."""
    return case.table_width * case.page_block_size


def scratch_bytes(row):
    """The partial results of a call whose schedule has row["num_parts"] parts."""
    rows = row["s_q"] * row["h_q"]
    return row["num_parts"] * (2 * rows * (2 * HEAD_DIM_V + 5 * 4) + -(-rows // 64) * 128)


def fixed_form(size):
    """Splits of a fixed size; max_seqlen is what the block table has room for."""

    def prepare(case, implementation, lengths):
        return dense.make_schedule(case, implementation, lengths, fixed_split_size=size,
                                   max_seqlen=table_tokens(case))  # fmt: skip

    def columns(case):
        parts = case.batch * -(-table_tokens(case) // size)
        return {"fixed_split_size": size, "num_parts": parts}

    return Form(dataclasses.replace(OP, prepare=prepare), columns=columns)


def run_fixed(run, machine, op):
    sizes = FIXED_SPLIT_SIZES[:1] if run.options.smoke else FIXED_SPLIT_SIZES
    forms = {f"splits of {size}": fixed_form(size) for size in sizes}
    run_beside_twins(run, machine, "fixed", FIXED_CASES, {"default": Form()} | forms)


def run_beside_twins(run, machine, section, cases, forms):
    """Every case in every form, of which the first is the twin of the others. All take turns."""

    def text(name, row):
        return f"{name:32s} {row['us']:8.2f} us, twin {row['twin_us']:8.2f}, {row['to_twin']:.3f}"

    (_, *others), benches = forms, {}
    cases = wanted(run, section, cases, others)
    if not cases:
        return
    for name, form in forms.items():
        changed = [form.change(case) for case in cases]
        benches[name] = Bench(form.op, changed, run, machine, alone=True, sets_checked=1)
        benches[name].compile()
    run.measure_each(OP, section, cases, functools.partial(beside_twin, benches, forms), text)


def beside_twin(benches, forms, twin_case):
    """A row for each form but the twin's."""
    cases = {name: form.change(twin_case) for name, form in forms.items()}
    inputs = {name: each.inputs(cases[name]) for name, each in benches.items()}
    ours = {name: b.op_round(cases[name], inputs[name], "given") for name, b in benches.items()}
    twin, *others = benches
    times = benches[twin].times({name: each.round for name, each in ours.items()})
    rows, twin_us = {}, times[twin].us
    for name in others:
        found = benches[name].check(cases[name], inputs[name], [ours[name].results])
        us, floor = times[name].us, cases[name].floor_us(benches[name].machine.card)
        errors = {column: values[0] for column, values in found.items()}
        rows[row_name(twin_case, name)] = cases[name].row() | forms[name].columns(cases[name]) | {
            "us": round(us, 2), "twin_us": round(twin_us, 2), "to_twin": round(us / twin_us, 4),
            "floor_us": round(floor, 2), "of_floor": round(floor / us, 4),
            **bench.quality(times[name], errors),
        }  # fmt: skip
    return rows


# -------------------- Growth


def growth_cases():
    """Series over the batch, uniform and ragged, and over the length; the largest come last."""
    shapes = {(batch, GROWTH_LENGTH) for batch in GROWTH_BATCHES}
    shapes |= {(batch, GROWTH_RAGGED_LENGTH, True) for batch in GROWTH_RAGGED_BATCHES}
    series = set(itertools.product(GROWTH_LENGTH_BATCHES, GROWTH_LENGTHS))
    shapes |= {shape for shape in series if math.prod(shape) <= MAX_GROWTH_TOKENS}
    cases = [DenseDecode(heads, 1, *shape) for heads in GROWTH_HEADS for shape in shapes]
    return sorted(cases, key=lambda c: (c.batch > 1024, c.batch * c.mean_len, c.batch, c.h_q))


def run_growth(run, machine, op):
    check = functools.partial(dense.check_results, sample=GROWTH_SAMPLE)
    op = dataclasses.replace(OP, check=check, baseline=(), is_sustained=None)
    cases = [c for c in smaller(growth_cases(), run) if run.wanted(OP.name, "growth", c.name)]
    if cases:
        brief = Bench(
            op, cases, run, machine, sets_checked=1, max_round_us=GROWTH_ROUND_US,
            repeats=min(run.options.repeats, GROWTH_REPEATS),
            rest=min(run.options.rest, GROWTH_REST),
        )  # fmt: skip
        bench.measure_all(run, brief, "growth")


SECTIONS = {
    "layers": run_layers, "variants": run_variants, "fixed": run_fixed, "growth": run_growth,
}  # fmt: skip


# -------------------- The report

GROWTH_COLORS = {"jax_flashmla": "#0969da", "FlashMLA": "#bc4c00"}


ABOUT_LAYERS = """
A jitted step makes the schedule and calls the op for each layer. All layers' pages lie in one
buffer, and each layer offsets the block table to its own pages. Times are microseconds a layer.
Alone: as many calls of the kernel on the same pages. Host: the time that the host takes to enqueue
the step, with three arrays a layer to pass. If that is as long as the step, the figure is the
host's time. Graphs and commands: how many CUDA graphs the compiled step launches, and how many
commands outside of them. Caches: how many layers have pages of their own; the other layers reuse
these pages. "scan, graphs of 1" is compiled with `xla_gpu_graph_min_graph_size=1`. Without it XLA
makes no graph of a loop's body that has fewer than 5 commands."""

ABOUT_FIXED = """
With `fixed_split_size` a sequence's result has the same bits in every batch. It is compared with
the default schedule; the two take turns. `max_seqlen` is what the block table has room for."""

ABOUT_GROWTH = """
The plot shows shares of the floor. Each case has 3 repeats, and 4 sequences of one call are
compared with float32. No call reads a page twice. At batch 1 with fewer than 4096 tokens the pages
are in the L2."""


def long_name(row):
    return f"{OP.label(row)}, h_q {row['h_q']}, s_q {row['s_q']}"


def report_on(page, rows, plot):
    """The sections of docs/performance.md; the plot is written to `plot`."""
    found = {name: report.of(rows, OP.name, name) for name in SECTIONS}
    count = found["layers"][0]["layers"] if found["layers"] else 0
    page.section(
        f"A step of {count} layers", ABOUT_LAYERS, found["layers"],
        [
            ("case", long_name, ""), ("form", "form", ""), ("us a layer", "us", ".2f"),
            ("alone us", "alone_us", ".2f"), ("over", "over", "+.1%"),
            ("host us", "host_us", ".1f"), ("graphs", "graph_launches", ""),
            ("commands", "single_launches", ""), ("caches", "distinct_caches", ""),
        ],
    )  # fmt: skip
    more = ("more", lambda row: row["to_twin"] - 1, "+.1%"), ("rel. error", "rel_err", ".1e")
    page.section(
        "fp16 and page sizes",
        "Each is compared with the same case in bf16 with pages of 64. The two take turns.",
        found["variants"],
        [
            ("case", long_name, ""), ("dtype", "dtype", ""), ("page", "page_block_size", ""),
            ("us", "us", ".1f"), ("bf16, page 64 us", "twin_us", ".1f"), *more,
        ],
    )  # fmt: skip
    page.section(
        "Splits of a fixed size", ABOUT_FIXED, found["fixed"],
        [
            ("case", long_name, ""), ("tokens a split", "fixed_split_size", ""),
            ("us", "us", ".1f"), ("default us", "twin_us", ".1f"), more[0],
            ("scratch MB", lambda row: scratch_bytes(row) / 1e6, ".1f"), more[1],
        ],
    )  # fmt: skip
    report_growth(page, found["growth"], plot)


def report_growth(page, rows, plot):
    if not rows:
        return
    plots.draw_panels(plot, growth_panels(rows), GROWTH_COLORS)
    page.section(
        "Growth with batch and length",
        f"![share of the floor by batch and by length]({plot.name})\n\n{ABOUT_GROWTH}",
        sorted(rows, key=lambda r: (r["h_q"], r["varlen"], r["batch"], r["mean_len"])),
        [
            ("case", long_name, ""), ("us", "us", ".1f"), ("share", "of_floor", ".0%"),
            ("+ schedule", "us_with_schedule", ".1f"), ("peer us", "peer_us", ".1f"),
            ("ratio", "ratio", ".2f"),
        ],
    )  # fmt: skip


def growth_panels(rows):
    """{title: (name of the x axis, {series: points})}: by batch at one length, then by length."""
    panels = {}
    for heads in sorted({row["h_q"] for row in rows}):
        ours = [row for row in rows if row["h_q"] == heads and not row["varlen"]]
        by_batch = [row for row in ours if row["mean_len"] == GROWTH_LENGTH]
        panels[f"h_q {heads}, length {GROWTH_LENGTH}"] = "batch", points(by_batch, "batch")
        for batch in GROWTH_LENGTH_BATCHES:
            at_batch = [row for row in ours if row["batch"] == batch]
            series = [row for row in at_batch if row["mean_len"] in GROWTH_LENGTHS]
            panels[f"h_q {heads}, batch {batch}"] = "length", points(series, "mean_len")
    return {title: panel for title, panel in panels.items() if any(panel[1].values())}


def points(rows, axis):
    ours = [(row[axis], row["of_floor"]) for row in rows]
    peer = [(row[axis], row["floor_us"] / row["peer_us"]) for row in rows if row["peer_us"]]
    return dict(zip(GROWTH_COLORS, (ours, peer), strict=True))


if __name__ == "__main__":
    sys.exit(bench.main(OP, __doc__, sections=SECTIONS))
