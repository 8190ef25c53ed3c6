"""Times a whole model: examples/models with random weights of DeepSeek-V2-Lite's dimensions.

    python benchmarks/bench_model.py             -> benchmarks/results/<card>_model.json
    python benchmarks/bench_model.py --smoke     a tiny model on the CPU
    python benchmarks/bench_model.py --sections step

step: the decoder's own loop on the device, greedy, a token of each sequence a step. The cache is
full of random numbers and the lengths are set: the time does not depend on how they came there.
Every sequence has pages of its own, in random order. A step is timed with our kernels ("cuda"),
with plain JAX ("plain": core/plain.py), and without attention ("without": its result is the first
columns of the query). What attention costs is the difference. Lengths are traced, and the block
table is that of the longest context that fits: so each form of a batch size is one program. Plain
JAX reads the whole table, so each context has a program of its own, and a table that just fits.
prefill: a prompt is read in chunks of several sizes, by the program that Decoder.prefill runs.

All programs are compiled first, some at a time, and before there is a cache. What the budget leaves
out has no row; the same command goes on from there.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from core import plain, report
from core.run import Run, parse, parser_of

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))
from examples.models import model
from examples.models.config import ModelConfig
from examples.models.decoding import Decoder, State
from examples.models.weights import random_weights

OP_NAME, NAME, PAGE = "model", "deepseek-v2-lite", 64
SECTIONS = ("step", "prefill")
WORKSPACE = 6e9  # bytes left to programs when a context is said to fit
FILLING_PAGES = 1024  # random pages, of which the cache is made
COMPILED_AT_A_TIME = 4
COMPILING_PART = 0.65  # of the budget


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run attention in a step."""

    name: str
    implementation: str  # of the other ops, and of attention in the form "cuda"
    steps: int  # of a burst
    bursts: int


@dataclasses.dataclass(frozen=True)
class Plan:
    config: ModelConfig
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    forms: tuple[Form, ...]
    prompt: int  # a multiple of each of the chunks
    chunks: tuple[int, ...]
    dtype: str


def full_plan():
    forms = Form("cuda", "auto", 32, 5), Form("without", "auto", 32, 5), Form("plain", "auto", 2, 2)
    return Plan(
        ModelConfig.named(NAME), batches=(1, 32, 128), contexts=(1024, 8192, 32768), forms=forms,
        prompt=4096, chunks=(64, 256, 512), dtype="bfloat16",
    )  # fmt: skip


def smoke_plan():
    tiny = dataclasses.replace(
        ModelConfig.named(NAME, layers=2), vocab=256, width=64, heads=2, mlp_width=64,
        expert_width=32, experts=8,
    )  # fmt: skip
    forms = Form("cuda", "xla", 2, 1), Form("without", "xla", 2, 1), Form("plain", "xla", 1, 1)
    return Plan(tiny, (1, 2), (64, 128), forms, prompt=64, chunks=(16, 32), dtype="float32")


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_bytes(plan, batch, context):
    itemsize = jnp.dtype(plan.dtype).itemsize
    return batch * context * plan.config.layers * plan.config.entry_dim * itemsize


@dataclasses.dataclass(frozen=True)
class Figure:
    """What a row is about: its program, and how it is measured."""

    section: str
    case: str
    columns: dict
    state: tuple  # (batch, longest context) of the state that it is measured on
    program: tuple  # figures with the same of these share a program
    lower: Callable | None  # () -> the lowered program; None: the cache does not fit
    measure: Callable  # (the program, a Batch) -> columns


def step_figures(plan, params, limit):
    for batch, form in itertools.product(plan.batches, plan.forms):
        sizes = {context: cache_bytes(plan, batch, context) for context in plan.contexts}
        fitting = [c for c, size in sizes.items() if bytes_of(params) + size + WORKSPACE <= limit]
        for context, size in sizes.items():
            longest = context if form.name == "plain" else max(fitting, default=0)
            lower = functools.partial(lower_form, plan, params, form, batch, longest)
            yield Figure(
                "step", f"{form.name} {batch} x {context}",
                {"form": form.name, "batch": batch, "context": context, "cache_bytes": size},
                (batch, longest), (form.name, batch, longest),
                lower if context in fitting else None,
                functools.partial(measure_form, params, form, batch, context),
            )  # fmt: skip


def prefill_figures(plan, params):
    for chunk in plan.chunks:
        yield Figure(
            "prefill", f"{plan.prompt} by {chunk}", {"prompt": plan.prompt, "chunk": chunk},
            (1, plan.prompt), ("prefill", chunk),
            functools.partial(lower_prefill, plan, params, chunk),
            functools.partial(measure_prefill, plan, params, chunk),
        )  # fmt: skip


# -------------------- The programs


