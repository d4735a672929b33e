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
from klq_edu.core import estimators, improvement, objectives, returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import c07_ppo_in_disguise as c07
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


def given(**wrong):
    """f with these keyword arguments replaced, or changed by a function wherever they are given."""

    def spoil(f):
        def changed(*args, **kw):
            return f(*args, **kw | {k: w(kw[k]) if callable(w) else w for k, w in wrong.items() if k in kw})

        return changed

    return spoil


def without_values(f):
    return lambda r, v, *args, **kw: f(r, torch.zeros_like(v), *args, **kw)


def held_kl(f):
    """The penalty's gradient lost, given or estimated."""

    def wrong(p, old, gain, mask, *, coef, kl=None):
        if kl is not None:
            return f(p, old, gain, mask, coef=coef, kl=kl.detach())
        both = f(p, old, gain, mask, coef=coef)
        alone = f(p, old, torch.zeros_like(gain), mask, coef=coef)
        return both - alone + alone.detach()

    return wrong


def estimated_by_k1(f):
    """−log ρ, unbiased as a value, for ρ log ρ − ρ + 1."""
    return lambda p, old, gain, mask, *, coef, kl=None: f(
        p, old, gain, mask, coef=coef, kl=old - p if kl is None else kl
    )


def log_for_ratio(f):
    """log ρ for ρ, whose first gradient is the same."""
    return lambda p, old, gain, mask, **kw: -((p - old) * gain)[mask].mean()


def clip_by_minimum(f):
    """PPO's pessimistic maximum of both squares turned into the smaller one."""

    def wrong(v, target, mask, *, clip=None, old_values=None):
        if clip is None:
            return f(v, target, mask)
        near = old_values + (v - old_values).clamp(-clip, clip)
        return 0.5 * torch.minimum((v - target) ** 2, (near - target) ** 2)[mask].mean()

    return wrong


def not_scaled(f):
    return lambda x, mask: torch.where(mask, x - x[mask].mean(), 0.0)


def coefficient_one(f):
    return lambda q, *anchors: f(q, *((p, 1.0) for p, _ in anchors))


def argmax_of(change):
    """kl_penalised_argmax with its action values or its maximum changed."""
    return lambda f: lambda q, *anchors: change(*f(q, *anchors))


def no_discount(f):
    return lambda self, policy, tau, gamma=1.0: f(self, policy, tau, 1.0)


