"""Chapter 01: KL-regularised bandits and Boltzmann policies."""

import math

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.improvement import boltzmann
from klq_edu.course.chapters import Chapter
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes
from klq_kernels.reference import kl_divergence

WORDS = ("fine", "good", "superb", "zxqv")
REF = (0.50, 0.30, 0.19, 0.01)
REWARDS = (0.0, 1.0, 2.0, 4.0)


def draw_bandit(figure: FigureBase, tau: float, prize: float = REWARDS[-1]) -> None:
    """Left: reference and Boltzmann policy; right: where that policy stands in the plane of KL and reward."""
    ref, q = torch.tensor(REF), torch.tensor((*REWARDS[:-1], prize))
    left, right = plain_axes(figure, 2)
    policy = boltzmann(q, ref, tau)[0]
    places = np.arange(len(WORDS))
    left.bar(places - 0.2, ref.numpy(), 0.4, color=GREY, label="reference $\\pi_b$")
    left.bar(places + 0.2, policy.numpy(), 0.4, color=BLUE, hatch="//", edgecolor="white", label="best policy $\\pi_Q$")
    left.set_xticks(places, WORDS)
    left.set(ylabel="probability", ylim=(0, 1.05), title=f"τ = {tau:g}, reward of zxqv = {prize:g}")
    left.legend(frameon=False, fontsize=8)
    curve = torch.tensor([trade(q, ref, t) for t in torch.logspace(-2, 2, 80).tolist()])
    right.plot(*curve.T, color=GREY, lw=1.5)
    right.plot(*trade(q, ref, tau), "o", color=ORANGE, ms=9)
    right.set(xlabel="KL($\\pi_Q$‖$\\pi_b$) [nats]", ylabel="expected reward", title="the best trades, and this one")


def trade(q: Tensor, ref: Tensor, tau: float) -> tuple[float, float]:
    """(KL paid, reward earned) by the Boltzmann policy."""
    policy = boltzmann(q, ref, tau)[0]
    return kl_divergence(policy.log(), ref.log()).item(), (policy * q).sum().item()


def soft_value(q: Tensor, ref: Tensor, tau: float) -> Tensor:
    """Exercise 1.1."""
    return tau * torch.logsumexp(ref.log() + q / tau, -1)


def best_policy(q: Tensor, ref: Tensor, tau: float) -> Tensor:
    """Exercise 1.2."""
    return torch.softmax(ref.log() + q / tau, -1)


def temperature_for(q: Tensor, ref: Tensor, budget: float, divergence=None, unit: float = 1.0) -> float:
    """Exercise 1.3: the τ at which the Boltzmann policy pays `budget`, by bisection; the KL falls as τ grows."""
    divergence = divergence or (lambda p: (p * (p / ref).log()).sum())
    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(100):
        middle = (low + high) / 2
        paid = divergence(best_policy(q, ref, math.exp(middle))) / unit
        low, high = (middle, high) if paid > budget else (low, middle)
    return math.exp(middle)


def _bandit(generator: Generator, scale: float = 2.0) -> tuple[Tensor, Tensor, float]:
    q = scale * torch.randn(5, generator=generator, dtype=torch.float64)
    ref = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    return q, ref, 0.3 + torch.rand((), generator=generator, dtype=torch.float64).item() / 2


def _large_bandit(generator: Generator) -> tuple[Tensor, Tensor, float]:
    q, ref, tau = _bandit(generator)
    return q + 1000.0, ref, tau


def _budget(generator: Generator) -> tuple[Tensor, Tensor, float]:
    q, ref, _ = _bandit(generator)
    return q, ref, trade(q, ref, math.exp(torch.empty(()).uniform_(-1.5, 1.5, generator=generator).item()))[0]


BANDIT = Widget(
    "01-bandit", draw_bandit,
    {"tau": [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 2.0, 5.0, 20.0], "prize": [2.0, 3.0, 4.0, 5.0]},
    [{"tau": 5.0, "prize": 4.0}, {"tau": 1.0, "prize": 4.0}, {"tau": 0.5, "prize": 4.0}],
    "From one pair to the next the price τ falls: at 5 the best policy stays close to the "
    "reference; at 1 it says superb most often; at 0.5 the blind spot has won. The orange dot moves to the "
    "right along the grey curve, the best reward that can be had for each amount of KL.",
    "Pairs of plots for several τ: bars of reference and best policy over four words, and the curve of reward against "
    "KL with a dot for this τ. Probability moves from fine over superb to zxqv as τ falls.",
    size=(7.0, 3.0),
)  # fmt: skip

