"""Chapter 04: measuring KL from samples."""

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.estimators import k1, k2, k3
from klq_edu.course.chapters import Chapter, differentiate, tensor64
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake, Wrong
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, plain_axes
from klq_kernels.reference import kl_divergence

ACTIONS = 9


def pair(distance: float, seed: int = 3) -> tuple[Tensor, Tensor]:
    """(π, π_b) over nine actions; the larger `distance`, the further apart."""
    rng = torch.Generator().manual_seed(seed)
    ref, direction = torch.randn(2, ACTIONS, generator=rng, dtype=torch.float64)
    return (0.7 * ref + distance * direction).softmax(0), (0.7 * ref).softmax(0)


def draw_estimators(figure: FigureBase, distance: float, batch: int) -> None:
    """Histograms of the batch means of k1, k2 and k3 over 2,000 batches, with the exact KL."""
    policy, ref = pair(distance)
    ratio = (policy / ref).log()
    drawn = torch.multinomial(policy, 2000 * batch, replacement=True, generator=torch.Generator().manual_seed(0))
    exact = kl_divergence(policy.log(), ref.log()).item()
    axes = plain_axes(figure, 3)
    for axis, (name, estimator, colour) in zip(axes, (("k1", k1, ORANGE), ("k2", k2, GREEN), ("k3", k3, BLUE))):
        means = estimator(ratio)[drawn].view(2000, batch).mean(1).numpy()
        axis.hist(means, bins=np.linspace(min(means.min(), 0) - 1e-3, means.max() + 1e-3, 30), color=colour)
        axis.axvline(exact, color="black", lw=1.5, label="exact KL")
        axis.axvline(means.mean(), color=GREY, ls="--", lw=1.5, label="mean")
        axis.set(xlabel=f"mean of {name} over {batch} [nats]", title=f"below 0: {(means < 0).mean():.0%}", yticks=[])
    axes[0].set_ylabel("batches")
    axes[0].legend(frameon=False, fontsize=7)


ESTIMATORS = Widget(
    "04-estimators", draw_estimators, {"distance": [0.1, 0.3, 0.6, 1.0, 1.5, 3.0], "batch": [1, 4, 16, 64]},
    [{"distance": 0.3, "batch": 16}, {"distance": 1.5, "batch": 16}],
    "Batch means of the three estimators (2,000 batches). k1 is right on average (dashed on black) and often negative; "
    "k3 is right on average and never negative; k2 is never negative, and its mean leaves "
    "the exact KL when the policies are far apart.",
    "Histograms of k1, k2 and k3 for two distances between policies, with the exact KL and the mean of each.",
    size=(8.6, 2.6),
)  # fmt: skip


def my_k3(log_ratio: Tensor) -> Tensor:
    """Exercise 4.1."""
    return torch.expm1(-log_ratio) + log_ratio


def surrogate(logits: Tensor, ref: Tensor) -> Tensor:
    """Exercise 4.2."""
    logp = logits.log_softmax(-1)
    ratio = logp - ref.log()
    return (logp.exp().detach() * ratio.detach() * logp).sum()


def _weighted(inner):
    """An exact expectation over actions with the sampling weights held fixed, of `inner(log π, log π_b)`."""

    def loss(logits, ref):
        logp = logits.log_softmax(-1)
        return (logp.exp().detach() * inner(logp, ref.log())).sum()

    return loss


def _gradient(answer, logits: Tensor, ref: Tensor) -> dict[str, Tensor]:
    """The gradient of an answer's loss; where it is ∇KL, Wrong if some of it flows through the sampling weights.

    If the weights are held and f' = ℓ + c, only f'' is free, and the second derivative is a multiple of diag π − ππᵀ.
    """
    logits = logits.clone().requires_grad_()
    (grad,) = differentiate(answer(logits, ref), logits)
    policy, right = logits.detach().softmax(-1), logits.detach().requires_grad_()
    if torch.allclose(grad, *differentiate(surrogate(right, ref), right)):
        held = policy.diag() - policy.outer(policy)
        curve = torch.stack([differentiate(g, logits)[0] for g in grad]) if grad.requires_grad else held
        if not torch.allclose(curve, (curve * held).sum() / held.square().sum() * held):
            raise Wrong(
                "the gradient is right, but the weights π(a) are not held fixed: part of it flows through them. With "
                "sampled tokens nothing can flow through the sampling, so detach them."
            )
    return {"the gradient: ": grad}


