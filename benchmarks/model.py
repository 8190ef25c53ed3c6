"""Times a whole model: examples/deepseek with random weights of DeepSeek-V2-Lite's dimensions.

    python benchmarks/model.py             -> benchmarks/results/h200_model.json, then report.py
    python benchmarks/model.py --smoke     a tiny model on the CPU: does the script run

What is timed is the decoder's own loop on the device, greedy, a token of each sequence a step. The
cache is full of random numbers and the lengths are set: the time does not depend on how they came
there. Every sequence has pages of its own, in random order. A step is timed with our kernels, with
attention in plain JAX, and without attention (its result is the first columns of the query): what
attention costs is the difference. Lengths are traced and the block table is that of the longest
context that fits, so that a batch size is one program for each of the three.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from results_file import commit_of

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from examples.deepseek import model
from examples.deepseek.config import ModelConfig
from examples.deepseek.decoding import Decoder, State
from examples.deepseek.weights import random_weights

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "h200_model.json"
NAME, PAGE = "deepseek-v2-lite", 64
WORKSPACE = 6e9  # bytes left to programs when a context is said to fit
FILLING_PAGES = 1024  # random pages, of which the cache is made


@dataclasses.dataclass(frozen=True)
class Plan:
    config: ModelConfig
    batches: tuple[int, ...] = (1, 32, 128)
    contexts: tuple[int, ...] = (1024, 8192, 32768)
    # name: (implementation of the ops, steps a burst, bursts)
    forms: tuple = (("cuda", "auto", 32, 5), ("without", "auto", 32, 5), ("xla", "xla", 4, 2))
    dtype: str = "bfloat16"


def full_plan():
    return Plan(ModelConfig.named(NAME))


def smoke_plan():
    tiny = dataclasses.replace(
        ModelConfig.named(NAME, layers=2), vocab=256, width=64, heads=2, mlp_width=64,
        expert_width=32, experts=8,
    )  # fmt: skip
    forms = (("cuda", "xla", 2, 1), ("without", "xla", 2, 1), ("xla", "xla", 1, 1))
    return Plan(tiny, (1, 2), (64, 128), forms, "float32")


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cache_bytes(plan, batch, context):
    itemsize = jnp.dtype(plan.dtype).itemsize
    return batch * context * plan.config.layers * plan.config.entry_dim * itemsize


def contexts_that_fit(plan, batch, params, limit):
    free = limit - bytes_of(params) - WORKSPACE
    return [context for context in plan.contexts if cache_bytes(plan, batch, context) <= free]


def make_state(plan, batch, longest):
    """A batch whose pages are full of random numbers, its lengths still to be set."""
    config, blocks = plan.config, longest // PAGE
    pages = batch * blocks
    table = np.random.default_rng(0).permutation(pages).astype(np.int32).reshape(batch, blocks)

    @jax.jit
    def fill(key):
        shape = (FILLING_PAGES, PAGE, 1, config.entry_dim)
        some = jax.random.normal(key, shape, jnp.float32).astype(plan.dtype)
        return some[jnp.arange(config.layers * pages) % FILLING_PAGES]

    zeros = jnp.zeros(batch, jnp.int32)
    cache = fill(jax.random.key(1))
    return State(cache, jnp.asarray(table), zeros, zeros, zeros > 0, jax.random.key(2))


def without_attention(q, k_cache, block_table, cache_seqlens, head_dim_v, *args, **kwargs):
    return q[..., :head_dim_v], None


def compile_form(plan, params, state, form, implementation, steps):
    """(the compiled loop, seconds that it took)."""
    decoder = Decoder(params, plan.config, implementation=implementation)
    attention = without_attention if form == "without" else model.flash_mla_with_kvcache
    began = time.perf_counter()
    with mock.patch.object(model, "flash_mla_with_kvcache", attention):
        compiled = decoder.program(steps).lower(params, state).compile()
    return compiled, time.perf_counter() - began


def time_form(compiled, params, state, context, steps, bursts):
    """(milliseconds a step, the state): the context is what the last step sees."""
    times = []
    for burst in range(1 + bursts):  # the first one loads what the program needs
        batch = state.block_table.shape[0]
        state = dataclasses.replace(
            state,
            lengths=jnp.full(batch, context - steps, jnp.int32),
            token=jnp.arange(batch, dtype=jnp.int32),
        )
        jax.block_until_ready(state)
        began = time.perf_counter()
        _, state = jax.block_until_ready(compiled(params, state))
        if burst:
            times.append((time.perf_counter() - began) / steps * 1e3)
    return statistics.median(times), state


def measure_batch(plan, params, batch, contexts):
    """{context: row} of one batch size."""
    rows = {context: {"batch": batch, "context": context} for context in contexts}
    state = make_state(plan, batch, max(contexts))
    for form, implementation, steps, bursts in plan.forms:
        compiled, seconds = compile_form(plan, params, state, form, implementation, steps)
        kernels = "jax_flashmla_dense_decode" in compiled.as_text()
        if form == "cuda" and implementation == "auto" and not kernels:
            raise SystemExit("there are no kernels here; --smoke runs anywhere")
        memory = compiled.memory_analysis()
        for context in contexts:
            ms, state = time_form(compiled, params, state, context, steps, bursts)
            rows[context] |= {
                f"{form}_ms": round(ms, 4),
                f"{form}_temporary_bytes": memory.temp_size_in_bytes,
            }
            print(f"{batch:4d} x {context:6d}  {form:8s} {ms:9.3f} ms a step "
                  f"(compiled in {seconds:.0f} s)", flush=True)  # fmt: skip
        del compiled
    stats = jax.devices()[0].memory_stats() or {}
    for context, row in rows.items():
        base = row["without_ms"]
        row |= {
            "tokens_per_s": round(batch / row["cuda_ms"] * 1e3, 1),
            "attention_share": round(1 - base / row["cuda_ms"], 4),
            "xla_attention_share": round(1 - base / row["xla_ms"], 4),
            "cache_bytes": cache_bytes(plan, batch, context),
            "peak_bytes": stats.get("peak_bytes_in_use"),
        }
    return rows


def kept_rows(path, head, batches):
    """The rows of other batches, if the file is of the same device, commit and model."""
    old = json.loads(path.read_text()) if path is not None and path.exists() else {}
    if any(old.get(key) != head[key] for key in ("device", "commit", "model")):
        return []
    return [row for row in old["rows"] if row["batch"] not in batches]


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help=f"results file ({RESULTS})")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--batches", help="as 1,32; default all; the file keeps the others")
    parser.add_argument("--commit", help="commit to record, where there is no .git")
    options = parser.parse_args(argv)
    if not options.smoke and options.out is None:
        options.out = RESULTS
    return options


def main(argv=None):
    options = parse_arguments(argv)
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
    plan = smoke_plan() if options.smoke else full_plan()
    if options.batches:
        plan = dataclasses.replace(plan, batches=tuple(map(int, options.batches.split(","))))
    device = jax.devices()[0]
    params = jax.block_until_ready(
        random_weights(plan.config, jax.random.key(0), jnp.dtype(plan.dtype))
    )
    limit = (device.memory_stats() or {}).get("bytes_limit", 1e12)
    results = {
        "device": f"{device.device_kind}, jax {jax.__version__}",
        "commit": commit_of(options),
        "model": NAME,
        "weights_bytes": bytes_of(params),
        "bytes_limit": limit,
    }
    results["rows"] = kept_rows(options.out, results, plan.batches)
    print(f"{results['device']}: {results['weights_bytes'] / 1e9:.1f} GB of weights")
    for batch in plan.batches:
        fitting = contexts_that_fit(plan, batch, params, limit)
        rows = measure_batch(plan, params, batch, fitting) if fitting else {}
        for context in plan.contexts:
            too_large = {
                "batch": batch,
                "context": context,
                "cache_bytes": cache_bytes(plan, batch, context),
            }
            results["rows"].append(rows.get(context, too_large))
        results["rows"].sort(key=lambda row: (row["batch"], row["context"]))
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
