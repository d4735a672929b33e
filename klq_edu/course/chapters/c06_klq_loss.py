"""Chapter 06: the KLQ loss."""

import functools

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.improvement import action_values, klq_step
from klq_edu.core.objectives import klq_loss
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter, differentiate
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, Picture, panels, plain_axes
from klq_kernels.reference import kl_divergence

OLD, REF = (0.40, 0.30, 0.20, 0.10), (0.55, 0.25, 0.15, 0.05)
GAINS = (-0.4, 0.1, 0.5, 0.9)


def draw_step(figure: FigureBase, tau: float, alpha: float) -> None:
    """Left: the policy before and after one exact KLQ step; right: what is left of the error, and the KL moved."""
    old, ref, gains = (torch.tensor(x, dtype=torch.float64) for x in (OLD, REF, GAINS))
    value = torch.zeros((), dtype=torch.float64)
    new, _ = klq_step(old, value, gains, ref, tau, alpha)
    left, right = plain_axes(figure, 2)
    places = np.arange(4)
    left.bar(places - 0.2, old.numpy(), 0.4, color=GREY, label="before")
    left.bar(places + 0.2, new.numpy(), 0.4, color=BLUE, hatch="//", edgecolor="white", label="after")
    left.set_xticks(places, [f"Δ = {g:+g}" for g in GAINS])
    left.set(ylabel="probability of the token", ylim=(0, 1), title=f"τ = {tau:g}, α = {alpha:g}")
    left.legend(frameon=False, fontsize=8)
    alphas = np.linspace(0.01, 1, 40)
    moved = [kl_divergence(klq_step(old, value, gains, ref, tau, a)[0].log(), old.log()).item() for a in alphas]
    right.plot(alphas, moved, color=ORANGE)
    right.plot(alpha, kl_divergence(new.log(), old.log()), "o", color=ORANGE, ms=8)
    right.set(xlabel="step size α", ylabel="KL(new‖old) [nats]", title="how far one step goes", ylim=(0, None))


STEP = Widget(
    "06-step", draw_step, {"tau": [0.1, 0.2, 0.5, 1.0, 2.0], "alpha": [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]},
    [{"tau": 0.5, "alpha": 0.2}, {"tau": 0.5, "alpha": 1.0}, {"tau": 2.0, "alpha": 1.0}],
    "One exact step from the same old policy with the same Δ. A larger α goes further, a larger τ less: what counts "
    "is α/τ, so τ = 2, α = 1 would take the very step of τ = 1, α = 0.5. The orange curve shows how far each α goes.",
    "For three settings of τ and α, bars of a policy over four tokens before and after the step, and the curve of the "
    "KL moved against α with a dot for this α.",
    size=(7.4, 3.0),
)  # fmt: skip


@functools.cache
def train_table(steps: int = 600, tau: float = 0.5, alpha: float = 0.3, refresh: int = 20) -> list[float]:
    """Regret J* − J after each refresh of the targets, of logits and values in a table fitted by Adam on the KLQ loss.

    All tokens of all states count alike, and Δ is exact: what is left is the algorithm itself.
    """
    tree = TokenTree.random(4, 3, seed=3)
    logits, values = tree.ref.log().clone().requires_grad_(), torch.zeros(len(tree.ref)).double().requires_grad_()
    optimiser, regrets = torch.optim.Adam([logits, values], lr=0.05), []
    best, logq, mask = tree.optimum(tau)[1][tree.roots].mean(), tree.ref.log(), tree.ref > 0
    for step in range(steps + 1):
        if step % refresh == 0:
            with torch.no_grad():
                policy = logits.softmax(-1)
                regrets.append((best - tree.objective(policy, tau)).item())
                q_old = action_values(policy, values, tree.ref, tau)
                targets = q_old + alpha * (tree.evaluate(policy, tau)[0] - q_old)
        logp, v = logits.log_softmax(-1), values.unsqueeze(-1).expand_as(logits)
        loss = klq_loss(logp, logq, v, targets, mask, tau=tau)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return regrets


