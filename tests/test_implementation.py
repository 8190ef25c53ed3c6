"""Which implementation a program gets: the kernel or the reference."""

import re
import warnings

import jax
import ops
import pytest
from lowering import (
    custom_calls,
    struct,
    text_for_cuda,
)


@pytest.mark.usefixtures("kernels")
@ops.each(lambda row: row.targets)
def test_xla_is_the_reference(row):
    assert not custom_calls(text_for_cuda(row.with_implementation("xla"), *row.structs()))


def gaps():
    for row in ops.ROWS:
        for i, gap in enumerate(row.gaps):
            yield pytest.param(row, *gap, id=f"{row}-{i}", marks=row.marks)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("row", "sizes", "dtype", "options", "reason"), list(gaps()))
def test_shapes_without_a_kernel(row, sizes, dtype, options, reason):
    """They run the reference with one warning, or raise with implementation="cuda"."""
    structs = row.structs(**sizes)
    if dtype is not None:
        structs = [
            struct(x.shape, dtype) if operand.is_float else x
            for operand, x in zip(row.operands, structs, strict=True)
        ]

    def text(implementation):
        return text_for_cuda(
            lambda *arrays: row.run(*arrays, implementation=implementation, **options), *structs
        )

    message = f"^{row.name_in_messages}.*{reason}"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        program = text("auto")
    assert len(caught) == 1
    assert not custom_calls(program)
    text("auto")  # must not warn again; a warning would be an error
    with pytest.raises(NotImplementedError, match=message):
        text("cuda")


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("row", "sizes"),
    [
        (ops.decode_row, {"b": 2**24}),
        (ops.given_row, {"b": 2**24}),
        (ops.sparse_row, {"b": 2**23}),
        (ops.sparse_row, {"topk": 2**29 - 1}),
        (ops.two_caches_row, {"extra_topk": 2**29 - 1}),
        (ops.schedule_row, {"b": 2**24}),
    ],
    ids=str,
)
def test_largest_sizes_with_a_kernel(row, sizes):
    program = text_for_cuda(row.with_implementation("cuda"), *row.structs(**sizes))
    assert custom_calls(program).keys() == row.targets.keys()


@ops.each(lambda row: row.targets)
def test_machine_without_the_kernels(row, machine):
    machine.takes_kernels(unavailable="it is Tuesday")
    with pytest.warns(RuntimeWarning, match=": it is Tuesday") as caught:
        assert not custom_calls(text_for_cuda(row.run, *row.structs()))
    assert len(caught) == 1
    with pytest.raises(NotImplementedError, match="it is Tuesday"):
        text_for_cuda(row.with_implementation("cuda"), *row.structs())


@ops.each(lambda row: row.targets)
def test_other_gpu(row, machine):
    """No warning, because such a GPU is meant to run the reference."""
    machine.has_gpu("8.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not custom_calls(text_for_cuda(row.run, *row.structs()))
    with pytest.raises(NotImplementedError, match=r"9\.0, this machine has NVIDIA X100 .*8\.0"):
        text_for_cuda(row.with_implementation("cuda"), *row.structs())


@ops.each(lambda row: row.targets)
def test_kernel_on_another_platform(row):
    traced = jax.jit(row.with_implementation("cuda")).trace(*row.structs())
    with pytest.raises(
        NotImplementedError, match=f"^{row.name_in_messages} has no .*for the platform cpu"
    ):
        traced.lower(lowering_platforms=("cpu",))


@ops.each(lambda row: row.primitive)
def test_misspelt_implementation(row):
    with pytest.raises(ValueError, match=r"implementation must be one of .*'triton'"):
        jax.eval_shape(row.with_implementation("triton"), *row.structs())


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(13000, None), (13020, None), (14000, None), (None, None), (12080, "for CUDA 12.8")],
)
def test_old_driver(driver, reason, machine):
    machine.has_gpu("9.0", driver)
    found = machine.unavailable_reason()
    assert found is None if reason is None else reason in found


def test_extension_for_a_newer_jaxlib(machine):
    """It is not registered with XLA, because a refused handler breaks the backend."""
    runtime = machine.runtime_ffi_api()
    assert runtime is not None
    machine.has_extension(ffi_api=(runtime[0], runtime[1] + 1))
    assert re.search(r"compiled for XLA FFI .*the installed jaxlib .* has", machine.register())
