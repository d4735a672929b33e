"""The HTML edition: one self-contained page per notebook, with MathML and sliders, that asks no host for anything."""

import re
from copy import deepcopy
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from klq_edu.course.chapters import Chapter
from klq_edu.course.display import TEMPLATES

TAG = re.compile(r"\\tag\{([\d.]+)\}")


class Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML; a displayed one stands by itself, with its number."""

    def paragraph(self, text: str) -> str:
        """A paragraph; what is displayed is none."""
        return text + "\n" if text.startswith("<div") else super().paragraph(text)

    def inline_math(self, body: str) -> str:
        """A formula in the text."""
        return self._mathml(body, "inline")

    def block_math(self, body: str) -> str:
        """A displayed formula."""
        number = TAG.search(body)
        label = f'<span class="number">({number[1]})</span>' if number else ""
        return f'<div class="equation" role="group">{self._mathml(TAG.sub("", body), "block")}{label}</div>'

    def _mathml(self, tex: str, display: str) -> str:
        formula = convert(tex.strip(), display=display).replace("\n", " ")
        if "\\" in formula:
            raise ValueError(f"latex2mathml does not know a command in ${tex}$: write it otherwise")
        return formula


def page(notebook: NotebookNode, chapter: Chapter, chapters: list[Chapter], frames: Path) -> str:
    """An executed notebook as a page; `frames` holds its widgets as HTML, to put in the place of their static twins."""
    notebook = deepcopy(notebook)
    for output in (o for cell in notebook.cells for o in cell.get("outputs", [])):
        if name := output.get("metadata", {}).get("image/png", {}).get("klq_widget"):
            output.data = {"text/html": (frames / f"{name}.html").read_text(encoding="utf-8")}
    filters = {"markdown2html": MarkdownWithMath(renderer=Renderer(escape=False)).render}
    bare = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    body, _ = HTMLExporter(template_name="basic", filters=filters, **bare).from_notebook_node(notebook)
    at = [c.number for c in chapters].index(chapter.number)
    about = {"before": chapters[at - 1] if at else None, "after": next(iter(chapters[at + 1 :]), None)}
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    return TEMPLATES.get_template("page.html.j2").render(chapter=chapter, body=body, css=css, **about) + "\n"
