"""Decode as a model runs it: a jitted step that calls the op for each of its layers.

All layers' pages lie in one buffer; a layer's block table is the step's, moved by the layer's first
page inside the step. The metadata is made once. Nothing else is in the step, so that what it costs
beyond its calls is XLA's.
"""

import functools
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
from rounds import in_turns
from workloads import HEAD_DIM_V

from jax_flashmla import flash_mla_with_kvcache, get_mla_metadata

# How the step is written, and what XLA is told.
FORMS = {
    "unrolled": (False, {}),
    "scan": (True, {}),
    "scan, graphs of 1": (True, {"xla_gpu_graph_min_graph_size": 1}),
}


def step(outs, lses, qs, pool, table, lengths, *, case, scan, distinct, implementation):
    """All layers, one for each of `outs`, each with queries of its own.

    Scanned they share the last queries and write the last buffer in turn: a model would make the
    queries in the loop's body and use the result there, while slices of stacked queries and
    results are copies. Layer i has the pages of layer i % distinct.
    """
    pages = case.pages()
    metadata = get_mla_metadata(lengths, case.s_q * case.h_q, 1, implementation=implementation)

    def layer(i, q):
        return flash_mla_with_kvcache(
            q, pool, table + (i % distinct) * pages, lengths, HEAD_DIM_V, *metadata,
            causal=case.causal, implementation=implementation,
        )  # fmt: skip

    if not scan:
        results = [layer(i, q) for i, q in enumerate(qs)]
        return [out for out, _ in results], [lse for _, lse in results]

    def body(carry, i):
        return layer(i, qs[-1]), None

    layers = jnp.arange(len(outs), dtype=jnp.int32)
    (out, lse), _ = jax.lax.scan(body, (outs[-1], lses[-1]), layers)
    return [*outs[:-1], out], [*lses[:-1], lse]


def _steps(outs, lses, qs, pool, table, lengths, *, loops, **options):
    def turn(outs, lses, lengths):
        return step(outs, lses, qs, pool, table, lengths, **options)

    return in_turns(turn, loops, outs, lses, lengths)


def compile_step(shapes, form, layers, distinct, implementation):
    """A form of the step for `shapes`, as `compile_and_count` gives it.

    The program takes the step `shapes.loops` times; what is counted are the launches of one.
    """
    scan, options = FORMS[form]

    def lower(loops):
        function = functools.partial(
            _steps, case=shapes.case, scan=scan, distinct=distinct, implementation=implementation,
            loops=loops,
        )  # fmt: skip
        return jax.jit(function, donate_argnums=(0, 1), keep_unused=True).lower(
            [shapes.out] * layers, [shapes.lse] * layers,
            [shapes.q] * layers, shapes.pool, shapes.table, shapes.lengths,
        )  # fmt: skip

    compiled, launches = compile_and_count(lower(1), layers, options)
    if shapes.loops > 1:
        compiled = lower(shapes.loops).compile(compiler_options=options)
    return compiled, launches


def compile_and_count(lowered, trips, options):
    """(the compiled program, (graphs, single commands) that it launches or None if unknown)."""
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={**options, "xla_dump_to": folder})
        # Where the passes over it change nothing, only the first of these is there.
        names = ["*.thunk_sequence.txt", "*.thunk_sequence_after_thunk_passes.txt"]
        files = [file for name in names for file in pathlib.Path(folder).glob(name)]
        return compiled, count_launches(files[-1].read_text(), trips) if files else None


def count_launches(thunks, trips):
    """(graphs, single commands) that a list of thunks launches, its loops running `trips` times.

    A line is a thunk, indented by what it is part of. The condition of a loop whose trip count is
    known is not evaluated.
    """
    graphs = singles = 0
    weight, inside = 1, None
    for line in thunks.splitlines():
        thunk = re.match(r"( *)\d+: (k\w+)", line)
        if thunk is None:
            weight = {"condition:": 0, "body:": trips}.get(line.strip(), weight)
            continue
        indent, kind = len(thunk[1]), thunk[2]
        if indent == 0:
            weight = 1
        if inside is not None and indent > inside:
            continue
        inside = indent if kind == "kCommandBuffer" else None
        if kind == "kCommandBuffer":
            graphs += weight
        elif kind != "kWhile":
            singles += weight
    return graphs, singles
