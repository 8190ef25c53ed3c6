"""Imports and includes go one way: from an op to what ops share, never back or to another op."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Lowest first. A module may import only from lower layers. Modules that are not named are ops.
PYTHON_LAYERS = (
    {"_targets", "_constants"},
    {"_checks"},
    {"_ffi"},
    {"reference._math"},
    {"reference._attention"},
    {"reference.*"},  # one module an op
    {"_op"},
    {"schedule"},  # an op that others share
    {"_split_kv"},
    {"<op>"},
    {"decode"},  # the function of two ops
    {"__init__"},
)
# Folders of cuda/; a file also includes its own folder's. Folders that are not named are ops.
CUDA_LAYERS = ({"host", "sm90"}, {"mla"}, {"split_kv"}, {"<op>"})


def layer_of(name, layers):
    """The number of a module's or a folder's layer, counted from the lowest."""
    if name.startswith("_") and not any(name in layer for layer in layers):
        pytest.fail(f"{name} is in none of the layers of {__file__}: add it to one")
    package, _, _ = name.partition(".")
    for names in (name, f"{package}.*", "<op>"):
        for i, layer in enumerate(layers):
            if names in layer:
                return i
    raise AssertionError(name)


def imports_of(name, text):
    """The modules of the package that a module imports, by their names inside the package."""
    package = name.rpartition(".")[0]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            assert not [x.name for x in node.names if x.name.startswith("jax_flashmla")], name
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package if node.level == 1 else ""
            source = ".".join(filter(None, (base, node.module)))
            if node.module is None or source == "reference":  # these import modules by name
                yield from (".".join(filter(None, (source, x.name))) for x in node.names)
            else:
                yield source


def python_faults(modules):
    """Imports that do not go downwards, of {name in the package: text}."""
    return [
        f"{name} imports {other}"
        for name, text in modules.items()
        for other in imports_of(name, text)
        if layer_of(other, PYTHON_LAYERS) >= layer_of(name, PYTHON_LAYERS)
    ]


def cuda_faults(files):
    """Includes that go to another folder which is not lower, of {path in cuda/: text}."""
    faults = []
    for path, text in files.items():
        folder = path.split("/")[0]
        for included in re.findall(r'^ *#include "(.*)"', text, re.MULTILINE):
            other, slash, _ = included.partition("/")
            if not slash or other in (folder, "xla"):  # of this folder, or XLA's
                continue
            if layer_of(other, CUDA_LAYERS) >= layer_of(folder, CUDA_LAYERS):
                faults.append(f"{path} includes {included}")
    return faults


def texts(root, pattern):
    return {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob(pattern))
    }


def package_modules():
    """{name: text}, such as "reference.append"; of the references' package only its modules."""
    found = texts(ROOT / "jax_flashmla", "*.py")
    names = {path: path.removesuffix(".py").replace("/", ".") for path in found}
    return {names[path]: text for path, text in found.items() if path != "reference/__init__.py"}


def test_imports_go_downwards():
    modules = package_modules()
    assert {"_op", "append", "reference.append", "__init__"} <= modules.keys()
    assert python_faults(modules) == []


def test_includes_go_downwards():
    files = {path: text for path, text in texts(ROOT / "cuda", "*.*").items() if "/" in path}
    assert {"append", "dense_decode", "split_kv"} <= {path.split("/")[0] for path in files}
    assert cuda_faults(files) == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("append", "from ._op import Op", None),
        ("append", "from .reference import append as reference", None),
        ("append", "from .dense_decode import flash_mla_with_kvcache", "dense_decode"),
        ("schedule", "from .append import append_kv_cache", "append"),
        ("decode", "from .sparse_decode import sparse_decode_op", None),
        ("sparse_decode", "from .dense_decode import flash_mla_with_kvcache_op", "dense_decode"),
        ("_op", "from . import schedule", "schedule"),
        ("_ffi", "from ._op import Op", "_op"),
        ("reference.append", "from ._math import ceil_div", None),
        ("reference.append", "from .._checks import check_array", None),
        ("reference.append", "from .. import append", "append"),
        ("reference.append", "from .dense_decode import decode", "reference.dense_decode"),
        ("reference.append", "from .._op import Op", "_op"),
    ],
)
def test_wrong_imports_are_seen(name, line, fault):
    assert python_faults({name: line}) == ([f"{name} imports {fault}"] if fault else [])


@pytest.mark.parametrize(
    ("path", "included", "wrong"),
    [
        ("append/handler.cu", "host/ffi.h", False),
        ("append/handler.cu", "kernel.cuh", False),
        ("dense_decode/kernel.cuh", "dense_decode/loader.cuh", False),
        ("dense_decode/kernel.cuh", "append/kernel.cuh", True),
        ("split_kv/work.cuh", "dense_decode/block.cuh", True),
        ("split_kv/work.cuh", "mla/shapes.cuh", False),
        ("mla/shapes.cuh", "split_kv/schedule.cuh", True),
        ("sm90/cta.cuh", "mla/shapes.cuh", True),
        ("sm90/cta.cuh", "host/ffi.h", True),
        ("host/ffi.h", "xla/ffi/api/ffi.h", False),
    ],
)
def test_wrong_includes_are_seen(path, included, wrong):
    faults = cuda_faults({path: f'#pragma once\n#include "{included}"\n'})
    assert faults == ([f"{path} includes {included}"] if wrong else [])
