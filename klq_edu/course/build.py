"""`klq course build`: one text source per notebook -> full (executed), student and HTML editions, and the map of all.

Sources are jupytext percent files. Lines between `# BEGIN SOLUTION` and `# END SOLUTION` are a hole in the student
edition, cells tagged "solution" are left out of it, and `<!-- hints 1.2 -->` becomes that exercise's folded hints.
Exercises of the full edition are tagged, so that `pytest --nbval-lax` compares their verdicts.
"""

import hashlib
import os
import re
import tempfile
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import jupytext
import nbformat
from nbclient import execute
from nbformat import NotebookNode

from klq_edu.course import html
from klq_edu.course.chapters import PARTS, Chapter, load, load_all
from klq_edu.course.chapters.c00_map_and_doctor import GLOSSARY, NOTATION, map_widget
from klq_edu.course.display import FRAMES, TEMPLATES, svg
from klq_edu.course.exercises import NOT_ATTEMPTED, Exercise

SOLUTION = re.compile(r"^( *)# BEGIN SOLUTION\n(.*?)\n *# END SOLUTION$", re.DOTALL | re.MULTILINE)
HOLE = rf'\1raise NotImplementedError("{NOT_ATTEMPTED}")  # your code here'
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
METADATA = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
EQUATION = re.compile(r"\$\$.+?\$\$", re.DOTALL)
PACE = {"words": 130, "lines": 12, "figure": 2, "open": 5}  # words, lines a minute; minutes: chosen, not measured
OVERVIEWS = {  # page of the whole course -> its template
    "README.md": "map.md.j2", "html/index.html": "index.html.j2", "html/cheat_sheet.html": "cheat_sheet.html.j2"
}  # fmt: skip


def build_all(folder: Path, only: tuple[str, ...] = ()) -> None:
    """Write every edition of the chosen notebooks (all by default), and the pages about all."""
    for chapter in chosen(only):
        print(f"{chapter.name} …", flush=True)
        build(folder, chapter)
    for page in OVERVIEWS:
        (folder / page).write_text(overview(folder, page), encoding="utf-8")


def overview(folder: Path, page: str) -> str:
    """A page of OVERVIEWS, of what the chapters say: questions, functions, minutes, equations, exercises, notation."""
    found = [(c, equations(_source(folder, c))) for c in load_all()]
    rows = [(c, minutes(folder, c), len(known)) for c, known in found]
    known = {number: (c, tex) for c, its in found for number, tex in its.items()}
    parts = {part: [c for c, *_ in rows if c.part == part] for part in PARTS}
    about = {"rows": rows, "parts": parts, "pace": PACE, "glossary": GLOSSARY, "map": map_widget(), "svg": svg}
    about |= {"notation": NOTATION, "equation": lambda number: html.formula(number, *known[number])}
    return TEMPLATES.get_template(OVERVIEWS[page]).render(about) + "\n"


def minutes(folder: Path, chapter: Chapter) -> int:
    """What a reader needs, by PACE (of prose: half a novel's); a formula is a word. ValueError for a typed number."""
    cells = [c for c in _source(folder, chapter).cells if "solution" not in c.metadata.get("tags", [])]
    prose, code = ("\n".join(c.source for c in cells if c.cell_type == kind) for kind in ("markdown", "code"))
    if re.search(r"\*Time:\*\s*(?!<!-- minutes -->)\S", prose):
        raise ValueError(f"{chapter.name}: write *Time:* <!-- minutes --> minutes, the builder knows how many")
    words = re.findall(r"\S*\w\S*", re.sub(r"\$[^$]+\$", "x", EQUATION.sub("", prose)))
    time = len(words) / PACE["words"] + len(re.findall(r"\S.*", SOLUTION.sub(HOLE, code))) / PACE["lines"]
    time += len(EQUATION.findall(prose)) + prose.count("**Predict") + PACE["open"] * prose.count("### Open question")
    time += PACE["figure"] * len(re.findall(r"^ *(?:explore|show|source)\(", code, re.MULTILINE))
    return 5 * round((time + sum(e.minutes for e in chapter.exercises.values())) / 5)


def chosen(only: tuple[str, ...]) -> list[Chapter]:
    """These chapters, or all; ValueError for a number that is none."""
    return [load(number) for number in only] or load_all()


