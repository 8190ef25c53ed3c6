"""Times decode on two GPUs against one: data, tensor and context parallel.

    python benchmarks/parallel.py               -> benchmarks/results/<card>_x2.json
    python benchmarks/parallel.py --smoke       tiny shapes on two CPU devices: does the script run

A round is one jitted function of several calls, which read different pages; each call waits for
the one before, its exchange included, as the layers of a model do. What makes it wait, a look at
the last result, costs a tiny kernel a call, on one GPU and on two alike. The schedule is made once
a round. The other rules of timing are those of decode.py.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cards import results_path
from harness import MAX_REL_ERR
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from results_file import commit_of
from rounds import DonatedRound
from timing import time_rounds
from workloads import HEAD_DIM_K, HEAD_DIM_V, MIN_BYTES_IN_ALL

import jax_flashmla as mla

DEVICES, PAGE = 2, 64

# How the arguments (q, k_cache, block_table, lengths) and the results (out, lse) are split.
SPLITS = {
    "one": ((P(), P(), P(), P()), (P(), P())),
    "data": ((P("x"), P("x"), P("x"), P("x")), (P("x"), P("x"))),
    "tensor": ((P(None, None, "x"), P(), P(), P()), (P(None, None, "x"), P(None, "x"))),
    "context": ((P(), P("x"), P(None, "x"), P()), (P(), P())),
}


@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    batch: int
    length: int
    s_q: int = 1
    h_q: int = 128
    calls: int = 16  # of a round

    @property
    def sets(self):
        """How many sets of pages it takes so that the L2 does not serve them."""
        set_bytes = self.batch * self.length * HEAD_DIM_K * 2
        return min(self.calls, max(2, math.ceil(MIN_BYTES_IN_ALL / set_bytes)))

    @property
    def exchanged_bytes(self):
        """What each device receives in a call."""
        rows = self.batch * self.s_q * self.h_q
        return (DEVICES - 1) * rows * (2 * HEAD_DIM_V + 4) if self.kind == "context" else 0


CASES = [
    Case("data", 2, 131072),
    Case("data", 32, 4096),
    Case("data", 128, 8192),
    Case("tensor", 1, 131072),
    Case("tensor", 32, 4096),
    Case("tensor", 128, 8192),
    Case("context", 1, 32768),
    Case("context", 1, 131072),
    Case("context", 1, 131072, s_q=4),
    Case("context", 8, 131072),
]
SMOKE = [Case(kind, 2, 256, s_q=2, h_q=2, calls=2) for kind in ("data", "tensor", "context")]


def decode_calls(kind, implementation, outs, lses, qs, k_cache, tables, lengths):
    """One device's part of a round: (outs, lses). Those given are reused, the last round's."""
    del outs, lses
    capacity = tables[0].shape[1] * k_cache.shape[1]

    def localize(lengths):
        if kind != "context":
            return lengths, None
        left = lengths - jax.lax.axis_index("x") * capacity
        local = jnp.clip(left, 0, capacity)
        return local, left - local

    rows = qs[0].shape[1] * qs[0].shape[2]
    schedule = mla.get_mla_metadata(localize(lengths)[0], rows, 1, implementation=implementation)
    outs, lses = [], []
    for i, q in enumerate(qs):
        local, offset = localize(lengths)
        out, lse = mla.flash_mla_with_kvcache(
            q, k_cache, tables[i % len(tables)], local, HEAD_DIM_V, *schedule,
            causal=True, causal_offset=offset, implementation=implementation,
        )  # fmt: skip
        if kind == "context":
            out, lse = mla.merge_attention_states_across(out, lse, "x")
        outs.append(out)
        lses.append(lse)
        # No lse is NaN, so the lengths stay as they are; but the next call must wait.
        lengths = lengths + jnp.isnan(lse[:, 0, 0]).astype(jnp.int32)
    return outs, lses


def make_inputs(case):
    """(qs, pool, tables of one device, tables of two, lengths).

    Each half of the pool serves one device, which counts its pages from 0.
    """
    rng = np.random.default_rng(0)
    width = case.length // PAGE
    pages = case.sets * case.batch * width
    split_axis = {"data": 0, "context": 1}.get(case.kind)
    alone, split = [], []
    if split_axis is None:
        alone = split = list(rng.permutation(pages).astype(np.int32).reshape(-1, case.batch, width))
    else:
        half = [case.batch, width]
        half[split_axis] //= DEVICES
        free = [rng.permutation(pages // DEVICES).astype(np.int32) for _ in range(DEVICES)]
        for parts in zip(*(ids.reshape(case.sets, *half) for ids in free), strict=True):
            split.append(np.concatenate(parts, axis=split_axis))
            numbered = [ids + i * (pages // DEVICES) for i, ids in enumerate(parts)]
            alone.append(np.concatenate(numbered, axis=split_axis).astype(np.int32))
    keys = jax.random.split(jax.random.key(0), case.calls + 1)
    q_shape = (case.batch, case.s_q, case.h_q, HEAD_DIM_K)
    qs = [jax.random.normal(key, q_shape, jnp.bfloat16) for key in keys[1:]]
    draw = jax.jit(lambda key: jax.random.normal(key, (pages, PAGE, 1, HEAD_DIM_K), jnp.bfloat16))
    return qs, draw(keys[0]), alone, split, np.full(case.batch, case.length, np.int32)


def compiled_round(case, kind, devices, implementation, qs, pool, tables, lengths):
    """A DonatedRound on some devices."""
    mesh = jax.sharding.Mesh(np.array(devices), ("x",))
    (q, k, table, length), (out, lse) = SPLITS[kind]

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    def poisoned(shape, dtype, spec):
        return [put(jnp.full(shape, jnp.nan, dtype), spec) for _ in range(case.calls)]

    def function(*arguments):
        return decode_calls(kind, implementation, *arguments)

    result_specs = ([out] * case.calls, [lse] * case.calls)
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(*result_specs, [q] * case.calls, k, [table] * len(tables), length),
        out_specs=result_specs,
    )
    arguments = (
        [put(x, q) for x in qs], put(pool, k), [put(x, table) for x in tables],
        put(lengths, length),
    )  # fmt: skip
    b, s_q, h_q, _ = qs[0].shape
    buffers = (
        poisoned((b, s_q, h_q, HEAD_DIM_V), jnp.bfloat16, out),
        poisoned((b, h_q, s_q), jnp.float32, lse),
    )
    jitted = jax.jit(mapped, donate_argnums=(0, 1), keep_unused=True)
    return DonatedRound(
        jitted.lower(*buffers, *arguments).compile(), buffers, arguments, case.calls
    )


def largest_error(outs, expected):
    """The largest relative L2 error of any call's out."""
    errors = []
    for out, reference in zip(outs, expected, strict=True):
        out, reference = np.asarray(out, np.float32), np.asarray(reference, np.float32)
        errors.append(np.linalg.norm(out - reference) / np.linalg.norm(reference))
    return float(max(errors))


