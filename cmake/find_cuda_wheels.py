"""Prints the root of the CUDA 13 compiler installed as Python wheels, or nothing."""

import importlib.util
from pathlib import Path

# What it takes to compile and link: a root that lacks one of them is no compiler.
REQUIRED = (
    "bin/nvcc",
    "bin/ptxas",
    "nvvm/bin/cicc",
    "include/crt/host_config.h",
    "include/cuda_runtime_api.h",
    "include/cccl/nv/target",
    "lib/libcudart_static.a",
)


def compiler_root() -> Path | None:
    """The first nvidia/cu13 folder on the import path that holds a whole compiler."""
    namespace = importlib.util.find_spec("nvidia")
    if namespace is None:
        return None
    roots = (Path(path) / "cu13" for path in namespace.submodule_search_locations or ())
    return next((root for root in roots if all((root / name).exists() for name in REQUIRED)), None)


if __name__ == "__main__":
    print(compiler_root() or "")
