"""A wrong formula in the library (sign, missing τ, shifted index, wrong mask) makes a check of a notebook fail.

Each notebook is run in this process, cell by cell, with one core function replaced wherever it was imported.
"""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import jupytext
import pytest
import torch

import klq_edu.course
import klq_kernels.triton_linear  # noqa: F401 (imported now, lest it import a mutant)
from klq_edu.bench import measure, roofline, workloads
from klq_edu.core import estimators, improvement, objectives, returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import c07_ppo_in_disguise as c07
from klq_edu.course.chapters import c10_backwards_and_scan as c10
from klq_edu.course.chapters import c11_never_build_the_logits as c11
from klq_edu.course.chapters import c13_whole_road, load
from klq_edu.rlhf import algorithms, judge, power, preference, replay
from klq_edu.rlhf.config import TrainConfig
from klq_kernels import device, loss, ops, reference, torch_linear, torch_logits, triton_logits

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


def unmasked_logits(f):
    return lambda x, tokens, q, v, target, mask, **kw: f(
        x, tokens, *(torch.where(mask, y, 0.0) for y in (q, v, target)), torch.ones_like(mask), **kw
    )


def fixed(**wrong):
    """These keyword arguments are ignored: what they are fixed at is used instead."""
    return lambda f: lambda *args, **kw: f(*args, **kw | wrong)


def arguments_swapped(i, j):
    def spoil(f):
        def wrong(*args, **kw):
            args = [*args]
            args[i], args[j] = args[j], args[i]
            return f(*args, **kw)

        return wrong

    return spoil


def unmasked_at(place):
    """Every position counts as a real token, with leftovers on padding."""

    def spoil(f):
        def wrong(*args, **kw):
            args, mask = [torch.where(args[place], x, 7.0) for x in args[:place]], args[place]
            return f(*args, torch.ones_like(mask), **kw)

        return wrong

    return spoil


def masked_late(f):
    """The last real token of a row counts as padding."""
    return lambda r, v, p, q, mask, **kw: f(r, v, p, q, mask & (mask.cumsum(1) < mask.sum(1, keepdim=True)), **kw)


def with_gradient(f):
    """λ-returns whose targets move with the values."""

    def wrong(r, v, *args, **kw):
        out = f(r, v, *args, **kw)
        return out._replace(targets=out.targets + torch.where(args[-1], v - v.detach(), 0.0))

    return wrong


def backwards(f):
    """The sum over what came before."""
    return lambda x, mask, **kw: (
        f(x.flip(-1), mask.flip(-1), **kw).flip(-1) if mask.all() else f(x, mask, **kw).flip(-1)
    )


def clipped_only(change):
    """A change of the clipped loss, where the plain one is right."""
    return lambda f: lambda *args, **kw: change(f)(*args, **kw) if kw.get("loss") == "value_clipped" else f(*args, **kw)


def kinder(f):
    """The better of the two squares, not the worse."""

    def wrong(p, q, v, target, mask, *, tau, clip, old_logprobs, old_values, **kw):
        plain = f(p, q, v, target, mask, tau=tau, reduction="none")
        both = f(p, q, v, target, mask, tau=tau, clip=clip, old_logprobs=old_logprobs, old_values=old_values, **kw)
        now, old = tau * (p - q) + v, tau * (old_logprobs - q) + old_values
        held = 0.5 * (torch.minimum(torch.maximum(now, old - clip), old + clip) - target) ** 2
        return torch.where(mask, torch.minimum(plain, held), both)

    return wrong


def result(i, change):
    """One of several results is spoilt: change(result, arguments)."""

    def spoil(f):
        def wrong(*args, **kw):
            out = [*f(*args, **kw)]
            out[i] = change(out[i], args)
            return tuple(out)

        return wrong

    return spoil


def no_discount_of_values(f):
    return lambda self, policy, values, tau, gamma=1.0: f(self, policy, values, tau, 1.0)


def no_tau(f):
    return lambda p, v, ref, tau: f(p, v, ref, 1.0)


def no_values(f):
    return lambda p, v, ref, tau: f(p, 0 * v, ref, tau)


def negative(f):
    """−τ for τ in the log-ratio."""
    return lambda p, v, ref, tau: 2 * v.unsqueeze(-1) - f(p, v, ref, tau)


def half_as_wide(f):
    def wrong(*args, **kw):
        *rate, low, high = f(*args, **kw)
        return *rate, low + (high - low) / 4, high - (high - low) / 4

    return wrong


def asked_once(f):
    return lambda prompts, a, b, asked: judge.preferred(torch.tensor(asked(prompts, a, b)).numpy(), 0.5)


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


