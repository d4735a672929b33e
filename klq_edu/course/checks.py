"""The checks of a notebook: every displayed equation in float64, every exercise with its usual mistakes by name.

`check = start("01")` opens a notebook; `check.equation`, `check.inequality` and `check.exercise` are then used where
the equation or the exercise stands, and `check.ledger()` ends it.
"""

import math
import os
from datetime import datetime
from pathlib import Path

import torch
from torch import Tensor

from klq_edu.course.chapters import load
from klq_edu.course.exercises import Exercise, grade
from klq_edu.files import read_json, write_json


class Progress:
    """Exercise number -> when it first passed, in $KLQ_PROGRESS or the user's state folder.

    A file that cannot be written costs the memory, never the check.
    """

    def __init__(self, path: Path | None = None):
        state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        self.path = path or Path(os.environ.get("KLQ_PROGRESS") or state / "klq-edu" / "progress.json")

    def read(self) -> dict[str, str]:
        """All that passed; nothing where the file is missing or broken."""
        try:
            return read_json(self.path)
        except (OSError, ValueError):
            return {}

    def record(self, number: str) -> None:
        """Remember that it passed now, if it never did before."""
        if number in (done := self.read()):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, done | {number: datetime.now().isoformat(timespec="minutes")})
        except OSError as error:
            print(f"(not remembered: {self.path} cannot be written, {error})")


class Checks:
    """What has been verified in one notebook.

    >>> check = Checks("01")
    >>> check.equation("1.1", torch.ones(2, dtype=torch.float64).sum(), 2.0)
    ✔ (1.1) holds: largest error 0 over 1 number
    >>> check.ledger()
    1 equation verified, worst error 0
    """

    def __init__(self, notebook: str, exercises: dict[str, Exercise] | None = None, progress: Progress | None = None):
        self.notebook, self.exercises, self.progress = notebook, exercises or {}, progress or Progress()
        self.errors: dict[str, float] = {}

    def equation(self, number: str, lhs, rhs, tol: float = 1e-10) -> None:
        """Assert lhs = rhs within tol · max(1, |rhs|), number by number, and enter it in the ledger.

        Both sides are numbers or float64 tensors of one shape, from independent routes. Raises TypeError for another
        precision, ValueError for shapes that differ or nothing to compare, AssertionError where the equation fails.
        """
        self._enter(number, lhs, rhs, tol, "=")

    def inequality(self, number: str, smaller, larger, tol: float = 1e-10) -> None:
        """Assert smaller ≤ larger up to rounding, number by number; errors as for `equation`."""
        self._enter(number, smaller, larger, tol, "≤")

    def exercise(self, number: str, answer) -> None:
        """Grade an answer (a function, or a value) on fresh random inputs, say what is wrong, remember what passed."""
        if number not in self.exercises:
            raise ValueError(f"notebook {self.notebook} has exercises {sorted(self.exercises)}, not {number!r}")
        verdict = grade(self.exercises[number], answer)
        print(verdict.message)
        if verdict.passed:
            self.progress.record(number)

    def ledger(self) -> None:
        """Print how many equations were verified, and the worst error."""
        worst, count = max(self.errors.values(), default=0.0), len(self.errors)
        print(f"{count} equation{'s' * (count != 1)} verified, worst error {worst:.1g}")

    def _enter(self, number: str, lhs, rhs, tol: float, sign: str) -> None:
        left, right = _sides(number, lhs, rhs)
        holds = left == right if sign == "=" else left <= right  # equal infinities agree, NaN with nothing
        gap = torch.where(holds, 0.0, (left - right).abs())
        allowed = tol * torch.where(right.isfinite(), right, 1.0).abs().clamp(min=1.0)
        worst = (gap / allowed).nan_to_num(nan=math.inf).argmax()
        if not gap[worst] <= allowed[worst]:
            one, other = left[worst].item(), right[worst].item()
            raise AssertionError(f"✘ ({number}) fails: {one:.12g} {sign} {other:.12g} is off by {abs(one - other):.3g}")
        error, count = gap.max().item(), gap.numel()
        self.errors[number] = max(self.errors.get(number, 0.0), error)
        print(f"✔ ({number}) holds: largest error {error:.1g} over {count} number{'s' * (count != 1)}")


def start(notebook: str) -> Checks:
    """Open notebook "NN": float64 everywhere, seed 0; prints what there is to do and what is done already."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    chapter, progress = load(notebook), Progress()
    done = len(chapter.exercises.keys() & progress.read())
    print(f"Notebook {notebook}: {chapter.title}. Exercises passed so far: {done} of {len(chapter.exercises)}.")
    return Checks(notebook, chapter.exercises, progress)


def _sides(number: str, *sides) -> list[Tensor]:
    sides = [x if isinstance(x, Tensor) else torch.as_tensor(x, dtype=torch.float64) for x in sides]
    for side, x in zip(("left", "right"), sides):
        if x.dtype != torch.float64:
            raise TypeError(f"({number}): the {side} side is {x.dtype}; equations are checked in float64")
    left, right = [x.detach().contiguous() for x in sides]
    if left.shape != right.shape:
        raise ValueError(f"({number}): the left side has shape {tuple(left.shape)}, the right {tuple(right.shape)}")
    if left.numel() == 0:
        raise ValueError(f"({number}): nothing to compare, both sides are empty")
    if left.data_ptr() == right.data_ptr():
        raise ValueError(f"({number}): both sides are the same tensor, which proves nothing")
    return [left.flatten(), right.flatten()]
