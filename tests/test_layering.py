"""Who may import whom (design: no arrow runs back, no circle), read from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"klq_kernels"},
    {"klq_edu.core"},
    {"klq_edu.rlhf", "klq_edu.figures", "klq_edu.terminal"},
    {"klq_edu.worlds"},
    {"klq_edu.course"},
    {"klq_edu.experiment"},
    {"klq_edu.report"},
    {"klq_edu.inspection", "klq_edu.demo", "klq_edu.sweep", "klq_edu.bench", "klq_edu.doctor"},
    {"klq_edu.commands"},
    {"klq_edu.cli"},
]
FLOOR = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = [*(ROOT / "kernels").rglob("*.py"), *(ROOT / "klq_edu").rglob("*.py")]


def part(module: str) -> str:
    """The part of the house a module belongs to: klq_edu.rlhf.loop -> klq_edu.rlhf."""
    return ".".join(module.split(".")[:2]) if module.startswith("klq_edu.") else module.split(".")[0]


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "klq_edu":
            yield from (f"klq_edu.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    base = ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[0] else ROOT
    here = part(".".join(path.relative_to(base).with_suffix("").parts))
    for module in map(part, imported(path)):
        if module in FLOOR and here in FLOOR and module != here:
            assert FLOOR[module] < FLOOR[here], f"{here} must not import {module}"


def test_every_part_of_the_package_has_its_floor():
    parts = {part(f"klq_edu.{p.stem}") for p in (ROOT / "klq_edu").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert parts - {"klq_edu.__init__", "klq_edu.__pycache__"} <= set(FLOOR)
