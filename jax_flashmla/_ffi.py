"""Loads the compiled kernels and registers them with XLA.

The import never raises. If the kernels cannot run (a pure-Python install, another GPU, an old
driver), `unavailable_reason` says why.
"""

import ctypes
import functools
import importlib
import os
import re
from types import ModuleType

import jax
import jaxlib
from jax import export

from ._targets import TARGETS

_C: ModuleType | None
_IMPORT_ERROR: str | None
try:
    _C = importlib.import_module("._C", __package__)
except ImportError as error:  # a pure-Python install, or an extension for another Python
    _C = None
    _IMPORT_ERROR = str(error)
else:
    _IMPORT_ERROR = None

COMPUTE_CAPABILITY = "9.0"
"""That of Hopper GPUs. The kernels use instructions that no other GPU has."""

EXPORT_DISABLED_CHECKS = tuple(map(export.DisabledSafetyCheck.custom_call, TARGETS))
"""Pass this to `jax.export.export` as `disabled_checks`, so that it accepts calls of our kernels.

`jax.export` refuses custom calls that it does not know to be stable. An exported program calls the
kernels by name: the process that runs it must import jax_flashmla.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from jax_flashmla import EXPORT_DISABLED_CHECKS, get_mla_metadata
  >>> make = jax.jit(lambda lengths: get_mla_metadata(lengths, 16, 1)[1])
  >>> lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
  >>> program = jax.export.export(make, disabled_checks=EXPORT_DISABLED_CHECKS)(lengths)
  >>> program.out_avals
  (ShapedArray(int32[3]),)
"""

DEFAULT_SM_COUNT = 132
"""The SM count of an H100 or H200 SXM, used if this machine has no CUDA device."""


def _runtime_ffi_api() -> tuple[int, int] | None:
    """(major, minor) of the FFI that the installed jaxlib has; None if unknown."""
    header = os.path.join(os.path.dirname(jaxlib.__file__), "include/xla/ffi/api/c_api.h")
    try:
        with open(header, encoding="utf-8") as f:
            text = f.read()
    except OSError:
        return None
    major, minor = (
        re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")
    )
    return (int(major[1]), int(minor[1])) if major and minor else None


def _register() -> str | None:
    """Registers the kernels with XLA, or says why it did not."""
    if _C is None:
        return f"jax_flashmla is installed without its compiled extension ({_IMPORT_ERROR})"
    # Do not register handlers that were built for a newer FFI than the runtime's: with them every
    # backend fails to start, the CPU's too.
    built, runtime = tuple(_C.build_info()["ffi_api"]), _runtime_ffi_api()
    if runtime is not None and built > runtime:
        return (
            f"the extension was compiled for XLA FFI {built[0]}.{built[1]}, the installed jaxlib "
            f"{jaxlib.version.__version__} has {runtime[0]}.{runtime[1]}"
        )
    for name, capsule in _C.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA", api_version=1)
    return None


_NOT_REGISTERED = _register()


def local_cuda_devices() -> list[jax.Device]:
    """This process's CUDA devices, [] if JAX has no CUDA backend. Starts the backend."""
    try:
        return list(jax.local_devices(backend="cuda"))
    except RuntimeError:
        return []


@functools.cache
def sm_count() -> int:
    """The SM count of this machine's first CUDA device, DEFAULT_SM_COUNT if there is none.

    It comes from the driver and starts no JAX backend, so it may be called while a function is
    traced. The answer is the same before jax.distributed.initialize and after.
    """
    count = getattr(_C, "sm_count", lambda: None)()
    return DEFAULT_SM_COUNT if count is None else int(count)


@functools.cache
def non_hopper_device() -> str | None:
    """The first local CUDA device that is not a Hopper GPU, in words; None if there is none.

    Also None if no CUDA device is visible, as in lowering for another machine. On that machine
    the handler itself refuses a wrong device.
    """
    for device in local_cuda_devices():
        capability = str(device.compute_capability)
        if capability != COMPUTE_CAPABILITY:
            return f"{device.device_kind} (compute capability {capability})"
    return None


def _driver_cuda_version() -> int | None:
    """The CUDA version of the driver, 1000 * major + 10 * minor, None if unknown."""
    try:
        query = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    version = ctypes.c_int(0)
    return version.value if query(ctypes.byref(version)) == 0 else None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run on this process's devices; None if they can.

    If no CUDA device is visible, only the installation is checked.
    """
    if _NOT_REGISTERED is not None:
        return _NOT_REGISTERED
    if not local_cuda_devices():
        return None
    if (device := non_hopper_device()) is not None:
        return (
            f"the kernels need compute capability {COMPUTE_CAPABILITY}, this machine has {device}"
        )
    assert _C is not None  # else the kernels were not registered
    built, driver = _C.build_info()["cudart"], _driver_cuda_version()
    if driver is not None and driver // 1000 < built // 1000:
        return (
            f"the kernels need a driver for CUDA {built // 1000}, the installed one is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}"
        )
    return None