def measure(case, devices, options):
    qs, pool, alone, split, lengths = make_inputs(case)
    rounds = {
        "one": compiled_round(
            case, "one", devices[:1], options.implementation, qs, pool, alone, lengths
        ),
        "two": compiled_round(
            case, case.kind, devices, options.implementation, qs, pool, split, lengths
        ),
    }
    timings = time_rounds(
        {name: each.round for name, each in rounds.items()},
        repeats=options.repeats,
        seconds=options.seconds,
        rest=options.rest,
    )
    one, two = timings["one"], timings["two"]
    return dataclasses.asdict(case) | {
        "one_us": round(one.us, 2),
        "two_us": round(two.us, 2),
        "speedup": round(one.us / two.us, 3),
        "exchanged_bytes": case.exchanged_bytes,
        "rel_err": largest_error(rounds["two"].outs, rounds["one"].outs),
        "host_us": round(two.host_us, 2),
        "spread": round(max(one.spread, two.spread), 4),
    }


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="results file (results/<card>_x2.json)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on two CPU devices")
    parser.add_argument("--implementation", default="cuda", choices=["cuda", "xla"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.005, help="length of a repeat")
    parser.add_argument("--rest", type=float, default=0.05, help="pause before a repeat")
    parser.add_argument("--commit", help="commit to record, where there is no .git")
    options = parser.parse_args(argv)
    if options.smoke:
        options.implementation, options.repeats, options.rest = "xla", 1, 0.0
    return options


def main(argv=None):
    options = parse_arguments(argv)
    if options.smoke:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", DEVICES)
    devices = jax.devices()[:DEVICES]
    if len(devices) < DEVICES:
        raise SystemExit(f"needs {DEVICES} devices, JAX sees {len(devices)}")
    path = options.out or (None if options.smoke else results_path(devices[0].device_kind, "_x2"))
    results = {
        "device": f"{DEVICES} x {devices[0].device_kind}, jax {jax.__version__}",
        "commit": commit_of(options),
        "rows": [],
    }
    print(results["device"])
    print(f"{'case':38s} {'one us':>9s} {'two us':>9s} {'speedup':>8s}")
    for case in SMOKE if options.smoke else CASES:
        row = measure(case, devices, options)
        results["rows"].append(row)
        name = f"{case.kind} {case.batch} x {case.length}, h_q {case.h_q}, s_q {case.s_q}"
        wrong = "" if row["rel_err"] <= MAX_REL_ERR else "  WRONG"
        print(f"{name:38s} {row['one_us']:9.2f} {row['two_us']:9.2f} {row['speedup']:7.2f}x{wrong}",
              flush=True)  # fmt: skip
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    return 0 if all(row["rel_err"] <= MAX_REL_ERR for row in results["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
