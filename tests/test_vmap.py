"""Every op under jax.vmap gives what a loop over the examples gives, with one call of the op."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from lowering import custom_calls, primitives, text_for_cuda
from op_examples import stacked

pytestmark = pytest.mark.usefixtures("quick_compile")


def axes_of(row, mapped, turn):
    """in_axes that map these operands, along another axis at each turn; None for the others."""
    ranks = [len(operand.axes.split()) for operand in row.operands]
    return tuple(
        (turn + i) % (rank + 1) if name in mapped else None
        for i, (name, rank) in enumerate(zip(row.names, ranks, strict=True))
    )


def may_map(row, mapped):
    """A cache that is updated must be mapped."""
    return mapped and (not row.in_place or set(row.caches) <= set(mapped))


def choices(row):
    """Every choice of mapped operands. With more than four operands: one, all but the last, all."""
    names = row.names
    if len(names) <= 4:
        found = [x for n in range(1, len(names) + 1) for x in itertools.combinations(names, n)]
    else:
        found = [*((name,) for name in names), names[:-1], names]
    return [mapped for mapped in found if may_map(row, mapped)]


def mapped_rows():
    for row in ops.ROWS:
        for turn, mapped in enumerate(choices(row)):
            axes = axes_of(row, mapped, turn)
            for implementation, marks in ops.runs(row):
                name = f"{row}-{'+'.join(mapped)}-{implementation}"
                yield pytest.param(row, implementation, axes, turn, id=name, marks=marks)


def check_examples(row, results, out_axes, examples):
    results = [
        np.moveaxis(np.asarray(x), axis, 0) for x, axis in zip(results, out_axes, strict=True)
    ]
    for index, example in examples.items():
        row.check([x[index] for x in results], example)


def assert_one_call(row, run, arrays):
    """One call of the op: neither a loop, nor a call for each example."""
    if row.primitive is not None:
        made = primitives(run, *arrays)
        assert made.count(row.primitive) == 1
        assert not {"scan", "while"} & set(made)


@pytest.mark.parametrize(("row", "implementation", "in_axes", "turn"), list(mapped_rows()))
def test_vmap_gives_what_a_loop_gives(row, implementation, in_axes, turn):
    arrays, examples = stacked(row, (3,), in_axes)
    ranks = [len(result.axes.split()) for result in row.results]
    out_axes = tuple((turn + i) % (rank + 1) for i, rank in enumerate(ranks))
    run = jax.vmap(row.with_implementation(implementation), in_axes, out_axes)
    if row.targets_under_vmap != {}:
        assert_one_call(row, run, arrays)
    check_examples(row, jax.jit(run)(*arrays), out_axes, examples)


def nested_rows():
    """The operands that the outer and the inner vmap map."""
    for row in ops.ROWS:
        evens, odds, every = row.names[::2], row.names[1::2], row.names
        caches = row.caches
        patterns = {
            "all-and-all": (every, every),
            "evens-and-odds": (evens, odds),
            "odds-and-evens": (odds, evens),
            "the-caches-by-both": ([*evens, *caches], [*odds, *caches]),
            "last-and-first": (every[-1:], every[:1]),
        }
        for turn, (name, (outer, inner)) in enumerate(patterns.items()):
            if may_map(row, outer) and may_map(row, inner):
                axes = axes_of(row, outer, turn), axes_of(row, inner, turn + 1)
                for implementation, marks in ops.runs(row):
                    id_ = f"{row}-{name}-{implementation}"
                    yield pytest.param(row, implementation, *axes, id=id_, marks=marks)


@pytest.mark.parametrize(("row", "implementation", "outer", "inner"), list(nested_rows()))
def test_nested_vmaps_give_what_loops_give(row, implementation, outer, inner):
    arrays, examples = stacked(row, (2, 3), outer, inner)
    run = jax.vmap(jax.vmap(row.with_implementation(implementation), inner), outer)
    if row.targets_under_vmap != {}:
        assert_one_call(row, run, arrays)
    for index, example in examples.items():
        row.check([x[index] for x in jax.jit(run)(*arrays)], example)


@ops.each_run()
@pytest.mark.parametrize("sizes", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("mapped", ["all", "first"])
def test_vmap_over_no_examples(row, implementation, sizes, mapped):
    """An axis of size 0 gives results of size 0, and no kernel is called."""
    of_first = mapped == "first" and not row.in_place
    in_axes = tuple(0 if i == 0 or not of_first else None for i in range(len(row.operands)))
    run = functools.reduce(
        lambda f, _: jax.vmap(f, in_axes), sizes, row.with_implementation(implementation)
    )
    arrays = [
        x if axis is None else jax.tree.map(lambda y: jnp.zeros((*sizes, *y.shape), y.dtype), x)
        for x, axis in zip(row.arrays(), in_axes, strict=True)
    ]
    expected = jax.eval_shape(row.run, *row.structs())
    for results in (run(*arrays), jax.jit(run)(*arrays)):
        assert [(x.shape, x.dtype) for x in results] == [
            ((*sizes, *x.shape), x.dtype) for x in expected
        ]


@pytest.mark.usefixtures("kernels")
@ops.each(lambda row: row.targets)
def test_vmap_over_no_examples_calls_no_kernel(row):
    structs = [
        jax.tree.map(lambda x: jax.ShapeDtypeStruct((0, *x.shape), x.dtype), x)
        for x in row.structs()
    ]
    run = jax.vmap(row.with_implementation("cuda"))
    assert not custom_calls(text_for_cuda(run, *structs))


def signature(line):
    """Attributes and types of a call's operands and results; not the names of the operands."""
    return line[line.index(")") :]


def folded_rows():
    """With the cache mapped and not mapped, if the op allows both."""
    for row in ops.ROWS:
        if row.targets and not row.in_place:
            yield pytest.param(row, False, id=f"{row}", marks=row.marks)
        if row.caches:
            yield pytest.param(row, True, id=f"{row}-of-mapped-caches", marks=row.marks)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize(("row", "cache_is_mapped"), list(folded_rows()))
def test_vmap_folds_into_one_call_of_the_kernel(row, cache_is_mapped, levels):
    """The call is that of a larger batch, and of a larger pool if the cache is mapped."""
    folded = [row.batch]
    if cache_is_mapped:
        folded += ["pages"]
    in_axes = tuple(0 if x.axes.split()[0] in folded else None for x in row.operands)
    sizes = (3, 2)[:levels]
    run = row.run
    for _ in sizes:
        run = jax.vmap(run, in_axes)
    arrays, _ = stacked(row, sizes, *[in_axes] * levels)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    calls = custom_calls(text_for_cuda(run, *structs))
    expected = row.targets if row.targets_under_vmap is None else row.targets_under_vmap
    assert {target: len(lines) for target, lines in calls.items()} == expected
    if not expected:
        return
    larger = {axis: int(np.prod(sizes)) * row.sizes[axis] for axis in folded}
    alone = custom_calls(text_for_cuda(row.run, *row.structs(**larger)))
    target = row.main_target
    assert list(map(signature, calls[target])) == list(map(signature, alone[target]))


@ops.each(lambda row: row.in_place)
def test_cache_that_is_updated_must_be_mapped(row):
    for mapped in ([x for x in row.names if x not in row.caches], row.names[-1:]):
        in_axes = axes_of(row, mapped, 0)
        arrays, _ = stacked(row, (3,), in_axes)
        with pytest.raises(NotImplementedError, match=f"{row.caches[0]} not mapped"):
            jax.vmap(row.run, in_axes)(*arrays)
