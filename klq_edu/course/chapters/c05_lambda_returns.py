"""Chapter 05: λ-returns and generalised advantage estimation."""

import functools
import math
from functools import partial

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import Episodes, TokenTree
from klq_edu.course.chapters import Chapter, on_any_padding, tensor64
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake, Wrong
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, plain_axes
from klq_kernels.reference import shift_left, zero_unless

TAU, STEPS, WRONG = 0.3, 5, 0.5
LENGTHS, OPERATIONS = (1, 2, 3, 8, 256, 300), 20  # of rows that a scan is tried on; that it may take in a round
STAYS = (Tensor, tuple, int, str, torch.dtype, torch.device, torch.layout, type(None), type(NotImplemented))


def every_path(tree: TokenTree) -> Episodes:
    """Each completion of a tree once, in the order of `completions()`: what sampling gives, without the chance."""
    where, start = {prefix: state for state, prefix in enumerate(tree.prefixes)}, len(tree.prefixes[0])
    paths = [[(where[y[:t]], y[t]) for t in range(start, len(y))] for y in tree.completions()]
    table = torch.tensor([path + [(0, 0)] * (len(tree.levels) - len(path)) for path in paths])
    mask = torch.arange(table.shape[1]) < torch.tensor([[len(path)] for path in paths])
    states, tokens = table.unbind(-1)
    return Episodes(states, tokens, zero_unless(mask, tree.rewards[states, tokens]), mask)


def mean_given(index: tuple[Tensor, ...], weight: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """Mean of x_t, weighted, for each value of what `index` holds at t: E[x_t | s_t = s, a_t = a] for (states, tokens).

    index, weight, x [n, T] -> `shape`, NaN where nothing weighs.
    """
    total = [torch.zeros(shape, dtype=torch.float64).index_put(index, y, accumulate=True) for y in (weight * x, weight)]
    return total[0] / total[1]


@functools.cache
def every_completion():
    """(tree, states, tokens, rewards, probability) of all completions of a small tree, under its reference."""
    tree = TokenTree.random(3, STEPS, seed=7)
    return tree, *every_path(tree)[:3], tree.sequence_distribution(tree.ref)


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


def _td_error(r: Tensor, v: Tensor, penalty: Tensor, gamma: float) -> Tensor:
    return r + gamma * shift_left(v) - penalty - v


def advantages(
    r, v, p, q, mask, tau, gamma, lam, *, clean=zero_unless, td_error=_td_error, decay=lambda g, lam: g * lam
):
    """Exercise 5.1; the keywords are for mistakes."""
    r, v, p, q = (clean(mask, x) for x in (r, v, p, q))
    delta = zero_unless(mask, td_error(r, v, tau * (p - q), gamma))
    return one_by_one(delta.T, torch.full_like(delta.T, decay(gamma, lam))).T


def one_by_one(delta: Tensor, decay: Tensor) -> Tensor:
    """S_t = delta_t + decay_t S_{t+1} along the first axis, by a loop."""
    sums = [torch.zeros_like(delta[0])]
    for d, a in zip(delta.flip(0), decay.flip(0), strict=True):
        sums.append(d + a * sums[-1])
    return torch.stack(sums[:0:-1])


def _forward_in_time(r, v, p, q, m, tau, g, lam):
    delta = advantages(r, v, p, q, m, tau, g, lam, decay=lambda g, lam: 0.0)
    return zero_unless(m, one_by_one(delta.T.flip(0), torch.full_like(delta.T, g * lam)).flip(0).T)


def _episodes(generator: Generator) -> tuple:
    data = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 1, 4])[torch.randperm(3, generator=generator)]
    mask = torch.arange(6) < lengths[:, None]
    settings = (0.3 + 0.6 * torch.rand(3, generator=generator, dtype=torch.float64)).tolist()
    return *torch.where(mask, data, torch.nan), mask, *settings


def scan(delta: Tensor, decay: Tensor, shift=shift_left, square=True) -> Tensor:
    """Exercise 5.2; the keywords are for mistakes."""
    step = 1
    while step < len(delta):
        delta, decay = delta + decay * shift(delta, step), decay * shift(decay, step) if square else decay
        step *= 2
    return delta


class _FewOperations(TorchDispatchMode):
    """Refuses an answer when it has taken more operations than a scan of this length could need."""

    def __init__(self, length: int):
        super().__init__()
        self.used, self.length, self.left = 0, length, OPERATIONS * math.ceil(math.log2(length))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.used, self.left = self.used + 1, self.left - 1
        if self.left < 0:
            raise Wrong(
                f"right for small T, but in too many steps: more than {OPERATIONS} operations a round for "
                f"T = {self.length}. In each round, let every position reach twice as far."
            )
        return func(*args, **(kwargs or {}))