def draw_training() -> Picture:
    """Regret of the table against the number of target refreshes."""
    figure, (axis,) = panels(1, width=5.6)
    regrets = train_table()
    axis.plot(range(len(regrets)), regrets, color=BLUE, marker="o", ms=3)
    axis.set(xlabel="times the targets were refreshed", ylabel="regret J* − J [reward]", yscale="log")
    return Picture(
        figure,
        "Nothing but a squared error was minimised, and the policy approaches the optimum: the exact regret falls by "
        "orders of magnitude (logarithmic axis).",
        "Curve of regret against the number of target refreshes, falling on a logarithmic axis.",
    )


def masked_klq_loss(logprobs, ref_logprobs, values, targets, mask, tau):
    """Exercise 6.1."""
    error = torch.where(mask, tau * (logprobs - ref_logprobs) + values - targets.detach(), 0.0)
    return 0.5 * (error**2).sum() / mask.sum()


def _wrong_loss(stop=True, tau_of=lambda tau: tau, sign=1.0, half=0.5, mean=None):
    def loss(logprobs, ref_logprobs, values, targets, mask, tau):
        targets = targets.detach() if stop else targets
        error = torch.where(mask, tau_of(tau) * sign * (logprobs - ref_logprobs) + values - targets, 0.0)
        square = half * error**2
        return square.sum() / mask.sum() if mean is None else mean(square, mask)

    return loss


def _loss_and_gradients(answer, logprobs, ref_logprobs, values, extra, mask, tau) -> dict[str, Tensor]:
    """Loss and its gradients in log-probs and values, with targets made from both; padding is NaN, then leftovers."""
    found = {}
    for padding in (torch.nan, 7.0):
        p, v = (torch.where(mask, x, padding).requires_grad_() for x in (logprobs, values))
        loss = answer(p, ref_logprobs, v, tau * (p - ref_logprobs) + v + extra, mask, tau)
        parts = (loss, *differentiate(loss, p, v, finite=False))
        names = ("the loss: ", "its gradient in logprobs: ", "its gradient in values: ")
        found |= {f"with padding of {padding}, {name}": part for name, part in zip(names, parts)}
    return found


def _batch(generator: Generator) -> tuple:
    logp, logq, values, extra = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 1, 3])[torch.randperm(3, generator=generator)]
    mask = torch.arange(5) < lengths[:, None]
    return logp, logq, values, extra + 1.0, mask, 0.2 + 0.5 * torch.rand((), generator=generator).item()


def exact_step(old: Tensor, advantages: Tensor, value: float, tau: float, alpha: float) -> tuple[Tensor, Tensor]:
    """Exercise 6.2."""
    score = old.log() + alpha * advantages / tau
    return score.softmax(-1), value + tau * score.logsumexp(-1)


def _state(generator: Generator) -> tuple:
    a, b = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    value, tau, alpha = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    return a.softmax(0), 10000.0 + b, value, 0.2 + tau, 0.1 + 0.8 * alpha


