"""Kernel puzzles: whatever a kernel does (hang, crash, write where it should not), its author gets a verdict."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
import torch
from nbclient import NotebookClient

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from klq_edu.course import exercises  # noqa: E402
from klq_edu.course.exercises import Mistake, grade  # noqa: E402
from klq_edu.course.puzzles import Puzzle, hostile_logits  # noqa: E402

BLOCK = 16


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def scaled(x, scale):
    return (x.double() * scale.double()[:, None]).float()


def inputs(generator):
    rows, columns = 3, int(torch.randint(BLOCK + 1, 3 * BLOCK, (), generator=generator)) // 2 * 2 + 1
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float32)
    return x, 1 + torch.rand(rows, generator=generator, dtype=torch.float32)


def contiguous_rows(x, scale):
    return scaled(x.as_strided(x.shape, (x.shape[1], 1)), scale)


PUZZLE = Puzzle(
    "9.9", "Scale the rows", 1, 1, scaled, inputs,
    (Mistake("stride", contiguous_rows, "you took the rows for contiguous."),
     Mistake("no scale", lambda x, scale: x.clone(), "you forgot the scale."),
     Mistake("half", lambda x, scale: scaled(x.half(), scale), "you rounded to half precision.")),
    ("a", "b", "c"), tile=(1, BLOCK),
)  # fmt: skip


@triton.jit
def kernel(X, SCALE, OUT, x_row, V, out_row, HALF: tl.constexpr, added, unmasked, past, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + row * x_row + column, mask=column < V + unmasked, other=0.0)
    if HALF:
        x = x.to(tl.float16).to(tl.float32)
    tl.store(OUT + row * out_row + column, x * tl.load(SCALE + row) + added, mask=column < V + past)


@triton.jit
def hole(OUT):
    raise NotImplementedError("not attempted yet")


def not_attempted(x, scale):
    hole[(1,)](x)


def launch(change=lambda x, scale, out: None, half=False, added=0.0, unmasked=0, past=0, x_row=None, blocks=None):
    def answer(x, scale):
        out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        change(x, scale, out)
        columns = blocks or triton.cdiv(x.shape[1], BLOCK)
        kernel[(len(x), columns)](
            x, scale, out, x_row or x.stride(0), x.shape[1], out.stride(0), half, added, unmasked, past, BLOCK
        )
        return out

    return answer


def endless(x, scale):
    while True:
        pass


def raises(error):
    def answer(*_):
        raise error

    return answer


def segfault(x, scale):
    os.kill(os.getpid(), signal.SIGSEGV)


def far_away(x, scale):
    return launch(x_row=1 << 40)(x, scale)


@triton.jit
def seen_only(X, SEEN, OUT, V, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    tl.store(OUT + column, tl.load(X + column, mask=(column < V) & tl.load(SEEN), other=0.0), mask=column < V)


def masked_by_a_boolean(x, scale):
    seen_only[(1,)](x, torch.tensor([True]), torch.empty(64), x.shape[1], 64)


def spoil(x, element):
    """Write this many elements after the first of x."""
    x.as_strided((1,), (1,), x.storage_offset() + element).zero_()


def spoils_and_stops(x, scale):
    """What was spoilt may be why it stopped."""
    spoil(x, -1)
    raise RuntimeError("storage that is invalid")


def into_argument(x, scale):
    x.mul_(scale[:, None])
    return x


def rest_of_memory(x, scale):
    return torch.empty(1 << 50, dtype=torch.float32)


SAID = [  # answer, whether it passes, what is said
    (launch(), True, "✔ Exercise 9.9 passed"),
    (scaled, True, "✔"),
    (lambda x, scale: torch.where(torch.arange(x.shape[1]) >= 0, scaled(x, scale), 0), True, "✔"),
    (..., None, "not attempted yet"),
    (raises(NotImplementedError("not attempted yet")), None, "not attempted yet"),
    (not_attempted, None, "not attempted yet"),
    (launch(x_row=17), False, "is expected"),
    (lambda x, scale: launch(x_row=x.shape[1])(x, scale), False, "you took the rows for contiguous"),
    (lambda x, scale: launch()(x, torch.ones_like(scale)), False, "you forgot the scale"),
    (launch(half=True), False, "you rounded to half"),
    (launch(added=1e-3), False, "(column 0 is the first of block 1 of"),
    (launch(blocks=1), False, "column 16 is the first of block 2 of"),
    (launch(blocks=1), False, "is expected: nothing was ever stored there"),
    (launch(added=float("nan")), False, "yours gives NaN (not a number) where"),
    (launch(added=float("nan")), False, "look for 0/0"),
    (masked_by_a_boolean, False, "write `seen != 0` for a boolean"),
    (launch(unmasked=BLOCK), False, "touches memory past the end of an argument"),
    (launch(past=1), False, "wrote outside of a tensor of shape (3,"),
    (launch(past=1), False, "1 elements past its end"),
    (lambda x, scale: launch(blocks=5)(x, scale), True, "✔"),
    (launch(lambda x, *_: x[1].zero_()), False, "changed its tensor argument 1, which is only to be read"),
    (launch(lambda x, *_: spoil(x, -1)), False, "wrote outside of its tensor argument 1, before or between its rows"),
    (launch(lambda x, *_: spoil(x, x.shape[1])), False, "wrote outside of its tensor argument 1, before or between"),
    (launch(lambda x, scale, _: spoil(scale, 3)), False, "wrote outside of its tensor argument 2, 1 elements past its"),
    (launch(lambda x, scale, out: spoil(out, -1)), False, "wrote outside of a tensor of shape (3, 27) that"),
    (spoils_and_stops, False, "wrote outside of its tensor argument 1"),
    (into_argument, False, "changed its tensor argument 1"),
    (segfault, False, "crashed (segmentation fault): look at the mask"),
    (far_away, False, "crashed (segmentation fault)"),
    (lambda x, scale: os._exit(3), False, "ended without a result (it exited)"),
    (lambda x, scale: os.kill(os.getpid(), signal.SIGKILL), False, "ended without a result (killed)"),
    (lambda x, scale: os.abort(), False, "(aborted)"),
    (raises(ValueError("no")), False, "stopped with ValueError: no"),
    (raises(MemoryError()), False, "stopped with MemoryError"),
    (raises(SystemExit(0)), False, "stopped with SystemExit"),
    (rest_of_memory, False, "stopped with RuntimeError"),
    (lambda x, scale: None, False, "it returned None"),
    (lambda x, scale: x[:, :3], False, "a result of shape (3,"),
    (lambda x, scale: scaled(x, scale).double(), False, "your result is a torch.float64 tensor; checks"),
    (lambda x, scale: scaled(x, scale).half(), False, "your result is a torch.float16 tensor"),
    (lambda x, scale: (x, x), False, "one tensor is expected, yours is a list or tuple of 2"),
    (3.0, False, "a function is expected"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "passed", "says"), SAID)
def test_what_a_check_says_to_a_kernel(answer, passed, says, capfd):
    verdict = grade(PUZZLE, answer, seed=1)
    assert verdict.passed is passed and says in verdict.message
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes apart here")
@pytest.mark.parametrize("elsewhere", [False, True], ids=["in the main thread", "in another"])
def test_an_endless_kernel_is_stopped_and_leaves_no_process(monkeypatch, elsewhere):
    monkeypatch.setattr(exercises, "SECONDS", 0.5)
    children, fork, begun = [], os.fork, time.monotonic()
    monkeypatch.setattr(os, "fork", lambda: children.append(fork()) or children[-1])
    with ThreadPoolExecutor(1) as pool:
        verdict = pool.submit(grade, PUZZLE, endless).result() if elsewhere else grade(PUZZLE, endless)
    assert verdict.passed is False and "was stopped after 0.5 seconds" in verdict.message
    assert time.monotonic() - begun < 20
    assert len(children) == 1  # of this test: a worker may have others, a browser's among them
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)


def test_a_kernel_runs_where_torch_has_had_threads():
    """The threads of the parent do not survive the fork: the child has to do without."""
    program = """
