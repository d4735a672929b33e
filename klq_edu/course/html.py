"""The HTML edition: one self-contained page per notebook, with MathML and sliders, that asks no host for anything."""

import re
from copy import deepcopy
from pathlib import Path

from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from nbformat.v4 import new_output
from pygments.formatters import HtmlFormatter

from klq_edu.course.chapters import Chapter
from klq_edu.course.display import TEMPLATES

CELLS = """{% extends "basic/index.html.j2" %}{% block input %}{% if "answer" in cell.metadata.tags %}<details>
<summary>A solution</summary>{{ super() }}</details>{% else %}{{ super() }}{% endif %}{% endblock %}"""
TAG = re.compile(r"\\tag\{([\d.]+)\}")


class Renderer(IPythonRenderer):
    """Markdown to HTML with formulas as MathML; a displayed one stands by itself, with its number."""

    def paragraph(self, text: str) -> str:
        """A paragraph; what is displayed is none."""
        return text + "\n" if text.startswith("<div") else super().paragraph(text)

    def inline_math(self, body: str) -> str:
        """A formula in the text."""
        return mathml(body, "inline")

    def block_math(self, body: str) -> str:
        """A displayed formula."""
        number = TAG.search(body)
        label = f'<span class="number">({number[1]})</span>' if number else ""
        return f'<div class="equation" role="group">{mathml(TAG.sub("", body), "block")}{label}</div>'


def mathml(tex: str, display: str) -> str:
    """TeX as MathML, "inline" or "block"; ValueError for a command that the converter does not know."""
    formula = convert(tex.strip(), display=display).replace("\n", " ")
    if "\\" in formula:
        raise ValueError(f"latex2mathml does not know a command in ${tex}$: write it otherwise")
    return formula


def formula(number: str, chapter: Chapter, tex: str) -> str:
    """An equation of a notebook for another page, with its number, which leads there."""
    return f'<span class="formula">{mathml(tex, "inline")} <a href="{chapter.name}.html">({number})</a></span>'


def page(notebook: NotebookNode, chapter: Chapter, chapters: list[Chapter], frames: Path) -> str:
    """An executed notebook as a page; `frames` holds its widgets as HTML, to put below their static twins."""
    notebook = deepcopy(notebook)
    for outputs in (cell.outputs for cell in notebook.cells if "outputs" in cell):
        names = [o.get("metadata", {}).get("image/png", {}).get("klq_widget") for o in outputs]
        sliders = [(frames / f"{name}.html").read_text(encoding="utf-8") for name in names if name]
        outputs += [new_output("display_data", {"text/html": text}) for text in sliders]
    filters = {"markdown2html": MarkdownWithMath(renderer=Renderer(escape=False)).render}
    bare = {"exclude_input_prompt": True, "exclude_output_prompt": True}
    body, _ = HTMLExporter(raw_template=CELLS, filters=filters, **bare).from_notebook_node(notebook)
    at = [c.number for c in chapters].index(chapter.number)
    about = {"before": chapters[at - 1] if at else None, "after": next(iter(chapters[at + 1 :]), None)}
    css = HtmlFormatter(style="default").get_style_defs(".highlight")
    return TEMPLATES.get_template("page.html.j2").render(chapter=chapter, body=body, css=css, **about) + "\n"
