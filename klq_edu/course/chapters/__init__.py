"""One module per notebook: what it is about, its exercises with their catalogued mistakes, its figures and widgets."""

import importlib
import pkgutil
from dataclasses import dataclass

from klq_edu.course.exercises import Exercise


@dataclass(frozen=True)
class Chapter:
    """What is known about a notebook besides its text.

    Attributes:
        number, slug, title: "01", "one_state", "One state".
        question: the one sentence it answers.
        minutes: for a reader who works through it.
        paper: the part of the paper it covers.
        functions: where it lives in the library.
        exercises: by number.
    """

    number: str
    slug: str
    title: str
    question: str
    minutes: int
    paper: str
    functions: tuple[str, ...]
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
    return importlib.import_module(f"{__name__}.{modules[number]}").CHAPTER


def load_all() -> list[Chapter]:
    """Every chapter, in order."""
    return [load(number) for number in sorted(m.name[1:3] for m in pkgutil.iter_modules(__path__))]
