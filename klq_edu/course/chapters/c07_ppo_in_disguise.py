"""Chapter 07: KLQ is PPO in disguise, and where it is not."""

import functools
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.returns import whiten
from klq_edu.course.chapters import Chapter, differentiate, float32
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes
from klq_edu.rlhf.algorithms import ALGORITHMS, make_targets
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.evaluate import score as score_tokens
from klq_edu.rlhf.loop import fit, prepare
from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import collect
from klq_kernels.reference import masked_mean

WITHOUT_CLIP = 1e9
STEP = 0.04  # length of the step between first and second epoch, in parameter space


@functools.cache
def grammar_batch():
    """(policy, rollout, settings) of the grammar model after three KLQ updates, so that it has left its reference."""
    from klq_edu.worlds import load
    from klq_edu.worlds.registry import preset

    with float32():
        world = load("grammar")
        config = preset("grammar", batch_size=128)
        torch.manual_seed(0)
        policy, generator = world.make_policy(config), torch.Generator().manual_seed(0)
        prepare(policy, world.prompts, config)
        optimizer = torch.optim.Adam(policy.trainable().values(), lr=config.learning_rate)
        for update in range(4):
            batch = world.prompts[[i % len(world.prompts) for i in range(config.batch_size)]]
            rollout = collect(
                policy, world.tokenizer, batch.pop("prompt"), max_new_tokens=config.max_new_tokens,
                constraint=world.constraint, generator=generator,
            )  # fmt: skip
            rollout = rollout.rewarded(score(world.reward, rollout, **batch))
            if update < 3:
                fit(policy, rollout, make_targets(rollout, config), config, optimizer, generator)
    policy.value_grad_scale = 1.0
    return policy, rollout, config


WHITENING = {  # and its two halves
    "no": lambda x, mask: x, "yes": whiten, "centred": lambda x, mask: x - masked_mean(x, mask),
    "scaled": lambda x, mask: x / x[mask].std(correction=0),
}  # fmt: skip


def gradient(algorithm: str, config: TrainConfig, whitening: str = "no") -> Tensor:
    """The gradient of an algorithm's loss on the grammar batch in all trainable parameters, as one vector."""
    policy, rollout, _ = grammar_batch()
    parameters = list(policy.trainable().values())
    with float32():
        targets = make_targets(rollout, config)
        targets = targets._replace(advantages=WHITENING[whitening](targets.advantages, rollout.mask))
        loss = ALGORITHMS[algorithm](policy, rollout, targets, config).loss
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    parts = (torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True))
    return torch.cat([part.flatten() for part in parts]).double()


@functools.cache
def gradients(whitened: str, clipped: str, epoch: int, value_coefficient: str) -> tuple[Tensor, Tensor]:
    """(KLQ's, PPO's) gradient on the grammar batch; PPO with these habits, KLQ as it is."""
    policy, _, config = grammar_batch()
    ppo = replace(
        config, algorithm="ppo_clip", ratio_clip=0.2 if clipped in ("yes", "ratios") else WITHOUT_CLIP,
        clip=0.2 if clipped in ("yes", "values") else None,
        vf_coef=1 / config.tau if value_coefficient == "1/τ" else 1.0,
    )  # fmt: skip
    with moved(policy, _step(config) * (epoch - 1)):
        return gradient("klq", config), gradient("ppo_clip", ppo, whitened)


def relative(here: Tensor, there: Tensor) -> dict[str, float]:
    """‖here − there‖ / ‖there‖ of two gradients, in the parameters of policy and of critic."""
    return {name: ((here - there)[at].norm() / there[at].norm()).item() for name, at in parts().items()}


def gap(**habits) -> dict[str, float]:
    """How far PPO's gradient with these habits is from KLQ's, relative to that."""
    klq, ppo = gradients(**PLAIN | habits)
    return relative(ppo, klq)


def habits() -> pd.DataFrame:
    """What PPO's habits do to its gradient, one by one, relative to plain PPO's at the same place; first that to KLQ's.

    Columns: policy and critic at the first step, policy and critic in the second epoch.
    """
    rows = {"plain PPO (from KLQ)": [gap(epoch=epoch) for epoch in (1, 2)]}
    for name, habit in ALONE.items():
        rows[name] = [
            relative(gradients(**PLAIN | habit | {"epoch": epoch})[1], gradients(**PLAIN | {"epoch": epoch})[1])
            for epoch in (1, 2)
        ]
    places = [(place, part) for place in ("first step", "second epoch") for part in ("policy", "critic")]
    sizes = [[size for place in row for size in place.values()] for row in rows.values()]
    return pd.DataFrame(sizes, rows, pd.MultiIndex.from_tuples(places))


