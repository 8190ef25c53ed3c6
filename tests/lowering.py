"""Programs for GPUs, made without one: shapes to lower, StableHLO text, H200s to compile for."""

import functools
import importlib.util
import math
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding

from jax_flashmla._targets import TARGETS


def target(name):
    """The FFI target of a handler in cuda/, which must be in the package's list."""
    (found,) = [full for full in TARGETS if full == f"jax_flashmla_{name}"]
    return found


APPEND = target("append_kv")
DECODE = target("dense_decode")
SCHEDULE = target("tile_scheduler")
SCHEDULE_AND_DECODE = target("schedule_and_decode")
SPARSE_DECODE = target("sparse_decode")


PLATFORMS = [
    pytest.param(("cpu", "cuda"), id="cpu-cuda"),
    pytest.param(("cpu", "cuda"), id="cpu-cuda-on-a-gpu", marks=pytest.mark.gpu),
    pytest.param(("cuda",), id="cuda-on-a-gpu", marks=pytest.mark.gpu),
]
"""The platforms for which a program is exported, and the one on which it then runs."""


def struct(shape, dtype=jnp.bfloat16, **options):
    return jax.ShapeDtypeStruct(shape, dtype, **options)


def primitives(function, *arrays):
    """The names of all primitives in a function's jaxpr, inner ones too."""
    return re.findall(r" = ([a-z_0-9]+)[\[ ]", str(jax.make_jaxpr(function)(*arrays)))


def text_for_cuda(function, *structs):
    fresh = jax.jit(lambda *args: function(*args))  # JAX remembers how it lowered a function
    return fresh.trace(*structs).lower(lowering_platforms=("cuda",)).as_text()


def custom_calls(text):
    """The lines of our custom calls, by target."""
    lines = re.findall(r"^.*stablehlo\.custom_call @(jax_flashmla_\w+)(.*)$", text, re.MULTILINE)
    targets = {target for target, _ in lines}
    return {target: [rest for t, rest in lines if t == target] for target in targets}


PASSED_ON = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "call"}
"""Operations in the result of `operations_on` that neither write nor copy."""


def operations_on(elements, hlo):
    """The names of the operations whose result has this number of elements."""
    names = set()
    for result, name in re.findall(
        r"^ *(?:ROOT )?%\S+ = (.*?) ([a-z][a-z0-9-]*)\(", hlo, re.MULTILINE
    ):
        shapes = re.findall(r"\w+\[([\d,]+)\]", result)
        if elements in [math.prod(map(int, shape.split(","))) for shape in shapes]:
            names.add(name)
    return names


def copies_in(hlo, shape=None):
    """The instructions that copy an array of this shape, or of any with an axis."""
    dims = r"\d[\d,]*" if shape is None else ",".join(map(str, shape))
    return re.findall(rf"= \(?\w+\[{dims}\].*? copy(?:-start)?\(", hlo)


def cpu_mesh(sizes, names, types=AxisType.Auto):
    """A mesh of CPU devices."""
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(types,) * len(sizes))


def skip_compiling(reason):
    """Skips a test that compiles for an H200, or fails it where all of them must run."""
    if os.environ.get("JAX_FLASHMLA_REQUIRE_H200_COMPILER") == "1":
        pytest.fail(f"JAX_FLASHMLA_REQUIRE_H200_COMPILER=1, but {reason}", pytrace=False)
    pytest.skip(f"cannot compile for an H200: {reason}")


@functools.cache
def h200_mesh(sizes, names):
    """A mesh of H200s, for compiling without a GPU."""
    if importlib.util.find_spec("jax_plugins") is None or (
        importlib.util.find_spec("jax_plugins.xla_cuda13") is None
    ):
        skip_compiling("the package jax-cuda13-plugin is missing")
    config = Path(__file__).with_name("h200_target_config.pbtxt").read_text(encoding="utf-8")
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=f"1x1x{int(np.prod(sizes))}"
    )
    return topologies.make_mesh(topology, sizes, names)


def placed(structs, mesh, *specs):
    return [
        struct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(structs, specs, strict=True)
    ]
