"""A decode step exported as a whole: symbolic sizes, schedules as arguments, fixed splits."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import D_V, Case, assert_bit_equal
from decode_step import check_serve, serve, serve_inputs, serve_structs
from dense_calls import decode, decode_structs
from jax import export
from lowering import (
    APPEND,
    DECODE,
    PLATFORMS,
    SCHEDULE,
    SCHEDULE_AND_DECODE,
    custom_calls,
    struct,
)

import jax_flashmla as fm

pytestmark = pytest.mark.usefixtures("quick_compile")


def exported(platforms, *sizes):
    """`serve` in bytes, with the kernels for CUDA."""
    export_ = export.export(
        jax.jit(lambda *arrays: serve(*arrays)),  # a new function, never lowered before
        platforms=platforms,
        disabled_checks=fm.EXPORT_DISABLED_CHECKS,
    )
    program = export_(*serve_structs(*sizes))
    assert set(custom_calls(program.mlir_module())) == {APPEND, DECODE, SCHEDULE}
    return program.serialize()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
def test_export_and_back(platforms):
    loaded = export.deserialize(exported(platforms, 3, 20, 6))
    assert loaded.platforms == platforms
    check_serve(loaded.call, 3, 20, 6)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
@pytest.mark.parametrize("sizes", ["b, 40, 6", "b, p, w"])
def test_export_of_a_symbolic_batch(sizes, platforms):
    """The size of the pool and the width of the table may be symbolic as well."""
    loaded = export.deserialize(exported(platforms, *export.symbolic_shape(sizes)))
    for b in (1, 5):
        check_serve(loaded.call, b, *((40, 6) if "p" not in sizes else (30 + b, 4 + b)))


@pytest.mark.usefixtures("kernels")
def test_export_of_a_symbolic_vmap():
    n, b = export.symbolic_shape("n, b")
    q, k_cache, table, lengths = decode_structs(b=b)
    structs = (struct((n, *x.shape), x.dtype) for x in (q, table, lengths))
    run = jax.jit(
        jax.vmap(lambda q, table, lengths, c: decode(q, c, table, lengths), (0, 0, 0, None))
    )
    program = export.export(run, platforms=("cuda",), disabled_checks=fm.EXPORT_DISABLED_CHECKS)
    program = program(*structs, k_cache)
    assert [x.shape for x in program.out_avals] == [(n, b, 1, 16, D_V), (n, b, 16, 1)]
    calls = custom_calls(program.mlir_module())
    assert {target: len(lines) for target, lines in calls.items()} == {SCHEDULE_AND_DECODE: 1}


@pytest.mark.parametrize("options", [{}, {"fixed_split_size": 64, "max_seqlen": 256}], ids=str)
def test_export_with_a_schedule_as_argument(options):
    inputs = cases.make_inputs(Case(3, 1, 100, 16, varlen=True))
    arrays = inputs.device_arrays()
    schedule = fm.get_mla_metadata(arrays[3], 16, 1, **options)

    def step(arrays, schedule):
        return decode(*arrays, schedule=schedule), schedule

    program = export.export(jax.jit(step), disabled_checks=fm.EXPORT_DISABLED_CHECKS)
    loaded = export.deserialize(program(arrays, schedule).serialize())
    results, again = loaded.call(arrays, schedule)
    cases.assert_decode_close(results, cases.expected_decode(inputs))
    assert jax.tree.structure(again) == jax.tree.structure(schedule)
    assert_bit_equal(again, schedule)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platforms", PLATFORMS)
def test_export_of_a_symbolic_batch_in_fixed_splits(platforms):
    """The number of parts is symbolic too."""

    def step(*arrays):
        schedule = fm.get_mla_metadata(arrays[3], 16, 1, fixed_split_size=64, max_seqlen=300)
        return decode(*arrays, schedule=schedule)

    b, width = export.symbolic_shape("b, w")
    structs = decode_structs(b=b)
    structs = *structs[:2], struct((b, width), jnp.int32), structs[3]
    program = export.export(
        jax.jit(step), platforms=platforms, disabled_checks=fm.EXPORT_DISABLED_CHECKS
    )(*structs)
    assert set(custom_calls(program.mlir_module())) == {DECODE}  # XLA makes this schedule
    loaded = export.deserialize(program.serialize())
    for count in (1, 5):
        inputs = cases.make_inputs(Case(count, 1, 200, 16, varlen=True), max_blocks=10 + count)
        unused = np.full_like(inputs.k_cache, np.nan, shape=(100, *inputs.k_cache.shape[1:]))
        k_cache = np.concatenate([inputs.k_cache, unused])[:100]
        actual = loaded.call(*inputs.replace(k_cache=k_cache).device_arrays())
        cases.assert_decode_close(actual, cases.expected_decode(inputs))


def test_lowered_and_compiled_by_hand():
    arrays, _ = serve_inputs(2, 10, 4)
    compiled = jax.jit(serve).lower(*serve_structs(2, 10, 4)).compile()
    check_serve(compiled, 2, 10, 4)
    with pytest.raises(TypeError, match=r"bfloat16\[3,1,16,576\]"):
        compiled(*serve_inputs(3, 12, 4)[0])
