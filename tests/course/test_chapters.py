"""A chapter's data stand in its module alone: a new notebook is that module and its source, and nothing else."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from klq_edu.course import build, chapters
from klq_edu.course.chapters import c00_map_and_doctor as c00
from klq_edu.course.chapters import load, load_all

SOURCES = Path(__file__).parents[2] / "notebooks" / "src"
CHAPTER = """
from klq_edu.course.chapters import Chapter
from klq_edu.course.exercises import Exercise, Mistake


def double(x):
    return 2 * x


EXERCISE = Exercise(
    "98.1", "Double it", 1, 1, double, lambda g: (g.initial_seed() % 7 + 1.0,),
    (Mistake("square", lambda x: x**2, "you squared it."),), ("a", "b", "c"),
)
CHAPTER = Chapter(
    "98", "toy", "A toy", "What is new?", {part!r}, "§9", ("math.tau",),
    needs={needs}, place={place}, short="a toy", exercises={{"98.1": EXERCISE}},
)
"""
SOURCE = """# %% [markdown]
# # 98 · A toy
# $$1 + 1 = 2 \\tag{{98.1}}$$

# %%
from klq_edu.course import chapters, explore, start
chapters.__path__.append({folder!r})
from klq_edu.course.chapters import c00_map_and_doctor
check = start("98")
check.equation("98.1", 1.0 + 1.0, 2.0)
explore(c00_map_and_doctor.map_widget())

# %%
def mine(x):
    # BEGIN SOLUTION
    return x + x
    # END SOLUTION

check.exercise("98.1", mine)
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """A function: (file name, what it needs, its place) -> nothing; a chapter of that name is there from now on."""
    monkeypatch.setattr(chapters, "__path__", [*chapters.__path__, str(tmp_path / "chapters")])
    (tmp_path / "chapters").mkdir()

    def write(name="c98_toy", needs=("02", "07"), place=(7, 1.5), part="practice"):
        text = CHAPTER.format(needs=needs, place=place, part=part)
        (tmp_path / "chapters" / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, f"{chapters.__name__}.{name}", raising=False)

    return write


def drawn(notebook):
    """The map as it is drawn with this notebook chosen: its axis."""
    figure = Figure()
    c00.map_widget().draw(figure, notebook=notebook)
    return figure.axes[0]


def test_a_new_notebook_takes_two_files(add, tmp_path):
    """Chapter and source in folders of their own: it is loaded, drawn, listed, linked to and built, checks and all."""
    add()
    shutil.copytree(SOURCES, tmp_path / "course" / "src")
    source = SOURCE.format(folder=str(tmp_path / "chapters"))
    (tmp_path / "course" / "src" / "98_toy.py").write_text(source)
    assert load_all()[-1] is load("98") and list(c00.progress()["notebook"])[-1] == "98"
    build.build_all(tmp_path / "course", ("98",))
    files = {
        str(p.relative_to(tmp_path / "course")) for p in (tmp_path / "course").rglob("*98*") if "src" not in p.parts
    }
    assert files == {"98_toy.ipynb", "student/98_toy.ipynb", "html/98_toy.html"}
    student = (tmp_path / "course" / "student" / "98_toy.ipynb").read_text()
    assert "not attempted yet" in student and "x + x" not in student
    page = (tmp_path / "course" / "html" / "98_toy.html").read_text()
    assert (
        f'href="{load_all()[-2].name}.html"' in page and "Exercise 98.1 passed" in page and "02 to 03, 05, 98" in page
    )
    assert page.count("<summary>A solution</summary>") == 1 and page.index("02 to 03") < page.index("Move the sliders:")
    row = "| [98 A toy](98_toy.ipynb) | What is new? | §9 | `math.tau` | 5 | 1 | 1 |"
    text = (tmp_path / "course" / "README.md").read_text()
    assert row in text and f"practice {', '.join(c.number for c in load_all() if c.part == 'practice')}" in text
    start = (tmp_path / "course" / "html" / "index.html").read_text()
    assert "98 · A toy</a><br>What is new?" in start and "5 minutes, 1 equations, 1 exercises; needs 02, 07" in start
    assert start.count('<a xlink:href="98_toy.html">') == 2 and "<h2>Practice</h2>" in start


def test_the_overviews_have_an_entry_for_every_chapter():
    text, start = (build.overview(SOURCES.parent, page) for page in ("README.md", "html/index.html"))
    assert re.findall(r"\]\((\w+)\.ipynb\)", text) == [c.name for c in load_all()]
    by_part = sorted(load_all(), key=lambda c: chapters.PARTS.index(c.part))
    assert re.findall(r'class="entry"><a href="(\w+)\.html"', start) == [c.name for c in by_part]
    assert set(re.findall(r'xlink:href="(\w+)\.html"', start)) == {c.name for c in load_all()}


def test_the_map_draws_every_chapter_and_every_need():
    """And says them in words: numbers, short names, and an arrow for each need, from it."""
    widget, found = c00.map_widget(), load_all()
    axis = drawn(found[-1].number)
    texts = {t.get_text(): t.get_position() for t in axis.texts}
    assert {c.number: c.place for c in found}.items() <= texts.items() and {c.short for c in found} <= texts.keys()
    arrows = {(t.xyann, t.xy) for t in axis.texts if getattr(t, "arrowprops", None)}
    places = {c.number: c.place for c in found}
    assert arrows == {(places[n], c.place) for c in found for n in c.needs}
    assert widget.options == {"notebook": [c.number for c in found]}
    said = {(a, b) for a, users in re.findall(r"(\d\d) to ([\d, ]+)[;.]", widget.alt) for b in users.split(", ")}
    assert said == {(n, c.number) for c in found for n in c.needs}


