"""One module per notebook: what it is about, its exercises with their catalogued mistakes, its figures and widgets."""

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from klq_edu.course.exercises import Exercise, Wrong

PARTS = ("theory", "practice", "kernels")


@dataclass(frozen=True)
class Chapter:
    """What is known about a notebook besides its text: with its source in notebooks/src, all that a new one takes.

    Attributes:
        number, slug, title: "01", "one_state", "One state"; the module is called c01_one_state.
        question: the one sentence it answers.
        part: of the course, one of PARTS.
        paper: the part of the paper it covers.
        functions: where it lives in the library.
        needs: the numbers of the earlier notebooks that it builds on.
        place, short: where it stands on the map (x, y), and its name there, in few words.
        exercises: by number.
    """

    number: str
    slug: str
    title: str
    question: str
    part: str
    paper: str
    functions: tuple[str, ...]
    needs: tuple[str, ...]
    place: tuple[float, float]
    short: str
    exercises: dict[str, Exercise]

    @property
    def name(self) -> str:
        """The stem of its files."""
        return f"{self.number}_{self.slug}"


def load(number: str) -> Chapter:
    """The chapter with this number; ValueError names those that there are."""
    modules = {m.name[1:3]: m.name for m in pkgutil.iter_modules(__path__)}
    if number not in modules:
        raise ValueError(f"notebook must be one of {sorted(modules)}, got {number!r}")
    chapter = importlib.import_module(f"{__name__}.{modules[number]}").CHAPTER
    if modules[number] != f"c{chapter.name}":
        raise ValueError(f"the chapter in {modules[number]}.py calls itself {chapter.name}")
    if chapter.part not in PARTS:
        raise ValueError(f"notebook {number} belongs to a part of {PARTS}, not to {chapter.part!r}")
    return chapter


def load_all() -> list[Chapter]:
    """Every chapter, in order; ValueError for one that needs what does not come before it, or for a shared place."""
    before: dict[str, Chapter] = {}
    for number in sorted(m.name[1:3] for m in pkgutil.iter_modules(__path__)):
        chapter = load(number)
        if unknown := sorted(set(chapter.needs) - before.keys()):
            raise ValueError(f"notebook {number} needs {unknown}, which must be among those before it: {[*before]}")
        if there := [n for n, other in before.items() if other.place == chapter.place]:
            raise ValueError(f"notebook {number} stands at {chapter.place} on the map, where {there[0]} is already")
        before[number] = chapter
    return [*before.values()]


@contextmanager
def float32():
    """The precision that models are trained in, whatever the notebook's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def on_any_padding(answer: Callable, *arguments) -> dict[str, Tensor]:
    """A probe: the answer with padding as it is (NaN), and with padding of leftovers. One argument is the mask."""
    mask = next(x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool)
    leftovers = (torch.where(mask, x, 7.0) if isinstance(x, Tensor) and x is not mask else x for x in arguments)
    return {"with padding of NaN: ": answer(*arguments), "with padding of leftovers: ": answer(*leftovers)}


def tensor64(x) -> Tensor:
    """An answer's result, if it is an ordinary float64 tensor; Wrong says what it is instead."""
    if isinstance(x, Tensor) and (x.dtype, x.layout, x.device.type) == (torch.float64, torch.strided, "cpu"):
        return x
    kind = f"a {x.dtype} tensor ({x.layout}, {x.device})" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise Wrong(f"a torch.float64 tensor is expected, yours is {kind}.")


def differentiate(loss, *inputs: Tensor, finite: bool = True) -> list[Tensor]:
    """Gradients of an answer's loss, to be differentiated again, 0 for an input without; Wrong where there is none."""
    if not isinstance(loss, Tensor) or loss.shape != () or loss.dtype != torch.float64:
        kind = f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise Wrong(
            f"a loss is a tensor with one number, torch.float64 of shape (), to be differentiated; yours is {kind}."
        )
    if not loss.requires_grad:
        raise Wrong("your loss carries no gradient at all: everything in it is detached, so nothing would be learnt.")
    if finite and not loss.isfinite():
        raise Wrong(f"your loss is {loss.item()}: look for 0/0, log 0 or ∞ − ∞.")
    grads = torch.autograd.grad(loss, inputs, allow_unused=True, create_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
