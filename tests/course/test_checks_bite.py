"""A wrong formula in the library (sign, missing τ, shifted index, wrong mask) makes a check of a notebook fail.

Each notebook is run in this process, cell by cell, with one core function replaced wherever it was imported.
"""

import sys
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import jupytext
import pytest
import torch

import klq_edu.course
from klq_edu.bench import measure, roofline, workloads
from klq_edu.core import estimators, improvement, objectives, returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import load
from klq_kernels import reference

SOURCES = Path(__file__).parents[2] / "notebooks" / "src"


def without_tau(f):
    return lambda *args, tau=None, **kw: f(*args, tau=1.0, **kw)


def positional(f, **wrong):
    """f with these positional arguments (index -> function of the value) spoilt."""
    at = {int(k[1:]): change for k, change in wrong.items()}
    return lambda *args, **kw: f(*(at.get(i, lambda x: x)(x) for i, x in enumerate(args)), **kw)


def shifted(field):
    def spoil(f):
        def wrong(*args, **kw):
            out = f(*args, **kw)
            return out._replace(**{field: torch.roll(getattr(out, field), 1, -1)})

        return wrong

    return spoil


def scaled(factor):
    return lambda f: lambda *args, **kw: factor * f(*args, **kw)


def swapped(f):
    return lambda a, b, *args, **kw: f(b, a, *args, **kw)


def unmasked(f):
    return lambda x, mask: f(x, torch.ones_like(mask))


def live_targets(f):
    """The gradient that flows through targets which nobody detached, taken from the one in the values."""
    return lambda p, q, v, target, mask, **kw: f(p, q, v - (target - target.detach()), target, mask, **kw)


def optimist(f):
    """max for min."""
    return lambda p, old, gain, mask, **kw: -f(p, old, -gain, mask, **kw)


def not_centred(f):
    return lambda x, mask: torch.where(mask, x, 0.0) / (x[mask] ** 2).mean().sqrt()


def rewarded_kl(f):
    return lambda *args, coef, kl: f(*args, coef=coef, kl=-kl)


def no_discount(f):
    return lambda self, policy, tau, gamma=1.0: f(self, policy, tau, 1.0)


def no_penalty(f):
    return lambda self, policy, tau, gamma=1.0: f(self, policy, 1e-9, gamma)


def in_blocks(f):
    """All of one contender, then all of the other."""
    return lambda all_, *a, **kw: {name: rows for one in all_ for name, rows in f([one], *a, **kw).items()}


def product_before(f):
    """The product before a repetition counts, not the mean of before and after."""

    def wrong(everyone, x, gemm, reps, tick):
        seen = []
        times = f(everyone, x, lambda: seen.append(gemm()) or seen[-1], reps, tick)
        for rep in range(reps):
            for place in range(len(everyone)):
                one = everyone[(rep + place) % len(everyone)]
                times[one.name][rep]["gemm"] = seen[rep * len(everyone) + place]
        return times

    return wrong


def mean_reported(f):
    return lambda name, values: f(name, values) | {name: sum(values) / len(values)}


def unit_forgotten(f):
    return lambda *args, **kw: [row | {"units": row["seconds"]} for row in f(*args, **kw)]


def gradient_error_doubled(f):
    return lambda *args: (found := f(*args)) | {"error_gradient": 2 * found["error_gradient"]}


def float32_truth(f):
    def wrong(*args):
        true = f(*args)
        return true._replace(grads={name: g.float().double() for name, g in true.grads.items()})

    return wrong


def one_pass_more(f):
    return lambda x, logits, ref_logits, **kw: f(x, 1.0 * logits, ref_logits, **kw)


def no_overlap(f):
    def wrong(kernel, device, dtype, *sizes):
        moved, operations = roofline.KERNELS[kernel](*sizes, roofline.SIZE[dtype])
        gpu = roofline.DEVICES[device]
        return moved / gpu.bandwidth + operations / gpu.rate(dtype)

    return wrong


