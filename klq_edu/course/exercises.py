"""Exercises that grade themselves: a solution, fresh random inputs, and the mistakes people make, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

TRIALS = 5
NOT_ATTEMPTED = "not attempted yet"


class Mistake(NamedTuple):
    """A wrong answer that people give, and what to say to it."""

    name: str
    answer: Callable
    message: str


class Verdict(NamedTuple):
    """What a check found: passed is None where nothing was attempted."""

    passed: bool | None
    message: str


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        number: "1.2", chapter and place.
        title: a few words.
        level: difficulty, 1 to 3.
        minutes: for a first attempt.
        solution: the right answer, a function (of no arguments where the answer is a value).
        inputs: generator -> arguments to try an answer on.
        mistakes: at least three wrong answers with a message each.
        hints: three, each more telling than the one before.
        probe: (answer, *arguments) -> what to compare, where that is not the answer's result.
        tol: relative tolerance.
    """

    number: str
    title: str
    level: int
    minutes: int
    solution: Callable
    inputs: Callable[[Generator], tuple]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    probe: Callable | None = None
    tol: float = 1e-8

    def outcome(self, answer: Callable, arguments: tuple) -> list[Tensor]:
        """What this answer gives for these arguments (copies, so that it may overwrite them), as float64 tensors."""
        copies = [x.detach().clone() if isinstance(x, Tensor) else x for x in arguments]
        result = answer(*copies) if self.probe is None else self.probe(answer, *copies)
        if result is None:
            raise TypeError("it returned None; is a `return` missing?")
        parts = result if isinstance(result, tuple | list) else (result,)
        return [torch.as_tensor(x).detach().to(torch.float64) for x in parts]


def grade(exercise: Exercise, answer, seed: int | None = None) -> Verdict:
    """Compare an answer with the solution on fresh random inputs; where it is wrong, find out which mistake it is.

    A value instead of a function is an answer without arguments; `...` (or NotImplementedError) is no attempt.
    """
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    given, head = answer if callable(answer) else lambda: answer, f"Exercise {exercise.number}"
    trials = [exercise.inputs(generator) for _ in range(TRIALS)]
    try:
        results = [exercise.outcome(given, x) for x in trials] if answer is not ... else None
    except NotImplementedError:
        results = None
    except Exception as error:
        return Verdict(False, f"✘ {head}: your answer stopped with {type(error).__name__}: {error}")
    if results is None:
        return Verdict(None, f"· {head}: {NOT_ATTEMPTED}.")
    if _agree(exercise, results, exercise.solution, trials):
        return Verdict(True, f"✔ {head} passed on {TRIALS} random inputs.")
    for mistake in exercise.mistakes:
        if _agree(exercise, results, mistake.answer, trials):
            return Verdict(False, f"✘ {head}: {mistake.message}")
    return Verdict(False, f"✘ {head}: {_difference(results[0], exercise.outcome(exercise.solution, trials[0]))}")


def on_any_padding(answer: Callable, *arguments) -> tuple:
    """A probe: the answer with padding as it is (NaN), and with padding of leftovers. One argument is the mask."""
    mask = next(x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool)
    leftovers = (torch.where(mask, x, 7.0) if isinstance(x, Tensor) and x is not mask else x for x in arguments)
    return answer(*arguments), answer(*leftovers)


def _agree(exercise: Exercise, results: list[list[Tensor]], other: Callable, trials: list[tuple]) -> bool:
    return all(_same(r, exercise.outcome(other, x), exercise.tol) for r, x in zip(results, trials, strict=True))


def _same(got: list[Tensor], want: list[Tensor], tol: float) -> bool:
    return len(got) == len(want) and all(
        g.shape == w.shape and torch.allclose(g, w, rtol=tol, atol=tol, equal_nan=True)
        for g, w in zip(got, want, strict=True)
    )


def _difference(got: list[Tensor], want: list[Tensor]) -> str:
    """In words, where the first result differs."""
    if len(got) != len(want):
        return f"{len(want)} results are expected, yours gives {len(got)}."
    g, w = next((g, w) for g, w in zip(got, want, strict=True) if not _same([g], [w], 1e-12))
    if g.shape != w.shape:
        return f"a result of shape {tuple(w.shape)} is expected, yours has {tuple(g.shape)}."
    if g.isnan().any():
        return "your result contains NaN (not a number): look for 0/0, log 0, ∞ − ∞, or padding that got in."
    gap, at = (g - w).abs().view(-1).max(0) if g.numel() else (0, 0)
    return (
        f"on a random input yours gives {g.view(-1)[at]:.6g} where {w.view(-1)[at]:.6g} is expected (off by {gap:.2g})."
    )
