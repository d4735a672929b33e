"""Puzzles: exercises whose answer is a Triton kernel, run apart so that it may hang or crash.

How to write one. The notebook's first cell says, before anything imports Triton: `if not torch.cuda.is_available():
os.environ["TRITON_INTERPRET"] = "1"`. The text gives the types of arguments and result. A skeleton follows: a
`@triton.jit` kernel with `# BEGIN SOLUTION` … `# END SOLUTION` in it, and `def answer(x, ...)`, which launches it and
returns float32 tensors that it made by `x.new_empty(...)` (float64 is the default in a notebook, and refused).
`check.exercise("9.1", answer)` grades it. In the chapter stands `Puzzle("9.1", title, level, minutes, solution, inputs,
mistakes, hints, tile=(1, BLOCK))`. Solution and mistakes are PyTorch functions that compute what a right or wrong
kernel would and return float32: a catalogue must not take the interpreter's time (tests run the wrong kernels). They
get the memory that a kernel gets: `x.as_strided(x.shape, (x.shape[1], 1))` is what one reads that takes rows for
contiguous. `inputs` are float32 and hostile: several programs, several blocks, a ragged tail, `hostile_logits`.

All tensors that an answer gets, or makes by `empty`, `zeros`, `ones`, `full` and their kin, lie between guards of NaN
(integers: the largest), and the rows it gets are not contiguous: each argument has another stride. What is made empty
is a NaN of its own. So a read beyond the end shows in the result, a write is named, and what was never stored is told.
Last, the inputs of one trial end where memory begins that nobody may touch. Where the system can fork (not on Windows),
all this happens in a process of its own, killed after `exercises.SECONDS`. On a GPU it happens in this one, since CUDA
does not survive a fork: an endless kernel then takes a restart. What an answer prints while it is graded is not shown;
to see it, call the answer yourself.
"""

import ctypes
import faulthandler
import io
import mmap
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from klq_edu.course import exercises
from klq_edu.course.exercises import Exercise, Wrong

GUARD, GAP = 64, 5  # elements before and after a tensor, and between the rows of the first; 2 more in each later one
UNWRITTEN = 0x7FC0ABCD  # the bits of a NaN of its own, in float32 memory that a tensor made empty gets
PROT_NONE = 0  # of sys/mman.h
LOOK = "look at the mask of your loads and stores, and at the stride that a row starts at."