EXERCISES = {
    "6.1": Exercise(
        "6.1", "The loss in a few lines", 2, 12, masked_klq_loss, _batch,
        (
            Mistake("no stop-gradient", _wrong_loss(stop=False),
                    "missing stop-gradient: your gradient also flows through the targets, which run away from the "
                    "prediction as fast as it approaches."),
            Mistake("no τ", _wrong_loss(tau_of=lambda tau: 1.0),
                    "you forgot τ: the log-ratio is in nats, V and the target are in units of reward."),
            Mistake("sign", _wrong_loss(sign=-1.0),
                    "the log-ratio has the wrong sign: Q = τ (log π − log π_b) + V."),
            Mistake("no reference", lambda p, r, v, t, m, tau: masked_klq_loss(p, torch.zeros_like(r), v, t, m, tau),
                    "the reference is missing: Q is τ times the log-*ratio* plus V."),
            Mistake("no half", _wrong_loss(half=1.0),
                    "there is no ½: every gradient is twice as large."),
            Mistake("sum", _wrong_loss(mean=lambda s, m: s.sum()),
                    "you summed over tokens; longer batches would take longer steps. Divide by the real tokens."),
            Mistake("mean over padding", _wrong_loss(mean=lambda s, m: s.mean()),
                    "you divided by all positions, padding included: the loss is diluted by zeros."),
            Mistake("mean of rows", _wrong_loss(mean=lambda s, m: (s.sum(1) / m.sum(1)).mean()),
                    "you averaged each completion first: tokens of short completions count more than others."),
            Mistake("times the mask", lambda p, r, v, t, m, tau: 0.5 * (
                        ((tau * (p - r) + v - t.detach()) ** 2) * m).sum() / m.sum(),
                    "NaN times 0 is NaN: multiplying by the mask lets padding poison the sum. Use torch.where."),
            Mistake("skips NaN", lambda p, r, v, t, m, tau: 0.5 * (
                        (tau * (p - r) + v - t.detach()).nan_to_num() ** 2).sum() / m.sum(),
                    "you skipped NaN, but padding may hold any leftovers; the mask says what is real."),
            Mistake("masked too late", lambda p, r, v, t, m, tau: 0.5 * torch.where(
                        m, (tau * (p - r) + v - t.detach()) ** 2, 0.0).sum() / m.sum(),
                    "the loss is right, but its gradient on padding is NaN (0 times the NaN inside the square): apply "
                    "torch.where to the error, *before* squaring."),
        ),
        ("Q_θ = τ (log π − log π_b) + V. Which of the two, prediction or target, may carry a gradient?",
         "`targets.detach()` stops the gradient; `torch.where(mask, error, 0.0)` drops padding, even where it is NaN.",
         "0.5 · (error²).sum() / mask.sum(), where error is 0 on padding."),
        probe=_loss_and_gradients,
    ),
    "6.2": Exercise(
        "6.2", "Where the regression ends", 2, 10, exact_step, _state,
        (
            Mistake("no α", lambda o, a, v, tau, alpha: exact_step(o, a, v, tau, 1.0),
                    "you forgot α: this is the full step."),
            Mistake("overflow", lambda o, a, v, tau, alpha: (
                        (w := o * (alpha * a / tau).exp()) / w.sum(), v + tau * w.sum().log()),
                    "the formulas are right, but e^(αΔ/τ) overflows: use torch.softmax and torch.logsumexp."),
            Mistake("value without τ", lambda o, a, v, tau, alpha: (
                        exact_step(o, a, v, tau, alpha)[0], v + (o.log() + alpha * a / tau).logsumexp(-1)),
                    "the policy is right; in the value you forgot the τ in front of the logarithm."),
            Mistake("times τ", lambda o, a, v, tau, alpha: (
                        (o.log() + alpha * a * tau).softmax(-1), v + tau * (o.log() + alpha * a * tau).logsumexp(-1)),
                    "Δ is multiplied by τ instead of divided."),
            Mistake("no π_old", lambda o, a, v, tau, alpha: (
                        (alpha * a / tau).softmax(-1), v + tau * (alpha * a / tau).logsumexp(-1)),
                    "π_old is missing: the step starts from a uniform policy."),
            Mistake("value kept", lambda o, a, v, tau, alpha: (
                        exact_step(o, a, v, tau, alpha)[0], torch.tensor(v, dtype=torch.float64)),
                    "the policy is right, but V has to move as well: it takes up what normalising π removes."),
            Mistake("mean", lambda o, a, v, tau, alpha: (
                        exact_step(o, a, v, tau, alpha)[0], v + alpha * (o * a).sum()),
                    "V moved by the mean of αΔ under π_old; the exact value is the soft one, τ log E e^(αΔ/τ)."),
        ),
        ("Write down τ log(π/π_b) + V = τ log(π_old/π_b) + V_old + αΔ. What cancels?",
         "τ log π + V = τ log π_old + V_old + αΔ for every token, and π sums to 1.",
         "π is the softmax of log π_old + αΔ/τ, and V = V_old + τ · logsumexp of the same."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "06", "klq_loss", "The KLQ loss",
    "How does a language model become an action-value function, and what does it regress on?",
    "theory", "§3, the algorithm: (6), (7) and (13)",
    ("klq_kernels.reference.klq_loss", "klq_edu.core.improvement.klq_step", "klq_kernels.logits_klq_loss"),
    needs=("01", "05"), place=(5, 0), short="the KLQ loss", exercises=EXERCISES,
)  # fmt: skip
