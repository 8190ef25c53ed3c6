"""Times decode on two GPUs against one: data, tensor and context parallel.

    python benchmarks/bench_parallel.py           -> benchmarks/results/<card>_x2.json
    python benchmarks/bench_parallel.py --smoke   tiny shapes on two CPU devices

A round is one jitted function of several calls, which read different pages. Each call waits for
the one before and its exchange, as the layers of a model do: it looks at the last result, which
costs a tiny kernel a call, on one GPU and on two alike. The schedule is made once a round. The
other rules of timing are those of README.md.
"""

import dataclasses
import functools
import math
import sys

import bench_dense_decode as dense
import jax
import jax.numpy as jnp
import numpy as np
from bench_dense_decode import HEAD_DIM_K, HEAD_DIM_V
from core.bench import significant
from core.op import MIN_BYTES_IN_ALL
from core.rounds import DonatedRound
from core.run import Run, parse, parser_of
from core.timing import time_rounds
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flashmla as mla

OP, DEVICES, PAGE = dataclasses.replace(dense.OP, name="parallel_decode"), 2, 64
CHECKED_SEQUENCES = 4

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
    def name(self):
        return f"{self.kind} h{self.h_q}-s{self.s_q}-{self.batch}x{self.length}"

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


def decode_calls(kind, implementation, results, qs, k_cache, tables, lengths):
    """One device's part of a round: its results. Those of the last round are overwritten."""
    del results
    capacity = tables[0].shape[1] * k_cache.shape[1]

    def localize(lengths):
        if kind != "context":
            return lengths, None
        left = lengths - jax.lax.axis_index("x") * capacity
        local = jnp.clip(left, 0, capacity)
        return local, left - local

    rows = qs[0].shape[1] * qs[0].shape[2]
    schedule = mla.get_mla_metadata(localize(lengths)[0], rows, 1, implementation=implementation)
    found = []
    for i, q in enumerate(qs):
        local, offset = localize(lengths)
        out, lse = mla.flash_mla_with_kvcache(
            q, k_cache, tables[i % len(tables)], local, HEAD_DIM_V, *schedule,
            causal=True, causal_offset=offset, implementation=implementation,
        )  # fmt: skip
        if kind == "context":
            out, lse = mla.merge_attention_states_across(out, lse, "x")
        found.append((out, lse))
        # No lse is NaN, so the lengths stay as they are; but the next call must wait.
        lengths = lengths + jnp.isnan(lse[:, 0, 0]).astype(jnp.int32)
    return found


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
    (q, k, table, length), results = SPLITS[kind]

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    function = functools.partial(decode_calls, kind, implementation)
    specs = [results] * case.calls
    mapped = jax.shard_map(
        function, mesh=mesh, out_specs=specs,
        in_specs=(specs, [q] * case.calls, k, [table] * len(tables), length),
    )  # fmt: skip
    arguments = (
        [put(x, q) for x in qs], put(pool, k), [put(x, table) for x in tables],
        put(lengths, length),
    )  # fmt: skip
    b, s_q, h_q, _ = qs[0].shape
    like = ((b, s_q, h_q, HEAD_DIM_V), jnp.bfloat16), ((b, h_q, s_q), jnp.float32)
    buffers = [
        tuple(
            put(jnp.full(shape, jnp.nan, dtype), spec)
            for (shape, dtype), spec in zip(like, results, strict=True)
        )
        for _ in range(case.calls)
    ]
    jitted = jax.jit(mapped, donate_argnums=0, keep_unused=True)
    return DonatedRound(jitted.lower(buffers, *arguments).compile(), buffers, arguments, case.calls)


def errors(case, qs, pool, tables, lengths, rounds):
    """{column: the largest error of any call of any round}, beside float32."""
    shape = dense.DenseDecode(case.h_q, case.s_q, case.batch, case.length)
    check = jax.jit(functools.partial(dense.check_results, shape, sample=CHECKED_SEQUENCES))
    found = []
    for i, q in enumerate(qs):
        results = [jax.device_put(r.results[i], jax.devices()[0]) for r in rounds]
        found.append(check(pool, lengths, (tables[i % len(tables)], q), results))
    return {name: significant(np.max([one[name] for one in found])) for name in found[0]}


def measure(options, case):
    qs, pool, alone, split, lengths = make_inputs(case)
    devices, implementation = jax.devices()[:DEVICES], "xla" if options.smoke else "cuda"
    rounds = {
        name: compiled_round(case, kind, those, implementation, qs, pool, tables, lengths)
        for name, kind, those, tables in (
            ("one", "one", devices[:1], alone), ("two", case.kind, devices, split)
        )
    }  # fmt: skip
    timings = time_rounds(
        {name: each.round for name, each in rounds.items()},
        repeats=options.repeats, rest=options.rest,
    )  # fmt: skip
    one, two = timings["one"], timings["two"]
    row = dataclasses.asdict(case) | {
        "one_us": round(one.us, 2), "two_us": round(two.us, 2),
        "speedup": round(one.us / two.us, 3), "exchanged_bytes": case.exchanged_bytes,
        **errors(case, qs, pool, alone, lengths, rounds.values()),
        "host_us": round(two.host_us, 2), "spread": round(max(one.spread, two.spread), 4),
    }  # fmt: skip
    return {case.name: row}


def text_of(name, row):
    return f"{name:38s} {row['one_us']:9.2f} {row['two_us']:9.2f} {row['speedup']:7.2f}x"


def main(argv=None):
    options = parse(parser_of(__doc__, ["two"]), argv, ["two"])
    if options.smoke:
        jax.config.update("jax_num_cpu_devices", DEVICES)
    if len(jax.devices()) < DEVICES:
        raise SystemExit(f"needs {DEVICES} devices, JAX sees {len(jax.devices())}")
    run = Run(options, f"_x{DEVICES}", devices=DEVICES)
    cases = SMOKE if options.smoke else CASES
    cases = [case for case in cases if run.wanted(OP.name, "two", case.name)]
    print(f"{'case':38s} {'one us':>9s} {'two us':>9s} {'speedup':>8s}")
    run.measure_each(OP, "two", cases, functools.partial(measure, options), text_of)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
