"""Every op exported by jax.export: stored, loaded, run; with symbolic sizes if it takes them."""

import functools
import re

import jax
import ops
import pytest
from jax import export
from lowering import PLATFORMS, custom_calls

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


def symbolic_sizes(row):
    """The axes that may be symbolic, as one scope of symbolic sizes."""
    names = row.symbolic
    return dict(zip(names, export.symbolic_shape(", ".join(names)), strict=True)) if names else {}


@functools.cache
def exported(row, platforms):
    """The program and its bytes, with the kernels for CUDA."""
    fresh = jax.jit(lambda *arrays: row.run(*arrays))  # a new function, never lowered before
    export_ = export.export(fresh, platforms=platforms, disabled_checks=fm.EXPORT_DISABLED_CHECKS)
    program = export_(*row.structs(**symbolic_sizes(row)))
    return program, program.serialize()


def platforms_of_rows():
    for row in ops.ROWS:
        for param in PLATFORMS:
            if row.targets or not param.marks:
                marks = (*row.marks, *param.marks)
                yield pytest.param(row, *param.values, id=f"{row}-{param.id}", marks=marks)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("row", "platforms"), list(platforms_of_rows()))
def test_export_and_back(row, platforms):
    """One program serves several sizes."""
    program, stored = exported(row, platforms)
    calls = custom_calls(program.mlir_module())
    assert {target: len(lines) for target, lines in calls.items()} == row.targets
    loaded = export.deserialize(stored)
    assert loaded.platforms == platforms
    assert len(loaded.in_avals) == len(jax.tree.leaves(row.structs()))
    assert len(loaded.out_avals) == len(row.results)
    for more in (0, 3) if row.symbolic else (0,):
        sizes = {name: row.sizes[name] + more for name in row.symbolic}
        results = loaded.call(*row.arrays(more, **sizes))
        row.check(jax.tree.leaves(results), row.example(more, **sizes))


@pytest.mark.usefixtures("kernels")
@ops.each(lambda row: row.targets)
def test_export_for_cuda_from_anywhere(row):
    """It works without a GPU, and fails without EXPORT_DISABLED_CHECKS."""
    program, _ = exported(row, ("cuda",))
    assert set(custom_calls(program.mlir_module())) == set(row.targets)
    run = jax.jit(lambda *arrays: row.run(*arrays))
    with pytest.raises(ValueError, match=row.main_target):
        export.export(run, platforms=("cuda",))(*row.structs())


def operands_of(target, hlo):
    """How many operands the kernel's one call has."""
    (operands,) = re.findall(rf".*custom-call\((.*)\), custom_call_target=\"{target}\"", hlo)
    return operands.count("%")


@pytest.mark.usefixtures("compiled_kernels", "kernels")
@ops.each(lambda row: row.targets)
def test_exported_program_compiles_for_an_h200(row, h200):
    """The kernel gets no operands for symbolic sizes, and the cache is aliased."""
    loaded = export.deserialize(exported(row, ("cpu", "cuda"))[1])
    structs = row.structs(h200, pages=1000) if row.symbolic else row.structs(h200)
    donated = row.cache_index if row.in_place else ()
    compiled = jax.jit(loaded.call, donate_argnums=donated).lower(*structs).compile()
    assert (
        operands_of(row.main_target, compiled.as_text()) == len(jax.tree.leaves(structs)) + row.made
    )
    if row.in_place:
        cache = structs[row.cache_index]
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= cache.size * cache.dtype.itemsize