def upstream(change):
    """A gradient of logits that gets other upstream gradients."""
    return lambda f: lambda z, y, r, t, mask, stats, up, out: f(z, y, r, t, mask, stats, change(up), out)


def means(up):
    return up._make(x if x is None else x.mean().expand_as(x) for x in up)


def uncentred(field):
    def spoil(f):
        def wrong(z, y, r, t, mask, stats, up, out):
            return f(z, y, r, t, mask, stats._replace(**{field: torch.zeros_like(stats.lse)}), up, out)

        return wrong

    return spoil


def no_chain_rule(f):
    """The temperature is in p, but not in front."""
    return lambda z, y, r, t, mask, stats, up, out: f(z, y, r, t, mask, stats, up, out).mul_(t)


def off(field):
    def spoil(f):
        def wrong(*args, **kw):
            out = f(*args, **kw)
            return out._replace(**{field: getattr(out, field) + 0.1})

        return wrong

    return spoil


def part(index, factor):
    """One of several results, scaled."""
    return lambda f: lambda *args: tuple(factor * x if i == index else x for i, x in enumerate(f(*args)))


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
    ("05", returns, "lambda_returns", "missing γ", fixed(gamma=1.0)),
    ("05", returns, "lambda_returns", "missing λ", fixed(lam=1.0)),
    ("05", returns, "lambda_returns", "one step", fixed(lam=0.0)),
    ("05", returns, "lambda_returns", "missing α", fixed(alpha=1.0)),
    ("05", returns, "lambda_returns", "sign of the KL", arguments_swapped(2, 3)),
    ("05", returns, "lambda_returns", "no mask", unmasked_at(4)),
    ("05", returns, "lambda_returns", "mask too short", masked_late),
    ("05", returns, "lambda_returns", "shifted targets", shifted("targets")),
    ("05", returns, "gae", "sign", scaled(-1)),
    ("05", returns, "gae", "missing γ", fixed(gamma=1.0)),
    ("05", returns, "gae", "missing λ", fixed(lam=1.0)),
    ("05", returns, "gae", "no mask", unmasked_at(2)),
    ("05", returns, "kl_shaped_rewards", "sign", arguments_swapped(1, 2)),
    ("05", returns, "kl_shaped_rewards", "missing τ", lambda f: lambda r, p, q, tau: f(r, p, q, 1.0)),
    ("05", returns, "forward_view", "missing γ", fixed(gamma=1.0)),
    ("05", returns, "forward_view", "missing λ", fixed(lam=1.0)),
    ("05", returns, "forward_view", "wrong direction", backwards),
    ("05", returns, "forward_view", "no mask", unmasked_at(1)),
    ("05", improvement, "action_values", "missing τ", no_tau),
    ("05", improvement, "action_values", "sign", negative),
    ("05", improvement, "action_values", "missing V", no_values),
    ("05", TokenTree, "evaluate", "no discount", no_discount),
    ("05", TokenTree, "evaluate", "no KL", no_penalty),
    ("05", TokenTree, "td_errors", "no discount", no_discount_of_values),
    ("05", TokenTree, "td_errors", "sign", scaled(-1)),
    ("06", reference, "klq_loss", "missing τ", without_tau),
    ("06", reference, "klq_loss", "no half", scaled(2.0)),
    ("06", reference, "klq_loss", "sign of the KL", lambda f: lambda p, q, *a, **kw: f(q, p, *a, **kw)),
    ("06", reference, "klq_loss", "targets not detached", live_targets),
    ("06", improvement, "klq_step", "missing α", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, tau, 1)),
    ("06", improvement, "action_values", "missing τ", no_tau),
    ("06", improvement, "action_values", "sign", negative),
    ("06", improvement, "action_values", "missing V", no_values),
    ("06", reference, "kl_divergence", "direction", swapped),
    ("06", reference, "kl_divergence", "sign", scaled(-1)),
    ("06", reference, "q_values", "missing τ", lambda f: lambda p, q, v, tau: f(p, q, v, 1.0)),
    ("06", reference, "q_values", "sign", arguments_swapped(0, 1)),
    ("06", returns, "lambda_returns", "missing τ", without_tau),
    ("06", returns, "lambda_returns", "missing α", fixed(alpha=1.0)),
    ("06", returns, "lambda_returns", "missing γ", fixed(gamma=1.0)),
    ("06", returns, "lambda_returns", "missing λ", fixed(lam=1.0)),
    ("06", returns, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("06", returns, "lambda_returns", "shifted targets", shifted("targets")),
    ("06", returns, "lambda_returns", "sign of the KL", arguments_swapped(2, 3)),
    ("06", returns, "lambda_returns", "mask too short", masked_late),
    ("06", returns, "lambda_returns", "targets not detached", with_gradient),
    ("06", TokenTree, "evaluate", "no discount", no_discount),
    ("06", TokenTree, "evaluate", "no KL", no_penalty),
    ("06", TokenTree, "td_errors", "no discount", no_discount_of_values),
    ("06", TokenTree, "td_errors", "sign", scaled(-1)),
    ("06", reference, "klq_loss", "no mask", unmasked_at(4)),
    ("06", reference, "klq_loss", "clip: missing", clipped_only(fixed(loss="l2"))),
    ("06", reference, "klq_loss", "clip: twice as far", clipped_only(fixed(clip=0.2))),
    ("06", reference, "klq_loss", "clip: min for max", clipped_only(kinder)),
    ("06", reference, "klq_loss", "clip: no half", clipped_only(scaled(2.0))),
    ("06", reference, "klq_loss", "clip: around the new Q",
     clipped_only(lambda f: lambda p, q, v, *a, **kw: f(p, q, v, *a, **kw | {"old_logprobs": p, "old_values": v}))),
    ("06", ops, "logits_klq_loss", "missing τ", without_tau),
    ("06", ops, "logits_klq_loss", "no half", scaled(2.0)),
    ("06", ops, "logits_klq_loss", "sign", scaled(-1)),
    ("06", ops, "logits_klq_loss", "shifted index", positional, {"_1": lambda tokens: torch.roll(tokens, 1, -1)}),
    ("06", ops, "logits_klq_loss", "no mask", unmasked_logits),
    ("06", ops, "logits_klq_loss", "no gradient", lambda f: lambda x, *a, **kw: f(x.detach(), *a, **kw) + 0 * x.sum()),
    ("06", improvement, "klq_step", "value not moved", result(1, lambda v, args: args[1])),
    ("06", improvement, "klq_step", "value moved by the mean",
     result(1, lambda v, args: args[1] + args[5] * (args[0] * args[2]).sum(-1))),
    ("06", improvement, "klq_step", "value's sign", result(1, lambda v, args: 2 * args[1] - v)),
    ("06", improvement, "klq_step", "sign of Δ", positional, {"_2": torch.neg}),
    ("06", improvement, "klq_step", "missing τ", lambda f: lambda p, v, d, r, tau, alpha=1: f(p, v, d, r, 1, alpha)),
    ("06", TokenTree, "optimum", "no KL", lambda f: lambda self, tau, gamma=1.0: f(self.with_ref(
        torch.full_like(self.ref, 1 / self.ref.shape[1])), tau, gamma)),
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
    ("08", TokenTree, "evaluate", "no KL", no_penalty),
    ("08", improvement, "boltzmann", "missing τ", lambda f: lambda q, ref, tau: f(q, ref, 1.0)),
    ("08", returns, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("08", returns, "lambda_returns", "missing τ", without_tau),
    ("08", reference, "klq_loss", "no half", scaled(2.0)),
    ("08", reference, "klq_loss", "missing τ", without_tau),
    ("08", returns, "whiten", "not centred", not_centred),
    ("08", replay, "refreshed", "stale", lambda f: lambda policy, rollout: rollout),
    ("08", algorithms, "make_targets", "λ = 0 in train", lambda f: lambda r, config: f(r, replace(config, lam=0.0))),
    ("08", TokenTree, "td_errors", "sign", scaled(-1)),
    ("08", TrainConfig, "cooled", "no cooling", lambda f: lambda self, update: self),
    ("09", roofline, "floor_seconds", "half", scaled(0.5)),
    ("09", ops, "token_stats", "log-prob too large", field("logprob", lambda x: x + 0.1)),
    ("09", ops, "token_stats", "sign of the entropy", field("entropy", torch.neg)),
    ("09", ops, "token_stats", "half the KL", field("kl", lambda x: 0.5 * x)),
    ("09", ops, "token_q", "missing τ", without_tau),
    ("09", reference, "kl_divergence", "direction", swapped),
    ("09", device, "kl_divergence", "five percent, in the Triton kernel", field(0, lambda kl: kl * 1.05)),
    ("09", device, "_move", "w not moved, in the Triton kernel", left_behind),
    ("09", device, "accumulate", "t too large, in the Triton kernel", field(4, lambda t: t * 1.05)),
    ("09", device, "kl_divergence", "one percent, in the Triton kernel", field(0, lambda kl: kl * 1.01)),
    ("09", device, "accumulate", "t too large, in the Triton kernel", field(4, lambda t: t * 1.01)),
    ("10", reference, "kl_divergence", "direction", swapped),
    ("10", torch_logits, "logits_stats", "normaliser", off("lse")),
    ("10", torch_logits, "logits_grad", "one upstream gradient for all rows", upstream(means)),
    ("10", torch_logits, "logits_grad", "sign of the entropy", upstream(lambda up: up._replace(entropy=-up.entropy))),
    ("10", torch_logits, "logits_grad", "entropy not centred", uncentred("entropy")),
    ("10", torch_logits, "logits_grad", "KL not centred", uncentred("kl")),
    ("10", torch_logits, "logits_grad", "missing temperature", no_chain_rule),
    ("10", triton_logits, "logits_stats", "normaliser", off("lse")),
    ("10", triton_logits, "logits_grad", "one upstream gradient for all rows", upstream(means)),
    ("10", triton_logits, "logits_grad", "KL not centred", uncentred("kl")),
    ("10", loss, "klq_terms", "missing τ", part(1, 2.5)),
    ("10", loss, "klq_terms", "gradient of the value", part(2, -1)),
    ("10", reference, "klq_loss", "no half", scaled(2.0)),
    ("10", reference, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("10", torch_logits, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("10", triton_logits, "lambda_returns", "shifted advantages", shifted("advantages")),
    ("10", triton_logits, "lambda_returns", "shifted targets", shifted("targets")),
    ("10", c10, "brent_kung", "no way down", lambda f: lambda steps: f(steps)[: steps.bit_length()]),
    ("10", c10, "hillis_steele", "a round less", lambda f: lambda steps: f(steps)[:-1]),
    ("10", c10, "run_scan", "decay kept", lambda f: lambda rounds, a, b: f(rounds, torch.full_like(a, 0.5), b)),
    ("10", c10, "running_sum", "last term lost", lambda f: lambda terms: f(terms[:-1])),
    ("10", c10, "pairwise_sum", "one after another", lambda f: c10.running_sum),
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
    ("12", measure, "interleave", "in blocks", in_blocks),
    ("12", measure, "interleave", "product before only", product_before),
    ("12", measure, "_spread", "mean for median", mean_reported),
    ("12", measure, "stage_rows", "no unit", unit_forgotten),
    ("12", measure, "errors", "factor", gradient_error_doubled),
    ("12", measure, "exact", "truth in float32", float32_truth),
    ("12", workloads, "naive_stats", "a pass more", one_pass_more),
    ("12", roofline, "floor_seconds", "sum for maximum", no_overlap),
    ("12", roofline, "floor_seconds", "in bits", scaled(8.0)),
    ("13", TokenTree, "sequence_kl", "half", scaled(0.5)),
    ("13", reference, "kl_divergence", "direction", swapped),
    ("13", preference, "bradley_terry_loss", "chosen and rejected swapped", swapped),
    ("13", preference, "bradley_terry_loss", "no difference", lambda f: lambda c, r: f(c, torch.zeros_like(r))),
    ("13", preference, "preference_pairs", "no noise", lambda f: lambda *a, scale, **kw: f(*a, scale=1e9, **kw)),
    ("13", improvement, "boltzmann", "missing τ", lambda f: lambda q, ref, tau: f(q, ref, 1.0)),
    ("13", c13_whole_road, "best_of_n", "best of n − 1", lambda f: lambda p, scores, n: f(p, scores, n - 1)),
    ("13", c13_whole_road, "best_of_n", "worst", positional, {"_1": torch.neg}),
    ("13", judge, "outcomes", "asked once", asked_once),
    ("13", judge, "outcomes", "ties lost", lambda f: lambda *a: (f(*a) == 1).astype(float)),
    ("13", judge, "bootstrap_interval", "too narrow", half_as_wide),
    ("13", judge, "win_rate_of_seeds", "too narrow", half_as_wide),
    ("13", c13_whole_road, "interval_of", "too narrow", half_as_wide),
    ("13", power, "t_quantile", "normal", lambda f: lambda p, freedom: f(p, 10**6)),
    ("13", power, "pairs_needed", "variance 1", scaled(4.0)),
    ("13", power, "seeds_needed", "seeds do not scatter", lambda f: lambda d, sd, n: f(d, 0.0, n)),
    ("13", c13_whole_road, "shown_from", "variance ½", lambda f: lambda sd, n, seeds: f(sd, n / 2, seeds)),
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


@pytest.mark.parametrize("number", ["01", "07", "09", "10", "11"])
def test_the_right_formulas_pass(number):
    """Else the mutants above might fail for another reason."""
    c07.gradients.cache_clear()
    run(number)
