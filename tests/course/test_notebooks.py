"""The notebooks as files: every displayed equation checked, editions up to date, no solution in the student's, pages
that ask no host for anything. That the full editions run is nbval's part of `make test`."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html import escape
from pathlib import Path

import jupytext
import nbformat
import pytest
from jupyter_client import KernelManager
from nbclient import NotebookClient

from klq_edu.course import build as builder
from klq_edu.course import html
from klq_edu.course.build import EQUATION, build, drift, editions, equations, failures
from klq_edu.course.chapters import load, load_all
from klq_edu.course.chapters.c00_map_and_doctor import GLOSSARY
from klq_edu.course.exercises import NOT_ATTEMPTED

CHECKED = re.compile(r'check\.(?:equation|inequality)\(\s*"([\d.]+)"')
NAMES = {"TRL"}
FOLDER = Path(__file__).parents[2] / "notebooks"
CHAPTERS = load_all()
ABOUT_ALL = ["index", "cheat_sheet"]
PAGES = [*(c.name for c in CHAPTERS), *ABOUT_ALL]
chapters = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)


def read(chapter, edition=""):
    return nbformat.read(FOLDER / edition / f"{chapter.name}.ipynb", 4)


def output(notebook):
    return "\n".join(o.text for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "text" in o)


@chapters
def test_every_displayed_equation_is_checked_where_it_stands(chapter):
    """In order: an equation's check comes after it and before the next cell with an equation."""
    full, _ = editions(FOLDER, chapter)
    texts = [c.source for c in full.cells if c.cell_type == "markdown"]
    shown = [html.TAG.search(e)[1] for text in texts for e in EQUATION.findall(text)]
    assert shown == list(equations(full)) == [f"{int(chapter.number)}.{i + 1}" for i in range(len(shown))]
    waiting: set[str] = set()
    for cell in full.cells:
        if cell.cell_type == "code":
            waiting -= set(CHECKED.findall(cell.source))
        elif here := [html.TAG.search(e).group(1) for e in EQUATION.findall(cell.source)]:
            assert not waiting, f"not checked before the next equation: {waiting}"
            waiting |= set(here)
    assert not waiting, f"never checked: {waiting}"


@chapters
def test_every_abbreviation_is_in_the_glossary_and_written_out_near_its_first_use(chapter):
    """Near: not later than 300 characters on. Names of libraries are in the glossary, but stand for nothing."""
    notebook = jupytext.read(FOLDER / "src" / f"{chapter.name}.py")
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown")
    prose = re.sub(r"^#.*$|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`", "", prose, flags=re.MULTILINE | re.DOTALL)
    words = {m.group(1): m.start() for m in reversed(list(re.finditer(r"\b([A-Z]{2,})s?\b", prose)))}
    assert set(words) <= set(GLOSSARY), "add it to the glossary of notebook 00"
    for word, start in words.items():
        meaning = plain(GLOSSARY.get(word, "").split(":")[0])
        assert word in NAMES or meaning in plain(prose[: start + 300]), f"{word} is not written out: {meaning}"


def plain(text):
    return " ".join(re.findall("[a-z]+", text.lower()))


@chapters
def test_committed_notebook_ran_and_its_ledger_has_every_equation(chapter):
    notebook = read(chapter)
    text, count = output(notebook), len(equations(notebook))
    assert re.search(rf"^{count} equations verified, worst error \d", text, re.MULTILINE)
    assert failures(notebook, chapter) == []
    assert not [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]


def graded(folder, answer):
    """A chapter of one exercise, whose source in this folder answers it so."""
    chapter = replace(load("01"), exercises={"1.2": load("01").exercises["1.2"]})
    (folder / "src").mkdir()
    answer = f'# %%\nfrom klq_edu.course import start\ncheck = start("01")\n# %%\ncheck.exercise("1.2", {answer})\n'
    (folder / "src" / f"{chapter.name}.py").write_text(answer)
    return chapter