def test_a_new_chapter_is_inside_the_map_and_changes_its_words(add):
    before, needed = c00.map_widget(), {n for c in load_all() for n in c.needs}
    goals = [c.number for c in load_all() if c.number not in needed]
    assert f"Everything leads to {' or '.join(goals)}. What can wait: 03 until 05, 04 until 07" in before.caption
    add(needs=("02",), place=(7, 3))
    widget, axis = c00.map_widget(), drawn("98")
    assert (
        f"leads to {' or '.join(goals)} or 98." in widget.caption
        and widget.size > before.size
        and widget.size[1] > before.size[1]
    )
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    assert left < 7 < right and low < 3 < high and axis.get_title() == "notebook 98: a toy"


@pytest.mark.parametrize(
    ("chapter", "says"),
    [
        ({"needs": ("99",)}, r"notebook 98 needs \['99'\], which must be among those before it: \['00', '01'"),
        ({"needs": ("98",)}, r"needs \['98'\]"),
        ({"part": 45}, r"notebook 98 belongs to a part of \('theory', 'practice', 'kernels'\), not to 45"),
        ({"place": (0, 0)}, r"notebook 98 stands at \(0, 0\) on the map, where 00 is already"),
        ({"name": "c97_toy"}, "the chapter in c97_toy.py calls itself 98_toy"),
        ({"name": "c98_toys"}, "the chapter in c98_toys.py calls itself 98_toy"),
    ],
)
def test_a_chapter_that_does_not_fit_is_named(add, chapter, says):
    """It needs what comes later or itself (so there is no circle), its place is taken, or its file has another name."""
    add(**chapter)
    with pytest.raises(ValueError, match=says):
        load_all()


NAMES = ["tau", "gamma", "ell", "lambda", "alpha", "delta", "rho", "varepsilon", "beta"]
LETTERS = dict(zip("τγℓλαδρεβ", NAMES, strict=True))


@pytest.mark.parametrize("symbol", LETTERS)
def test_a_symbol_comes_in_where_the_notation_says(symbol):
    """The first notebook after 00 that writes it; two tables, the second beginning where the first ends."""
    rows = [row for later in (False, True) for row in c00.notation(later).itertuples(index=False)]
    assert [tuple(row) for row in rows] == c00.NOTATION == sorted(c00.NOTATION, key=lambda row: row[-1])
    said = next(row[-1] for row in rows if row[0].startswith(symbol))
    letter = re.compile(rf"\\{LETTERS[symbol]}(?![a-z])")
    found = (c.number for c in load_all()[1:] if letter.search((SOURCES / f"{c.name}.py").read_text()))
    assert said == next(found)


@pytest.mark.parametrize("chapter", load_all(), ids=lambda c: c.name)
def test_a_source_opens_with_what_its_chapter_says(chapter):
    """Title, and a place for the time; the question may be worded more fully there."""
    text = (SOURCES / f"{chapter.name}.py").read_text()
    assert text.startswith(f"# %% [markdown]\n# # {chapter.number} · {chapter.title}\n")
    assert re.search(r"\*Time:\* <!-- minutes -->\s+(# )?minutes", text.split("# %%")[1])


def lengthened(folder, old, new):
    """The minutes of notebook 01 by a copy of its source in which something is replaced."""
    chapter = load("01")
    (folder / "src").mkdir(exist_ok=True)
    text = (SOURCES / f"{chapter.name}.py").read_text()
    assert old in text
    (folder / "src" / f"{chapter.name}.py").write_text(text.replace(old, new, 1))
    return build.minutes(folder, chapter)


@pytest.mark.parametrize(
    ("old", "new", "more"),
    [
        ("\n# %% [markdown]\n", "\n# %% [markdown]\n# " + "word " * 1300 + "\n#\n", 10),
        ("\n# %% [markdown]\n", "\n# %% [markdown]\n# " + "$x + y = z$ " * 1300 + "\n#\n", 10),
        ("\n# %% [markdown]\n", "\n# %% [markdown]\n# " + "$$x = y$$ " * 10 + "\n#\n", 10),
        ("\n# %%\n", "\n# %%\n" + "x = 1\n" * 120, 10),
        ("\n# %%\n", "\n# %%\n" + "explore(BANDIT)\n" * 5, 10),
        ("    # BEGIN SOLUTION\n", "    # BEGIN SOLUTION\n" + "    x = 1\n" * 120, 0),
        ('# %% [markdown] tags=["solution"]\n', '# %% [markdown] tags=["solution"]\n# ' + "word " * 1300 + "\n#\n", 0),
    ],
    ids=["prose", "formulas", "equations", "code", "figures", "solution", "sample answer"],
)
def test_minutes_follow_the_source(old, new, more, tmp_path):
    """By the pace that notebooks/README.md states; what is folded away costs nothing."""
    assert abs(lengthened(tmp_path, old, new) - lengthened(tmp_path, "", "") - more) <= (5 if more else 0)


def test_a_number_of_minutes_that_somebody_typed_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"01_one_state: write \*Time:\* <!-- minutes --> minutes"):
        lengthened(tmp_path, "<!-- minutes -->", "40")
