"""Exercises that grade themselves: a solution, fresh random inputs, and the mistakes people make, by name."""

import math
import signal
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor

TRIALS = 5
SECONDS = 10.0  # for all trials of an answer together
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


class Wrong(Exception):
    """What is wrong with an answer, in words for whoever wrote it; raised by probes."""


class _TimeUp(BaseException):
    """No Exception, so that an answer's own `except Exception` lets it through."""


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
        probe: (answer, *arguments) -> what to compare, by name, where that is not the answer's result.
        tol: tolerance, relative to the largest number of a result.
    """

    number: str
    title: str
    level: int
    minutes: int
    solution: Callable
    inputs: Callable[[Generator], tuple]
    mistakes: tuple[Mistake, ...]
    hints: tuple[str, str, str]
    probe: Callable[..., dict[str, Tensor]] | None = None
    tol: float = 1e-8

    def outcome(self, answer: Callable, arguments: tuple) -> dict[str, Tensor]:
        """What this answer gives for these arguments: float64 tensors of their own, by name; Wrong for anything else."""
        answer = partial(_call, answer)
        if self.probe is not None:
            found = self.probe(answer, *arguments)
        else:
            result = answer(*arguments)
            parts = result if isinstance(result, tuple | list) else (result,)
            found = {f"result {i} of {len(parts)}" if len(parts) > 1 else "": x for i, x in enumerate(parts, 1)}
        return {name: _numbers(x, self.tol) for name, x in found.items()}


@contextmanager
def _isolated():
    """float64 and gradients on; what is done to torch's precision, gradient mode and random numbers is undone."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@_isolated()
def grade(exercise: Exercise, answer, seed: int | None = None) -> Verdict:
    """Compare an answer with the solution on fresh random inputs; where it is wrong, find out which mistake it is.

    A value instead of a function is an answer without arguments; `...` (or NotImplementedError) is no attempt. Whatever
    the answer is, raises or does to its arguments, there is a verdict; only a real Ctrl-C gets through. In the main
    thread of a system with SIGALRM it is stopped after 10 seconds; elsewhere (Windows, other threads) nothing stops it.
    """
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    trials = [exercise.inputs(generator) for _ in range(TRIALS)]
    try:
        with _watched() as pressed:
            results = [exercise.outcome(answer, x) for x in trials]
    except BaseException as error:
        if pressed:
            raise KeyboardInterrupt from None
        message = _complaint(error)
    else:
        if pressed:
            raise KeyboardInterrupt  # the answer swallowed it
        message = _judge(exercise, results, trials)
    if message == NOT_ATTEMPTED:
        return Verdict(None, f"· Exercise {exercise.number}: {message}.")
    if message is None:
        return Verdict(True, f"✔ Exercise {exercise.number} passed on {TRIALS} random inputs.")
    return Verdict(False, f"✘ Exercise {exercise.number}: {message}")


@_isolated()
def _call(answer, *arguments):
    """The answer's result on copies of the arguments, itself copied: nobody's memory is shared."""
    if callable(answer):
        answer = answer(*_copied(arguments))
    elif arguments and answer is not ...:
        raise Wrong(f"a function is expected, yours is a {type(answer).__name__}.")
    if answer is ...:
        raise NotImplementedError
    if answer is None:
        raise Wrong("it returned None; is a `return` missing?")
    return _copied(answer)


def _copied(x):
    if isinstance(x, tuple | list):
        return [_copied(y) for y in x] if isinstance(x, list) else tuple(_copied(y) for y in x)
    return x.clone() if isinstance(x, Tensor) else x


def _numbers(x, tol: float) -> Tensor:
    """A result as a float64 tensor; Wrong for what is no real number, or too coarse to be compared within `tol`."""
    if isinstance(x, Tensor) and x.is_floating_point() and torch.finfo(x.dtype).eps > tol:
        raise Wrong(f"your result is in {x.dtype}, which is too coarse to be compared: compute in torch.float64.")
    try:
        values = torch.tensor(x.tolist() if isinstance(x, Tensor) else x, dtype=torch.float64)
        return values.reshape(x.shape) if isinstance(x, Tensor) else values
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise Wrong(f"your answer stopped with a {kind}; real numbers in a tensor are expected.") from None


