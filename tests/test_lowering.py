"""Every op in programs for a GPU, lowered without one: the kernel calls in StableHLO text."""

import re
from collections import Counter

import jax
import ops
import pytest
from lowering import custom_calls, primitives, text_for_cuda


def types(text):
    return re.findall(r"tensor<([^>]*)>", text)


def mlir_type(struct):
    names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int32": "i32"}
    return "x".join(map(str, (*struct.shape, names[struct.dtype.name])))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", ["auto", "cuda"])
@ops.each(lambda row: row.targets)
def test_program_calls_the_kernels(row, implementation):
    """The right kernels are called, how often and with which attributes, operands and aliases."""
    structs = row.structs()
    calls = custom_calls(text_for_cuda(row.with_implementation(implementation), *structs))
    assert {target: len(lines) for target, lines in calls.items()} == row.targets
    for target, attributes in row.attributes.items():
        for attribute in attributes:
            assert re.search(attribute, calls[target][0])
    line = calls[row.main_target][0]
    (names,) = re.findall(r"^\((.*?)\)", line)
    leaves = jax.tree.leaves(structs)
    # The operands go to the kernel with at most a reshape between; those that the op makes follow.
    assert len(names.split(", ")) == len(leaves) + row.made
    operands, results = map(types, line.split(" : ")[-1].split(" -> "))
    sizes = Counter(map(sizes_of, operands))
    assert not Counter(sizes_of(mlir_type(x)) for x in leaves) - sizes
    assert len(results) == len(row.results) + row.scratch
    in_place = [int(i) for i in re.findall(r"operand_index = (\d+)", line)]
    assert in_place == ([row.cache_index] if row.in_place else [])
    assert ("output_operand_alias" in line) == row.in_place


def sizes_of(type_):
    """(number of elements, dtype) of an MLIR tensor type."""
    *shape, dtype = type_.split("x")
    elements = 1
    for size in shape:
        elements *= int(size)
    return elements, dtype


@pytest.mark.usefixtures("kernels")
@ops.each(lambda row: row.targets)
def test_several_platforms_in_one_program(row):
    traced = jax.jit(row.run).trace(*row.structs())
    text = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert set(custom_calls(text)) == set(row.targets)
    assert "stablehlo.case" in text


@ops.each()
def test_shapes_of_results(row):
    """Without running."""
    results = jax.eval_shape(row.run, *row.structs())
    for actual, result in zip(results, row.results, strict=True):
        shape = tuple(row.sizes[axis] for axis in result.axes.split())
        assert (actual.shape, actual.dtype) == (shape, result.dtype)


@ops.each(lambda row: row.primitive)
def test_jaxprs_and_programs_have_the_name_of_the_op(row):
    structs = row.structs()
    for function in (row.run, jax.checkpoint(row.run)):
        assert primitives(function, *structs).count(row.primitive) == 1

    def step(*arrays):
        with jax.named_scope("layer"):
            return row.run(*arrays, implementation="xla")

    text = jax.jit(step).lower(*structs).as_text(debug_info=True)
    assert re.search(rf'"jit\(step\)/layer/{row.primitive}/\w+', text)
