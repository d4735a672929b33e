"""Exercises that grade themselves: a solution, fresh random inputs, and the mistakes people make, by name."""

import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils._pytree import tree_map_only

TRIALS = 5
SECONDS = 10.0  # for all trials of an answer together
ALARM = getattr(signal, "SIGALRM", None)  # not on Windows
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


def returned(answer: Callable, *arguments) -> dict[str, Tensor]:
    """A probe: what the answer returns, one result or several."""
    result = answer(*arguments)
    parts = result if isinstance(result, tuple | list) else (result,)
    return {f"result {i} of {len(parts)}: " if len(parts) > 1 else "": x for i, x in enumerate(parts, 1)}


@dataclass(frozen=True)
class Exercise:
    """One exercise."""

    number: str  # "1.2": chapter and place
    title: str  # a few words
    level: int  # of difficulty, 1 to 3
    minutes: int  # for a first attempt
    solution: Callable  # the right answer, a function (of no arguments where the answer is a value)
    inputs: Callable[[Generator], tuple]  # generator -> arguments to try an answer on
    mistakes: tuple[Mistake, ...]  # at least three
    hints: tuple[str, str, str]  # each more telling than the one before
    probe: Callable[..., dict[str, Tensor]] = returned  # (answer, *arguments) -> what to compare, by name
    tol: float = 1e-8  # relative to the largest number of a result

    def outcome(self, answer: Callable, arguments: tuple) -> dict[str, Tensor]:
        """What this answer gives for these arguments, as float64 tensors by name; Wrong for anything else."""
        return {name: _numbers(x) for name, x in self.probe(partial(_call, answer), *arguments).items()}

    def outcomes(self, answer: Callable, trials: list[tuple]) -> list[dict[str, Tensor]]:
        """`outcome` for the arguments of every trial."""
        return [self.outcome(answer, arguments) for arguments in trials]

    def close(self, got: Tensor, want: Tensor) -> Tensor:
        """Which numbers of a result are right."""
        scale = max([1e-4, *want[want.isfinite()].abs().tolist()])
        return torch.isclose(got, want, rtol=0.0, atol=self.tol * scale, equal_nan=True)

    def way(self, x: float, y: float) -> str:
        """In which direction x misses y."""
        if y and abs(x + y) < 1e-6 * abs(y):
            return "the sign is wrong"
        return "too large" if x > y else "too small" if x < y else "look for 0/0, log 0, ∞ − ∞, padding that got in"

    def place(self, index: tuple, result: Tensor, arguments: tuple) -> str:
        """An index in words, and what stands there if a mask among the arguments tells."""
        at = f"at {list(index)} " if index else ""
        mask = next((x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool), None)
        if not index or mask is None or mask.dim() < 2 or result.shape not in (mask.shape, mask.shape[:1]):
            return at
        length = int(mask[index[0]].sum())
        if len(index) == 1:
            return f"{at}(a row of length {length}) "
        token = "the last token" if index[1:] == (length - 1,) else "a real token" if mask[index] else "on padding"
        return f"{at}({token}, in a row of length {length}) "


@contextmanager
def _isolated():
    """float64 and gradients on; torch's precision, device, gradient mode and random numbers are put back afterwards."""
    before, device = torch.get_default_dtype(), torch.get_default_device()
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
            if torch.get_default_device() != device:
                torch.set_default_device(None if device.type == "cpu" else device)


@_isolated()
def grade(exercise: Exercise, answer, seed: int | None = None) -> Verdict:
    """Compare an answer with the solution on fresh random inputs; where it is wrong, find out which mistake it is.

    A value instead of a function is an answer without arguments; `...` (or NotImplementedError) is no attempt. Whatever
    an answer is, raises or does to its arguments, it gets a verdict; only a real Ctrl-C gets through. After 10 seconds
    it is interrupted, in the main thread of a system with SIGALRM; elsewhere (Windows, other threads) nothing stops it,
    and nothing stops one endless call into C.
    """
    generator = torch.Generator()
    generator.manual_seed(seed) if seed is not None else generator.seed()
    trials = [exercise.inputs(generator) for _ in range(TRIALS)]
    right = exercise.outcomes(exercise.solution, trials)  # before the answer can change what it calls
    results, message = None, "your answer stopped with an error that can't be shown"
    with _watched() as rung, suppress(KeyboardInterrupt):  # which may ring while the complaint is made, too
        try:
            results, message = exercise.outcomes(answer, trials), None
        except BaseException as error:
            message = _complaint(error)
    if signal.SIGINT in rung:  # whatever the answer made of it
        raise KeyboardInterrupt
    if rung:
        message = f"your answer was stopped after {SECONDS:g} seconds; is there a loop that never ends?"
    message = message or _judge(exercise, results, right, trials)
    if message == NOT_ATTEMPTED:
        return Verdict(None, f"· Exercise {exercise.number}: {message}.")
    if message:
        return Verdict(False, f"✘ Exercise {exercise.number}: {message}")
    return Verdict(True, f"✔ Exercise {exercise.number} passed on {TRIALS} random inputs.")


def _copies(arguments: tuple) -> tuple:
    return tree_map_only(Tensor, torch.clone, arguments)


