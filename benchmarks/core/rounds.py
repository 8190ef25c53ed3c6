"""Rounds of an op: the jitted functions, compiled ahead, and their inputs.

A round is one jitted function of many calls. Each call has lists or tables, tokens and random
arrays of its own. What is `shared`, such as the lengths, is the same for all calls, as for the
layers of a model. The output buffers are donated, so that every round writes where the last one
wrote: XLA's command buffers then never need an update, and each round depends on the one before.
Within a round the calls share one scratch buffer, which orders them; --profile shows that they do
not overlap. A round that the device finishes sooner than Python dispatches the next one runs
several times inside the jitted function, in a loop.
"""

import concurrent.futures
import functools
import os

import jax
import jax.numpy as jnp

from core.timing import Round

# The check's float32 products need no search for the fastest algorithm.
CHECK_OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def in_turns(turn, loops, results, shared):
    """turn(results, shared) -> results, `loops` times. Results are a list of tuples.

    `shared`, which every call reads, passes through the loop's carry and waits for the last array
    of every result: so XLA cannot move calls out of the loop.
    """

    def body(_, carry):
        results = turn(*carry)
        shared, last = jax.lax.optimization_barrier((carry[1], [r[-1] for r in results]))
        return [(*r[:-1], x) for r, x in zip(results, last, strict=True)], shared

    if loops == 1:
        return turn(results, shared)
    return jax.lax.fori_loop(0, loops, body, (results, shared))[0]


def _rounds(results, pool, shared, prepared, owns, *, call, loops):
    def turn(results, shared):
        return [call(pool, shared, prepared, own) for own in owns]

    return in_turns(turn, loops, results, shared)


def poison(like):
    """An array of NaN, or of the largest integer."""
    floats = jnp.issubdtype(like.dtype, jnp.floating)
    return jnp.full(like.shape, jnp.nan if floats else jnp.iinfo(like.dtype).max, like.dtype)


class Programs:
    """The programs of one shape of an op, each lowered from shapes alone."""

    def __init__(self, op, case, pool, calls, loops=1, sharding=None):
        def abstract(tree):
            struct = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
            return jax.tree.map(lambda x: struct(x.shape, x.dtype), tree)

        self.op, self.case, self.calls, self.loops = op, case.shape_key, calls, loops
        shared, lists = op.lists(case, pool, 1)
        drawn = jax.eval_shape(functools.partial(op.draw, self.case), jax.random.key(0))
        self.pool, self.shared, self.own = map(abstract, (pool, shared, (lists[0], drawn)))
        call = functools.partial(op.call, self.case, "xla")
        one = jax.eval_shape(call, self.pool, self.shared, None, self.own)
        self.result = abstract(one)

    def draw(self):
        """(a call's random arrays, output buffers in which nothing is written) from a key."""

        def draw(key):
            return self.op.draw(self.case, key), tuple(map(poison, self.result))

        return jax.jit(draw).lower(jax.random.key(0)).compile()

    def make_prepared(self, implementation):
        """The function of `shared`."""
        return functools.partial(self.op.prepare, self.case, implementation)

    def prepare(self, implementation):
        return jax.jit(self.make_prepared(implementation)).lower(self.shared).compile()

    def lower_round(self, implementation, kind, calls=None):
        """The rounds with what is prepared given to them ("given") or not ("made")."""
        loops = self.loops if calls is None else 1
        calls, prepared = calls or self.calls, None
        if kind == "given" and self.op.prepare is not None:
            prepared = jax.eval_shape(self.make_prepared(implementation), self.shared)
        call = functools.partial(self.op.call, self.case, implementation)
        if implementation == "plain":
            call = self.plain
        function = functools.partial(_rounds, call=call, loops=loops)
        return jax.jit(function, donate_argnums=0, keep_unused=True).lower(
            [self.result] * calls, self.pool, self.shared, prepared, [self.own] * calls
        )

    def plain(self, pool, shared, prepared, own):
        return self.op.plain(self.case, pool, shared, own)

    def round(self, implementation, kind, calls=None):
        return self.lower_round(implementation, kind, calls).compile()

    def check(self, count):
        """The program (pool, shared, own, found) -> {column: [the error of each of found]}."""
        lowered = jax.jit(functools.partial(self.op.check, self.case)).lower(
            self.pool, self.shared, self.own, [self.result] * count
        )
        on_gpu = jax.default_backend() == "gpu"
        return lowered.compile(compiler_options=CHECK_OPTIONS if on_gpu else None)


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

    def __getitem__(self, key):
        return self._jobs[key].result()


class Inputs:
    """The inputs of one case, on the device; draw is the program of Programs.draw."""

    def __init__(self, op, case, draw, pool, calls):
        shared, lists = op.lists(case, pool, calls)
        self.pool, self.shared, self._draw = pool, jax.device_put(shared), draw
        self.owns = [
            (jax.device_put(own), draw(jax.random.key(i))[0]) for i, own in enumerate(lists)
        ]

    def poisoned(self, calls):
        """Output buffers in which nothing is written yet."""
        return [self._draw(jax.random.key(i))[1] for i in range(calls)]


class DonatedRound:
    """Rounds of a compiled function of (results, *arguments) that donates the results.

    `results` are those of the last round. `calls` is how many a round makes.
    """

    def __init__(self, function, buffers, arguments, calls):
        # The round holds the results, not self: a cycle would keep them and the pool alive.
        results = self.results = list(buffers)

        def enqueue():
            results[:] = function(results, *arguments)

        def wait():
            results[-1][-1].block_until_ready()

        self.round = Round(calls, enqueue, wait)


class OpRound(DonatedRound):
    """The compiled rounds of a case on its inputs."""

    def __init__(self, function, inputs, prepared, calls, loops=1):
        arguments = inputs.pool, inputs.shared, prepared, inputs.owns[:calls]
        super().__init__(function, inputs.poisoned(calls), arguments, calls * loops)