def make_state(plan, batch, longest):
    """A batch whose pages are full of random numbers, its lengths still to be set."""
    pages = -(-longest // PAGE)
    table = np.random.default_rng(0).permutation(batch * pages).astype(np.int32)

    @jax.jit
    def fill(key):
        shape = FILLING_PAGES, PAGE, 1, plan.config.entry_dim
        some = jax.random.normal(key, shape, jnp.float32).astype(plan.dtype)
        return some[jnp.arange(plan.config.layers * batch * pages) % FILLING_PAGES]

    return State(
        fill(jax.random.key(1)),
        jnp.asarray(table.reshape(batch, pages)),
        *(jnp.zeros(batch, dtype) for dtype in (jnp.int32, jnp.int32, bool)),
        jax.random.key(2),
    )


def abstract_state(*args):
    """The shapes of what make_state makes."""
    return jax.eval_shape(functools.partial(make_state, *args))


def without_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, *args, **kwargs):
    return q[..., :head_dim_v], None


def plain_attention(
    q, k_cache, block_table, cache_seqlens, head_dim_v, *schedule, softmax_scale, causal,
    implementation,
):  # fmt: skip
    return plain.attend_paged(
        q, k_cache, block_table, cache_seqlens, head_dim_v, softmax_scale, causal
    )


def lower_form(plan, params, form, batch, longest):
    decoder = Decoder(params, plan.config, implementation=form.implementation)
    others = {"without": without_attention, "plain": plain_attention}
    attention = others.get(form.name, model.flash_mla_with_kvcache)
    with mock.patch.object(model, "flash_mla_with_kvcache", attention):
        lowered = decoder.program(form.steps).lower(params, abstract_state(plan, batch, longest))
    has_kernels = "jax_flashmla_dense_decode" in lowered.as_text()
    if form.name == "cuda" and form.implementation == "auto" and not has_kernels:
        raise SystemExit("there are no kernels here; --smoke runs anywhere")
    return lowered


def lower_prefill(plan, params, chunk):
    implementation = plan.forms[0].implementation
    decoder = Decoder(params, plan.config, chunk=chunk, implementation=implementation)
    tokens, end = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, chunk), (1,)))
    state = abstract_state(plan, 1, plan.prompt)
    return decoder.read_program.lower(params, state, tokens, end)


def compile_all(figures, run):
    """{key: the future of its program}, as far as the time goes."""
    pool, started = concurrent.futures.ThreadPoolExecutor(COMPILED_AT_A_TIME), {}

    def left():
        return max(COMPILING_PART * run.options.budget - run.elapsed(), 0)

    for figure in figures:
        if figure.lower is not None and figure.program not in started and left():
            started[figure.program] = pool.submit(figure.lower().compile)
    concurrent.futures.wait(started.values(), left())
    pool.shutdown(cancel_futures=True)
    print(f"{len(started)} programs after {run.elapsed():.0f} s", flush=True)
    return {key: future for key, future in started.items() if not future.cancelled()}


# -------------------- Timing


class Batch:
    """A state that is made when it is needed: donation uses it up, and a failure too."""

    def __init__(self, plan, batch, longest):
        self.make = functools.partial(make_state, plan, batch, longest)
        self.state = None

    def seconds(self, run, lengths):
        """Of run(state) -> state, from that length of all sequences on."""
        state, self.state = self.state, None
        state = self.make() if state is None else state
        batch = len(state.lengths)
        lengths = jnp.full(batch, lengths, jnp.int32)
        token = jnp.arange(batch, dtype=jnp.int32)
        state = dataclasses.replace(state, lengths=lengths, token=token)
        jax.block_until_ready(state)
        began = time.perf_counter()
        self.state = jax.block_until_ready(run(state))
        return time.perf_counter() - began

    def median(self, run, lengths, bursts):
        """The first burst does not count: it loads what the program needs."""
        return statistics.median([self.seconds(run, lengths) for _ in range(1 + bursts)][1:])


def measure_form(params, form, batch, context, program, state):
    """A step; the context is what the last step sees."""
    first = context - form.steps
    seconds = state.median(lambda state: program(params, state)[1], first, form.bursts)
    ms = seconds / form.steps * 1e3
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "ms": round(ms, 4),
        "tokens_per_s": round(batch / ms * 1e3, 1),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }


def measure_prefill(plan, params, chunk, program, state):
    """A prompt of random tokens, chunk by chunk."""
    tokens = np.random.default_rng(1).integers(0, plan.config.vocab, (1, chunk), np.int32)

    def read(state):
        for end in range(chunk, plan.prompt + 1, chunk):
            state = program(params, state, tokens, np.array([end], np.int32))
        return state

    seconds = state.median(read, 0, 3)
    return {
        "ms": round(seconds * 1e3, 3),
        "tokens_per_s": round(plan.prompt / seconds, 1),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def measure(run, plan, figures):
    """A row for each figure, as far as the time goes."""
    figures = [f for f in figures if run.wanted(OP_NAME, f.section, f.case)]
    programs, left_out = compile_all(figures, run), 0
    for shape, group in itertools.groupby(figures, lambda figure: figure.state):
        state = Batch(plan, *shape)
        for figure in group:
            program = programs.get(figure.program)
            late = program is None or run.elapsed() > run.options.budget
            if figure.lower is not None and late:
                left_out += 1
                continue
            row = figure.columns | figure_row(figure, program, state)
            print(f"{figure.section} {figure.case}: {row.get('ms') or row['why']}", flush=True)
            run.results.add(OP_NAME, figure.section, figure.case, row)
        del state  # before there is another cache
    if left_out:
        run.error(f"out of time: {left_out} figures are left out; the same command goes on")


def figure_row(figure, program, state):
    """The columns of a figure, or why there are none."""
    if figure.lower is None:
        return {"why": "does not fit"}
    try:
        return figure.measure(program.result(), state)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"why": "out of memory"}


