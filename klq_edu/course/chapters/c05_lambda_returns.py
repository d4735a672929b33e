"""Chapter 05: λ-returns and generalised advantage estimation."""

import functools

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator

from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, plain_axes

TAU, STEPS, WRONG = 0.3, 5, 0.5


@functools.cache
def every_completion():
    """(tree, states, tokens, rewards, probability) of all completions of a small tree, under its reference."""
    tree = TokenTree.random(3, STEPS, seed=7)
    where = {prefix: state for state, prefix in enumerate(tree.prefixes)}
    tokens = torch.tensor(tree.completions())
    states = torch.tensor([[where[y[:t]] for t in range(STEPS)] for y in tree.completions()])
    return tree, states, tokens, tree.rewards[states, tokens], tree.sequence_distribution(tree.ref)


@functools.cache
def bias_and_variance(lam: float, gamma: float = 1.0, wrong: float = WRONG) -> tuple[float, float]:
    """Exact (bias², variance) of the target V + Δ at the first token, when V is `wrong` times too noisy.

    Over every completion with its probability: no sampling.
    """
    tree, states, tokens, rewards, weight = every_completion()
    true = tree.evaluate(tree.ref, TAU)[1]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = (true + wrong * noise)[states]
    logp = tree.ref[states, tokens].log()
    mask = torch.ones_like(states, dtype=torch.bool)
    out = lambda_returns(rewards, values, logp, logp, mask, tau=TAU, gamma=gamma, lam=lam)
    target = values[:, 0] + out.advantages[:, 0]
    mean = (weight * target).sum()
    return ((mean - true[0]) ** 2).item(), (weight * (target - mean) ** 2).sum().item()


def draw_lambda(figure: FigureBase, lam: float, wrong: float) -> None:
    """Left: weights of the n-step targets; right: bias², variance and their sum against λ."""
    left, right = plain_axes(figure, 2)
    weights = [(1 - lam) * lam**n for n in range(STEPS - 1)] + [lam ** (STEPS - 1)]
    left.bar(range(1, STEPS + 1), weights, color=BLUE)
    left.set(xlabel="steps looked ahead n", ylabel="weight of the n-step target", ylim=(0, 1.02), title=f"λ = {lam:g}")
    grid = np.linspace(0, 1, 21)
    bias, variance = np.array([bias_and_variance(float(x), wrong=wrong) for x in grid]).T
    right.plot(grid, bias, color=ORANGE, ls="--", label="bias²")
    right.plot(grid, variance, color=GREEN, ls=":", lw=2, label="variance")
    right.plot(grid, bias + variance, color=BLUE, label="mean squared error")
    right.axvline(lam, color=GREY, lw=1)
    right.set(xlabel="λ", ylabel="error of the target [reward²]", ylim=(0, None), title=f"V wrong by {wrong:g}")
    right.legend(frameon=False, fontsize=8)


LAMBDA = Widget(
    "05-lambda", draw_lambda, {"lam": [0.0, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0], "wrong": [0.0, 0.5, 1.0, 2.0]},
    [{"lam": 0.5, "wrong": 0.5}, {"lam": 0.95, "wrong": 2.0}],
    "Left of each pair: how much each n-step target counts; the last bar holds all that would come later. Right: exact "
    "error of the target at the first token. λ = 0 trusts V and has its bias; λ = 1 trusts one sampled completion and "
    "has its variance. The worse V is, the further right the best λ lies.",
    "Pairs of plots: bars of the weights of n-step targets, and curves of squared bias (falls), variance (rises) and "
    "their sum against λ.",
    size=(7.2, 3.0),
)  # fmt: skip


def advantages(rewards, values, logprobs, ref_logprobs, mask, tau, gamma, lam):
    """Exercise 5.1."""
    return _backward(rewards, values, logprobs, ref_logprobs, mask, tau, gamma, lam)


def _backward(rewards, values, logp, logq, mask, tau, gamma, lam, *, penalty=1.0, decay=None, leak=False, sign=1):
    """The recursion, with room for mistakes."""
    fill = (lambda x: x) if leak else (lambda x: torch.where(mask, x, 0.0))
    r, v, ratio = fill(rewards), fill(values), torch.where(mask, logp - logq, 0.0)
    after = torch.nn.functional.pad(v, (0, 1))[:, 1:]
    delta = torch.where(mask, r + gamma * after - sign * penalty * tau * ratio - v, 0.0)
    out, tail, decay = torch.zeros_like(delta), 0.0, gamma * lam if decay is None else decay
    for t in reversed(range(delta.shape[1])):
        tail = delta[:, t] + decay * tail
        out[:, t] = tail
    return out