@pytest.mark.parametrize("answer", ["lambda q, ref, tau: ref", "..."])
def test_nothing_is_written_where_an_exercise_does_not_pass(answer, tmp_path):
    with pytest.raises(RuntimeError, match=r"01_one_state is not written:\n[✘·] Exercise 1.2"):
        build(tmp_path, graded(tmp_path, answer))
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_an_exercise_that_does_not_pass_fails_nbval_lax(tmp_path):
    """Which compares no outputs, except where a cell is tagged."""
    full, _ = editions(tmp_path, graded(tmp_path, "lambda q, ref, tau: ref"))
    verdict = "✔ Exercise 1.2 passed on 5 random inputs.\n"
    full.cells[1].execution_count = 2  # else nbval takes the cell for one that did not run
    full.cells[1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=verdict)]
    nbformat.write(full, tmp_path / "graded.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "graded.ipynb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Cell outputs differ" in done.stdout, done.stdout


@chapters
def test_committed_exercises_are_tagged_for_nbval(chapter):
    graded = [c for c in read(chapter).cells if c.cell_type == "code" and "check.exercise(" in c.source]
    assert graded and all("nbval-check-output" in c.metadata.tags for c in graded)


@chapters
def test_editions_are_what_the_source_says(chapter):
    assert drift(FOLDER, chapter) == [], "run `klq course build`"


@pytest.mark.parametrize("page", builder.OVERVIEWS)
def test_the_map_and_the_start_page_are_up_to_date(page):
    assert (FOLDER / page).read_text() == builder.overview(FOLDER, page)


def test_drift_is_noticed(tmp_path):
    chapter = CHAPTERS[1]
    for edition in ("", "student", "src"):
        (tmp_path / edition).mkdir(exist_ok=True)
        suffix = "py" if edition == "src" else "ipynb"
        shutil.copy(FOLDER / edition / f"{chapter.name}.{suffix}", tmp_path / edition)
    assert drift(tmp_path, chapter) == []
    source = tmp_path / "src" / f"{chapter.name}.py"
    source.write_text(source.read_text().replace("# %%\n", "# %%\n1 + 1\n", 1))
    assert len(drift(tmp_path, chapter)) == 2


@chapters
def test_student_edition_has_holes_and_no_solution(chapter):
    student, source = read(chapter, "student"), jupytext.read(FOLDER / "src" / f"{chapter.name}.py")
    text = "\n".join(c.source for c in student.cells)
    assert "SOLUTION" not in text and "sample answer" not in text.lower()
    solutions = re.findall(
        r"# BEGIN SOLUTION\n(.*?)# END SOLUTION", "\n".join(c.source for c in source.cells), re.DOTALL
    )
    assert len(solutions) == len(chapter.exercises) == text.count(NOT_ATTEMPTED)
    assert not [s for s in solutions if s.strip() in text]
    assert all(not c.get("outputs") for c in student.cells)


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all student editions: starting one and importing torch takes longer than most of them."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(FOLDER))
    yield manager
    manager.shutdown_kernel(now=True)


@chapters
def test_student_edition_runs_and_every_check_says_not_attempted(chapter, kernel, tmp_path):
    """It starts without a name of the one before. That the same imports do in a fresh kernel, nbval sees."""
    _, student = editions(FOLDER, chapter)
    bare = f"%reset -f\nimport os\nos.environ['KLQ_PROGRESS'] = {str(tmp_path / 'progress.json')!r}\ndel os"
    cells = [c for c in student.cells if "heavy" not in c.metadata.get("tags", [])]
    student.cells = [nbformat.v4.new_code_cell(bare), *cells]
    NotebookClient(student, km=kernel, timeout=300).execute()
    said = re.findall(r"Exercise ([\d.]+): not attempted yet", output(student))
    assert sorted(said) == sorted(chapter.exercises)


@chapters
def test_cell_ids_are_unique(chapter):
    ids = [c.id for c in read(chapter).cells]
    assert len(set(ids)) == len(ids)


@chapters
def test_every_figure_has_a_text_alternative(chapter):
    outputs = [
        o for c in read(chapter).cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert outputs and all(len(o.metadata["image/png"]["alt"]) > 20 for o in outputs)


def test_a_page_has_formulas_as_mathml_folds_as_folds_and_sliders_below_twins(tmp_path):
    text = "A price $p_1$ of `$5`:\n\n$$p = 1 \\tag{9.1}$$\n\n| a |\n|---|\n| $p$ |\n\n```\n$q$\n```\n\n"
    text += "<details><summary>Hint 1</summary>\n\n**Try** $p$.\n\n</details>"
    (tmp_path / "99-toy.html").write_text("<figure><script>0 < 1 && draw()</script></figure>")
    metadata = {"image/png": {"klq_widget": "99-toy"}}
    twin = nbformat.v4.new_output("display_data", {"image/png": "AAAA"}, metadata=metadata)
    said = nbformat.v4.new_output("display_data", {"text/markdown": "and $p$"})
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("1", outputs=[twin, said])]
    verdict = [nbformat.v4.new_output("stream", text="passed")]
    cells += [nbformat.v4.new_code_cell("answer", metadata={"tags": ["answer"]}, outputs=verdict)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    page = html.page(notebook, CHAPTERS[1], CHAPTERS, tmp_path)
    assert page.count("<math") == 5 and 'display="block"' in page and "$p" not in page and page.count("9.1") == 1
    assert re.search(
        r'</p>\s*<div class="equation" role="group"><math.*</math><span class="number">\(9.1\)</span>', page
    )
    assert page.count("$5") == page.count("$q$") == 1 and "<strong>Try</strong>" in page
    assert re.search(r"<details>\s*<summary>Hint 1</summary>", page) and "</details>" in page
    (solution,) = re.findall(r"<details>\s*<summary>A solution</summary>(.*?)</details>", page, re.DOTALL)
    assert "answer" in solution and "passed" in page and "passed" not in solution
    assert page.index("AAAA") < page.index("and <math") < page.index("0 < 1 && draw()")
    assert 'href="index.html"' in page and f"{CHAPTERS[0].name}.html" in page and f"{CHAPTERS[2].name}.html" in page
    assert len(notebook.cells[1].outputs) == 2, "the notebook itself gets no page's sliders"
    notebook.cells[0].source = "$\\nonsense$"
    with pytest.raises(ValueError, match=r"latex2mathml does not know a command in \$\\nonsense\$"):
        html.page(notebook, CHAPTERS[1], CHAPTERS, tmp_path)


@pytest.mark.parametrize("name", PAGES)
def test_page_asks_no_host_for_anything(name):
    page = (FOLDER / "html" / f"{name}.html").read_text()
    assert not re.findall(
        r"""(?:src|href)\s*=\s*["'](?!data:|#|\d\d_\w+\.html|index\.html|cheat_sheet\.html)[^"']*""", page
    )
    assert "@import" not in page and "url(http" not in page and "fetch(" not in page


@chapters
def test_page_has_what_the_notebook_has_and_folds_what_a_reader_is_to_find(chapter):
    page = (FOLDER / "html" / f"{chapter.name}.html").read_text()
    assert "<math" in page and "$$" not in page and page.count('class="equation"') == len(equations(read(chapter)))
    assert page.count("<summary>A solution</summary>") == len(chapter.exercises) and "<details open" not in page
    unfolded = re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "check.exercise" not in re.sub("<[^>]*>", "", unfolded)
    assert all(f"Exercise {n} passed" in unfolded for n in chapter.exercises)
    assert all(page.count(word) == 1 for word in ('<figure class="klq-widget"', "Move the sliders:"))
    assert '<div class="output_png' in page.split('<figure class="klq-widget"')[0].split("explore")[-1], "no twin"


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
@pytest.mark.parametrize("name", PAGES)
def test_page_works_in_a_browser_without_network_and_fits_a_small_screen(name, tmp_path):
    """What is wider than 400 pixels scrolls in a box of its own, the page does not."""
    said = in_a_browser((FOLDER / "html" / f"{name}.html").read_text(), tmp_path)
    assert said["client"] == 400 and said["scroll"] <= 400, f"the page is {said['scroll']} pixels wide"
    assert len(said["drawn"]) == (name not in ABOUT_ALL) and all(frame.isdigit() for frame in said["drawn"])


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_a_page_that_is_too_wide_is_noticed(tmp_path):
    said = in_a_browser('<!DOCTYPE html><body><div style="width: 420px">wide</div></body>', tmp_path)
    assert said["client"] == 400 < said["scroll"]


def in_a_browser(page, folder):
    """The widths of a page in 400 pixels, and which frame each widget has drawn; nothing may be logged."""
    script = """
        onload = () => {
          const page = frames[0].document, root = page.documentElement;
          const drawn = [...page.querySelectorAll(".klq-widget")].map(w => w.hidden ? "nothing" : w.dataset.frame);
          const said = {client: root.clientWidth, scroll: root.scrollWidth, drawn};
          document.body.textContent = JSON.stringify(said);
        }"""  # in a frame, because a window is at least 500 pixels wide
    frame = f'<iframe style="width: 400px; height: 800px; border: 0" srcdoc="{escape(page)}"></iframe>'
    (folder / "page.html").write_text(f"<!DOCTYPE html><body>{frame}<script>{script}</script></body>")
    said = chromium(folder, "--hide-scrollbars", "--dump-dom", (folder / "page.html").as_uri())
    return json.loads(re.search(r"<body>(.*)</body>", said, re.DOTALL)[1])


def chromium(folder, *what):
    """What it prints, offline; nothing may be logged."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder}", "--enable-logging=stderr", "--v=0",
    ]  # fmt: skip
    done = subprocess.run([*command, *what], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium here")
def test_the_cheat_sheet_is_two_pages_on_paper(tmp_path):
    page = FOLDER / "html" / "cheat_sheet.html"
    chromium(tmp_path, "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'it.pdf'}", page.as_uri())
    assert len(re.findall(rb"/Type /Page\b", (tmp_path / "it.pdf").read_bytes())) == 2


def test_the_cheat_sheet_has_the_equations_of_the_notebooks():
    """By number, every one of them; one that is not there is an error of the builder."""
    page = (FOLDER / "html" / "cheat_sheet.html").read_text()
    known = {n: (c, tex) for c in CHAPTERS for n, tex in equations(editions(FOLDER, c)[0]).items()}
    shown = re.findall(r'<span class="formula">(<math.*?</math>) <a href="(\w+)\.html">\(([\d.]+)\)', page)
    assert len(shown) > 40 and {n.split(".")[0] for *_, n in shown} >= {str(int(c.number)) for c in CHAPTERS[1:]}
    assert all((name, math) == (known[n][0].name, html.mathml(known[n][1], "inline")) for math, name, n in shown)