def _small_and_large(generator: Generator) -> tuple:
    signs = torch.randint(2, (4,), generator=generator) * 2 - 1
    return (torch.cat([signs * 1e-7, torch.randn(4, generator=generator, dtype=torch.float64)]),)


def _logits_and_ref(generator: Generator) -> tuple:
    a, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return a, b.softmax(0)


def _right_even_where_tiny(answer, x: Tensor) -> dict[str, Tensor]:
    """Values at ordinary log-ratios and, if those are right, whether the four tiny ones are right to 0.1 %."""
    ordinary, tiny = tensor64(answer(x[4:])), tensor64(answer(x[:4]))
    if not all(y.shape == (4,) for y in (ordinary, tiny)):
        return {"": ordinary}
    wrong = not torch.allclose(ordinary, my_k3(x[4:]))
    near = (tiny / my_k3(x[:4]) - 1).abs() < 1e-3
    return {"at ordinary ℓ: ": ordinary, "three digits right at ℓ = ±1e-7 (1: yes, 0: no): ": near | wrong}


EXERCISES = {
    "4.1": Exercise(
        "4.1", "k3, to the last digit", 1, 6, my_k3, _small_and_large,
        (
            Mistake("cancellation", lambda x: (-x).exp() + x - 1,
                    "right as a formula, but for ℓ = 1e-7 it loses nearly all digits: e^(−ℓ) − 1 cancels. torch.expm1 "
                    "computes that difference exactly."),
            Mistake("sign", lambda x: torch.expm1(x) - x,
                    "the sign of ℓ is swapped: this would be right for samples from π_b."),
            Mistake("minus ℓ", lambda x: torch.expm1(-x) - x,
                    "the last term has the wrong sign; yours can be negative."),
            Mistake("no minus one", lambda x: torch.exp(-x) + x,
                    "you forgot to subtract 1: for equal policies it should be 0."),
            Mistake("k2", lambda x: 0.5 * x**2,
                    "that is k2, which is biased when policies differ much."),
        ),
        ("k3 = e^{−ℓ} − 1 + ℓ.", "Which of its parts nearly cancel when ℓ is small?",
         "`torch.expm1(-log_ratio) + log_ratio`."),
        probe=_right_even_where_tiny,
    ),
    "4.2": Exercise(
        "4.2", "A loss whose gradient is ∇KL", 3, 15, surrogate, _logits_and_ref,
        (
            Mistake("k1 as loss", _weighted(lambda p, q: p - q),
                    "k1 as a loss: its gradient is the expected score, which is zero (4.6). Nothing would be learnt."),
            Mistake("k3 as loss", _weighted(lambda p, q: torch.expm1(q - p) + p - q),
                    "k3 as a loss: its gradient is that of KL(π_b‖π), the forward KL (4.8)."),
            Mistake("live weights", lambda z, r: (z.softmax(-1) * 0.5 * (z.log_softmax(-1) - r.log()) ** 2).sum(),
                    "the weights π(a) are not held fixed: your gradient also flows through the sampling. Detach them."),
            Mistake("sign", _weighted(lambda p, q: -(p - q).detach() * p),
                    "the sign is wrong: this loss would drive π away from π_b."),
            Mistake("unweighted", lambda z, r: 0.5 * ((z.log_softmax(-1) - r.log()) ** 2).mean(),
                    "all actions count alike in yours; under π they come with probability π(a)."),
            Mistake("doubled", _weighted(lambda p, q: (p - q) ** 2),
                    "ℓ² without the ½ has twice the gradient."),
        ),
        ("Which estimator has the right gradient as a loss?", "½ℓ²: its derivative is ℓ times that of log π.",
         "Σ_a π(a) (held fixed) · ½ (log π(a) − log π_b(a))²."),
        probe=_gradient,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "04", "measuring_kl", "Measuring KL from samples",
    "Why did my KL go negative, and which estimator belongs where?",
    "theory", "§2, the divergence (2)",
    ("klq_edu.core.estimators", "klq_kernels.reference.kl_divergence", "klq_kernels.token_stats"),
    needs=("01",), place=(2, -0.8), short="measuring KL", exercises=EXERCISES,
)  # fmt: skip
