"""The HTML edition: one self-contained page per notebook, with MathML and sliders, that asks no host for anything."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from klq_edu.course.chapters import Chapter

CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\\w])\$(?P<inline>[^$\n]+?)\$", re.DOTALL)
TAG = re.compile(r"\\tag\{([\d.]+)\}")
PAGES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)


def page(notebook: NotebookNode, chapter: Chapter, chapters: list[Chapter], frames: Path) -> str:
    """An executed notebook as a page; `frames` holds its widgets as HTML."""
    copy = NotebookNode(notebook)
    copy["cells"] = [_for_page(cell, frames) for cell in notebook.cells]
    exporter = HTMLExporter(template_name="basic", embed_images=True, exclude_input_prompt=True)
    exporter.exclude_output_prompt = True
    body, _ = exporter.from_notebook_node(copy)
    at = [c.number for c in chapters].index(chapter.number)
    neighbours = {"before": chapters[at - 1] if at else None, "after": next(iter(chapters[at + 1 :]), None)}
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    return PAGES.get_template("page.html.j2").render(chapter=chapter, body=body, css=css, **neighbours)


def with_mathml(text: str) -> str:
    """Markdown whose TeX formulas have become MathML; code is left alone."""
    parts = CODE.split(text)
    return "".join(part if CODE.fullmatch(part) else MATH.sub(_mathml, part) for part in parts)


def _mathml(match: re.Match) -> str:
    if inline := match.group("inline"):
        return convert(inline)
    tex = match.group("block").strip()
    number = TAG.search(tex)
    formula = convert(TAG.sub("", tex).strip(), display="block").replace("\n", " ")
    label = f'<span class="number">({number.group(1)})</span>' if number else ""
    return f'\n<div class="equation" role="group">{formula}{label}</div>\n'


def _for_page(cell: NotebookNode, frames: Path) -> NotebookNode:
    cell = NotebookNode(cell)
    if cell.cell_type == "markdown":
        cell["source"] = with_mathml(cell.source)
    else:
        cell["outputs"] = [_for_screen(output, frames) for output in cell.outputs]
    return cell


def _for_screen(output: NotebookNode, frames: Path) -> NotebookNode:
    """A widget's static twin gives way to the widget itself, markdown to markdown with MathML."""
    data = output.get("data", {})
    name = output.get("metadata", {}).get("image/png", {}).get("klq_widget")
    if name:
        return NotebookNode(output, data={"text/html": (frames / f"{name}.html").read_text()}, metadata={})
    if "text/markdown" in data:
        return NotebookNode(output, data={"text/markdown": with_mathml(data["text/markdown"])})
    return output


def course_map(chapters: list[Chapter], folder: Path) -> str:
    """notebooks/README.md: notebook, question, part of the paper, functions, minutes, equations, exercises."""
    from klq_edu.course.build import editions, equations

    rows = [(c, len(equations(editions(folder, c)[0]))) for c in chapters]
    return PAGES.get_template("map.md.j2").render(rows=rows)
