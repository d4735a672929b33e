"""Real kernels with the catalogued mistakes: each gets the message of the PyTorch function that stands for it.

A mistake is made in the solution of a notebook's puzzle by replacing some of its source.
"""

import importlib.util
import re
import warnings
from pathlib import Path

import jupytext
import pytest
import torch

from klq_edu.course.chapters import load
from klq_edu.course.exercises import grade

pytest.importorskip("triton")
SOURCES = Path(__file__).parents[2] / "notebooks" / "src"
HEADER = "import torch, triton\nimport triton.language as tl\n"
INF = 'float("-inf")'
PRODUCT = 'tl.dot(h, w.T, input_precision="ieee")'
HALF = ".to(tl.float16).to(tl.float32)"
TO_HALF = f"{PRODUCT}.to(tl.float16)"
BEHIND = f"        z = tl.where((token < V)[None, :], z, {INF})\n"
W = "        w = tl.exp(fall) * (w + s * (fall - fall_r)) + tl.sum(e * d, 0)\n"
S = "        s = tl.exp(fall) * s + tl.sum(e, 0)\n"
LOAD = ', mask=columns < V, other=float("-inf")'
WRONG = [  # puzzle, what is replaced and by what, name of the mistake
    ("9.1", [(', mask=inside, other=float("-inf")', ""), ("tl.where(inside, x, 0.0)", "x")], "unmasked tail"),
    ("9.1", [(f"best, total = {INF}", "best, total = 0.0")], "a zero in the maximum"),
    ("9.1", [(f"other={INF}", "other=0.0")], "a zero in the maximum"),
    ("9.1", [("range(0, V, BLOCK)", "range(0, V // BLOCK * BLOCK, BLOCK)")], "tail dropped"),
    ("9.1", [("range(0, V, BLOCK)", "range(0, BLOCK, BLOCK)")], "one block"),
    ("9.1", [("row * stride", "row * V")], "wrong stride"),
    ("9.1", [("        tl.store(TOP + row, 0.0)\n        tl.store(TOTAL + row, 0.0)\n", "")], "masked rows not stored"),
    ("9.1", [("== 0:", "== 7:")], "masked rows read"),
    ("9.1", [("        best = tl.max", "        x = x.to(tl.float16).to(tl.float32)\n        best = tl.max")],
     "half precision"),
    ("9.1", [("(len(x),)]", "(1,)]")], "one program"),
    ("9.2", [("s * tl.exp(m - new)", "s")], "not rescaled"),
    ("9.2", [("tl.maximum(m, tl.max(z, 0))", "tl.max(z, 0)")], "no −inf"),
    ("9.2", [("m, s = -1e30", "m, s = -100.0")], "maximum started at 0"),
    ("9.2", [("(len(z),)]", "(1,)]")], "wrong stride"),
    ("9.2", [("m, s = -1e30", "m, s = 0.0")], "maximum started at 0"),
    ("9.2", [("m, s = -1e30", f"m, s = {INF}")], "no −inf"),
    ("9.2", [("new = tl.maximum(m, tl.max(z, 0))", "new = 0.0"), ("m, s = -1e30", "m, s = 0.0")], "no maximum"),
    ("9.2", [("m + tl.log(s)", "tl.log(s)")], "maximum not added"),
    ("9.2", [(f"other={INF}", "other=0.0")], "zeros behind the end"),
    ("9.2", [("range(0, V, BLOCK)", "range(0, V // BLOCK * BLOCK, BLOCK)")], "tail dropped"),
    ("9.2", [("row * stride", "row * V")], "wrong stride"),
    ("9.2", [("new = tl.maximum", "z = z.to(tl.float16).to(tl.float32)\n        new = tl.maximum")], "half precision"),
    ("9.3", [("tl.sum(e * d, 0)", "tl.sum(tl.exp(r - new_r) * -d, 0)"), ("m - new,", "n - new_r,"), ("n - new_r\n",
             "m - new\n"), ("w = tl.exp(fall) * (w + s ", "w = tl.exp(fall) * (w + t "), ("s = tl.exp(fall) ",
             "s = tl.exp(fall_r) "), ("t = tl.exp(fall_r) ", "t = tl.exp(fall) "),
             ("w / s + tl.log(t) - tl.log(s)", "w / t + tl.log(s) - tl.log(t)")], "direction"),
    ("9.3", [("w / s + tl.log(t) - tl.log(s)", "tl.log(s) - tl.log(t) - w / s")], "sign"),
    ("9.3", [("w / s + tl.log(t) - tl.log(s)", "w / s + m - n")], "normalisers forgotten"),
    ("9.3", [("w / s + tl.log(t) - tl.log(s)", "w / s")], "half of (9.6)"),
    ("9.3", [("tl.exp(fall) * (w + s * (fall - fall_r))", "w")], "w not rescaled"),
    ("9.3", [(f"other={INF}", "other=0.0")], "zeros behind the end"),
    ("9.3", [(W, ""), (S, S + W)], "w after s"),
    ("9.3", [("(w + s * (fall - fall_r))", "w")], "w shrunk only"),
    ("9.3", [(f"        d = tl.where(z > {INF}, d, 0.0)\n", "")], "NaN of −inf"),
    ("9.3", [("+ tl.log(t) - tl.log(s)", "- tl.log(t) + tl.log(s)")], "sign of the normalisers"),
    ("9.3", [("chosen = tl.load(Z +", "chosen = tl.load(R +")], "reference's logit"),
    ("9.3", [("row * r_stride", "row * z_stride")], "r has its own stride"),
    ("9.3", [("row * z_stride", "row * r_stride")], "z has its own stride"),
    ("9.3", [("(len(z),)]", "(1,)]")], "one program"),
    ("9.3", [("chosen = tl.load(Z +", "chosen = tl.load(R +"), ("chosen - m - tl.log(s)", "chosen - n - tl.log(t)")],
     "reference's log-prob"),
    ("9.3", [("chosen - m - tl.log(s)", "chosen - m")], "log s forgotten"),
    ("10.1", [("tl.load(G + row) * ", "")], "no upstream"),
    ("10.1", [("tl.load(G + row)", "tl.load(G)")], "one upstream"),
    ("10.1", [("(one - p)", "(-p)")], "one-hot missing"),
    ("10.1", [("tl.load(G + row) * inverse * (one - p)", "inverse * (one - tl.load(G + row) * p)")], "one-hot bare"),
    ("10.1", [("(one - p)", "(p - one)")], "sign"),
    ("10.1", [("* inverse * (one", "* (one")], "no factor"),
    ("10.1", [(") * inverse - tl", ") - tl")], "factor only"),
    ("10.1", [(") * inverse - tl", ") - tl"), ("* inverse * (one", "* (one")], "no temperature"),
    ("10.1", [("* inverse * (one", "/ inverse * (one")], "times temperature"),
    ("10.1", [("(z - tl.load(TOP + row))", "z")], "no top"),
    ("10.1", [(" - tl.load(LSE + row)", "")], "no lse"),
    ("10.1", [("logits.stride(0), out", "V, out")], "stride"),
    ("10.1", [("triton.cdiv(V, 16)", "1")], "first block"),
    ("10.1", [("p = tl.exp", "z = z.to(tl.float16).to(tl.float32)\n    p = tl.exp")], "half"),
    ("10.2", [("tl.exp(logp) * centred", "(tl.exp(logp) - tl.exp(logq))")], "direction"),
    ("10.2", [(" - tl.load(KL + row)", "")], "not centred"),
    ("10.2", [("- tl.load(KL + row)", "- tl.load(KL + row) + 1")], "one too many"),
    ("10.2", [("- tl.load(KL", "+ tl.load(KL")], "added"),
    ("10.2", [("* centred", "* -centred")], "sign"),
    ("10.2", [("tl.exp(logp) * centred", "tl.exp(logq) * centred")], "weights q"),
    ("10.2", [("tl.exp(logp) * centred", "tl.exp(logp) * 0")], "p held"),
    ("10.2", [("tl.load(G + row) * ", "")], "no upstream"),
    ("10.2", [("* inverse * tl.exp", "* tl.exp")], "no factor"),
    ("10.2", [("tl.maximum(logq, -1e30)", "logq")], "one floor"),
    ("10.2", [("logp - logq - tl", "logq - logp - tl")], "upside down"),
    ("10.2", [("row * r_row", "row * z_row")], "another's stride"),
    ("10.2", [("row * z_row", "row * r_row")], "another's stride"),
    ("10.2", [("tl.maximum(logp, -1e30), tl.maximum(logq, -1e30)", "logp, logq")], "0 · inf"),
    ("10.2", [("- tl.load(KL", "+ tl.load(LSE + row) - tl.load(REF_LSE + row) - tl.load(KL")], "no normalisers"),
    ("10.2", [("logits.stride(0), ref_logits.stride(0)", "V, V")], "stride"),
    ("10.2", [("triton.cdiv(V, 16)", "1")], "first block"),
    ("10.3", [("sums += decays * tail", "sums += 0")], "no carry"),
    ("10.3", [("tl.cdiv(T, BLOCK) - 1, -1, -1", "tl.cdiv(T, BLOCK)")], "blocks from the left"),
    ("10.3", [(", reverse=True", "")], "scan forwards"),
    ("10.3", [("sums, mask=t < T", "sums, mask=t < length")], "padding not stored"),
    ("10.3", [("decays * tail", "a * tail")], "decay kept"),
    ("10.3", [("decays * tail", "tl.where(t < length, tail, 0.0)")], "carry undecayed"),
    ("10.3", [("decays * tail", "decays * tail / decay")], "off by one"),
    ("10.3", [("decay, 0.0)", "1.0, 0.0)")], "no decay"),
    ("10.3", [("decay, 0.0)", "0.0, 0.0)")], "δ"),
    ("10.3", [("t < length", "t < T")], "padding"),
    ("10.3", [("LENGTHS + row", "LENGTHS")], "one length"),
    ("10.3", [("tl.load(LENGTHS + row)", "tl.load(LENGTHS + row) - 1")], "last token"),
    ("10.3", [("delta.stride(0)", "T")], "stride"),
    ("10.3", [("tl.cdiv(T, BLOCK) - 1, -1, -1", "tl.cdiv(T, BLOCK)"), (", reverse=True", ""),
              ("steps == 0", "steps == BLOCK - 1")], "forwards"),
    ("11.1", [(" & inside", "")], "unmasked tail"),
    ("11.1", [("range(0, H, BLOCK)", "range(0, H // BLOCK * BLOCK, BLOCK)")], "tail dropped"),
    ("11.1", [("range(0, H, BLOCK)", "range(0, BLOCK, BLOCK)")], "one block"),
    ("11.1", [("total += tl.dot", "total = tl.dot")], "overwritten"),
    ("11.1", [("token.to(tl.int64)[:, None] * w_row + d[None, :]", "d[None, :] * w_row + token[:, None]")],
     "transposed"),
    ("11.1", [("* h_row", "* H"), ("* w_row", "* H")], "wrong stride"),
    ("11.1", [("tl.zeros([BLOCK, BLOCK], tl.float32)", "tl.zeros([BLOCK, BLOCK], tl.float16)"), (PRODUCT, TO_HALF)],
     "half accumulator"),
    ("11.1", [("tl.dot(h, w.T", f"tl.dot(h{HALF}, w.T{HALF}")], "float16"),
    ("11.2", [(BEHIND, "")], "phantom tokens"),
    ("11.2", [("s * tl.exp(m - new)", "s")], "not rescaled"),
    ("11.2", [("-1e30", "0.0")], "maximum started at 0"),
    ("11.2", [("tl.max(z, 1)", "tl.max(tl.max(z, 1), 0)")], "one maximum"),
    ("11.2", [("tl.maximum(m, tl.max(z, 1))", "tl.zeros([BLOCK], tl.float32)"), ("-1e30", "0.0")], "no maximum"),
    ("11.2", [("m + tl.log(s)", "tl.log(s)")], "maximum not added"),
    ("11.2", [("range(0, V, BLOCK)", "range(0, V // BLOCK * BLOCK, BLOCK)")], "vocabulary's tail"),
    ("11.2", [(PRODUCT, PRODUCT + HALF)], "half precision"),
    ("11.2", [("* h_row", "* H"), ("* w_row", "* H")], "NaN"),
    ("11.2", [(" & inside", "")], "NaN"),
    ("11.2", [("tl.maximum(m, tl.max(z, 1))", "tl.max(z, 1)")], "maximum of the tile"),
    ("11.3", [("token[None, :] == chosen", "tl.arange(0, BLOCK)[None, :] == chosen")], "one-hot at the wrong place"),
    ("11.3", [("hot - p", "-p")], "no one-hot"),
    ("11.3", [("hot - p", "p - hot")], "sign"),
    ("11.3", [("a[:, None] * (hot - p)", "hot - p")], "upstream forgotten"),
    ("11.3", [("tl.exp(z - lse[:, None])", "tl.exp(z - tl.max(z, 1)[:, None])"),
              ("hot - p", "hot - p / tl.sum(p, 1)[:, None]")], "softmax of a tile"),
    ("11.3", [("tl.exp(z - lse[:, None])", "tl.exp(z)")], "not normalised"),
    ("11.3", [(BEHIND, "")], "phantom tokens"),
    ("11.3", [("total += tl.dot", "total = tl.dot")], "overwritten"),
    ("11.3", [("live[:, None] & inside", "(row < N)[:, None] & inside"), ("mask=live", "mask=row < N"),
              ("    total = tl.where(live[:, None], total, 0.0)\n", "")], "masked rows leak"),
    ("11.3", [("mask=(row < N)[:, None] & inside)", "mask=live[:, None] & inside)")], "masked rows leak"),
    ("11.3", [("* h_row", "* H"), ("* w_row", "* H")], "NaN"),
]  # fmt: skip
UNKNOWN = [  # what nobody catalogued: it does not pass, and something else is said
    ("9.1", [("tl.store(TOTAL + row, total)", "tl.store(TOTAL + row + V, total)")],
     "wrote outside of a tensor|crashed|stopped with RuntimeError"),  # by luck of what lies there
    ("9.2", [("tl.exp(m - new)", "tl.exp(new - m)")], "yours gives NaN"),
    ("9.2", [(LOAD, "")], "yours gives NaN"),
    ("9.2", [("tl.store(OUT + row", "tl.store(OUT + (row.to(tl.int64) + 1) * 100000000000")], "crashed"),
    ("9.3", [("z_stride\n", "2 * z_stride\n")], "is expected"),
    ("9.3", [("TOKENS + row", "TOKENS")], "result 1 of 2: "),
    ("10.1", [("dz, mask=inside", "dz")], "wrote outside of a tensor"),
    ("10.1", [(', mask=inside, other=-float("inf")', "")], "past the end of an argument"),
    ("10.2", [("dz, mask=inside", "dz")], "wrote outside of a tensor"),
    ("10.3", [("steps == 0", "steps == 1")], "is expected"),
    ("10.3", [("tl.cdiv(T, BLOCK) - 1, -1, -1", "0, -1, -1")], "is expected"),
    ("10.3", [("sums, mask=t < T", "sums")], "wrote outside of a tensor"),
    ("11.1", [("mask=(row < N)[:, None] & (token < V)[None, :])", "mask=(token < V)[None, :])")],
     "look at the mask of your loads and stores"),
    ("11.1", [("(row < N)[:, None] & (token < V)[None, :]", "(row < N)[:, None] & (token < V - 1)[None, :]")],
     "the ragged one) yours gives NaN"),
    ("11.2", [(", mask=row < N)", ")")], "wrote outside"),
    ("11.2", [("tl.store(OUT + row, m + tl.log(s), mask=row < N)", "pass")], "is a tl.store missing"),
    ("11.3", [("HIDDENS=32", "HIDDENS=16")], "yours gives"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
    torch.set_default_dtype(torch.float32)


def answer(number, replaced, folder):
    """The solution in the notebook with these replacements, from a file, since Triton wants to read its source."""
    chapter = load(f"{int(number.split('.')[0]):02}")
    cells = jupytext.read(SOURCES / f"{chapter.name}.py", fmt="py:percent").cells
    text = next(c.source for c in cells if f'check.exercise("{number}"' in c.source)
    name = re.search(rf'check.exercise\("{number}", (\w+)\)', text)[1]
    text = re.sub(r"\n {8,}(\S.*)\n {4,}\)", r"\1)", text)  # a call in one line
    for old, new in replaced:
        assert old in text, old
        text = text.replace(old, new)
    path = folder / "answer.py"
    path.write_text(HEADER + re.sub(r"^check\..*", "", text, flags=re.MULTILINE))
    spec = importlib.util.spec_from_file_location("answer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return chapter.exercises[number], getattr(module, name)


@pytest.mark.parametrize(("number", "replaced", "name"), WRONG, ids=lambda x: x if isinstance(x, str) else "")
def test_a_kernel_with_a_catalogued_mistake_is_told_which(number, replaced, name, tmp_path):
    puzzle, wrong = answer(number, replaced, tmp_path)
    message = next(m.message for m in puzzle.mistakes if m.name == name)
    verdict = grade(puzzle, wrong, seed=(seed := torch.seed() % 10**9))
    assert verdict.passed is False and verdict.message.endswith(message), (seed, verdict)


@pytest.mark.parametrize(("number", "replaced", "says"), UNKNOWN)
def test_a_kernel_with_another_mistake_is_told_where(number, replaced, says, tmp_path):
    verdict = grade(*answer(number, replaced, tmp_path), seed=(seed := torch.seed() % 10**9))
    assert verdict.passed is False and any(x in verdict.message for x in says.split("|")), (seed, verdict)


@pytest.mark.parametrize("number", [f"{n}.{i}" for n in (9, 10, 11) for i in (1, 2, 3)])
def test_the_kernels_in_the_notebook_are_right(number, tmp_path):
    for _ in range(3):
        verdict = grade(*answer(number, [], tmp_path), seed=(seed := torch.seed() % 10**9))
        assert verdict.passed, (seed, verdict)