@dataclass(frozen=True)
class Puzzle(Exercise):
    """An exercise in float32 whose answer launches a kernel."""

    tol: float = 1e-5  # relative to each number
    atol: float = 1e-6
    tile: tuple[int, ...] = ()  # elements that one program, or one turn of its loop, makes along each axis of a result
    writes: tuple[int, ...] = ()  # which of the tensors among the arguments a kernel may change, from 0

    def outcomes(self, answer: Callable, trials: list[tuple]) -> list[dict[str, Tensor]]:
        """What it gives for every trial, from a process of its own; Wrong where that crashed or hung."""
        here = partial(super().outcomes, trials=trials)
        known = any(answer is f for f in (self.solution, *(m.answer for m in self.mistakes)))
        if known or not hasattr(os, "fork") or _device() == "cuda":
            return here(answer)
        data, signalled = _forked(partial(here, answer), partial(exercises._call, answer, *trials[-1], copy=_fenced))
        results, complaint = pickle.loads(data) if data else (None, _obituary(signalled))
        if complaint:
            raise Wrong(complaint)
        right = here(self.solution)
        if signalled and not any(exercises._difference(*three, self) for three in zip(results, right, trials)):
            raise Wrong(f"the numbers are right, but your kernel touches memory past the end of an argument: {LOOK}")
        return results

    def outcome(self, answer: Callable, arguments: tuple) -> dict[str, Tensor]:
        """What it gives for these arguments between guards; Wrong where it changed what is not its own."""
        guards = Guards()
        try:
            with guards:
                found = self.probe(partial(exercises._call, answer, copy=guards.arguments), *arguments)
        except Exception:
            guards.check(self.writes)  # memory that was written to may be why
            raise
        for name, x in found.items():
            if isinstance(x, Tensor) and x.dtype == torch.float32 and x.numel() and bool(unwritten(x).all()):
                raise Wrong(f"{name}nothing was ever stored there; is a tl.store missing, or never reached?")
        numbers = {name: exercises._numbers(x, torch.float32) for name, x in found.items()}
        guards.check(self.writes)
        return numbers

    def close(self, got: Tensor, want: Tensor) -> Tensor:
        """Which numbers are right, each by its own size."""
        return torch.isclose(got, want, rtol=self.tol, atol=self.atol, equal_nan=True)

    def way(self, x: float, y: float) -> str:
        """In which direction x misses y, or that x comes from memory that was made empty."""
        made_empty = unwritten(torch.tensor(x, dtype=torch.float64).float()).item()
        return "nothing was ever stored there" if made_empty else super().way(x, y)

    def place(self, index: tuple, result: Tensor, arguments: tuple) -> str:
        """An index in words, with its block and whether that is the ragged one."""
        axes = ("row", "column") if len(index) == 2 else ("element",)
        said = []
        for axis, i, n, size in zip(axes, index, result.shape, self.tile):
            where = f"{'the first' if i % size == 0 else 'one'} of block {i // size + 1} of {-(-n // size)}"
            ragged = ", the ragged one" if n % size and i // size == n // size else ""
            said += [f"{axis} {i} is {where}{ragged}"] if size > 1 else []
        said += [f"row {index[0]} of {len(result)}"] if index and not self.tile else []
        return super().place(index, result, arguments) + (f"({'; '.join(said)}) " if said else "")


