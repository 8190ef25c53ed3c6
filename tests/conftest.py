"""What all tests share: how those that need a GPU are skipped, or fail, where there is none."""

import os

# XLA can compile for an H200 without a GPU, but only if jax does not look for a driver.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

import functools
from types import SimpleNamespace

import jax
import lowering
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_flashmla import _ffi, _op
from jax_flashmla.reference import _attention

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
def set_chunks(monkeypatch):
    """To change how the references cut their work into chunks."""

    def change(chunk_bytes, max_tokens):
        monkeypatch.setattr(_attention, "_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(_attention, "_MAX_CHUNK_TOKENS", max_tokens)
        monkeypatch.setattr(_attention, "_SYMBOLIC_CHUNK_TOKENS", max_tokens)

    return change


class Machine:
    """Lets a test choose what the library finds here. Only this file patches private names."""

    _QUERIES = (_ffi.non_hopper_device, _ffi.unavailable_reason, _op._warn_once)

    def __init__(self, monkeypatch):
        self._patch = monkeypatch.setattr

    def forget(self):
        """Clears what was found before, and which warnings were given."""
        for query in self._QUERIES:
            query.cache_clear()

    def takes_kernels(self, unavailable=None):
        """As a Hopper machine on which nothing is missing, except what `unavailable` says."""
        self._patch(_ffi, "unavailable_reason", lambda: unavailable)
        self._patch(_ffi, "non_hopper_device", lambda: None)

    def has_gpu(self, capability, driver=None):
        """As a machine with a GPU and the kernels built for CUDA 13.0."""
        gpu = SimpleNamespace(
            compute_capability=capability, device_kind="NVIDIA X100", core_count=100
        )
        self.has_extension(ffi_api=(0, 1))
        self._patch(_ffi, "_NOT_REGISTERED", None)
        self._patch(_ffi, "local_cuda_devices", lambda: [gpu])
        self._patch(_ffi, "_driver_cuda_version", lambda: driver)

    def has_extension(self, ffi_api):
        """With an extension built for this FFI version. None of its handlers may be registered."""
        extension = SimpleNamespace(
            build_info=lambda: {"ffi_api": ffi_api, "cudart": 13000},
            handlers=lambda: pytest.fail("registered"),
        )
        self._patch(_ffi, "_C", extension)

    def has_no_gpu(self):
        self.has_sms(_ffi.DEFAULT_SM_COUNT)

    def has_sms(self, count):
        """As on a GPU, or a part of one, with this number of SMs."""
        self._patch(_ffi, "sm_count", lambda: count)

    def cannot_count_sms(self):
        self._patch(_ffi, "sm_count", None)

    runtime_ffi_api = staticmethod(_ffi._runtime_ffi_api)
    register = staticmethod(_ffi._register)
    unavailable_reason = staticmethod(_ffi.unavailable_reason)


@pytest.fixture
def machine(monkeypatch):
    """To change what the library finds on this machine; see `Machine`."""
    machine = Machine(monkeypatch)
    machine.forget()
    yield machine
    machine.forget()


@pytest.fixture
def kernels(machine):
    """Lets programs be lowered with kernels that were not built."""
    machine.takes_kernels()


@pytest.fixture(scope="session")
def h200():
    """A sharding on one H200, for compiling without a GPU."""
    return NamedSharding(lowering.h200_mesh((1,), ("x",)), PartitionSpec())


@pytest.fixture
def compiled_kernels():
    """XLA compiles only calls of handlers that are registered."""
    if _ffi._NOT_REGISTERED is not None:
        lowering.skip_compiling(_ffi._NOT_REGISTERED)
