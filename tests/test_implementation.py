"""Which implementation a program gets: the kernel or the reference."""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from cases import D_K, D_V, zeros
from dense_calls import decode, decode_structs
from lowering import (
    SCHEDULE_AND_DECODE,
    custom_calls,
    struct,
    text_for_cuda,
)

import jax_flashmla as fm


@pytest.mark.usefixtures("kernels")
def test_several_platforms_in_one_program():
    lowered = jax.jit(decode).trace(*decode_structs()).lower(lowering_platforms=("cpu", "cuda"))
    text = lowered.as_text()
    assert set(custom_calls(text)) == {SCHEDULE_AND_DECODE}
    assert "stablehlo.case" in text


def test_xla_has_no_custom_calls(kernels):
    text = text_for_cuda(lambda *a: decode(*a, implementation="xla"), *decode_structs())
    assert not custom_calls(text)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("shapes", "d_v", "reason"),
    [
        ({"d_k": 288}, 256, "not for 288 and 256"),
        ({}, 256, "not for 576 and 256"),
        ({"page": 48}, D_V, r"page_block_size in .*, not for 48"),
        ({"dtype": jnp.float32}, D_V, "not for q in float32"),
    ],
)
def test_shapes_without_a_kernel(shapes, d_v, reason):
    structs = decode_structs(**shapes)
    with pytest.warns(RuntimeWarning, match=reason):
        text = text_for_cuda(lambda *a: decode(*a, d_v=d_v), *structs)
    assert not custom_calls(text)
    text_for_cuda(lambda *a: decode(*a, d_v=d_v), *structs)  # does not warn again
    with pytest.raises(NotImplementedError, match=reason):
        text_for_cuda(lambda *a: decode(*a, d_v=d_v, implementation="cuda"), *structs)


def test_machine_without_the_kernels(machine):
    machine.takes_kernels(unavailable="it is Tuesday")
    with pytest.warns(RuntimeWarning, match="plain JAX.*: it is Tuesday") as caught:
        text = text_for_cuda(decode, *decode_structs())
    assert len(caught) == 1
    assert not custom_calls(text)
    with pytest.raises(NotImplementedError, match="it is Tuesday"):
        text_for_cuda(lambda *a: decode(*a, implementation="cuda"), *decode_structs())


def test_other_gpu(machine):
    """No warning there: the reference is what such a GPU is meant to run."""
    machine.has_gpu("8.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not custom_calls(text_for_cuda(fm.append_kv_cache, *append_structs()))
    with pytest.raises(NotImplementedError, match=r"9\.0, this machine has NVIDIA X100 .*8\.0"):
        text_for_cuda(lambda *a: fm.append_kv_cache(*a, implementation="cuda"), *append_structs())


def append_structs():
    return struct((100, 64, 1, D_K)), struct((7, 1, D_K)), struct((7,), jnp.int32)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [(13000, None), (13020, None), (14000, None), (None, None), (12080, "for CUDA 12.8")],
)
def test_old_driver(driver, reason, machine):
    machine.has_gpu("9.0", driver)
    found = machine.unavailable_reason()
    assert found is None if reason is None else reason in found


def test_extension_for_a_newer_jaxlib(machine):
    """It is not offered to XLA: a refused handler would take the backend down."""
    runtime = machine.runtime_ffi_api()
    assert runtime is not None
    machine.has_extension(ffi_api=(runtime[0], runtime[1] + 1))
    assert re.search(r"compiled for XLA FFI .*the installed jaxlib .* has", machine.register())


def test_kernel_on_another_platform():
    if jax.default_backend() == "gpu":
        pytest.skip("for machines without a GPU")
    with pytest.raises(NotImplementedError, match="no kernel for the platform cpu"):
        fm.append_kv_cache(
            zeros(2, 16, 1, D_K), zeros(3, D_K), jnp.zeros(3, jnp.int32), implementation="cuda"
        )
