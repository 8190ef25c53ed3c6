"""Times a whole model: examples/deepseek with random weights of DeepSeek-V2-Lite's dimensions.

    python benchmarks/model.py             -> benchmarks/results/<card>_model.json, then report.py
    python benchmarks/model.py --smoke     a tiny model on the CPU: does the script run

What is timed is the decoder's own loop on the device, greedy, a token of each sequence a step. The
cache is full of random numbers and the lengths are set: the time does not depend on how they came
there. Every sequence has pages of its own, in random order. A step is timed with our kernels, with
attention in plain JAX, and without attention (its result is the first columns of the query): what
attention costs is the difference. Lengths are traced and the block table is that of the longest
context that fits, so that a batch size is one program for each of the three. A prompt is read in
chunks of several sizes, by the program that Decoder.prefill runs. The attention of a prompt's last
chunk is timed alone, too, beside a library call over expanded keys (prefill_attention.py).

All programs are compiled first, some at a time, and before there is a cache. After --budget seconds
the file says "left out" where there is no figure yet; the same command goes on from there.
--sections takes some of the sections alone.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from cards import results_path
from results_file import commit_of

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from prefill_attention import WEIGHTS, AttentionForm, lower_layers

from examples.deepseek import model
from examples.deepseek.config import ModelConfig
from examples.deepseek.decoding import Decoder, State
from examples.deepseek.weights import random_weights

NAME, PAGE = "deepseek-v2-lite", 64
WORKSPACE = 6e9  # bytes left to programs when a context is said to fit
BURST, MOST_RUNS = 0.05, 20  # a chunk's attention runs for so many seconds, or so often
FILLING_PAGES = 1024  # random pages, of which the cache is made
COMPILED_AT_A_TIME = 4
COMPILING_ENDS = 0.35  # when this part of the budget is left
LEFT_OUT, TOO_LARGE, NO_MEMORY = "left out", "does not fit", "out of memory"
SECTIONS = ("rows", "prefill", "prefill_attention")
# |x - y| / |y|, of a library call's result x and the op's y. The logarithms by which two calls are
# joined come rounded to bfloat16.
TOLERANCE = {"bfloat16": 3e-2, "float32": 1e-4}


# What a library call raises for shapes that it does not take, or that its plans do not.
REFUSALS = (NotImplementedError, RuntimeError, TypeError, ValueError)


class NoFigure(Exception):
    """Why there is none."""


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run attention."""

    name: str
    implementation: str  # of the ops
    steps: int  # of a burst
    bursts: int
    batches: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    config: ModelConfig
    contexts: tuple[int, ...]
    forms: tuple[Form, ...]
    prompt: int  # a multiple of each of
    chunks: tuple[int, ...]
    attention_forms: tuple[AttentionForm, ...]  # the first is the op
    attention_contexts: tuple[int, ...]  # multiples of PAGE
    attention_chunks: tuple[int, ...]
    dtype: str

    @property
    def batches(self):
        return sorted({batch for form in self.forms for batch in form.batches})


def full_plan():
    forms = (
        Form("cuda", "auto", 32, 5, (1, 32, 128)),
        Form("without", "auto", 32, 5, (1, 32, 128)),
        Form("xla", "xla", 2, 2, (1, 32, 128)),
    )
    attention = (
        AttentionForm("op", "auto", expanded=False),
        AttentionForm("cudnn", "cudnn"),
        AttentionForm("cudnn_split", "cudnn", split=True),
        AttentionForm("xla", "xla"),
    )
    return Plan(
        ModelConfig.named(NAME), (1024, 8192, 32768), forms, 4096, (64, 256, 512),
        attention, (4096, 32768), (64, 256, 512, 2048), "bfloat16",
    )  # fmt: skip


def smoke_plan():
    tiny = dataclasses.replace(
        ModelConfig.named(NAME, layers=2), vocab=256, width=64, heads=2, mlp_width=64,
        expert_width=32, experts=8,
    )  # fmt: skip
    forms = (
        Form("cuda", "xla", 2, 1, (1, 2)),
        Form("without", "xla", 2, 1, (1, 2)),
        Form("xla", "xla", 1, 1, (1,)),
    )
    attention = (
        AttentionForm("op", "xla", expanded=False),
        AttentionForm("cudnn", "cudnn"),  # which there is none of on a CPU
        AttentionForm("cudnn_split", "xla", split=True),
        AttentionForm("xla", "xla"),
    )
    return Plan(tiny, (64, 128), forms, 64, (16, 32), attention, (64, 128), (64,), "float32")


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_bytes(plan, batch, context):
    itemsize = jnp.dtype(plan.dtype).itemsize
    return batch * context * plan.config.layers * plan.config.entry_dim * itemsize