def turn(name: str) -> float:
    """The cosine of the angle between PPO's gradient with a habit and plain PPO's: policy's part, at the first step."""
    with_habit, plain = (gradients(**habit)[1][parts()["policy"]] for habit in (PLAIN | ALONE[name], PLAIN))
    return torch.cosine_similarity(with_habit, plain, 0).item()


def second_epoch() -> tuple[Tensor, Tensor]:
    """(ρ, V − V_old) of the grammar batch's tokens where the second epoch's gradients are taken."""
    policy, old, config = grammar_batch()
    with moved(policy, _step(config)), float32(), torch.no_grad():
        new, values = score_tokens(policy, old)
    return (new.logprob - old.logprobs)[old.mask].exp(), (values - old.values)[old.mask]


@functools.cache
def parts() -> dict[str, Tensor]:
    """Which entries of a gradient belong to the policy and which to the critic (a network of its own here)."""
    policy, _, _ = grammar_batch()
    known = set(map(id, policy.critic_modules().parameters()))
    critic = torch.cat([torch.full((p.numel(),), id(p) in known) for p in policy.trainable().values()])
    return {"policy": ~critic, "critic": critic}


@contextmanager
def moved(policy, step: Tensor):
    """Within this context the policy's parameters are moved by `step`."""
    parameters, at = list(policy.trainable().values()), 0
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.add_(step[at : at + p.numel()].view_as(p))
            at += p.numel()
    try:
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)


def _step(config: TrainConfig) -> Tensor:
    """A step of length STEP against KLQ's gradient in the policy's parameters, and as long a one in the critic's."""
    grad = gradient("klq", config)
    for at in parts().values():
        grad[at] /= grad[at].norm()
    return -STEP * grad


HABITS = {"whitened": ["no", "yes"], "clipped": ["no", "yes"], "epoch": [1, 2], "value_coefficient": ["1/τ", "1"]}
PLAIN = {name: options[0] for name, options in HABITS.items()}
ALONE = {
    "ratios clipped": {"clipped": "ratios"}, "values clipped": {"clipped": "values"},
    "value coefficient 1": {"value_coefficient": "1"}, "centred": {"whitened": "centred"},
    "scaled": {"whitened": "scaled"}, "whitened": {"whitened": "yes"},
}  # fmt: skip


def draw_gap(figure: FigureBase, **habits) -> None:
    """Left: the policy's parameters, PPO's gradient against KLQ's. Right: the gap for PPO's habits, one by one."""
    left, right = plain_axes(figure, 2)
    klq, ppo = (g[parts()["policy"]] for g in gradients(**habits))
    largest = klq.abs().topk(400).indices
    ends = [klq.min().item(), klq.max().item()]
    left.plot(ends, ends, color=GREY, lw=1)
    left.plot(klq[largest], ppo[largest], "o", ms=3, alpha=0.6, color=BLUE)
    left.set(xlabel="KLQ's gradient", ylabel="PPO's gradient", title="400 parameters of the policy")
    bars = {"no habit": {}, **ALONE, "second epoch": {"epoch": 2}, "YOUR CHOICE": habits}
    sizes = [gap(**habit) for habit in bars.values()]
    places = np.arange(len(sizes))
    right.barh(places - 0.19, [s["policy"] - 1e-8 for s in sizes], 0.36, left=1e-8, color=BLUE, label="policy")
    right.barh(places + 0.19, [s["critic"] - 1e-8 for s in sizes], 0.36, left=1e-8, color=ORANGE, hatch="//",
               edgecolor="white", label="critic")  # fmt: skip
    right.set_yticks(places, [*bars])
    right.set(xscale="log", xlim=(1e-8, 100), xlabel="relative gap of the gradients", title="PPO's habits, one by one")
    right.axvline(1e-5, color=GREY, ls=":", lw=1.2)
    right.legend(frameon=False, fontsize=8, loc="upper right")
    right.invert_yaxis()


GAP = Widget(
    "07-gap", draw_gap, HABITS,
    [PLAIN, {"whitened": "yes", "clipped": "yes", "epoch": 2, "value_coefficient": "1"}],
    "First pair: plain PPO with value coefficient 1/τ. Every parameter's gradient lies on the diagonal, and the gap is "
    "rounding (left of the dotted line), for the policy (blue) and the critic (orange). Second pair: PPO as it usually "
    "comes. Clipping alone changes nothing at the first step, because nothing has moved yet; another value "
    "coefficient parts the critics, either half of whitening the policies, and a second epoch both.",
    "For each setting a scatter plot of PPO's gradients against KLQ's and bars of the relative gap for policy and "
    "critic: about 1e-7 without PPO's habits and with clipping alone, about a half to one with the others.",
    size=(8.6, 3.6),
)  # fmt: skip


