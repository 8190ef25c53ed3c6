"""Rounds of the public op: the jitted functions, compiled ahead, and their inputs.

A round is one jitted function of many calls. Each call reads pages, a table and queries of its
own; lengths, and metadata where it is given, are shared, as by the layers of a model. The
output buffers are donated, so that every round writes where the last one wrote: XLA's command
buffers then never have to be updated, and each round depends on the one before. Within a round
the calls share one scratch buffer, which orders them; decode.py --profile shows that they do
not overlap. Rounds that the device finishes sooner than Python dispatches the next one run
several times inside the jitted function, in a loop.
"""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp
import oracle
from timing import Round
from workloads import HEAD_DIM_K, HEAD_DIM_V, page_tables

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
POOL_CHUNK_TOKENS = 65536
MAX_POOL_TOKENS = 67584 * 64  # 5 GB; a case that needs more gets more

# The oracle's float32 products need no search for the fastest algorithm.
ORACLE_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def make_pool(cases, calls):
    """One random pool, [pages, page_block_size, 1, 576], that serves all cases of one dtype."""
    dtype, page = DTYPES[cases[0].dtype], cases[0].page_block_size
    tokens = 0
    for case in cases:
        one = case.pages() * case.page_block_size
        tokens = max(tokens, one, min(one * calls(case), MAX_POOL_TOKENS))
    chunk = min(POOL_CHUNK_TOKENS, -(-tokens // 256) * 256)
    chunks = -(-tokens // chunk)

    @jax.jit
    def draw(key):
        normal = functools.partial(jax.random.normal, shape=(chunk, HEAD_DIM_K), dtype=dtype)
        drawn = jax.lax.map(normal, jax.random.split(key, chunks))
        return drawn.reshape(-1, page, 1, HEAD_DIM_K)

    return draw(jax.random.key(0))


def _metadata(case, implementation, fixed_split_size, lengths):
    fixed = {}
    if fixed_split_size is not None:
        fixed = {"fixed_split_size": fixed_split_size, "max_seqlen": case.table_tokens}
    return get_mla_metadata(lengths, case.s_q * case.h_q, 1, implementation=implementation, **fixed)


def _round(outs, lses, pool, qs, tables, lengths, metadata, *, case, implementation):
    """All calls of a round."""
    results = [
        flash_mla_with_kvcache(
            q, pool, table, lengths, HEAD_DIM_V, *metadata,
            causal=case.causal, implementation=implementation,
        )
        for q, table in zip(qs, tables, strict=True)
    ]  # fmt: skip
    return [out for out, _ in results], [lse for _, lse in results]


def _rounds(outs, lses, pool, qs, tables, lengths, metadata, *, loops, **options):
    def turn(outs, lses, lengths):
        return _round(outs, lses, pool, qs, tables, lengths, metadata, **options)

    return in_turns(turn, loops, outs, lses, lengths)


def in_turns(turn, loops, outs, lses, lengths):
    """turn(outs, lses, lengths) -> (outs, lses), `loops` times.

    Lengths, which every call reads, pass through the loop's carry and wait for the last result:
    so XLA cannot move calls out of the loop. The results of a turn are those of the last one's
    buffers.
    """

    def body(_, carry):
        lengths = carry[2]
        outs, lses = turn(*carry)
        lengths, lses = jax.lax.optimization_barrier((lengths, lses))
        return outs, lses, lengths

    if loops == 1:
        return turn(outs, lses, lengths)
    return jax.lax.fori_loop(0, loops, body, (outs, lses, lengths))[:2]


class Shapes:
    """The compiled functions of one shape key, whose metadata may have splits of a fixed size."""

    def __init__(self, case, pool_pages, calls, loops=1, sharding=None, fixed_split_size=None):
        self.case, self.calls, self.loops = case.shape_key, calls, loops
        self.fixed_split_size = fixed_split_size
        b, s, h, page = case.batch, case.s_q, case.h_q, case.page_block_size
        dtype, i32 = DTYPES[case.dtype], jnp.int32
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
        self.q = struct((b, s, h, HEAD_DIM_K), dtype)
        self.out = struct((b, s, h, HEAD_DIM_V), dtype)
        self.lse = struct((b, h, s), jnp.float32)
        self.pool = struct((pool_pages, page, 1, HEAD_DIM_K), dtype)
        self.table = struct((b, case.table_width), i32)
        self.lengths = struct((b,), i32)

    def draw(self):
        """(queries, an out and an lse full of NaN) from a key."""

        def draw(key):
            return (
                jax.random.normal(key, self.q.shape, self.q.dtype),
                jnp.full(self.out.shape, jnp.nan, self.out.dtype),
                jnp.full(self.lse.shape, jnp.nan, self.lse.dtype),
            )

        return jax.jit(draw).lower(jax.random.key(0)).compile()

    def make_metadata(self, implementation):
        """The function of the lengths."""
        return functools.partial(_metadata, self.case, implementation, self.fixed_split_size)

    def metadata(self, implementation):
        return jax.jit(self.make_metadata(implementation)).lower(self.lengths).compile()

    def round(self, implementation, made_in_call, calls=None):
        """The rounds, compiled."""
        return self.lower_round(implementation, made_in_call, calls).compile()

    def lower_round(self, implementation, made_in_call, calls=None):
        """The rounds with their metadata given, or made by each call."""
        loops = self.loops if calls is None else 1
        calls = calls or self.calls
        make = self.make_metadata(implementation)
        metadata = () if made_in_call else jax.eval_shape(make, self.lengths)
        function = functools.partial(
            _rounds, loops=loops, case=self.case, implementation=implementation
        )
        function = jax.jit(function, donate_argnums=(0, 1), keep_unused=True)
        return function.lower(
            [self.out] * calls, [self.lse] * calls, self.pool, [self.q] * calls,
            [self.table] * calls, self.lengths, metadata,
        )  # fmt: skip

    def errors(self, outs, sample=None):
        lowered = oracle.errors.lower(
            self.pool, self.q, self.table, self.lengths, [self.out] * outs, [self.lse] * outs,
            causal=self.case.causal, sample=sample,
        )  # fmt: skip
        on_gpu = jax.default_backend() == "gpu"
        return lowered.compile(compiler_options=ORACLE_OPTIONS if on_gpu else None)


class Compiler:
    """Compiles what the cases need, in parallel and ahead of the timing."""

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(max(2, min(8, os.cpu_count() // 2)))
        self._jobs = {}

    def submit(self, key, method, *args):
        if key not in self._jobs:
            self._jobs[key] = self._pool.submit(method, *args)

    def wait(self):
        done = concurrent.futures.as_completed(self._jobs.values())
        for count, _ in enumerate(done, 1):
            if count % 25 == 0 or count == len(self._jobs):
                print(f"compiled {count} of {len(self._jobs)}", flush=True)

    def close(self):
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __getitem__(self, key):
        return self._jobs[key].result()


class Inputs:
    """The input sets of one case, on the device."""

    def __init__(self, case, draw, pool, calls):
        self.pool = pool
        tables = page_tables(case, pool.shape[0], calls)
        self.tables = [jax.device_put(table) for table in tables]
        self.lengths = jnp.asarray(case.lengths(), jnp.int32)
        self._draw = draw
        self.qs = [draw(jax.random.key(i))[0] for i in range(calls)]

    def poisoned(self, calls):
        """Output buffers in which nothing is written yet."""
        drawn = [self._draw(jax.random.key(i))[1:] for i in range(calls)]
        return [out for out, _ in drawn], [lse for _, lse in drawn]


class DonatedRound:
    """Rounds of a compiled function of (outs, lses, *arguments) that donates the first two.

    `outs` and `lses` are those of the last round. `calls` is how many a round makes.
    """

    def __init__(self, function, buffers, arguments, calls):
        # The round has the results, not self: in a cycle they and the pool would outlive their use.
        results = self._results = list(buffers)

        def enqueue():
            results[:] = function(*results, *arguments)

        def wait():
            results[1][-1].block_until_ready()

        self.round = Round(calls, enqueue, wait)

    @property
    def outs(self):
        return self._results[0]

    @property
    def lses(self):
        return self._results[1]


class OpRound(DonatedRound):
    """The compiled rounds of a case on its inputs."""

    def __init__(self, function, inputs, metadata, calls, loops=1):
        arguments = inputs.pool, inputs.qs[:calls], inputs.tables[:calls], inputs.lengths, metadata
        super().__init__(function, inputs.poisoned(calls), arguments, calls * loops)