class Guards(TorchFunctionMode):
    """While it is entered, tensors are made between guards; `check` finds what was written to them."""

    def __init__(self):
        super().__init__()
        self.held: list[tuple] = []  # number of the argument or None, what it is, memory, memory before, its own places

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call it; a tensor that is made is moved between guards."""
        out, made = function(*args, **kwargs or {}), getattr(function, "__name__", "")
        if not isinstance(out, Tensor) or not any(x in made for x in ("empty", "zeros", "ones", "full")):
            return out
        name = f"a tensor of shape {tuple(out.shape)} that you made"
        return self.guard(None, name, out, out.stride(), empty="empty" in made)

    def arguments(self, arguments: tuple) -> tuple:
        """Copies between guards, with gaps between rows."""
        numbers = count()

        def move(x):
            strides, number = [1], next(numbers)
            for n in reversed(x.shape[1:]):
                strides.insert(0, n * strides[0] + GAP + 2 * number)
            return self.guard(number, f"its tensor argument {number + 1}", x, strides[: x.dim()])

        return tree_map_only(Tensor, move, arguments)

    def guard(self, number: int | None, name: str, x: Tensor, strides, empty: bool = False) -> Tensor:
        """x in memory that is larger."""
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides)) if x.numel() else 0
        device = x.device if number is None else _device()
        with torch._C.DisableTorchFunction():  # this mode too
            memory = torch.full((span + 2 * GUARD,), _poison(x.dtype), dtype=x.dtype, device=device)
            own = torch.zeros(len(memory), dtype=torch.bool)
            view, places = (y.as_strided(x.shape, strides, GUARD) for y in (memory, own))
            places.fill_(True)
            if not empty:
                view.copy_(x)
            elif x.dtype == torch.float32:
                view.view(torch.int32).fill_(UNWRITTEN)
            self.held.append((number, name, memory, memory.clone(), own))
        return view

    def check(self, writes: tuple[int, ...]) -> None:
        """Wrong where a guard was written to, or an argument that is not to be written."""
        for number, name, memory, before, own in self.held:
            now, then = (x.cpu().view(torch.uint8).view(len(x), -1) for x in (memory, before))
            changed = (now != then).any(1)
            if (outside := (changed & ~own).nonzero()).numel():
                past = outside.max().item() - own.nonzero().max().item() if own.any() else 1
                where = f"{past} elements past its end" if past > 0 else "before or between its rows"
                raise Wrong(f"your kernel wrote outside of {name}, {where}: {LOOK}")
            if number is not None and number not in writes and changed.any():
                raise Wrong(f"your kernel changed {name}, which is only to be read; write to memory of your own.")


def hostile_logits(generator: Generator, rows: int, columns: int) -> Tensor:
    """Random float32 logits [rows, columns] with offsets of 0, −300 and 300 by turns, and a few −inf in every row."""
    logits = 3 * torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    logits += torch.tensor([0.0, -300.0, 300.0], dtype=torch.float32).repeat(rows)[:rows, None]
    barred = torch.rand(rows, columns, generator=generator).argsort(1) < max(1, columns // 10)
    return logits.masked_fill(barred & (columns > 1), -torch.inf)


def unwritten(x: Tensor) -> Tensor:
    """Where float32 numbers are those of memory that was made empty."""
    return x.view(torch.int32) == UNWRITTEN


def _device() -> str:
    """Where kernels run."""
    return "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"


def _poison(dtype: torch.dtype):
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return torch.nan
    return torch.iinfo(dtype).max


def _fenced(arguments: tuple) -> tuple:
    """Copies that end where memory begins that no one may touch."""

    def move(x):
        size = x.numel() * x.element_size()
        room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = torch.frombuffer(mmap.mmap(-1, room + mmap.PAGESIZE), dtype=torch.uint8)[:room]
        ctypes.CDLL(None).mprotect(ctypes.c_void_p(memory.data_ptr() + room), mmap.PAGESIZE, PROT_NONE)
        return memory[room - size :].view(x.dtype).view(x.shape).copy_(x)

    return tree_map_only(Tensor, move, arguments)


def _forked(work: Callable, afterwards: Callable) -> tuple[bytes, int]:
    """(what the work returned and what there is to complain of, pickled; the signal that ended its process, or 0)."""
    # A signal that comes while it forks is answered afterwards: an exception in what runs around a fork (there logging
    # puts its lock back) would be lost, and the lock held. No mask does that: another thread may be given the signal.
    (read, write), late, main = os.pipe(), [], threading.current_thread() is threading.main_thread()
    handlers = {n: signal.signal(n, lambda n, _: late.append(n)) for n in (signal.SIGALRM, signal.SIGINT) if main}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child uses none
        child = os.fork()
    if not child:
        _child(write, work, afterwards)
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's
        for number in late:
            signal.raise_signal(number)
        os.close(write)
        with open(read, "rb") as pipe:
            data = pipe.read()
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        _, status = os.waitpid(child, 0)
    return data, os.WTERMSIG(status)


def _child(write: int, work: Callable, afterwards: Callable) -> None:
    """In the forked process: work with a deadline and in silence, tell the parent, end."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, exercises.SECONDS)
        faulthandler.disable()
        sys.stdout = sys.stderr = io.StringIO()
        torch.set_num_threads(1)  # the others did not survive the fork
        try:
            said = work(), None
        except BaseException as error:
            said = None, exercises._complaint(error)
        with open(write, "wb") as pipe:
            pipe.write(pickle.dumps(said))
        if said[1] is None:
            afterwards()
    finally:
        os._exit(0)


def _obituary(signalled: int) -> str:
    """What ended a process that told nothing."""
    if signalled == signal.SIGALRM:
        return f"your kernel was stopped after {exercises.SECONDS:g} seconds; is there a loop that never ends?"
    how = signal.strsignal(signalled).lower() if signalled else "it exited"
    if signalled in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):  # the last: of malloc, whose memory was written to
        return f"your kernel crashed ({how}): {LOOK}"
    return f"your kernel's process ended without a result ({how})."