# notebook, where the function is defined, its name, what is wrong with it, the wrong version made of the right one
MUTANTS = [
    ("01", improvement, "boltzmann", "missing τ", lambda f: lambda q, ref, tau: f(q, ref, 1.0)),
    ("01", improvement, "boltzmann", "sign", positional, {"_0": torch.neg}),
    ("01", improvement, "action_values", "missing τ", lambda f: lambda p, v, ref, tau: f(p, v, ref, 1.0)),
    ("01", reference, "kl_divergence", "direction", swapped),
    ("02", TokenTree, "evaluate", "no discount", no_discount),
    ("02", TokenTree, "evaluate", "no KL", no_penalty),
    ("02", improvement, "boltzmann", "missing τ", lambda f: lambda q, ref, tau: f(q, ref, 1.0)),
    ("03", TokenTree, "sequence_kl", "half", scaled(0.5)),
    ("03", TokenTree, "state_kl", "sign", scaled(-1)),
    ("03", reference, "masked_mean", "wrong mask", unmasked),
    ("04", estimators, "k1", "sign", scaled(-1)),
    ("04", estimators, "k2", "no half", scaled(2.0)),
    ("04", estimators, "k3", "sign of the log-ratio", positional, {"_0": torch.neg}),
    ("04", reference, "kl_divergence", "direction", swapped),
    ("05", returns, "lambda_returns", "missing τ", without_tau),
    ("05", returns, "lambda_returns", "shifted index", shifted("td_errors")),
    ("05", returns, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("05", returns, "gae", "shifted index", lambda f: lambda *a, **kw: torch.roll(f(*a, **kw), 1, -1)),
    ("05", returns, "forward_view", "sign", scaled(-1)),
    ("06", reference, "klq_loss", "missing τ", without_tau),
    ("06", reference, "klq_loss", "no half", scaled(2.0)),
    ("06", reference, "klq_loss", "sign of the KL", lambda f: lambda p, q, *a, **kw: f(q, p, *a, **kw)),
    ("06", reference, "klq_loss", "targets not detached", live_targets),
    ("06", improvement, "klq_step", "missing α", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, tau, 1)),
    ("07", returns, "kl_shaped_rewards", "sign", lambda f: lambda r, p, q, tau: f(r, q, p, tau)),
    ("07", returns, "lambda_returns", "missing τ", without_tau),
    ("07", returns, "lambda_returns", "shifted index", shifted("td_errors")),
    ("07", returns, "gae", "sign", scaled(-1)),
    ("07", reference, "klq_loss", "no half", scaled(2.0)),
    ("07", objectives, "ppo_clip_loss", "sign", scaled(-1)),
    ("07", objectives, "ppo_clip_loss", "max for min", optimist),
    ("07", objectives, "ppo_penalty_loss", "sign", scaled(-1)),
    ("07", objectives, "ppo_penalty_loss", "sign of the penalty", rewarded_kl),
    ("07", returns, "whiten", "not centred", not_centred),
    ("07", objectives, "value_loss", "no half", scaled(2.0)),
    ("07", improvement, "klq_step", "missing α", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, tau, 1)),
    ("07", improvement, "ppo_penalty_step", "anchors swapped", lambda f: lambda p, q, r, tau, b: f(r, q, p, tau, b)),
    ("07", improvement, "penalty_coefficient", "missing τ", lambda f: lambda tau, alpha: (1 - alpha) / alpha),
    ("12", measure, "interleave", "in blocks", in_blocks),
    ("12", measure, "interleave", "product before only", product_before),
    ("12", measure, "_spread", "mean for median", mean_reported),
    ("12", measure, "stage_rows", "no unit", unit_forgotten),
    ("12", measure, "errors", "factor", gradient_error_doubled),
    ("12", measure, "exact", "truth in float32", float32_truth),
    ("12", workloads, "naive_stats", "a pass more", one_pass_more),
    ("12", roofline, "floor_seconds", "sum for maximum", no_overlap),
    ("12", roofline, "floor_seconds", "in bits", scaled(8.0)),
]  # fmt: skip


def run(number):
    """Run every code cell of a notebook; figures and widgets are left out."""
    cells = jupytext.read(SOURCES / f"{load(number).name}.py", fmt="py:percent").cells
    space = {"__name__": "__main__", "display": lambda *_: None}
    for cell in cells:
        if cell.cell_type == "code" and "heavy" not in cell.metadata.get("tags", []):
            exec(compile(cell.source, f"notebook {number}", "exec"), space)


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    for name in ("explore", "show", "source"):
        monkeypatch.setattr(klq_edu.course, name, lambda *_, **__: None)
    monkeypatch.setenv("KLQ_PROGRESS", str(tmp_path / "progress.json"))
    yield
    torch.set_default_dtype(torch.float32)


def replaced(owner, name, wrong):
    """Patch a function in its module (or class) and wherever it has been imported to."""
    right, stack = getattr(owner, name), ExitStack()
    places = (
        [m for n, m in list(sys.modules.items()) if n.startswith("klq_")] if not isinstance(owner, type) else [owner]
    )
    for place in places:
        if vars(place).get(name) is right:
            stack.enter_context(patch.object(place, name, wrong))
    return stack


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0]}-{m[2]}-{m[3]}")
def test_a_wrong_formula_fails_a_check(mutant):
    number, owner, name, _, spoil, *arguments = mutant
    load(number)
    wrong = spoil(getattr(owner, name), **(arguments[0] if arguments else {}))
    with replaced(owner, name, wrong), pytest.raises(AssertionError, match=r"✘ \("):
        run(number)


@pytest.mark.parametrize("number", ["01"])
def test_the_right_formulas_pass(number):
    """Else the mutants above might fail for another reason."""
    run(number)
