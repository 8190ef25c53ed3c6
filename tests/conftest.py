"""What all tests share: how those that need a GPU are skipped, or fail, where there is none."""

import os

# XLA compiles for an H200 without one, but only where jax does not look for a driver.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools

import jax
import lowering
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_flashmla import _ffi

jax.config.update("jax_num_cpu_devices", 8)  # for the tests of several devices

REQUIRE_GPU = os.environ.get("JAX_FLASHMLA_REQUIRE_GPU") == "1"


@functools.cache
def why_no_gpu() -> str | None:
    """Why the kernels cannot run here, or None."""
    if jax.default_backend() != "gpu" or not _ffi.local_cuda_devices():
        return f"there is no CUDA device, jax runs on {jax.default_backend()}"
    return _ffi.unavailable_reason()


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") is None or (reason := why_no_gpu()) is None:
        return
    if REQUIRE_GPU:
        pytest.fail(f"JAX_FLASHMLA_REQUIRE_GPU=1, but {reason}", pytrace=False)
    pytest.skip(f"needs a Hopper GPU: {reason}")


@pytest.fixture(params=["xla", pytest.param("cuda", marks=pytest.mark.gpu)])
def implementation(request) -> str:
    """The reference everywhere, the kernel on a GPU."""
    return request.param


@pytest.fixture
def quick_compile():
    """For tests of what is computed on a CPU: XLA compiles in less than half the time."""
    jax.config.update("jax_disable_most_optimizations", jax.default_backend() == "cpu")
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def kernels(monkeypatch):
    """Lets programs be lowered with kernels that were not built."""
    monkeypatch.setattr(_ffi, "unavailable_reason", lambda: None)
    monkeypatch.setattr(_ffi, "non_hopper_device", lambda: None)


@pytest.fixture(scope="session")
def h200():
    """A sharding on one H200 that is not there."""
    return NamedSharding(lowering.h200_mesh((1,), ("x",)), PartitionSpec())


@pytest.fixture
def compiled_kernels():
    """XLA compiles only calls of handlers that are registered."""
    if _ffi._NOT_REGISTERED is not None:
        lowering.skip_compiling(_ffi._NOT_REGISTERED)