def _call(answer, *arguments, copy=_copies):
    """The answer's result on copies of the arguments, itself copied: nobody's memory is shared."""
    if callable(answer):
        with _isolated():
            # in a generator: a swallowed interrupt can leave an exception "being handled", and there it ends with it
            answer = next(answer(*copies) for copies in [copy(arguments)])
    elif arguments and answer is not ...:
        raise Wrong(f"a function is expected, yours is a {type(answer).__name__}.")
    if answer is ...:
        raise NotImplementedError
    if answer is None:
        raise Wrong("it returned None; is a `return` missing?")
    return tree_map_only(Tensor, torch.clone, answer)


def _numbers(x, dtype: torch.dtype = torch.float64) -> Tensor:
    """A result as a float64 tensor; Wrong for what is no real number, or in another precision than this."""
    kind = f"{x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
    try:
        values = torch.tensor(x.tolist() if isinstance(x, Tensor) else x, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise Wrong(f"your answer returned a {kind}; real numbers in a tensor are expected.") from None
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != dtype:
        raise Wrong(f"your result is a {kind}; checks are in {dtype}, so compute in that.")
    return values.reshape(x.shape) if isinstance(x, Tensor) else values


@contextmanager
def _watched():
    """In the main thread: ends what takes too long, yields a list of the signals that came, and puts all back."""
    rung, begun, main = [], time.monotonic(), threading.current_thread() is threading.main_thread()

    def insist(_, event, __):
        if event == "line":
            raise KeyboardInterrupt
        return insist

    def ring(number, frame):
        rung.append(number)
        if number == ALARM and rung.count(ALARM) > 1:  # the first was caught: interrupt every line of what catches it
            while frame and frame.f_code is not _call.__code__:
                frame.f_trace, frame = insist, frame.f_back
            sys.settrace(insist)
        raise KeyboardInterrupt

    tracer = sys.gettrace()
    handlers = {n: signal.signal(n, ring) for n in (signal.SIGINT, ALARM) if main and n}
    left, every = signal.setitimer(signal.ITIMER_REAL, SECONDS, 1.0) if ALARM in handlers else (0, 0)
    try:
        yield rung
    finally:
        if ALARM in handlers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.settrace(tracer)
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - time.monotonic() + begun, 1e-3), every)


def _complaint(error: BaseException) -> str:
    """What to say to an answer that stopped."""
    if type(error).__module__.startswith("triton"):  # about what was raised in a kernel, or a line of its source
        error = NotImplementedError() if NOT_ATTEMPTED in str(error) else error.__cause__ or error
    if isinstance(error, NotImplementedError) and error.args in ((), (NOT_ATTEMPTED,)):  # torch raises others
        return NOT_ATTEMPTED
    said = traceback.format_exception_only(error)[0].strip()[:300].encode(errors="backslashreplace").decode()
    if "mask has unsupported dtype" in said:  # Triton 3.9's interpreter; a GPU takes it
        said += ". In the interpreter a mask is made of comparisons: write `seen != 0` for a boolean that you loaded"
    return str(error) if isinstance(error, Wrong) else f"your answer stopped with {said}"


def _judge(exercise: Exercise, results: list[dict], right: list[dict], trials: list[tuple]) -> str | None:
    """None where all results are right, else the message of the mistake that gives just these, or how they differ."""

    def differences(others: Iterable[dict]) -> Iterator[str]:
        return (_difference(got, want, x, exercise) for got, want, x in zip(results, others, trials))

    found = list(differences(right))
    if not any(found):
        return None
    for mistake in exercise.mistakes:
        if not any(differences(exercise.outcomes(mistake.answer, trials))):
            return mistake.message
    (text, arguments), *more = [(text, x) for text, x in zip(found, trials) if text]
    shown = (list(x.shape) if isinstance(x, Tensor) else f"{x:.3}" if isinstance(x, float) else x for x in arguments)
    where = f"Wrong on {1 + len(more)} of {TRIALS} random inputs, first with arguments {', '.join(map(str, shown))}."
    return f"{text} ({where})"


def _difference(got: dict[str, Tensor], want: dict[str, Tensor], arguments: tuple, exercise: Exercise) -> str:
    """In words: the first number that differs, and in which direction; empty where nothing does."""
    if got.keys() != want.keys():
        several = f"{len(want)} results are expected, yours gives {len(got)}."
        return f"one tensor is expected, yours is a list or tuple of {len(got)}." if len(want) == 1 else several
    for name, right in want.items():
        if got[name].shape != right.shape:
            return f"{name}a result of shape {tuple(right.shape)} is expected, yours has {tuple(got[name].shape)}."
        off = ~exercise.close(got[name], right)
        if off.any():
            index = tuple(off.nonzero()[0].tolist())
            x, y = got[name][index].item(), right[index].item()
            way = exercise.way(x, y)
            form = ".7g" if f"{x:.7g}" != f"{y:.7g}" else ".12g"
            place = exercise.place(index, right, arguments)
            text = f"{name}{place}yours gives {x:{form}} where {y:{form}} is expected: {way}."
            return text.replace("nan", "NaN (not a number)")
    return ""
