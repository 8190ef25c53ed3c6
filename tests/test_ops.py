"""The table of ops has every kernel, and a new op needs a new row and no other change.

`toy_op` holds the files of a made-up op, scale_rows. They are added to a copy of the package and of
the tests as CONTRIBUTING.md says. A handler is not compiled.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path

import ops
import pytest
import sanitizer_sample

from jax_flashmla import _ffi
from jax_flashmla._targets import TARGETS

ROOT = Path(__file__).parent.parent
TOY = Path(__file__).with_name("toy_op")
GENERIC = [
    f"tests/test_{name}.py"
    for name in (
        "aot", "derivatives", "donation", "eager", "export", "implementation", "loops", "lowering",
        "sharding", "vmap",
    )
]  # fmt: skip


def test_every_target_has_a_row():
    assert {target for row in ops.ROWS for target in row.targets} == set(TARGETS)


def test_rows_are_told_apart_by_name():
    assert len({row.name for row in ops.ROWS}) == len(ops.ROWS)


@ops.each()
def test_axes_have_sizes(row):
    for array in (*row.operands, *row.results):
        assert set(array.axes.split()) <= row.sizes.keys(), array
    names = {axis for operand in row.operands for axis in operand.axes.split()}
    assert {row.batch, *row.symbolic, *(x for axes in row.splits.values() for x in axes)} <= names
    assert set(row.caches) <= set(row.names)


@pytest.mark.usefixtures("quick_compile")
@ops.each_run()
def test_one_call(row, implementation):
    """The call that all other tests build upon, for several seeds."""
    for seed in range(3):
        results = row.run(*row.arrays(seed), implementation=implementation)
        for x, result in zip(results, row.results, strict=True):
            assert x.shape == tuple(row.sizes[axis] for axis in result.axes.split())
            assert x.dtype == result.dtype
        row.check(results, row.example(seed))


@pytest.mark.usefixtures("quick_compile")
@ops.each(lambda row: row.samples)
def test_samples_for_the_sanitizer(row):
    """A few of them, with the reference."""
    few = [sample for sample in row.samples if len(sample.args[0]) < 4][:2]
    assert few
    for garbage in (False, True):
        sanitizer_sample.run_row(row, "xla", garbage, few)


@ops.each(lambda row: row.cost)
def test_cost_of_one_call(row):
    """In proportion to the sequences, under XLA's names."""
    one, two = (
        row.cost(*row.structs(b=b), [100] * b) for b in (row.sizes["b"], 2 * row.sizes["b"])
    )
    assert one.keys() == {"flops", "transcendentals", "bytes accessed"}
    assert two == {name: 2 * value for name, value in one.items()}


# A dry run of adding an op.


def add_scale_rows(copy):
    """Follows the steps in a copy of the repository."""
    for folder in ("jax_flashmla", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "toy_op")
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    if _ffi._C is not None:  # an editable install keeps it apart from the modules
        shutil.copy(_ffi._C.__file__, copy / "jax_flashmla")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copy(TOY / "reference.py", copy / "jax_flashmla/reference/scale_rows.py")
    shutil.copy(TOY / "scale_rows.py", copy / "jax_flashmla/scale_rows.py")
    targets = copy / "jax_flashmla/_targets.py"
    text, count = re.subn(
        r"\n\)", '\n    "jax_flashmla_scale_rows",\n)', targets.read_text("utf-8")
    )
    assert count == 1
    targets.write_text(text, "utf-8")
    with open(copy / "tests/ops.py", "a", encoding="utf-8") as table:
        table.write((TOY / "row.py").read_text("utf-8"))


def run_tests_of_scale_rows(copy, *files):
    """{test: "passed" or "failed"} of the tests that the row makes, by their function's name."""
    # -S, and the installed packages by their path: an editable install must not be found before the
    # copy.
    command = [sys.executable, "-S", "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    path = os.pathsep.join([str(copy), sysconfig.get_path("purelib")])
    environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_FLASHMLA_REQUIRE_GPU", None)
    done = subprocess.run(
        [*command, "-rA", "-q", "-m", "not gpu", "-k", "scale-rows", *files],
        cwd=copy, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    outcomes = re.findall(r"^(PASSED|FAILED|SKIPPED|ERROR) \S*::(\w+)", done.stdout, re.MULTILINE)
    assert outcomes, done.stdout + done.stderr
    return {state: Counter(test for s, test in outcomes if s == state) for state, _ in outcomes}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    copy = tmp_path_factory.mktemp("repository")
    add_scale_rows(copy)
    return copy


def test_a_row_brings_all_tests(copy):
    outcomes = run_tests_of_scale_rows(copy, *GENERIC, "tests/test_ops.py", "tests/test_layers.py")
    assert outcomes.keys() <= {"PASSED", "SKIPPED"}
    names = outcomes["PASSED"].keys()
    for file in set(GENERIC) - {"tests/test_donation.py"}:  # the op updates nothing in place
        here = re.findall(r"^def (test_\w+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)
        assert names & set(here), f"nothing of {file}"


def test_a_wrong_batching_rule_of_a_new_op_is_seen(copy):
    module = copy / "jax_flashmla/scale_rows.py"
    right = module.read_text("utf-8")
    assert "factors.reshape(-1)" in right
    module.write_text(right.replace("factors.reshape(-1)", "factors.T.reshape(-1)"), "utf-8")
    try:
        outcomes = run_tests_of_scale_rows(copy, "tests/test_vmap.py")
    finally:
        module.write_text(right, "utf-8")
    assert set(outcomes["FAILED"]) == {
        "test_vmap_gives_what_a_loop_gives", "test_nested_vmaps_give_what_loops_give"
    }  # fmt: skip