@contextmanager
def _watched():
    """In the main thread: ends what takes too long, and yields a list that is empty until somebody presses Ctrl-C."""
    pressed, begun = [], time.monotonic()

    def press(number, frame):
        pressed.append(number)
        raise KeyboardInterrupt

    def stop(number, frame):
        raise _TimeUp

    with ExitStack() as undo:
        if threading.current_thread() is threading.main_thread():
            if callable(signal.getsignal(signal.SIGINT)):
                undo.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, press))
            if hasattr(signal, "SIGALRM") and signal.getsignal(signal.SIGALRM) is not None:
                left, every = signal.getitimer(signal.ITIMER_REAL)
                undo.callback(lambda: signal.setitimer(
                    signal.ITIMER_REAL, left and max(left - time.monotonic() + begun, 1e-3), every))  # fmt: skip
                undo.callback(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, stop))
                undo.callback(signal.setitimer, signal.ITIMER_REAL, 0)
                signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.1)  # again and again: an `except:` may swallow one
        yield pressed


def _complaint(error: BaseException) -> str:
    """What to say to an answer that stopped."""
    if isinstance(error, NotImplementedError) and error.args in ((), (NOT_ATTEMPTED,)):
        return NOT_ATTEMPTED
    if isinstance(error, _TimeUp):
        return f"your answer was stopped after {SECONDS:g} seconds; is there a loop that never ends?"
    if isinstance(error, Wrong):
        return str(error)
    said = textwrap.shorten(traceback.format_exception_only(error)[0], 300)
    return f"your answer stopped with {said}".encode(errors="backslashreplace").decode()


def _judge(exercise: Exercise, results: list[dict], trials: list[tuple]) -> str | None:
    """None where all results are right, else the message of the mistake that gives just these, or where they differ."""
    right = [exercise.outcome(exercise.solution, x) for x in trials]
    differ = [not _same(got, want, exercise.tol) for got, want in zip(results, right, strict=True)]
    if not any(differ):
        return None
    for mistake in exercise.mistakes:
        if all(_same(got, exercise.outcome(mistake.answer, x), exercise.tol) for got, x in zip(results, trials)):
            return mistake.message
    first, often = differ.index(True), sum(differ)
    message = _difference(results[first], right[first], trials[first], exercise.tol)
    return message + f" (Wrong on {often} of {TRIALS} random inputs.)" * (often < TRIALS)


def _close(got: Tensor, want: Tensor, tol: float) -> Tensor:
    scale = want.nan_to_num(posinf=0.0, neginf=0.0).abs().amax().clamp(1e-4) if want.numel() else 1.0
    return torch.isclose(got, want, rtol=0.0, atol=tol * float(scale), equal_nan=True)


def _same(got: dict[str, Tensor], want: dict[str, Tensor], tol: float) -> bool:
    return got.keys() == want.keys() and all(
        got[k].shape == want[k].shape and bool(_close(got[k], want[k], tol).all()) for k in want
    )


def _difference(got: dict[str, Tensor], want: dict[str, Tensor], arguments: tuple, tol: float) -> str:
    """In words: the first place that differs, what kind of place that is, and in which direction."""
    if got.keys() != want.keys():
        return f"{len(want)} results are expected, yours gives {len(got)}."
    name = next(k for k in want if not _same({k: got[k]}, {k: want[k]}, tol))
    g, w = got[name], want[name]
    where = f"{name}: " if name else ""
    if g.shape != w.shape:
        return f"{where}a result of shape {tuple(w.shape)} is expected, yours has {tuple(g.shape)}."
    index = tuple((~_close(g, w, tol)).nonzero()[0].tolist())
    x, y = g[index].item(), w[index].item()
    where += f"at {list(index)}{_kind(index, w.shape, mask_of(arguments))} " if index else ""
    return f"{where}yours gives {x:.7g} where {y:.7g} is expected: {_direction(x, y)}."


def mask_of(arguments: tuple) -> Tensor | None:
    return next((x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool), None)


def _kind(index: tuple, shape: torch.Size, mask: Tensor | None) -> str:
    """What stands at this index of a result, if there is a mask to tell."""
    if mask is None or shape not in (mask.shape, mask.shape[:1]):
        return ""
    length = int(mask[index[0]].sum())
    if shape != mask.shape:
        return f" (a row of length {length})"
    place = "on padding" if not mask[index] else "the last token" if index[1] == length - 1 else "a real token"
    return f" ({place}, in a row of length {length})"


def _direction(x: float, y: float) -> str:
    if math.isnan(x):
        return "NaN (not a number), so look for 0/0, log 0, ∞ − ∞, or padding that got in"
    if y and math.isclose(x, -y, rel_tol=1e-6):
        return "the sign is wrong"
    return f"too {'large' if x > y else 'small'}" + ", without bound" * math.isinf(x)
