"""The HTML edition: one self-contained page per notebook, with MathML and sliders, that asks no host for anything."""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from klq_edu.course.chapters import Chapter

SPECIAL = re.compile(
    r"(?P<code>```.*?```|`[^`\n]+`)|\$\$(?P<block>.+?)\$\$|(?<![\\\w])\$(?P<inline>[^$\n]+?)\$"
    r"|(?P<fold><details>\s*<summary>[^\n]*?</summary>|</details>)", re.DOTALL,
)  # fmt: skip
TAG = re.compile(r"\\tag\{([\d.]+)\}")
PAGES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)


class Kept(list):
    """HTML that must pass the Markdown renderer untouched: a word stands for each piece until the page is made."""

    def away(self, piece: str) -> str:
        """The word that stands for this piece."""
        self.append(piece)
        return f"KLQ{len(self) - 1}KEPT"

    def back(self, page: str) -> str:
        """The page with every piece in its place (a paragraph of its own loses its tags)."""
        return re.sub(r"<p>KLQ(\d+)KEPT</p>|KLQ(\d+)KEPT", lambda m: self[int(m[1] or m[2])], page)


def page(notebook: NotebookNode, chapter: Chapter, chapters: list[Chapter], frames: Path) -> str:
    """An executed notebook as a page; `frames` holds its widgets as HTML."""
    kept = Kept()
    copy = NotebookNode(notebook, cells=[_for_page(cell, frames, kept) for cell in notebook.cells])
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True)
    body, _ = exporter.from_notebook_node(copy)
    at = [c.number for c in chapters].index(chapter.number)
    about = {"before": chapters[at - 1] if at else None, "after": next(iter(chapters[at + 1 :]), None)}
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    return PAGES.get_template("page.html.j2").render(chapter=chapter, body=kept.back(body), css=css, **about) + "\n"


def with_mathml(text: str, kept: Kept) -> str:
    """Markdown whose TeX formulas have become MathML and whose folds stay folds; code is left alone."""
    return SPECIAL.sub(lambda m: _replacement(m, kept), text)


def _replacement(match: re.Match, kept: Kept) -> str:
    if match["code"]:
        return match[0]
    if match["fold"]:
        return f"\n\n{kept.away(match[0])}\n\n"
    if match["inline"]:
        return kept.away(_convert(match["inline"], "inline"))
    number = TAG.search(match["block"])
    formula = _convert(TAG.sub("", match["block"]), "block")
    label = f'<span class="number">({number[1]})</span>' if number else ""
    return f'\n\n{kept.away(f"""<div class="equation" role="group">{formula}{label}</div>""")}\n\n'


def _convert(tex: str, display: str) -> str:
    formula = convert(tex.strip(), display=display).replace("\n", " ")
    if "\\" in formula:
        raise ValueError(f"latex2mathml does not know a command in ${tex}$: write it otherwise")
    return formula


def _for_page(cell: NotebookNode, frames: Path, kept: Kept) -> NotebookNode:
    if cell.cell_type == "markdown":
        return NotebookNode(cell, source=with_mathml(cell.source, kept))
    return NotebookNode(cell, outputs=[_for_screen(output, frames, kept) for output in cell.outputs])


def _for_screen(output: NotebookNode, frames: Path, kept: Kept) -> NotebookNode:
    """A widget's static twin gives way to the widget itself; Markdown gets its formulas."""
    data = output.get("data", {})
    if name := output.get("metadata", {}).get("image/png", {}).get("klq_widget"):
        text = kept.away((frames / f"{name}.html").read_text(encoding="utf-8"))
        return NotebookNode(output, data={"text/html": text}, metadata={})
    if "text/markdown" in data:
        return NotebookNode(output, data={"text/markdown": with_mathml(data["text/markdown"], kept)})
    return output