import torch
torch.set_num_threads(2)
(torch.randn(500, 500) @ torch.randn(500, 500)).exp().sum()
from klq_edu.course.exercises import grade
from klq_edu.course.puzzles import Puzzle
solution = lambda x: (x @ x).exp().sum(1)
puzzle = Puzzle("9.9", "", 1, 1, solution, lambda g: (torch.rand(500, 500, dtype=torch.float32) / 500,), (), ())
print(grade(puzzle, lambda x: solution(x)).message)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "passed on 5 random inputs" in done.stdout, done


def test_logits_are_hostile_and_no_row_is_barred():
    x = hostile_logits(torch.Generator().manual_seed(0), 7, 21)
    assert x.dtype == torch.float32 and (x == -torch.inf).any(1).all() and (x > -torch.inf).any(1).all()
    finite = torch.where(x > -torch.inf, x, 0.0).sum(1)
    assert (finite < -1000).any() and (finite > 1000).any() and (finite.abs() < 1000).any()
    assert not hostile_logits(torch.Generator(), 4, 1).isinf().any()


CELLS = [
    """import os
os.environ["TRITON_INTERPRET"] = "1"
import torch, triton, triton.language as tl
from klq_edu.course.checks import Checks
from klq_edu.course.puzzles import Puzzle
from klq_edu.course.exercises import Mistake
double = Puzzle("9.9", "", 1, 1, lambda x: 2 * x, lambda g: (torch.randn(3, 37, generator=g, dtype=torch.float32),),
                (Mistake("", lambda x: x.clone(), "you forgot to double."),), ())
check = Checks("09", {"9.9": double})
@triton.jit
def kernel(X, OUT, x_row, V, factor, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + row * x_row + column, mask=column < V)
    while factor == 0:
        x += 1
    tl.store(OUT + row * V + column, factor * x, mask=column < V)
def launch(x, factor=2, x_row=None):
    print("never seen")
    out = x.new_empty(x.shape)
    kernel[(3, 3)](x, out, x_row or x.stride(0), x.shape[1], factor, 16)
    return out""",
    "check.exercise('9.9', launch)",
    "check.exercise('9.9', lambda x: launch(x, 1))",
    "check.exercise('9.9', lambda x: launch(x, x_row=1 << 40))",
    "from klq_edu.course import exercises\nexercises.SECONDS = 3.0\ncheck.exercise('9.9', lambda x: launch(x, 0))",
    "print('still there', launch(torch.ones(3, 5, dtype=torch.float32))[0, 0].item())",
]