EXERCISES = {
    "1.1": Exercise(
        "1.1", "The soft value, without overflow", 1, 6, soft_value, _large_bandit,
        (
            Mistake("overflow", lambda q, ref, tau: tau * (ref * (q / tau).exp()).sum(-1).log(),
                    "the formula is right, but e^(Q/τ) overflows for rewards near 1000: subtract the largest exponent "
                    "first, or use torch.logsumexp."),
            Mistake("no τ in front", lambda q, ref, tau: torch.logsumexp(ref.log() + q / tau, -1),
                    "you forgot the τ in front of the logarithm: V is in units of reward, log Z is in nats."),
            Mistake("no τ inside", lambda q, ref, tau: tau * torch.logsumexp(ref.log() + q, -1),
                    "Q is not divided by τ inside the exponential."),
            Mistake("probability as logarithm", lambda q, ref, tau: tau * torch.logsumexp(ref + q / tau, -1),
                    "inside logsumexp stands a logarithm: log π_b, not π_b."),
            Mistake("maximum lost", lambda q, ref, tau: tau * torch.logsumexp(ref.log() + (q - q.amax()) / tau, -1),
                    "you subtracted the largest reward against overflow; now add it back."),
            Mistake("no reference", lambda q, ref, tau: tau * torch.logsumexp(q / tau, -1),
                    "π_b is missing: this is the value beside a uniform reference (plus a constant), not beside π_b."),
            Mistake("plain maximum", lambda q, ref, tau: q.amax(-1),
                    "that is the limit τ → 0, the plain maximum, which pays nothing for leaving π_b."),
            Mistake("mean", lambda q, ref, tau: (ref * q).sum(-1),
                    "that is the limit τ → ∞, the reward of π_b itself."),
        ),
        ("Write π_b e^{Q/τ} as one exponential: e^{log π_b + Q/τ}.",
         "`torch.logsumexp(x, -1)` computes log Σ eˣ after subtracting the largest x, so it never overflows.",
         "V = τ · logsumexp(log π_b + Q/τ)."),
    ),
    "1.2": Exercise(
        "1.2", "The best policy", 1, 5, best_policy, _bandit,
        (
            Mistake("no reference", lambda q, ref, tau: torch.softmax(q / tau, -1),
                    "you forgot π_b: this softmax would happily say words that the reference never says."),
            Mistake("times τ", lambda q, ref, tau: torch.softmax(ref.log() + q * tau, -1),
                    "Q is multiplied by τ instead of divided: with yours, a larger τ strays further."),
            Mistake("sign", lambda q, ref, tau: torch.softmax(ref.log() - q / tau, -1),
                    "the sign of Q is wrong: this policy prefers the worst words."),
            Mistake("not normalised", lambda q, ref, tau: ref * (q / tau).exp(),
                    "these numbers do not sum to 1: divide by Z."),
            Mistake("probability as logarithm", lambda q, ref, tau: torch.softmax(ref + q / tau, -1),
                    "a softmax takes logarithms: log π_b, not π_b."),
            Mistake("reference over τ", lambda q, ref, tau: torch.softmax((ref.log() + q) / tau, -1),
                    "τ divides Q only; you also sharpened π_b, as a sampling temperature would."),
            Mistake("no τ", lambda q, ref, tau: torch.softmax(ref.log() + q, -1),
                    "you forgot τ: this is right at τ = 1 only."),
        ),
        ("It is proportional to π_b e^{Q/τ}; what makes it sum to 1?",
         "A softmax of x is e^x / Σ e^x. Which x do you need?",
         "x = log π_b + Q/τ."),
    ),
    "1.3": Exercise(
        "1.3", "Which τ spends the budget?", 2, 12, temperature_for, _budget,
        (
            Mistake("KL direction",
                    lambda q, ref, budget: temperature_for(q, ref, budget, lambda p: (ref * (ref / p).log()).sum()),
                    "the KL direction is swapped: you measured D(π_b‖π), the objective pays for D(π‖π_b)."),
            Mistake("bits", lambda q, ref, budget: temperature_for(q, ref, budget, unit=math.log(2)),
                    "your KL is in bits (logarithm to base 2); ours are nats (natural logarithm)."),
            Mistake("ends swapped", lambda q, ref, budget: 1e-3 if trade(q, ref, 1.0)[0] > budget else 1e3,
                    "you ran to an end of the range: the KL falls as τ grows, so if it is too high, τ must rise."),
            Mistake("inverse", lambda q, ref, budget: 1 / temperature_for(q, ref, budget),
                    "you returned 1/τ (the inverse temperature)."),
        ),
        ("The KL of π_Q falls when τ grows: see below (1.9). What finds the zero of a falling function?",
         "Bisection: keep two values of τ, one that pays too much KL and one that pays too little, and halve the gap. "
         "On a logarithmic scale small τ are found as precisely as large ones.",
         "Start from log τ between log 0.001 and log 1000 and repeat 60 times: take the middle, compute π_Q and its "
         "KL; if it is above the budget, raise the lower end, else lower the upper end."),
        tol=5e-6,  # six significant digits
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "01", "one_state", "One state: KL-regularised bandits",
    "What is the best policy near one that you trust?",
    "theory", "§2, Boltzmann policies and (13)",
    ("klq_edu.core.improvement.boltzmann", "klq_edu.core.improvement.action_values"),
    needs=("00",), place=(1, 0), short="one state", exercises=EXERCISES,
)  # fmt: skip