def coefficients(tau: float, alpha: float) -> tuple[float, float]:
    """Exercise 7.1."""
    return tau * (1 - alpha) / alpha, tau / alpha


def penalty_step(old: Tensor, ref: Tensor, q: Tensor, tau: float, beta: float) -> Tensor:
    """Exercise 7.2."""
    return torch.softmax((q + tau * ref.log() + beta * old.log()) / (tau + beta), -1)


def matching_ppo(logprobs, old_logprobs, values, old_values, advantages, tau):
    """Exercise 7.3."""
    ratio = (logprobs - old_logprobs).exp()
    critic = 0.5 * ((values - old_values - advantages) ** 2).mean()
    return -(ratio * advantages).mean() + critic / tau


def _wrong_ppo(sign=1.0, half=0.5, coefficient=None, change=lambda a: a):
    def loss(logprobs, old_logprobs, values, old_values, advantages, tau):
        ratio = (logprobs - old_logprobs).exp()
        critic = half * ((values - old_values - advantages) ** 2).mean()
        weight = 1 / tau if coefficient is None else coefficient(tau)
        return -sign * (ratio * change(advantages)).mean() + weight * critic

    return loss


def _square(logprobs, old_logprobs, values, old_values, advantages, tau):
    """KLQ's own loss, which has PPO's gradient at π_old and no other."""
    return 0.5 * ((tau * (logprobs - old_logprobs) + values - old_values - advantages) ** 2).mean() / tau


def _gradients_near_old(answer, old_logprobs, old_values, advantages, moves, tau) -> dict[str, Tensor]:
    """Gradients of an answer's loss in log-probs and values, at the old ones and away from them."""
    found = {}
    for step, where in ((0.0, "at π_old"), (1.0, "away from π_old")):
        logprobs = (old_logprobs + step * moves[0]).requires_grad_()
        values = (old_values + step * moves[1]).requires_grad_()
        loss = answer(logprobs, old_logprobs, values, old_values, advantages, tau)
        by_logprobs, by_values = differentiate(loss, logprobs, values)
        found |= {f"the gradient in logprobs {where}: ": by_logprobs, f"the gradient in values {where}: ": by_values}
    return found


