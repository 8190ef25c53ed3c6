"""Facts that stand in several of the project's files are the same in all of them."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import jax_flashmla

ROOT = Path(__file__).parent.parent


def read(path):
    return (ROOT / path).read_text("utf-8")


def project():
    return tomllib.loads(read("pyproject.toml"))["project"]


def test_pre_commit_uses_the_linters_of_make_lint():
    linters = dict(pin.split("==") for pin in project()["optional-dependencies"]["lint"])
    used = re.findall(r"\[(ruff|clang-format)==([\d.]+)\]", read(".pre-commit-config.yaml"))
    assert {name for name, _ in used} == {"ruff", "clang-format"}
    assert [linters[name] for name, _ in used] == [version for _, version in used]


def test_the_version_is_the_same_everywhere():
    version = project()["version"]
    assert jax_flashmla.__version__ == version
    assert re.findall(r"^## (\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.MULTILINE)[0] == version


def test_the_oldest_jax_is_the_same_everywhere():
    (oldest,) = [line.split(">=")[1] for line in project()["dependencies"] if "jax" in line]
    if not (ROOT / ".github").exists():
        pytest.skip("an sdist has no workflows")
    assert read(".github/oldest_jax.txt").split() == [f"jax=={oldest}", f"jaxlib=={oldest}"]


def test_ci_runs_every_supported_python():
    if not (ROOT / ".github").exists():
        pytest.skip("an sdist has no workflows")
    (line,) = re.findall(r"python: (\[.*\])\n        jax:", read(".github/workflows/ci.yml"))
    classifiers = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert re.findall(r"3\.\d+", line) == classifiers


def test_findings_are_listed_and_run_in_bash():
    scripts = {path.name for path in (ROOT / "findings").glob("*.sh")}
    assert scripts == set(re.findall(r"\(([\w.]+\.sh)\)", read("findings/README.md")))
    for name in scripts:
        subprocess.run(["bash", "-n", ROOT / "findings" / name], check=True)