class _NumbersStay(TorchFunctionMode):
    """Refuses what takes numbers out of a tensor, where no operation is counted (`tolist`, `numpy`, `item` …)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, STAYS):
            name = getattr(func, "__name__", func)
            raise Wrong(
                f"right for small T, but `{name}` takes numbers out of the tensor, and a loop over them is slow."
            )
        return result


def _every_length(answer, delta: Tensor, decay: Tensor) -> dict[str, Tensor]:
    """Results for the end of a row, of several lengths; if those are right, for all of it with few operations."""
    parts = {f"for T = {n}: ": (delta[-n:], decay[-n:]) for n in LENGTHS}
    found = {name: tensor64(answer(*part)) for name, part in parts.items()}
    pairs = [(found[name], scan(*part)) for name, part in parts.items()]
    right = all(x.shape == y.shape and torch.allclose(x, y) for x, y in pairs)
    long = torch.full_like(delta, torch.nan)
    if right:
        with _FewOperations(len(delta)) as few, _NumbersStay():
            long = tensor64(answer(delta, decay))
        if few.used < math.ceil(math.log2(len(delta))):
            raise Wrong("right for small T, but the work is not done by rounds of tensor operations.")
    return found | {f"for T = {len(delta)}: ": long}


def _steps(generator: Generator) -> tuple[Tensor, Tensor]:
    """Decays so close to 1 that the first position hears of the last, but for one end of an episode near the end."""
    delta, decay = torch.randn(2, 4095, generator=generator, dtype=torch.float64)
    decay = 1 - decay.sigmoid() / len(decay)
    decay[-6] = 0.0
    return delta, decay


EXERCISES = {
    "5.1": Exercise(
        "5.1", "Δ on a padded batch", 2, 15, advantages, _episodes,
        (
            Mistake("no γ", partial(advantages, decay=lambda g, lam: lam),
                    "you forgot γ in the decay: later errors are weighted by (γλ)^k, yours by λ^k."),
            Mistake("no λ", partial(advantages, decay=lambda g, lam: g),
                    "you forgot λ in the decay: this is the λ = 1 estimate."),
            Mistake("no γ in δ", partial(advantages, td_error=lambda r, v, kl, g: _td_error(r, v, kl, 1.0)),
                    "you forgot γ inside δ: the next value is discounted."),
            Mistake("no KL", partial(advantages, td_error=lambda r, v, kl, g: _td_error(r, v, 0.0, g)),
                    "the KL is missing: δ subtracts Q = τ log(π/π_b) + V, yours only V."),
            Mistake("KL sign", partial(advantages, td_error=lambda r, v, kl, g: _td_error(r, v, -kl, g)),
                    "the log-ratio has the wrong sign: straying is paid for, not rewarded."),
            Mistake("reward late", partial(advantages, td_error=lambda r, v, kl, g: _td_error(shift_left(r), v, kl, g)),
                    "you shifted the rewards: r_{t+1}, which follows token t, is stored in rewards[:, t]."),
            Mistake("no next state", partial(advantages, td_error=lambda r, v, kl, g: r + g * v - kl - v),
                    "you used V(s_t) twice: what is discounted is the value of the *next* state."),
            Mistake("padding leaks", partial(advantages, clean=lambda m, x: x),
                    "the last real token bootstraps from a padded value: after the end V is 0."),
            Mistake("times the mask", partial(advantages, clean=lambda m, x: x * m),
                    "NaN times 0 is NaN: multiplying by the mask lets padding poison the row. Use torch.where."),
            Mistake("one step", partial(advantages, decay=lambda g, lam: 0.0),
                    "these are the one-step errors δ; the recursion over later steps is missing."),
            Mistake("forwards", _forward_in_time,
                    "you ran forwards in time: Δ sums errors that come *later*."),
        ),
        ("Replace everything on padding by 0 first; then the end of a row needs no special case.",
         "δ_t = rewards[:, t] + γ V_{t+1} − (τ (log π − log π_b) + V), with V_{t+1} = 0 after the last token.",
         "Loop t from the last to the first: tail = δ_t + γ λ tail; Δ_t = tail."),
        probe=on_any_padding,
    ),
    "5.2": Exercise(
        "5.2", "The scan", 3, 15, scan, _steps,
        (
            Mistake("decay kept", partial(scan, square=False),
                    "the decay has to be composed too: a map that covers 2 steps multiplies x by the product of both."),
            Mistake("wrong way", partial(scan, shift=lambda x, n: torch.nn.functional.pad(x, (n, 0))[:-n]),
                    "you looked to the left: Δ collects what comes *later*."),
            Mistake("wrapped", partial(scan, shift=lambda x, n: x.roll(-n)),
                    "torch.roll wraps around: after the end there is nothing, so fill with zeros."),
            Mistake("one round", lambda delta, decay: delta + decay * shift_left(delta),
                    "that is one round; go on with steps of 2, 4, 8, until the row is covered."),
        ),
        ("Give every position its own map x ↦ b + a x, at first a = decay, b = δ; (5.7) joins two.",
         "Round j joins position t with t + 2^j: b ← b + a · b[t + 2^j], a ← a · a[t + 2^j]; zero past the end.",
         "`while step < len(b): b, a = b + a * shifted(b), a * shifted(a); step *= 2`."),
        probe=_every_length,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "05", "lambda_returns", "λ-returns and GAE",
    "How far ahead should a target look?",
    "theory", "§3, (7) and (14)",
    ("klq_kernels.lambda_returns", "klq_edu.core.returns.gae", "klq_edu.core.returns.forward_view"),
    needs=("02", "03"), place=(4, 0.6), short="λ-returns", exercises=EXERCISES,
)  # fmt: skip
