"""Who may import whom (design: no arrow runs back, no circle), read from the source, imports inside functions too."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"klq_kernels"},
    {"klq_edu.core", "klq_edu.machine"},
    {"klq_edu.files", "klq_edu.figures"},
    {"klq_edu.rlhf"},
    {"klq_edu.worlds"},
    {"klq_edu.bench", "klq_edu.course"},
    {"klq_edu.app"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
PACKAGES = {"klq_kernels": ROOT / "kernels", "klq_edu": ROOT}


def part(module: str) -> str:
    """The part of the house a module belongs to: klq_edu.rlhf.loop -> klq_edu.rlhf."""
    return ".".join(module.split(".")[: 2 if module.startswith("klq_edu.") else 1])


def modules():
    """(module, its package, its source) of every file."""
    for package, base in PACKAGES.items():
        for path in sorted((base / package).rglob("*.py")):
            *parents, name = path.relative_to(base).with_suffix("").parts
            module = ".".join(parents if name == "__init__" else (*parents, name))
            yield module, ".".join(parents), path.read_text(encoding="utf-8")


def imported(source: str, package: str):
    """(line, what) for all that is imported: `from klq_edu import a, b` gives klq_edu.a and klq_edu.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield node.lineno, module if alias.name.startswith("__") else f"{module}.{alias.name}"


def circle(files) -> list[str]:
    """A circle of modules that import each other, inside functions too; empty if there is none.

    What is imported by name (the chapters, by `load`) is not seen, nor that a module's package is imported before it.
    """
    files = {module: (package, source) for module, package, source in files}
    graph = {}
    for module, (package, source) in files.items():
        names = [name for _, name in imported(source, package)]
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys()
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def violations(source: str, module: str, package: str):
    """What is wrong with this module: it has no floor, or imports from its own floor or above."""
    here = part(module)
    if here not in FLOOR and module != "klq_edu":
        yield f"{module} belongs to no floor"
    for line, name in imported(source, package):
        there = part(name)
        if there.startswith("klq_") and there not in (here, "klq_edu") and FLOOR.get(there, 99) >= FLOOR.get(here, 0):
            yield f"{module}, line {line}: {here} must not import {there}"


def test_imports_point_downwards():
    found = [text for module, package, source in modules() for text in violations(source, module, package)]
    assert not found, "\n".join(found)


def test_no_modules_import_each_other_in_a_circle():
    assert not circle(modules())


@pytest.mark.parametrize("back", ["from klq_edu.course import build", "def f():\n    from .build import editions"])
def test_a_circle_is_seen(back):
    """html is what build builds with: if html asked build for something, which of them is read first would matter."""
    files = [(m, p, s + f"\n{back}\n" if m == "klq_edu.course.html" else s) for m, p, s in modules()]
    assert set(circle(files)) == {"klq_edu.course.html", "klq_edu.course.build"}


def test_every_way_of_writing_an_import_is_seen():
    ways = [
        "import klq_edu.bench.run", "import os, klq_edu.bench as b", "from klq_edu.bench import run",
        "from klq_edu import bench", "from ..bench import run", "from .. import bench", "from klq_edu.attic import x",
        "def f():\n    import klq_edu.bench", "if True:\n    from klq_edu import figures, bench",
    ]  # fmt: skip
    fine = ["import klq_kernels.ops", "from klq_edu.core import tree", "from . import x", "from .. import __version__"]
    seen = [way for way in ways + fine if list(violations(way, "klq_edu.rlhf.loop", "klq_edu.rlhf"))]
    assert seen == ways