def _forward_in_time(r, v, p, q, m, tau, g, lam):
    delta, out, tail = _backward(r, v, p, q, m, tau, g, 0.0), torch.zeros_like(r), 0.0
    for t in range(r.shape[1]):
        tail = delta[:, t] + g * lam * tail
        out[:, t] = tail
    return torch.where(m, out, 0.0)


def _episodes(generator: Generator) -> tuple:
    r, v, p, q = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4])[torch.randperm(3, generator=generator)]
    mask = torch.arange(6) < lengths[:, None]
    tau, gamma, lam = (0.3 + 0.6 * torch.rand(3, generator=generator, dtype=torch.float64)).tolist()
    return r, v, p, q, mask, tau, gamma, lam


def compose(a1, b1, a2, b2):
    """Exercise 5.2."""
    return a1 * a2, b1 + a1 * b2


EXERCISES = {
    "5.1": Exercise(
        "5.1", "Δ on a padded batch", 2, 15, advantages, _episodes,
        (
            Mistake("no γ", lambda r, v, p, q, m, tau, g, lam: _backward(r, v, p, q, m, tau, g, lam, decay=lam),
                    "you forgot γ in the decay: later errors are weighted by (γλ)^k, yours by λ^k."),
            Mistake("no λ", lambda r, v, p, q, m, tau, g, lam: _backward(r, v, p, q, m, tau, g, lam, decay=g),
                    "you forgot λ in the decay: this is the λ = 1 estimate."),
            Mistake("no KL", lambda r, v, p, q, m, tau, g, lam: _backward(r, v, p, q, m, tau, g, lam, penalty=0.0),
                    "the KL is missing: δ subtracts Q = τ log(π/π_b) + V, yours only V."),
            Mistake("KL sign", lambda r, v, p, q, m, tau, g, lam: _backward(r, v, p, q, m, tau, g, lam, sign=-1),
                    "the log-ratio has the wrong sign: straying is paid for, not rewarded."),
            Mistake("padding leaks", lambda r, v, p, q, m, tau, g, lam:
                    _backward(r, v, p, q, m, tau, g, lam, leak=True),
                    "the last real token bootstraps from a padded value: after the end V is 0."),
            Mistake("one step", lambda r, v, p, q, m, tau, g, lam: _backward(r, v, p, q, m, tau, g, 0.0),
                    "these are the one-step errors δ; the recursion over later steps is missing."),
            Mistake("forwards", _forward_in_time,
                    "you ran forwards in time: Δ sums errors that come *later*."),
        ),
        ("Replace everything on padding by 0 first; then the end of a row needs no special case.",
         "δ_t = r + γ V_{t+1} − (τ (log π − log π_b) + V), with V_{t+1} = 0 after the last token.",
         "Loop t from the last to the first: tail = δ_t + γ λ tail; Δ_t = tail."),
    ),
    "5.2": Exercise(
        "5.2", "The operator of the scan", 3, 10, compose,
        lambda g: tuple(torch.randn(4, generator=g, dtype=torch.float64)),
        (
            Mistake("swapped", lambda a1, b1, a2, b2: (a1 * a2, b2 + a2 * b1),
                    "the order is swapped: apply the *later* map first, x ↦ b1 + a1 (b2 + a2 x)."),
            Mistake("no decay", lambda a1, b1, a2, b2: (a1 * a2, b1 + b2),
                    "b2 has to be carried back through the first step: multiply it by a1."),
            Mistake("sum of decays", lambda a1, b1, a2, b2: (a1 + a2, b1 + a1 * b2),
                    "decays multiply, they don't add: two steps of γλ are (γλ)²."),
        ),
        ("Each step is a map x ↦ b + a x. What is one after the other?",
         "b1 + a1 (b2 + a2 x). Multiply out.",
         "The factor of x is a1 a2, the rest is b1 + a1 b2."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "05", "lambda_returns", "λ-returns and GAE",
    "How far ahead should a target look?",
    45, "§3, (7) and (14)",
    ("klq_kernels.lambda_returns", "klq_edu.core.returns.gae", "klq_edu.core.returns.forward_view"), EXERCISES,
)  # fmt: skip