def main(argv=None):
    options = parse(parser_of(__doc__, SECTIONS), argv, SECTIONS)
    # By default JAX takes 0.75 of the memory: on an H100 too little for 33 GB of cache.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    plan = smoke_plan() if options.smoke else full_plan()
    run = Run(options, "_model")
    params = random_weights(plan.config, jax.random.key(0), jnp.dtype(plan.dtype))
    jax.block_until_ready(params)
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 1e12)
    weights = {"model": NAME, "weights_bytes": bytes_of(params), "bytes_limit": limit}
    run.results.data.update(weights)
    figures = [*step_figures(plan, params, limit), *prefill_figures(plan, params)]
    measure(run, plan, [figure for figure in figures if figure.section in options.sections])
    return run.finish()


# -------------------- The report


def by_shape(rows):
    """A line for each batch and context, with the row of each form by its name."""
    lines = {}
    for row in rows:
        shape = {name: row[name] for name in ("batch", "context", "cache_bytes", "commit")}
        lines.setdefault(row["case"].split(" ", 1)[1], shape)[row["form"]] = row
    return list(lines.values())


def time_of(row, digits):
    """The time of a row, or why there is none."""
    return f"{row['ms']:.{digits}f}" if "ms" in row else row.get("why", "")


def quotient(line, top, bottom):
    """One form's time over another's."""
    found = [line.get(form, {}).get("ms") for form in (top, bottom)]
    return found[0] / found[1] if all(found) else None


def attention_share(line, form):
    left = quotient(line, "without", form)
    return None if left is None else 1 - left


def peak(line):
    peaks = [row.get("peak_bytes") for row in line.values() if isinstance(row, dict)]
    return max(filter(None, peaks), default=0) / 1e9 or None


STEP = """
`python benchmarks/bench_model.py`: examples/models with random weights of DeepSeek-V2-Lite's
dimensions ({gigabytes:.1f} GB in bfloat16). A greedy step of the whole model is compared with a
step whose attention is {baseline}. Share of attention: how much shorter the step is without
attention. Peak GB: the most memory in use up to then."""

BASELINES = {
    "plain": "plain JAX (gathered tokens, two einsums that sum in float32, a softmax)",
    "xla": "the reference",
}

PREFILL = """
The same model reads a single prompt of random tokens in chunks. Each chunk is a step with that many
queries, and uses the same op."""


def report_on(page, results):
    """The part of docs/performance.md on a whole model."""
    if not results:
        return
    lines = by_shape(report.of(results["rows"], OP_NAME, "step"))
    # Files of older commits have the reference in place of plain JAX.
    form = "plain" if any("plain" in line for line in lines) else "xla"
    name = {"plain": "plain JAX", "xla": "reference"}[form]
    gigabytes, baseline = results["weights_bytes"] / 1e9, BASELINES[form]
    page.section(
        "In a whole model", STEP.format(gigabytes=gigabytes, baseline=baseline), lines,
        [
            ("batch x context", lambda line: f"{line['batch']} x {line['context']}", ""),
            ("cache GB", lambda line: line["cache_bytes"] / 1e9, ".1f"),
            ("ms a step", lambda line: time_of(line.get("cuda", {}), 2), ""),
            ("tokens/s", lambda line: line.get("cuda", {}).get("tokens_per_s"), ".0f"),
            ("share of attention", lambda line: attention_share(line, "cuda"), ".0%"),
            (f"{name}: ms a step", lambda line: time_of(line.get(form, {}), 2), ""),
            ("share", lambda line: attention_share(line, form), ".0%"),
            ("times", lambda line: quotient(line, form, "cuda"), ".1f"),
            ("peak GB", peak, ".1f"),
        ],
        level=2,
    )  # fmt: skip
    page.section(
        "Reading a prompt", PREFILL, report.of(results["rows"], OP_NAME, "prefill"),
        [
            ("prompt", "prompt", ""), ("tokens a chunk", "chunk", ""),
            ("ms", lambda row: time_of(row, 1), ""),
            ("tokens/s", "tokens_per_s", ".0f"),
            ("temporary GB", lambda row: row.get("temporary_bytes", 0) / 1e9 or None, ".2f"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
