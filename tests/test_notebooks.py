"""Modules of the package may be reloaded, as a notebook's %autoreload does, or imported again.

Each test runs in its own process, because a reload changes modules that other tests use.
"""

from pathlib import Path

import fresh_process
import pytest

import jax_flashmla

PACKAGE = Path(jax_flashmla.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)

SETUP = """
import importlib, sys, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp
from jax import export
import jax_flashmla as fm

lengths = jnp.array([70, 3], jnp.int32)

def step(fm, metadata, num_splits):
    q, k_cache = jnp.ones((2, 1, 4, 8)), jnp.ones((4, 64, 1, 8))
    xla = {"implementation": "xla"}
    k_cache = fm.append_kv_cache(k_cache, jnp.zeros((1, 8)), jnp.array([1], jnp.int32), **xla)
    table = jnp.array([[0, 1], [2, 3]], jnp.int32)
    return fm.flash_mla_with_kvcache(q, k_cache, table, lengths, 4, metadata, num_splits, **xla)

def make(fm):
    return fm.get_mla_metadata(lengths, 4, 1, num_sms=3)

def check(fm, metadata, num_splits):
    assert isinstance(metadata, fm.TileSchedulerMetadata), type(metadata)
    out, lse = jax.eval_shape(lambda *schedule: step(fm, *schedule), metadata, num_splits)
    assert (out.shape, lse.shape) == ((2, 1, 4, 4), (2, 4, 1))
    assert len(jax.tree.leaves(metadata)) == 2

def check_export(metadata):
    program = export.export(jax.jit(lambda schedule: schedule))(metadata)
    again = export.deserialize(program.serialize()).call(metadata)
    assert jax.tree.structure(again) == jax.tree.structure(metadata)

old = make(fm)
check(fm, *old)
"""


def run(code):
    fresh_process.finish(fresh_process.start(SETUP + code))


CHECK_BOTH = """
for schedule in (old, make(fm)):
    check(fm, *schedule)
    check_export(schedule[0])
"""


@pytest.mark.parametrize("cleared", [False, True])
def test_each_module_reloaded(cleared):
    """Old and new schedules work. %autoreload empties a module before it reloads it."""
    clear = """
    names = {k: vars(module)[k] for k in ("__name__", "__loader__", "__spec__", "__path__")
             if k in vars(module)}
    vars(module).clear()
    vars(module).update(names)
"""
    run(
        f"""
for name in {MODULES}:
    module = importlib.import_module(name)  # the package need not import it
    {clear if cleared else ""}
    importlib.reload(module)
    {CHECK_BOTH.replace(chr(10), chr(10) + "    ")}
"""
    )


def test_all_modules_reloaded_twice():
    run(
        f"""
for _ in range(2):
    for name in {MODULES}:
        importlib.reload(importlib.import_module(name))
{CHECK_BOTH}
    step(fm, *old)
"""
    )


def test_package_imported_again():
    run(
        f"""
for name in [name for name in sys.modules if name.split(".")[0] == "jax_flashmla"]:
    if not name.endswith("._C"):
        del sys.modules[name]
import jax_flashmla as fm
{CHECK_BOTH}
"""
    )


def test_modules_are_found():
    assert {"jax_flashmla", "jax_flashmla.schedule", "jax_flashmla.reference._math"} <= set(MODULES)