# -------------------- The results


class Results:
    """Rows with a reason for each figure that is missing; the file is written whole each time."""

    def __init__(self, path, head, plan, limit):
        old = json.loads(path.read_text()) if path is not None and path.exists() else {}
        if any(old.get(key) != head[key] for key in ("device", "commit", "model")):
            old = {}
        self.path = path
        self.data = head | {
            "rows": old.get("rows") or decode_rows(plan, head["weights_bytes"], limit),
            "prefill": old.get("prefill") or prefill_rows(plan),
            "prefill_attention": old.get("prefill_attention") or attention_rows(plan),
        }

    def wanted(self, section):
        """The rows of which something was left out."""
        return [row for row in self.data[section] if LEFT_OUT in row["missing"].values()]

    def fill(self, row, name, measure, *args):
        """Puts the figures of measure(*args) into a row, or why there are none."""
        try:
            row |= measure(*args)
            row["missing"].pop(name, None)
        except TimeoutError:
            pass  # it stays left out
        except NoFigure as reason:
            row["missing"][name] = str(reason)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            row["missing"][name] = NO_MEMORY
        self.save()

    def save(self):
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.data, indent=1) + "\n")


def decode_rows(plan, weights_bytes, limit):
    """A row for each batch and context, in which nothing is measured yet."""
    rows = []
    for batch in plan.batches:
        for context in plan.contexts:
            size = cache_bytes(plan, batch, context)
            reason = LEFT_OUT if weights_bytes + size + WORKSPACE <= limit else TOO_LARGE
            missing = {form.name: reason for form in plan.forms if batch in form.batches}
            rows.append(
                {"batch": batch, "context": context, "cache_bytes": size, "missing": missing}
            )
    return rows


def prefill_rows(plan):
    return [
        {"prompt": plan.prompt, "chunk": chunk, "missing": {"prefill": LEFT_OUT}}
        for chunk in plan.chunks
    ]


def attention_rows(plan):
    return [
        {
            "context": context, "chunk": chunk,
            "missing": {form.name: LEFT_OUT for form in plan.attention_forms},
        }
        for context in plan.attention_contexts
        for chunk in plan.attention_chunks
    ]  # fmt: skip


def derived(row):
    """What follows from the times that there are."""
    ours, plain, without = (row.get(f"{name}_ms") for name in ("cuda", "xla", "without"))
    found = {}
    if ours:
        found["tokens_per_s"] = round(row["batch"] / ours * 1e3, 1)
    if ours and without:
        found["attention_share"] = round(1 - without / ours, 4)
    if plain and without:
        found["xla_attention_share"] = round(1 - without / plain, 4)
    return found


# -------------------- The programs


class Programs:
    """Compiles in the background what is asked for, in that order."""

    def __init__(self, plan, params, budget):
        self.plan, self.params, self.budget = plan, params, budget
        self.pool = concurrent.futures.ThreadPoolExecutor(COMPILED_AT_A_TIME)
        self.started = {}

    def start(self, key, lower, *args):
        """lower(self, *args) is the lowered program; NoFigure is raised by `get`."""
        if self.budget.for_compiling():
            try:
                self.started[key] = self.pool.submit(compiled, lower(self, *args))
            except NoFigure as reason:
                self.started[key] = concurrent.futures.Future()
                self.started[key].set_exception(reason)

    def finish(self):
        """Waits until nothing is compiled any more; what has not begun in time is left out."""
        concurrent.futures.wait(self.started.values(), self.budget.for_compiling())
        self.pool.shutdown(cancel_futures=True)

    def get(self, key):
        """(the compiled program, how many seconds that took).

        Raises:
          TimeoutError: there was no time for it, or there is none left.
          NoFigure: it could not be lowered.
        """
        if key not in self.started or self.started[key].cancelled() or not self.budget.left():
            raise TimeoutError
        return self.started[key].result()