def test_it_works_from_jupyter(monkeypatch, tmp_path):
    """Nothing of the child reaches the kernel's sockets, and the kernel survives it."""
    monkeypatch.setenv("KLQ_PROGRESS", str(tmp_path / "progress.json"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in CELLS])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    said = ["".join(o.text for o in cell.outputs) for cell in notebook.cells]
    assert {o.get("name") for cell in notebook.cells for o in cell.outputs} == {"stdout"}
    assert said[1:3] == ["✔ Exercise 9.9 passed on 5 random inputs.\n", "✘ Exercise 9.9: you forgot to double.\n"]
    assert "crashed (segmentation fault)" in said[3] and "was stopped after 3 seconds" in said[4]
    assert said[5] == "never seen\nstill there 2.0\n"


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="no processes apart here")
def test_an_alarm_amid_a_fork_is_not_lost_in_what_runs_around_it():
    """There Python drops exceptions, and a lock that was to be put back stays held: the next thread to log waits for
    ever. The alarm is given to another thread, where a mask of the main one stops nothing."""
    script = """
        import os, signal, sys, threading, time
        import klq_edu.course.puzzles as puzzles
        from klq_edu.course.exercises import _watched
        lost, fires = [], [True]
        sys.unraisablehook = lambda problem: lost.append(problem)
        def after():
            if fires.pop() if fires else False:
                os.kill(os.getpid(), signal.SIGALRM)
                for _ in range(3_000_000):
                    pass
        os.register_at_fork(after_in_parent=after)
        def busy():
            while True:
                time.sleep(1e-4)
        threading.Thread(target=busy, daemon=True).start()
        with _watched() as rung:
            try:
                puzzles._forked(lambda: None, lambda: None)
                print("went on")
            except KeyboardInterrupt:
                print("interrupted", rung == [signal.SIGALRM], lost)
    """
    said = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert said.stdout == "interrupted True []\n", said
