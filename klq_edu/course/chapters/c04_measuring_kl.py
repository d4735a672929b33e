"""Chapter 04: measuring KL from samples."""

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.estimators import k1, k2, k3
from klq_edu.course.chapters import Chapter, differentiate, tensor64
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
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
    figure.suptitle(f"distance {distance:g}: exact KL {exact:.3f} nats", fontsize=10)
    axes[0].set_ylabel("batches")
    axes[0].legend(frameon=False, fontsize=7)


ESTIMATORS = Widget(
    "04-estimators", draw_estimators, {"distance": [0.1, 0.3, 0.6, 1.0, 1.5, 3.0], "batch": [1, 4, 16, 64]},
    [{"distance": 0.3, "batch": 16}, {"distance": 1.5, "batch": 16}],
    "Batch means of the three estimators (2,000 batches), for a policy near its reference and for one far off; above "
    "each triple stand the distance, which the slider sets, and the KL it comes to. "
    "k1 is right on average (dashed on black) and often negative; "
    "k3 is right on average and never negative; k2 is never negative, and its mean leaves "
    "the exact KL when the policies are far apart.",
    "Histograms of k1, k2 and k3 for two distances between policies, with the exact KL and the mean of each.",
    size=(8.6, 2.8),
)  # fmt: skip


def my_k3(log_ratio: Tensor) -> Tensor:
    """Exercise 4.1."""
    return torch.expm1(-log_ratio) + log_ratio


def off_policy(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Exercise 4.2."""
    ratio, log_ratio = (logprobs - old_logprobs).exp(), logprobs - ref_logprobs
    return (ratio.detach() * 0.5 * log_ratio**2).mean()


def _mean_of(inner):
    """A loss: the mean over samples of `inner(ρ, ℓ)`, ρ = π/π_old and ℓ = log π/π_b, both live."""
    return lambda p, old, ref: inner((p - old).exp(), p - ref).mean()


def _gradient(answer, logits: Tensor, actions: Tensor, ref: Tensor) -> dict[str, Tensor]:
    """The gradient in the logits of an answer's loss on these samples, which are π_old to the last digit."""
    logits, old = logits.clone().requires_grad_(), actions.bincount(minlength=len(ref)).double() / len(actions)
    loss = answer(*(logprobs[actions] for logprobs in (logits.log_softmax(-1), old.log(), ref.log())))
    return {"the gradient: ": differentiate(loss, logits)[0]}


def _small_and_large(generator: Generator) -> tuple:
    signs = torch.randint(2, (4,), generator=generator) * 2 - 1
    return (torch.cat([signs * 1e-7, torch.randn(4, generator=generator, dtype=torch.float64)]),)


def _old_samples(generator: Generator) -> tuple:
    logits, ref = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    counts = torch.randint(1, 9, (5,), generator=generator)
    actions = torch.arange(5).repeat_interleave(counts)
    return logits, actions[torch.randperm(len(actions), generator=generator)], ref.softmax(0)


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
        "4.2", "Samples from an older policy", 3, 15, off_policy, _old_samples,
        (
            Mistake("k2 as it is", _mean_of(lambda rho, x: 0.5 * x**2),
                    "½ℓ² has the right gradient where π itself has sampled (4.7). Yours came from π_old: how much more "
                    "likely is each of them under π?"),
            Mistake("live ratio", _mean_of(lambda rho, x: rho * 0.5 * x**2),
                    "the ratio π/π_old belongs there, but it depends on π too: its gradient is an additional term, "
                    "½ℓ² ∇π/π_old. Hold the ratio fixed."),
            Mistake("k1, ratio held", _mean_of(lambda rho, x: rho.detach() * x),
                    "with the ratio held fixed this is k1 as a loss: its expected gradient is zero (4.6)."),
            Mistake("k3, ratio held", _mean_of(lambda rho, x: rho.detach() * (torch.expm1(-x) + x)),
                    "with the ratio held fixed this is k3 as a loss: its gradient is that of D(π_b‖π), the forward KL "
                    "(4.8)."),
            Mistake("upside down", _mean_of(lambda rho, x: 0.5 * x**2 / rho.detach()),
                    "the ratio is upside down: actions that π prefers to π_old came too rarely, so they must count "
                    "more."),
            Mistake("sign", _mean_of(lambda rho, x: -rho.detach() * 0.5 * x**2),
                    "the sign is wrong: this loss would drive π away from π_b."),
            Mistake("doubled", _mean_of(lambda rho, x: rho.detach() * x**2),
                    "ℓ² without the ½ has twice the gradient."),
            Mistake("the other anchor", lambda p, old, ref: off_policy(p, old, old),
                    "that is the KL to π_old; the one to π_b is wanted, π_old has only done the sampling."),
            Mistake("sum", lambda p, old, ref: len(p) * off_policy(p, old, ref),
                    "you took the sum over the samples; their mean is wanted."),
        ),
        ("(4.5) is a mean over π. Which weight makes of a mean over π_old a mean over π?",
         "The weight is ρ = π/π_old, so E over π_old of ρ ℓ ∇log π is wanted. But ρ depends on π as well: what does a "
         "derivative make of ρ times something?",
         "Mean of ρ (held fixed, `.detach()`) · ½ (log π − log π_b)². Or, with ρ live, of ρ ℓ: why?"),
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