class Budget:
    """Seconds that are left, in all and for compiling."""

    def __init__(self, seconds):
        self.began, self.seconds = time.monotonic(), seconds

    def left(self):
        return max(self.began + self.seconds - time.monotonic(), 0)

    def for_compiling(self):
        return max(self.left() - COMPILING_ENDS * self.seconds, 0)


def compiled(lowered):
    began = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - began


def abstract_state(plan, batch, longest):
    """The shapes of what make_state makes."""
    blocks = -(-longest // PAGE)
    row = jax.ShapeDtypeStruct((batch,), jnp.int32)
    pages = plan.config.layers * batch * blocks
    return State(
        jax.ShapeDtypeStruct((pages, PAGE, 1, plan.config.entry_dim), jnp.dtype(plan.dtype)),
        jax.ShapeDtypeStruct((batch, blocks), jnp.int32),
        row,
        row,
        jax.ShapeDtypeStruct((batch,), bool),
        jax.eval_shape(lambda: jax.random.key(2)),
    )


def make_state(plan, batch, longest):
    """A batch whose pages are full of random numbers, its lengths still to be set."""
    config, like = plan.config, abstract_state(plan, batch, longest)
    pages = like.block_table.size
    table = np.random.default_rng(0).permutation(pages).astype(np.int32)

    @jax.jit
    def fill(key):
        shape = (FILLING_PAGES, *like.cache.shape[1:])
        some = jax.random.normal(key, shape, jnp.float32).astype(plan.dtype)
        return some[jnp.arange(config.layers * pages) % FILLING_PAGES]

    return State(
        fill(jax.random.key(1)),
        jnp.asarray(table.reshape(like.block_table.shape)),
        *(jnp.zeros(batch, x.dtype) for x in (like.lengths, like.token, like.done)),
        jax.random.key(2),
    )


def without_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, *args, **kwargs):
    return q[..., :head_dim_v], None


def lower_form(programs, form, batch, longest):
    decoder = Decoder(programs.params, programs.plan.config, implementation=form.implementation)
    attention = without_attention if form.name == "without" else model.flash_mla_with_kvcache
    with mock.patch.object(model, "flash_mla_with_kvcache", attention):
        state = abstract_state(programs.plan, batch, longest)
        lowered = decoder.program(form.steps).lower(programs.params, state)
    if form.name == "cuda" and form.implementation == "auto":
        require_kernels(lowered)
    return lowered


def require_kernels(lowered):
    if "jax_flashmla_dense_decode" not in lowered.as_text():
        raise SystemExit("there are no kernels here; --smoke runs anywhere")


def lower_prefill(programs, chunk, implementation):
    plan = programs.plan
    decoder = Decoder(programs.params, plan.config, chunk=chunk, implementation=implementation)
    state = abstract_state(plan, 1, plan.prompt)
    tokens, end = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, chunk), (1,)))
    return decoder.read_program.lower(programs.params, state, tokens, end)


