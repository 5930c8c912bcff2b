"""Imports go one way: core <- models, data <- rl, training <- report <- experiments <- cli."""

import ast
from pathlib import Path

import pytest

import fewstep

SOURCE = Path(fewstep.__file__).parent

ALLOWED = {
    "core": {"core"},
    "models": {"core", "models"},
    "data": {"core", "data"},
    "rl": {"core", "models", "data", "rl"},
    "training": {"core", "models", "data", "training", "fewstep"},
    "report": {"core", "models", "data", "rl", "training", "report", "fewstep"},
    "experiments": {"core", "models", "data", "rl", "training", "report", "experiments", "fewstep"},
    "cli": {"core", "models", "data", "training", "report", "experiments", "cli", "fewstep"},
    "fewstep": {"core", "models"},  # the package's own front, __init__.py
    "__main__": {"cli"},
}


def layer(module: str) -> str:
    """Return the layer of a module of fewstep, given with its dots."""
    first, *rest = module.split(".")
    return rest[0] if rest else first


def imports(tree: ast.AST, package: str) -> set[str]:
    """Return the layers of fewstep that the code imports, wherever in it; `package` holds it."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from fewstep import x` may name a layer or a name of the front.
            modules |= {
                f"fewstep.{a.name}" if source == "fewstep" and a.name in ALLOWED else source
                for a in node.names
            }
    return {layer(m) for m in modules if m.split(".")[0] == "fewstep"}


FILES = {path.relative_to(SOURCE).as_posix(): path for path in sorted(SOURCE.rglob("*.py"))}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    *packages, file = name.removesuffix(".py").split("/")
    own = packages[0] if packages else "fewstep" if file == "__init__" else file
    tree = ast.parse(FILES[name].read_text())
    assert imports(tree, ".".join(["fewstep", *packages])) <= ALLOWED[own]


@pytest.mark.parametrize(
    ("line", "package", "found"),
    [
        ("import torch", "fewstep.core", set()),
        ("from fewstep.data.store import ClassStore", "fewstep.core", {"data"}),
        ("import fewstep.cli.main as m", "fewstep.core", {"cli"}),
        ("from fewstep import maml", "fewstep.core", {"fewstep"}),
        ("from fewstep import training, maml", "fewstep.core", {"training", "fewstep"}),
        ("from ..report import curves", "fewstep.core", {"report"}),
        ("from .. import report", "fewstep.core", {"report"}),
        ("from .tasks import TaskBatch", "fewstep.core", {"core"}),
        ("def f():\n    from fewstep.cli import main", "fewstep.core", {"cli"}),
    ],
)
def test_every_form_of_import_is_seen(line, package, found):
    assert imports(ast.parse(line), package) == found
