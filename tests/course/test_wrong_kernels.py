"""The kernels of the notebooks' puzzles with one mistake each: every one is answered by the name of its mistake.

The catalogue says in PyTorch what a wrong kernel computes; here wrong kernels run, each a notebook's own solution with
a piece of its text replaced.
"""

import linecache
from functools import cache
from pathlib import Path

import jupytext
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from klq_edu.course.chapters import load  # noqa: E402
from klq_edu.course.exercises import grade  # noqa: E402

SOURCES = Path(__file__).parents[2] / "notebooks" / "src"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of inf and NaN

INF = ', other=-float("inf")'
WRONG = [  # exercise, what of its cell is replaced by what, how the verdict begins
    ("10.1", {}, "✔"),
    ("10.1", {"tl.load(G + row) * ": ""}, "you forgot the upstream"),
    ("10.1", {"tl.load(G + row)": "tl.load(G)"}, "every row got the first row's upstream"),
    ("10.1", {"(one - p)": "(-p)"}, "the one-hot is missing"),
    ("10.1", {"tl.load(G + row) * inverse * (one - p)": "inverse * (one - tl.load(G + row) * p)"}, "the one-hot has"),
    ("10.1", {"(one - p)": "(p - one)"}, "the sign is that of a loss"),
    ("10.1", {"* inverse * (one": "* (one"}, "you forgot the temperature in front"),
    ("10.1", {") * inverse - tl": ") - tl"}, "you forgot the temperature inside p"),
    ("10.1", {"* inverse * (one": "/ inverse * (one"}, "you multiplied by the temperature"),
    ("10.1", {"(z - tl.load(TOP + row))": "z"}, "lse is relative to the largest logit"),
    ("10.1", {" - tl.load(LSE + row)": ""}, "your p does not sum to 1"),
    ("10.1", {"logits.stride(0), out": "V, out"}, "you took the rows for contiguous"),
    ("10.1", {"triton.cdiv(V, 16)": "1"}, "only the first block of each row was written"),
    ("10.1", {"dz = ": "p = p.to(tl.float16).to(tl.float32)\n    dz = "}, "p was rounded to half precision"),
    ("10.1", {"dz, mask=inside": "dz"}, "your kernel wrote outside of a tensor"),
    ("10.1", {", mask=inside" + INF: ""}, "the numbers are right, but your kernel touches memory past the end"),
    ("10.2", {}, "✔"),
    ("10.2", {"tl.exp(logp) * centred": "(tl.exp(logp) - tl.exp(logq))"}, "this is the gradient of D(q‖p)"),
    ("10.2", {" - tl.load(KL + row)": ""}, "D is not subtracted"),
    ("10.2", {"- tl.load(KL + row)": "- tl.load(KL + row) + 1"}, "the 1 from differentiating"),
    ("10.2", {"- tl.load(KL": "+ tl.load(KL"}, "D is added"),
    ("10.2", {"* centred": "* -centred"}, "the sign is wrong, or p and q are exchanged"),
    ("10.2", {"tl.exp(logp) * centred": "tl.exp(logq) * centred"}, "the weights are the policy's p"),
    ("10.2", {"tl.exp(logp) * centred": "tl.exp(logp) * 0"}, "nothing is left where p is held fixed"),
    ("10.2", {"tl.load(G + row) * ": ""}, "you forgot the upstream"),
    ("10.2", {"* inverse * tl.exp": "* tl.exp"}, "you forgot the temperature in front"),
    ("10.2", {"tl.maximum(logp, -1e30), tl.maximum(logq, -1e30)": "logp, logq"}, "NaN: where p = 0"),
    ("10.2", {"- tl.load(KL": "+ tl.load(LSE + row) - tl.load(REF_LSE + row) - tl.load(KL"},
     "the log-ratio lacks the normalisers"),
    ("10.2", {"logits.stride(0), ref_logits.stride(0)": "V, V"}, "you took the rows for contiguous"),
    ("10.2", {"triton.cdiv(V, 16)": "1"}, "only the first block of each row was written"),
    ("10.2", {"dz, mask=inside": "dz"}, "your kernel wrote outside of a tensor"),
    ("10.3", {}, "✔"),
    ("10.3", {", reverse=True": ""}, ""),
    ("10.3", {"sums += decays * tail": "sums += 0"}, "each block is right by itself"),
    ("10.3", {"decays * tail": "a * tail"}, "the decay was kept, not composed"),
    ("10.3", {"decays * tail": "tl.where(t < length, tail, 0.0)"}, "what is carried into a block was not discounted"),
    ("10.3", {"decays * tail": "decays * tail / decay"}, "what is carried over the seam misses one factor"),
    ("10.3", {"decay, 0.0)": "1.0, 0.0)"}, "you forgot the decay"),
    ("10.3", {"decay, 0.0)": "0.0, 0.0)"}, "these are the δ themselves"),
    ("10.3", {"t < length": "t < T"}, "padding got in"),
    ("10.3", {"LENGTHS + row": "LENGTHS"}, "every row got the first row's length"),
    ("10.3", {"tl.load(LENGTHS + row)": "tl.load(LENGTHS + row) - 1"}, "the last token of each row is missing"),
    ("10.3", {"delta.stride(0)": "T"}, "you took the rows for contiguous"),
    ("10.3", {"range(tl.cdiv(T, BLOCK) - 1, -1, -1)": "range(0, -1, -1)"}, ""),
    ("10.3", {"sums, mask=t < T": "sums"}, "your kernel wrote outside of a tensor"),
]  # fmt: skip


@cache
def cell(number):
    """The notebook's cell that is graded as this exercise."""
    cells = jupytext.read(SOURCES / f"{load(number.split('.')[0]).name}.py", fmt="py:percent").cells
    return next(c.source for c in cells if f'check.exercise("{number}"' in c.source)


def launcher(number, replaced):
    """The answer of that cell with these pieces of its text replaced."""
    text, call = cell(number).split("check.exercise(")
    for old, new in replaced.items():
        assert old in text, old
        text = text.replace(old, new)
    name = f"<{number} {len(linecache.cache)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)  # Triton reads its source
    space = {"triton": triton, "tl": tl}
    exec(compile(text, name, "exec"), space)
    return space[call.split(", ")[1].rstrip(")\n")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run in the interpreter here")
@pytest.mark.parametrize(("number", "replaced", "says"), WRONG)
def test_a_wrong_kernel_is_told_its_mistake(number, replaced, says):
    exercise = load(number.split(".")[0]).exercises[number]
    verdict = grade(exercise, launcher(number, replaced), seed=1)
    assert verdict.passed is (not replaced), verdict
    assert verdict.message.split(": ", 1)[-1].startswith(says) or not replaced, verdict
