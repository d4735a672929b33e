"""What a notebook shows besides numbers: figures with captions, library source, and widgets with a static twin."""

import base64
import inspect
import io
import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from IPython.display import Markdown, display
from jinja2 import Environment, FileSystemLoader
from matplotlib import rc_context
from matplotlib.figure import Figure

from klq_edu.figures import Picture

TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
FRAMES = "KLQ_COURSE_FRAMES"  # a folder: the builder wants every frame of a widget, to make a page without a kernel


def show(picture: Picture) -> None:
    """Display a figure, with its text alternative, and its caption below."""
    _display(picture.figure, picture.alt)
    display(Markdown("*{}*".format(picture.caption.replace("*", r"\*"))))


def source(function: Callable) -> None:
    """Display a library function as it stands, without its docstring, and where it lives."""
    text = textwrap.dedent(inspect.getsource(function)).replace("  # fmt: skip", "")
    text = re.sub(r':\n *r?""".*?"""\n', ":\n", text, count=1, flags=re.DOTALL)
    display(Markdown(f"`{function.__module__.replace('.', '/')}.py`\n```python\n{text.rstrip()}\n```"))


@dataclass(frozen=True)
class Widget:
    """A picture with sliders, and its static twin."""

    name: str  # its own among all notebooks, like "01-bandit"
    draw: Callable  # (figure, **values) draws it for one choice of values
    options: dict[str, list]  # argument -> the values to choose from
    twin: list[dict]  # the settings drawn side by side where nothing can be moved; the sliders start at the first
    caption: str  # what to see in the twin
    alt: str  # what it shows, in words
    size: tuple[float, float] = (4.2, 3.2)  # of one picture, in inches


def explore(widget: Widget) -> None:
    """Display the static twin, always; below it live controls, or where a page is built, the frames for its sliders."""
    width, height = widget.size
    rows = math.ceil(len(widget.twin) * width / 10)  # not wider than a page
    columns = math.ceil(len(widget.twin) / rows)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    for part, values in zip(figure.subfigures(rows, columns, squeeze=False).flat, widget.twin):
        widget.draw(part, **values)
    _display(figure, widget.alt, widget.name)
    display(Markdown(f"*{widget.caption}*"))
    if folder := os.environ.get(FRAMES):
        Path(folder, f"{widget.name}.html").write_text(slider_page(widget), encoding="utf-8")
    else:
        display(live(widget))


def live(widget: Widget):
    """The ipywidgets: one control per option above the picture they change."""
    import ipywidgets

    picture, controls = ipywidgets.Image(format="png", layout={"width": f"{96 * widget.size[0]:.0f}px"}), {}

    def update(_=None):
        picture.value = frame(widget, {k: c.value for k, c in controls.items()})

    for name, choices in widget.options.items():
        words = any(isinstance(c, str | bool) for c in choices)
        control = ipywidgets.ToggleButtons if words else ipywidgets.SelectionSlider
        controls[name] = control(options=choices, value=widget.twin[0][name], description=name)
        controls[name].observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), picture])


def frame(widget: Widget, values: dict) -> bytes:
    """One picture of a widget, as PNG."""
    figure = Figure(figsize=widget.size, layout="constrained")
    widget.draw(figure, **values)
    return _png(figure, dpi=80)


def slider_page(widget: Widget) -> str:
    """The widget as self-contained HTML: every combination of options drawn in advance, and sliders to choose."""
    options = widget.options
    every = (dict(zip(options, values)) for values in product(*options.values()))
    frames = [base64.b64encode(frame(widget, values)).decode() for values in every]
    start = {k: choices.index(widget.twin[0][k]) for k, choices in options.items()}
    page = TEMPLATES.get_template("slider.html.j2")
    return page.render(name=widget.name, alt=widget.alt, options=options, start=start, frames=frames)


def svg(widget: Widget, **values) -> str:
    """One picture of a widget as an SVG element, its text as text."""
    figure, data = Figure(figsize=widget.size, layout="constrained"), io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": widget.name}):
        widget.draw(figure, **values)
        figure.savefig(data, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return "<svg" + data.getvalue().partition("<svg")[2].replace(' target="_blank"', "")


def _png(figure: Figure, dpi: int = 100) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


def _display(figure: Figure, alt: str, widget: str | None = None) -> None:
    metadata = {"alt": alt} | ({"klq_widget": widget} if widget else {})
    display({"image/png": _png(figure), "text/plain": alt}, raw=True, metadata={"image/png": metadata})