def no_penalty(f):
    return lambda self, policy, tau, gamma=1.0: f(self, policy, 1e-9, gamma)


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
    ("07", returns, "kl_shaped_rewards", "missing τ", lambda f: lambda r, p, q, tau: f(r, p, q, 1.0)),
    ("07", returns, "kl_shaped_rewards", "no KL", lambda f: lambda r, p, q, tau: f(r, p, p, tau)),
    ("07", returns, "lambda_returns", "missing τ", without_tau),
    ("07", returns, "lambda_returns", "missing α", given(alpha=1.0)),
    ("07", returns, "lambda_returns", "no discount", given(gamma=1.0)),
    ("07", returns, "lambda_returns", "λ = 1", given(lam=1.0)),
    ("07", returns, "lambda_returns", "no values", without_values),
    ("07", returns, "lambda_returns", "shifted index", shifted("td_errors")),
    ("07", returns, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("07", returns, "lambda_returns", "shifted targets", shifted("targets")),
    ("07", returns, "gae", "sign", scaled(-1)),
    ("07", returns, "gae", "λ = 1", given(lam=1.0)),
    ("07", returns, "gae", "no discount", given(gamma=1.0)),
    ("07", returns, "gae", "shifted index", lambda f: lambda *a, **kw: torch.roll(f(*a, **kw), 1, -1)),
    ("07", reference, "klq_loss", "no half", scaled(2.0)),
    ("07", reference, "klq_loss", "missing τ", without_tau),
    ("07", reference, "klq_loss", "sign of the KL", lambda f: lambda p, q, *a, **kw: f(2 * q - p, q, *a, **kw)),
    ("07", reference, "klq_loss", "no value", lambda f: lambda p, q, v, *a, **kw: f(p, q, 0 * v, *a, **kw)),
    ("07", objectives, "ppo_clip_loss", "sign", scaled(-1)),
    ("07", objectives, "ppo_clip_loss", "max for min", optimist),
    ("07", objectives, "ppo_clip_loss", "no clip", given(clip=1e9)),
    ("07", objectives, "ppo_clip_loss", "another clip", given(clip=lambda c: 2 * c)),
    ("07", objectives, "ppo_clip_loss", "log ρ for ρ", log_for_ratio),
    ("07", objectives, "ppo_penalty_loss", "sign", scaled(-1)),
    ("07", objectives, "ppo_penalty_loss", "sign of the penalty", rewarded_kl),
    ("07", objectives, "ppo_penalty_loss", "half the coefficient", given(coef=lambda c: c / 2)),
    ("07", objectives, "ppo_penalty_loss", "penalty without gradient", held_kl),
    ("07", objectives, "ppo_penalty_loss", "k1 for the penalty", estimated_by_k1),
    ("07", objectives, "value_loss", "no half", scaled(2.0)),
    ("07", objectives, "value_loss", "no clip", lambda f: lambda v, g, m, **kw: f(v, g, m)),
    ("07", objectives, "value_loss", "another clip", given(clip=lambda c: c and 2 * c)),
    ("07", objectives, "value_loss", "min for max", clip_by_minimum),
    ("07", returns, "whiten", "not centred", not_centred),
    ("07", returns, "whiten", "not scaled", not_scaled),
    ("07", returns, "whiten", "wrong mask", lambda f: lambda x, mask: f(x, torch.ones_like(mask))),
    ("07", improvement, "klq_step", "missing α", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, tau, 1)),
    ("07", improvement, "klq_step", "missing τ", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, 1.0, alpha)),
    ("07", improvement, "klq_step", "sign", positional, {"_2": torch.neg}),
    ("07", improvement, "klq_step", "old policy lost", lambda f: lambda p, v, d, r, *a: f(r, v, d, r, *a)),
    ("07", improvement, "ppo_penalty_step", "anchors swapped", lambda f: lambda p, q, r, tau, b: f(r, q, p, tau, b)),
    ("07", improvement, "ppo_penalty_step", "no penalty", lambda f: lambda p, q, r, tau, b: f(p, q, r, tau, 0.0)),
    ("07", improvement, "ppo_penalty_step", "missing τ", lambda f: lambda p, q, r, tau, b: f(p, q, r, 1.0, b)),
    ("07", improvement, "penalty_coefficient", "missing τ", lambda f: lambda tau, alpha: (1 - alpha) / alpha),
    ("07", improvement, "penalty_coefficient", "τ/α for β", lambda f: lambda tau, alpha: tau / alpha),
    ("07", improvement, "kl_penalised_argmax", "sign", positional, {"_0": torch.neg}),
    ("07", improvement, "kl_penalised_argmax", "missing coefficient", coefficient_one),
    ("07", improvement, "kl_penalised_argmax", "first anchor only", lambda f: lambda q, *anchors: f(q, anchors[0])),
    ("07", improvement, "kl_penalised_argmax", "half the maximum", argmax_of(lambda policy, best: (policy, best / 2))),
    ("07", improvement, "action_values", "missing τ", lambda f: lambda p, v, ref, tau: f(p, v, ref, 1.0)),
    ("07", improvement, "action_values", "no value", lambda f: lambda p, v, ref, tau: f(p, 0 * v, ref, tau)),
    ("07", improvement, "action_values", "sign", lambda f: lambda p, v, ref, tau: f(ref, v, p, tau)),
    ("07", reference, "kl_divergence", "direction", swapped),
    ("07", reference, "kl_divergence", "half", scaled(0.5)),
    ("07", TokenTree, "evaluate", "no discount", no_discount),
    ("07", TokenTree, "evaluate", "no KL", no_penalty),
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
    if number == "07":  # its batch is sampled by the right formulas, and no wrong gradient is remembered
        c07.grammar_batch(), c07.gradients.cache_clear()
    with replaced(owner, name, wrong), pytest.raises(AssertionError, match=r"✘ \("):
        run(number)


@pytest.mark.parametrize("number", ["01", "07"])
def test_the_right_formulas_pass(number):
    """Else the mutants above might fail for another reason."""
    c07.gradients.cache_clear()
    run(number)
