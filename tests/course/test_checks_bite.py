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
from klq_edu.bench import roofline
from klq_edu.core import estimators, improvement, objectives, returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import c11_never_build_the_logits as c11
from klq_edu.course.chapters import load
from klq_kernels import (  # noqa: F401 (lest they import a mutant)
    device,
    ops,
    reference,
    torch_linear,
    triton_linear,
    triton_logits,
)

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


def field(name, change):
    """The result with one field of its statistics changed, or of what a jit function of Triton returns, its place."""

    def spoil(f):
        def wrong(*args, **kw):
            out = f(*args, **kw)
            if isinstance(name, int):
                return (*out[:name], change(out[name]), *out[name + 1 :])
            return out._replace(**{name: change(getattr(out, name))})

        wrong.fn = getattr(f, "fn", None)  # its source is shown
        return wrong

    return spoil


def left_behind(f):
    """Triton's `_move`, without the move of w to another pivot."""

    def wrong(s, t, w, *rest):
        moved = f(s, t, w, *rest)
        return moved[0], w, moved[2]

    return wrong


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


def head_field(name, factor):
    """Gradients of a head, one of them scaled; they are all that is returned, or the third of four."""

    def spoil(f):
        def wrong(*args, **kw):
            out = f(*args, **kw)
            head = out if hasattr(out, name) else out[2]
            head = head._replace(**{name: factor * getattr(head, name)})
            return head if hasattr(out, name) else (*out[:2], head, *out[3:])

        return wrong

    return spoil


def at_key(key, factor):
    return lambda f: lambda *args, **kw: (out := f(*args, **kw)) | {key: factor * out[key]}


def larger_workspace(f):
    return lambda *args: f(*args[:-1], 4 * args[-1])


def twice(f):
    """It does its work twice."""
    return lambda *args, **kw: (f(*args, **kw), f(*args, **kw))[0]


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
    ("09", roofline, "floor_seconds", "half", scaled(0.5)),
    ("09", ops, "token_stats", "log-prob too large", field("logprob", lambda x: x + 0.1)),
    ("09", ops, "token_stats", "sign of the entropy", field("entropy", torch.neg)),
    ("09", ops, "token_stats", "half the KL", field("kl", lambda x: 0.5 * x)),
    ("09", ops, "token_q", "missing τ", without_tau),
    ("09", reference, "kl_divergence", "direction", swapped),
    ("09", device, "kl_divergence", "one percent, in the Triton kernel", field(0, lambda kl: kl * 1.01)),
    ("09", device, "_move", "w not moved, in the Triton kernel", left_behind),
    ("09", device, "accumulate", "t too large, in the Triton kernel", field(4, lambda t: t * 1.01)),
    ("11", c11, "naive_bytes", "two tensors of three", scaled(2 / 3)),
    ("11", c11, "linear_bytes", "one workspace", lambda f: lambda n, v, h, size, room: f(n, v, h, size, room / 4)),
    ("11", torch_linear, "linear_klq", "larger chunks than asked for", larger_workspace),
    ("11", ops, "linear_token_stats", "log-prob too large", field("logprob", lambda x: x + 0.1)),
    ("11", torch_linear, "linear_grad", "sign of dH", head_field("hidden", -1)),
    ("11", torch_linear, "linear_grad", "half dW", head_field("weight", 0.5)),
    ("11", torch_linear, "linear_stats", "two products for one", twice),
    ("11", roofline, "floor_seconds", "square root", lambda f: lambda *args: f(*args) ** 0.5),
    ("11", roofline, "_loaded", "rows only once", scaled(0.75)),
    ("11", roofline, "predict", "half the bytes from L2", at_key("l2_needed", 0.5)),
    ("11", roofline, "predict", "half the bytes from shared memory", at_key("shared_needed", 0.5)),
    ("11", c11, "compiled_tiles", "shared memory of one stage", lambda f: lambda *t: [
        r | {"shared_bytes": r["shared_bytes"] // 3} for r in f(*t)]),
    ("11", c11, "compiled_tiles", "one block more", lambda f: lambda *t: [
        r | {"work": r["work"] | {"blocks": r["work"]["blocks"] + 1}} for r in f(*t)]),
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


@pytest.mark.parametrize("number", ["01", "09", "11"])
def test_the_right_formulas_pass(number):
    """Else the mutants above might fail for another reason."""
    run(number)
