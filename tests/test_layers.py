"""No module of the package imports a higher one."""

import ast
from pathlib import Path

import jax_flashmla

PACKAGE = Path(jax_flashmla.__file__).parent
# Each module may import from the lines above its own. An op that needs another one comes after it.
LAYERS = [
    {"_targets", "_constants"},
    {"_checks"},
    {"_ffi"},
    {"_op"},
    {"reference", "reference._math"},
    {"reference.schedule", "reference.dense_decode", "reference.append"},
    {"schedule", "append", "cost", "merge"},
    {"dense_decode"},
    {"jax_flashmla"},
]


def modules():
    """Each module's name within the package, and its file."""
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix("__init__").removesuffix(".") or "jax_flashmla", path


def imported(name, path):
    """The modules of the package that a module imports."""
    names = {other for other, _ in modules()}
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [] if package == ["jax_flashmla"] else package
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("jax_flashmla") for alias in node.names), path
        if not isinstance(node, ast.ImportFrom):
            continue
        assert not (node.module or "").startswith("jax_flashmla"), f"{path}: import it as from ."
        if node.level == 0:
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        base = ".".join(part for part in base if part)
        for alias in node.names:
            inner = f"{base}.{alias.name}" if base else alias.name
            yield inner if inner in names else base


def test_imports_go_down():
    level = {name: i for i, names in enumerate(LAYERS) for name in names}
    assert set(level) == {name for name, _ in modules()}
    found = {(name, other) for name, path in modules() for other in imported(name, path)}
    assert {("dense_decode", "schedule"), ("reference.schedule", "_constants")} <= found
    assert [pair for pair in sorted(found) if level[pair[0]] <= level[pair[1]]] == []