def lower_attention(programs, form, context, chunk):
    plan, config = programs.plan, programs.plan.config
    cache = abstract_state(plan, 1, max(plan.attention_contexts)).cache
    table = jax.ShapeDtypeStruct((1, context // PAGE), jnp.int32)
    q_nope, q_rope = (
        jax.ShapeDtypeStruct((1, chunk, config.heads, width), cache.dtype)
        for width in (config.nope_dim, config.rope_dim)
    )
    w = expanding_weights(programs)
    try:
        lowered = lower_layers(form, config, config.layers, w, q_nope, q_rope, cache, table)
    except REFUSALS as error:
        if not form.expanded:
            raise
        raise refusal(error) from error
    if not form.expanded and form.implementation == "auto":
        require_kernels(lowered)
    return lowered


def expanding_weights(programs):
    return {name: programs.params["layers"][0][name] for name in WEIGHTS}


def refusal(error):
    """What a library call says instead of running, on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return NoFigure(f"refused: {text[:200]}")


# -------------------- Timing


class Batch:
    """A state that is made when it is needed: donation uses it up, and failure too."""

    def __init__(self, plan, batch, longest):
        self.make = lambda: make_state(plan, batch, longest)
        self.state = None

    def seconds(self, run, lengths):
        """Of run(state) -> state, from that length of all sequences on."""
        state, self.state = self.state, None
        state = self.make() if state is None else state
        batch = len(state.lengths)
        state = jax.block_until_ready(
            dataclasses.replace(
                state,
                lengths=jnp.full(batch, lengths, jnp.int32),
                token=jnp.arange(batch, dtype=jnp.int32),
            )
        )
        began = time.perf_counter()
        self.state = jax.block_until_ready(run(state))
        return time.perf_counter() - began

    def median(self, run, lengths, bursts):
        """The first burst does not count: it loads what the program needs."""
        return statistics.median([self.seconds(run, lengths) for _ in range(1 + bursts)][1:])


def measure_form(programs, form, state, row):
    """The figures of one form in one row: the context is what the last step sees."""
    program, compile_seconds = programs.get((form.name, row["batch"]))
    seconds = state.median(
        lambda state: program(programs.params, state)[1], row["context"] - form.steps, form.bursts
    )
    ms = seconds / form.steps * 1e3
    stats = jax.devices()[0].memory_stats() or {}
    print(f"{row['batch']:4d} x {row['context']:6d}  {form.name:8s} {ms:9.3f} ms a step "
          f"(compiled in {compile_seconds:.0f} s)", flush=True)  # fmt: skip
    found = {
        f"{form.name}_ms": round(ms, 4),
        f"{form.name}_temporary_bytes": program.memory_analysis().temp_size_in_bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    return found | derived(row | found)


def measure_prefill(programs, state, row):
    """A prompt of random tokens, chunk by chunk."""
    program, compile_seconds = programs.get(("prefill", row["chunk"]))
    rng, chunk = np.random.default_rng(1), row["chunk"]
    tokens = rng.integers(0, programs.plan.config.vocab, (1, chunk), np.int32)

    def read(state):
        for end in range(chunk, row["prompt"] + 1, chunk):
            state = program(programs.params, state, tokens, np.array([end], np.int32))
        return state

    seconds = state.median(read, 0, 3)
    print(f"prompt {row['prompt']} by {chunk:4d}  {seconds * 1e3:9.1f} ms "
          f"(compiled in {compile_seconds:.0f} s)", flush=True)  # fmt: skip
    return {
        "ms": round(seconds * 1e3, 3),
        "tokens_per_s": round(row["prompt"] / seconds, 1),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def attention_operands(programs, state, row):
    """What a program of `lower_attention` takes."""
    config, shape = programs.plan.config, (1, row["chunk"], programs.plan.config.heads)
    q_nope, q_rope = (
        jax.random.normal(jax.random.key(width), (*shape, width)).astype(state.cache.dtype)
        for width in (config.nope_dim, config.rope_dim)
    )
    table = state.block_table[:, : row["context"] // PAGE]
    zero = jnp.zeros((), state.cache.dtype)
    return expanding_weights(programs), q_nope, q_rope, state.cache, table, zero


def measure_attention(programs, form, row, operands, results):
    """The figures of one form in one row; results is where each form's result is left."""
    op, plan = programs.plan.attention_forms[0], programs.plan
    if form is not op and op.name not in results:
        raise TimeoutError  # nothing to compare with, yet
    try:
        program, compile_seconds = programs.get(("attention", row["context"], row["chunk"], form))
        seconds, out = burst_seconds(lambda: program(*operands))
    except REFUSALS as error:
        if not form.expanded or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise refusal(error) from error
    us = seconds / plan.config.layers * 1e6
    results[form.name] = np.asarray(out, np.float32)
    expected = results[op.name]
    error = float(np.linalg.norm(results[form.name] - expected) / np.linalg.norm(expected))
    print(f"{row['chunk']:4d} of {row['context']:6d}  {form.name:11s} {us:9.1f} us a layer, "
          f"differs by {error:.1e} (compiled in {compile_seconds:.0f} s)", flush=True)  # fmt: skip
    if not error <= TOLERANCE[plan.dtype]:
        raise NoFigure(f"wrong: differs by {error:.1e}")
    return {
        f"{form.name}_us": round(us, 2),
        f"{form.name}_difference": float(f"{error:.2e}"),
        f"{form.name}_temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def burst_seconds(run):
    """(seconds of a run, its result): run after run without waiting, for BURST seconds."""
    out = jax.block_until_ready(run())  # loads what the program needs
    began = time.perf_counter()
    jax.block_until_ready(run())
    count = min(max(math.ceil(BURST / (time.perf_counter() - began)), 1), MOST_RUNS)

    def seconds():
        began = time.perf_counter()
        jax.block_until_ready([run() for _ in range(count)])
        return (time.perf_counter() - began) / count

    return statistics.median([seconds() for _ in range(3)]), out


def measure(plan, params, results, budget, sections=SECTIONS):
    """All that is left out in the results, as far as the time goes."""
    rows, prompts, chunks = (results.wanted(name) if name in sections else [] for name in SECTIONS)
    programs, longest = Programs(plan, params, budget), {}
    for row in rows:
        longest[row["batch"]] = max(row["context"], longest.get(row["batch"], 0))
    for form in plan.forms:
        for batch, context in longest.items():
            if batch in form.batches:
                programs.start((form.name, batch), lower_form, form, batch, context)
    for row in prompts:
        programs.start(
            ("prefill", row["chunk"]), lower_prefill, row["chunk"], plan.forms[0].implementation
        )
    for row in chunks:
        for form in wanted_forms(plan, row):
            shape = row["context"], row["chunk"]
            programs.start(("attention", *shape, form), lower_attention, form, *shape)
    programs.finish()
    for batch, context in longest.items():
        state = Batch(plan, batch, context)
        for form in plan.forms:
            for row in rows:
                if row["batch"] == batch and row["missing"].get(form.name) == LEFT_OUT:
                    results.fill(row, form.name, measure_form, programs, form, state, row)
        del state  # before there is another cache
    state = Batch(plan, 1, plan.prompt)
    for row in prompts:
        results.fill(row, "prefill", measure_prefill, programs, state, row)
    del state
    measure_chunks(programs, results, chunks)


def measure_chunks(programs, results, rows):
    plan = programs.plan
    state = make_state(plan, 1, max(plan.attention_contexts)) if rows else None
    for row in rows:
        operands, outs = attention_operands(programs, state, row), {}
        for form in wanted_forms(plan, row):
            results.fill(row, form.name, measure_attention, programs, form, row, operands, outs)


def wanted_forms(plan, row):
    """The op, with which the others are compared, and what was left out."""
    op, *others = plan.attention_forms
    return [op, *(form for form in others if row["missing"].get(form.name) == LEFT_OUT)]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="results file (results/<card>_model.json)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--budget", type=float, default=225, help="stop after so many seconds")
    parser.add_argument("--commit", help="commit to record, where there is no .git")
    parser.add_argument(
        "--sections", type=lambda names: names.split(","), default=SECTIONS,
        help=f"what to measure, of {','.join(SECTIONS)}",
    )  # fmt: skip
    options = parser.parse_args(argv)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"--sections has {', '.join(SECTIONS)}, not {', '.join(sorted(unknown))}")
    return options


def main(argv=None):
    options = parse_arguments(argv)
    budget = Budget(options.budget)
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
    # By default JAX takes 0.75 of the memory: on an H100 too little for 33 GB of cache.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    plan = smoke_plan() if options.smoke else full_plan()
    device = jax.devices()[0]
    params = jax.block_until_ready(
        random_weights(plan.config, jax.random.key(0), jnp.dtype(plan.dtype))
    )
    limit = (device.memory_stats() or {}).get("bytes_limit", 1e12)
    head = {
        "device": f"{device.device_kind}, jax {jax.__version__}",
        "commit": commit_of(options),
        "model": NAME,
        "weights_bytes": bytes_of(params),
        "bytes_limit": limit,
    }
    print(f"{head['device']}: {head['weights_bytes'] / 1e9:.1f} GB of weights", flush=True)
    path = options.out or (None if options.smoke else results_path(device.device_kind, "_model"))
    results = Results(path, head, plan, limit)
    results.save()
    measure(plan, params, results, budget, options.sections)
    left_out = sum(len(results.wanted(name)) for name in options.sections)
    if left_out:
        print(f"out of time: figures of {left_out} rows are left out; run it again for them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