def _tau_alpha(generator: Generator) -> tuple[float, float]:
    tau, alpha = (0.1 + 0.7 * torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
    return tau, alpha


def _two_anchors(generator: Generator) -> tuple:
    q, a, b = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return a.softmax(0), b.softmax(0), q, *_tau_alpha(generator)


def _old_batch(generator: Generator) -> tuple:
    a, b, c = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    moves = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    return -a.abs() - 0.1, b, c + 0.5, moves, _tau_alpha(generator)[0]


EXERCISES = {
    "7.1": Exercise(
        "7.1", "From step size to penalty", 1, 5, coefficients, _tau_alpha,
        (
            Mistake("total weight twice", lambda tau, alpha: (tau / alpha, tau / alpha),
                    "τ/α is the weight beside the bare advantage. Beside Q_old + Δ and τ D(π‖π_b) only β = τ/α − τ of "
                    "it is left, since τ of the brake is already in Q_old."),
            Mistake("β twice", lambda tau, alpha: 2 * (tau * (1 - alpha) / alpha,),
                    "β is right beside Q_old and the reference; with the bare advantage both are gone, and the whole "
                    "τ + β stands there."),
            Mistake("pair swapped", lambda tau, alpha: coefficients(tau, alpha)[::-1],
                    "the pair is swapped: the smaller one, β, stands where τ D(π‖π_b) helps."),
            Mistake("no division", lambda tau, alpha: (tau * (1 - alpha), tau),
                    "you forgot to divide by α: a short step needs a strong penalty, without bound."),
            Mistake("no τ", lambda tau, alpha: ((1 - alpha) / alpha, 1 / alpha),
                    "you forgot τ: the coefficients are in units of reward per nat."),
        ),
        ("What must the two penalties of (7.9) add up to?", "τ + β = τ/α, and that sum is the second number.",
         "Solve for β and put it over one denominator. As α → 0 both grow without bound: no step at all."),
    ),
    "7.2": Exercise(
        "7.2", "One step, two anchors", 2, 10, penalty_step, _two_anchors,
        (
            Mistake("only the reference", lambda old, ref, q, tau, beta: torch.softmax(ref.log() + q / tau, -1),
                    "you forgot π_old: this is the Boltzmann policy, the step for β = 0."),
            Mistake("only the old policy", lambda old, ref, q, tau, beta: torch.softmax(old.log() + q / beta, -1),
                    "you forgot π_b: without τ D(π‖π_b) the policy walks away step by step."),
            Mistake("swapped", lambda old, ref, q, tau, beta: penalty_step(ref, old, q, tau, beta),
                    "the weights are swapped: τ belongs to π_b, β to π_old."),
            Mistake("not divided", lambda old, ref, q, tau, beta: torch.softmax(
                        q + tau * ref.log() + beta * old.log(), -1),
                    "the exponent is not divided by τ + β, so the anchors' exponents do not sum to 1."),
            Mistake("not weighted", lambda old, ref, q, tau, beta: torch.softmax(
                        q / (tau + beta) + ref.log() + old.log(), -1),
                    "the anchors are not weighted: their exponents are τ/(τ + β) and β/(τ + β), which sum to 1."),
            Mistake("mixture", lambda old, ref, q, tau, beta: torch.softmax(
                        ((tau * ref + beta * old) / (tau + beta)).log() + q / (tau + beta), -1),
                    "you mixed the anchors by their arithmetic mean; KL penalties merge them by their geometric mean."),
        ),
        ("Write all three terms under one sum over a, as in notebook 01.",
         "E_π[Q] − τ D(π‖π_b) − β D(π‖π_old) = −(τ+β) Σ π log(π / …). What stands in the denominator?",
         "π ∝ (π_b^τ π_old^β e^Q)^{1/(τ+β)}: a softmax of (Q + τ log π_b + β log π_old)/(τ + β)."),
    ),
    "7.3": Exercise(
        "7.3", "The PPO that takes KLQ's first step", 2, 10, matching_ppo, _old_batch,
        (
            Mistake("usual coefficient", _wrong_ppo(coefficient=lambda tau: 1.0),
                    "the value coefficient is 1: KLQ's is 1/τ, so your critic learns τ times as fast."),
            Mistake("τ instead of 1/τ", _wrong_ppo(coefficient=lambda tau: tau),
                    "the value coefficient is τ; it must be 1/τ. In (7.4) it is the policy's part that carries τ."),
            Mistake("value of the advantage", lambda p, op, v, ov, a, tau:
                    -((p - op).exp() * a).mean() + 0.5 * ((v - a) ** 2).mean() / tau,
                    "your value head is fitted to Â; its target is V_old + Â."),
            Mistake("no half", _wrong_ppo(half=1.0),
                    "there is no ½ in your value loss, so its gradient is twice KLQ's."),
            Mistake("sign", _wrong_ppo(sign=-1.0),
                    "the sign of the surrogate is wrong: a loss is minimised, so it needs a minus."),
            Mistake("whitened", _wrong_ppo(change=lambda a: whiten(a, torch.ones_like(a, dtype=torch.bool))),
                    "you whitened the advantages: shifted and rescaled, they are not KLQ's Δ any more."),
            Mistake("KLQ's square", _square,
                    "that is KLQ's own loss: its first gradient is right of course, but PPO's surrogate, −E[ρÂ], is "
                    "wanted. Away from π_old they part."),
            Mistake("log ρ", lambda p, op, v, ov, a, tau:
                    -((p - op) * a).mean() + 0.5 * ((v - ov - a) ** 2).mean() / tau,
                    "you have log ρ in the place of ρ: the same gradient at π_old, but not the surrogate −E[ρÂ]."),
        ),
        ("PPO's loss has two terms: the surrogate −E[ρÂ] and a value loss. Which number weighs the second?",
         "Take the gradient at π = π_old of both and compare with (7.4), divided by ατ.",
         "−mean(ρÂ) + (1/τ) · ½ mean((V − V_old − Â)²)."),
        probe=_gradients_near_old,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "07", "ppo_in_disguise", "KLQ is PPO in disguise (and where it is not)",
    "In what sense is KLQ the same algorithm as PPO, and where does that stop?",
    "theory", "§4, the equivalence, (14) and (18)",
    ("klq_edu.core.improvement.klq_step", "klq_edu.core.improvement.ppo_penalty_step", "klq_edu.rlhf.algorithms"),
    needs=("01", "04", "05", "06"), place=(6, 0), short="PPO in disguise", exercises=EXERCISES,
)  # fmt: skip