def build(folder: Path, chapter: Chapter) -> None:
    """The three editions of one notebook; nothing is written unless every cell ran and every exercise passed."""
    full, student = editions(folder, chapter)
    with tempfile.TemporaryDirectory() as frames:
        own = {FRAMES: frames, "KLQ_PROGRESS": f"{frames}/progress.json", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        with patch.dict(os.environ, own):
            execute(full, cwd=str(folder), timeout=300, kernel_name="python3", record_timing=False)
        full.metadata = nbformat.from_dict(METADATA)
        if failed := failures(full, chapter):
            raise RuntimeError("\n".join([f"{chapter.name} is not written:", *failed]))
        page = html.page(full, chapter, load_all(), Path(frames))
    for path, text in (
        (folder / f"{chapter.name}.ipynb", nbformat.writes(full) + "\n"),
        (folder / "student" / f"{chapter.name}.ipynb", nbformat.writes(student) + "\n"),
        (folder / "html" / f"{chapter.name}.html", page),
    ):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


def editions(folder: Path, chapter: Chapter) -> tuple[NotebookNode, NotebookNode]:
    """The full and the student notebook of a chapter as their source has them, without outputs."""
    cells, time = _source(folder, chapter).cells, str(minutes(folder, chapter))
    return tuple(_edition(cells, chapter.exercises, time, student) for student in (False, True))


def _source(folder: Path, chapter: Chapter) -> NotebookNode:
    return jupytext.read(folder / "src" / f"{chapter.name}.py", fmt="py:percent")


def failures(full: NotebookNode, chapter: Chapter) -> list[str]:
    """Exercises whose verdict in an executed notebook is not a pass, or that have none."""
    outputs = (o for cell in full.cells if cell.cell_type == "code" for o in cell.outputs)
    said = "".join(o.text for o in outputs if o.output_type == "stream")
    bad = [f"Exercise {n}: no verdict" for n in chapter.exercises if f" Exercise {n}" not in said]
    return bad + re.findall(r"^[✘·] Exercise .*$", said, re.MULTILINE)


def drift(folder: Path, chapter: Chapter) -> list[Path]:
    """Generated notebooks whose cells (source, id, kind) are not those of their source."""

    def cells(notebook: NotebookNode) -> list[tuple]:
        return [(cell.cell_type, cell.id, cell.source) for cell in notebook.cells]

    paths = (folder / edition / f"{chapter.name}.ipynb" for edition in ("", "student"))
    pairs = zip(paths, editions(folder, chapter), strict=True)
    return [path for path, fresh in pairs if not path.exists() or cells(nbformat.read(path, 4)) != cells(fresh)]


def equations(notebook: NotebookNode) -> dict[str, str]:
    """The displayed equations by number, in order, in TeX; ValueError for one without a number."""
    found = [m for cell in notebook.cells if cell.cell_type == "markdown" for m in EQUATION.findall(cell.source)]
    if bare := [equation for equation in found if not html.TAG.search(equation)]:
        raise ValueError(f"a displayed equation without \\tag: {bare[0]}")
    return {html.TAG.search(equation)[1]: html.TAG.sub("", equation.strip("$")) for equation in found}


def _edition(cells: list[NotebookNode], exercises: dict[str, Exercise], time: str, student: bool) -> NotebookNode:
    made, seen = [], Counter()
    for cell in cells:
        tags = list(cell.metadata.get("tags", []))
        if student and "solution" in tags:
            continue
        text = SOLUTION.sub(HOLE if student else r"\2", cell.source).replace("<!-- minutes -->", time)
        text = re.sub(r"<!-- hints ([\d.]+) -->", lambda m: hints(exercises[m.group(1)]), text)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        tags += ["nbval-check-output"] if not student and "check.exercise(" in text else []
        tags += ["answer"] if not student and SOLUTION.search(cell.source) else []
        new = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        made.append(new(text, id=f"{digest}-{seen[digest]}", metadata={"tags": tags} if tags else {}))
        seen[digest] += 1
    return nbformat.v4.new_notebook(cells=made, metadata=METADATA)


def hints(exercise: Exercise) -> str:
    """Three folded hints, and what to expect of the exercise."""
    stars = "●" * exercise.level + "○" * (3 - exercise.level)
    parts = [f"*Difficulty {stars}, about {exercise.minutes} minutes.*"]
    parts += [f"<details><summary>Hint {i}</summary>\n\n{x}\n\n</details>" for i, x in enumerate(exercise.hints, 1)]
    return "\n\n".join(parts)
