"""Loads the compiled kernels and registers them with XLA; importable where there are none.

The import never fails and never raises: a pure-Python install, a machine without a GPU and a
driver that is too old all leave a reason behind, which `unavailable_reason` gives.
"""

import ctypes
import functools
import importlib
import os
import re

import jax
import jaxlib
from jax import export

from ._targets import TARGETS

try:
    _C = importlib.import_module("._C", __package__)
except ImportError as error:  # a pure-Python install, or an extension for another Python
    _C = None
    _IMPORT_ERROR = str(error)
else:
    _IMPORT_ERROR = None

COMPUTE_CAPABILITY = "9.0"
"""The kernels use instructions that only this compute capability (Hopper) has."""

EXPORT_DISABLED_CHECKS = tuple(map(export.DisabledSafetyCheck.custom_call, TARGETS))
"""What `jax.export.export` needs as its `disabled_checks`.

It refuses programs with calls that it does not know to be stable, and these let the kernels pass.
An exported program calls the kernels by name: whoever runs it imports a jax_flashmla that has them.
"""


def _runtime_ffi_api() -> tuple[int, int] | None:
    """(major, minor) of the FFI that the installed jaxlib speaks, None where unknown."""
    header = os.path.join(os.path.dirname(jaxlib.__file__), "include/xla/ffi/api/c_api.h")
    try:
        with open(header, encoding="utf-8") as f:
            text = f.read()
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return (int(found[0][1]), int(found[1][1])) if all(found) else None


def _register() -> str | None:
    """Registers the kernels with XLA, or says why it did not."""
    if _C is None:
        return f"jax_flashmla is installed without its compiled extension ({_IMPORT_ERROR})"
    # A handler built for a newer FFI than the runtime's makes every backend fail at start, the
    # CPU's too: it must not even be offered.
    built, runtime = tuple(_C.build_info()["ffi_api"]), _runtime_ffi_api()
    if runtime is not None and built > runtime:
        return (
            f"the extension was compiled for XLA FFI {built[0]}.{built[1]}, the installed jaxlib "
            f"{jaxlib.__version__} has {runtime[0]}.{runtime[1]}"
        )
    for name, capsule in _C.handlers().items():
        jax.ffi.register_ffi_target(name, capsule, platform="CUDA", api_version=1)
    return None


_NOT_REGISTERED = _register()


def local_cuda_devices() -> list[jax.Device]:
    """This process's CUDA devices; none on a machine where JAX has no CUDA backend."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


@functools.cache
def other_device() -> str | None:
    """The first local CUDA device that is not a Hopper GPU, in words; None where there is none.

    With no CUDA device at all (lowering for another machine) the answer is None too: there the
    handler itself refuses a wrong device.
    """
    for device in local_cuda_devices():
        capability = str(device.compute_capability)
        if capability != COMPUTE_CAPABILITY:
            return f"{device.device_kind} (compute capability {capability})"
    return None


def _driver_cuda_version() -> int | None:
    """The CUDA version of the driver, 1000 * major + 10 * minor, None where unknown."""
    try:
        query = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    version = ctypes.c_int(0)
    return version.value if query(ctypes.byref(version)) == 0 else None


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run on this process's devices; None where they can.

    With no CUDA device visible, only what the installation lacks counts.
    """
    if _NOT_REGISTERED is not None:
        return _NOT_REGISTERED
    if not local_cuda_devices():
        return None
    if (device := other_device()) is not None:
        return (
            f"the kernels need compute capability {COMPUTE_CAPABILITY}, this machine has {device}"
        )
    built, driver = _C.build_info()["cudart"], _driver_cuda_version()
    if driver is not None and driver // 1000 < built // 1000:
        return (
            f"the kernels need a driver for CUDA {built // 1000}, the installed one is for CUDA "
            f"{driver // 1000}.{driver % 1000 // 10}"
        )
    return None
