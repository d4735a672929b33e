"""What a notebook shows besides numbers: figures with captions, library source, and widgets with a static twin."""

import ast
import inspect
import io
import os
import textwrap
from collections.abc import Callable
from itertools import product
from pathlib import Path

from IPython.display import Markdown, display
from jinja2 import Template
from matplotlib.figure import Figure

from klq_edu.figures import Picture

FRAMES = "KLQ_COURSE_FRAMES"  # a folder: the builder wants every frame of a widget, to make a page without a kernel


def show(picture: Picture) -> None:
    """Display a figure, with its text alternative, and its caption below."""
    _display_png(_png(picture.figure), picture.alt)
    display(Markdown(f"*{picture.caption}*"))


def source(function: Callable) -> None:
    """Display a library function as it stands, without its docstring, and where it lives."""
    text = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(text).body[0]
    lines = text.splitlines()
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        lines[doc.lineno - 1 : doc.end_lineno] = []
    where = f"{function.__module__.replace('.', '/')}.py"
    display(Markdown(f"`{where}`\n```python\n" + "\n".join(lines) + "\n```"))


def explore(
    name: str, draw: Callable, twin: list[dict], caption: str, alt: str, size: tuple[float, float] = (4.2, 3.2), **options
) -> None:
    """A widget: `draw(figure, **values)` for values chosen by the reader, one list of options per argument.

    A static twin, the settings in `twin` side by side, is always drawn; sliders come below it in a live notebook. In
    the HTML edition they run over frames that were drawn when it was built. `name` is the widget's own.
    """
    figure = Figure(figsize=(size[0] * len(twin), size[1]), layout="constrained")
    for part, values in zip(figure.subfigures(1, len(twin), squeeze=False)[0], twin, strict=True):
        draw(part, **values)
    _display_png(_png(figure), alt, name)
    display(Markdown(f"*{caption}*"))
    if folder := os.environ.get(FRAMES):
        Path(folder, f"{name}.html").write_text(slider_page(name, draw, alt, size, twin[0], options))
    else:
        display(live(draw, size, twin[0], options))


def live(draw: Callable, size: tuple[float, float], first: dict, options: dict[str, list]):
    """The ipywidgets: one control per option above the picture they change."""
    import ipywidgets

    picture = ipywidgets.Image(format="png", layout={"width": f"{96 * size[0]:.0f}px"})
    controls = {k: _control(ipywidgets, k, choices, first[k]) for k, choices in options.items()}

    def update(_=None):
        picture.value = frame(draw, size, {k: c.value for k, c in controls.items()})

    for control in controls.values():
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), picture])


def _control(ipywidgets, name: str, choices: list, value):
    if any(isinstance(c, str | bool) for c in choices):
        return ipywidgets.ToggleButtons(options=choices, value=value, description=name)
    return ipywidgets.SelectionSlider(options=choices, value=value, description=name)


def frame(draw: Callable, size: tuple[float, float], values: dict, dpi: int = 80) -> bytes:
    """One picture of a widget, as PNG."""
    figure = Figure(figsize=size, layout="constrained")
    draw(figure, **values)
    return _png(figure, dpi)


def slider_page(name: str, draw: Callable, alt: str, size: tuple[float, float], first: dict, options: dict) -> str:
    """The widget as self-contained HTML: every combination of options drawn in advance, and sliders to choose."""
    import base64

    frames = [
        base64.b64encode(frame(draw, size, dict(zip(options, values)))).decode()
        for values in product(*options.values())
    ]
    start = {k: choices.index(first[k]) for k, choices in options.items()}
    template = Template(Path(__file__).with_name("slider.html.j2").read_text(), autoescape=True)
    return template.render(name=name, alt=alt, options=options, start=start, frames=frames)


def _png(figure: Figure, dpi: int = 100) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=dpi, metadata={"Software": None})
    return data.getvalue()


def _display_png(data: bytes, alt: str, widget: str | None = None) -> None:
    metadata = {"alt": alt} | ({"klq_widget": widget} if widget else {})
    display({"image/png": data, "text/plain": alt}, raw=True, metadata={"image/png": metadata})
