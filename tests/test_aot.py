"""Every op compiled for an H200, without one: memory, copies of the cache, command buffers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import ops
import pytest
from decode_loop import COMMAND_BUFFERS
from lowering import PASSED_ON, operations_on, struct

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def kernels_in(hlo):
    return re.findall(r'custom_call_target="(jax_flashmla_\w+)"', hlo)


def copies_of(elements, row, hlo):
    """The operations that make another array as large as the cache; an update in place does not."""
    in_place = {"custom-call"} if row.in_place else set()
    return operations_on(elements, hlo) - PASSED_ON - in_place


def compiled(row, sharding, pages):
    """The op on a donated cache with this number of pages, in a named scope of the caller."""

    @jax.named_scope("layer")
    def step(*arrays):
        return row.run(*arrays, implementation="cuda")

    donated = row.cache_index if row.in_place else ()
    structs = row.structs(sharding, pages=pages)
    return jax.jit(step, donate_argnums=donated).lower(*structs).compile()


@ops.each(lambda row: row.targets)
def test_memory_does_not_grow_with_the_cache(row, h200):
    """Scratch has a constant size, nothing copies the cache, and an append is in place."""
    temporary = []
    for pages in (1000, 50000) if row.caches else (1,):
        program = compiled(row, h200, pages)
        memory, hlo = program.memory_analysis(), program.as_text()
        assert sorted(kernels_in(hlo)) == sorted(row.targets)
        temporary.append(memory.temp_size_in_bytes)
        for index in row.cache_indices:
            cache = row.structs(pages=pages)[index]
            assert not copies_of(cache.size, row, hlo)
            if row.in_place:
                assert memory.alias_size_in_bytes >= cache.size * cache.dtype.itemsize
    assert len(set(temporary)) == 1


@ops.each(lambda row: row.targets)
def test_names_in_a_compiled_program(row, h200):
    """A profile shows the scopes of the caller, and the op."""
    hlo = compiled(row, h200, pages=1000).as_text()
    (name,) = re.findall(rf'custom_call_target="{row.main_target}".*op_name="([^"]*)"', hlo)
    assert name == f"jit(step)/layer/{row.primitive}/ffi_call"


def mapped_caches():
    """The axis along which the cache is mapped, or None, and whether that copies the cache."""
    for row in ops.ROWS:
        if row.targets and row.caches and not row.variant:
            for axis, copied in ((None, False), (0, False), (1, True)):
                if axis is not None or not row.in_place:
                    yield pytest.param(row, axis, copied, id=f"{row}-{axis}", marks=row.marks)


@pytest.mark.parametrize(("row", "axis", "copied"), list(mapped_caches()))
def test_copies_of_the_cache_under_vmap(row, axis, copied, h200):
    in_axes = [axis if name in row.caches else 0 for name in row.names]
    structs = []
    for x, place in zip(row.structs(pages=1000), in_axes, strict=True):
        shape = list(x.shape)
        if place is not None:
            shape.insert(place, 3)
        structs.append(struct(shape, x.dtype, sharding=h200))
    run = jax.vmap(row.with_implementation("cuda"), in_axes, axis if row.in_place else 0)
    donated = row.cache_index if row.in_place else ()
    program = jax.jit(run, donate_argnums=donated).lower(*structs).compile()
    hlo = program.as_text()
    assert sorted(kernels_in(hlo)) == sorted(row.targets_under_vmap or row.targets)
    for index in row.cache_indices:
        size = int(np.prod(structs[index].shape))
        assert bool(copies_of(size, row, hlo)) == copied
    if row.in_place:
        memory = program.memory_analysis()
        assert memory.alias_size_in_bytes >= 2 * size
        assert (memory.temp_size_in_bytes >= 2 * size) == copied


@pytest.mark.parametrize("buffers", COMMAND_BUFFERS)
@ops.each(lambda row: row.targets and not row.variant)
def test_command_buffers(row, buffers, h200):
    """In a loop, whose body may become a CUDA graph; an updated cache is carried in place."""

    def loop(count, *operands):
        def body(carry):
            i, operands, _ = carry
            results = row.run(*operands, implementation="cuda")
            if row.in_place:
                operands = list(operands)
                operands[row.cache_index] = results[0]
                results = ()
            return i + 1, tuple(operands), results

        results = () if row.in_place else jax.eval_shape(row.run, *operands)
        results = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), results)
        return jax.lax.while_loop(lambda c: c[0] < count, body, (0, operands, results))[1:]

    structs = row.structs(h200, pages=1000)
    donated = row.cache_index + 1 if row.in_place else ()
    lowered = jax.jit(loop, donate_argnums=donated).lower(
        struct((), jnp.int32, sharding=h200), *structs
    )
    hlo = lowered.compile(compiler_options=COMMAND_BUFFERS[buffers]).as_text()
    assert sorted(kernels_in(hlo)) == sorted(row.targets)
    if row.in_place:
        assert not copies_of(structs[row.cache_index].size, row, hlo)
