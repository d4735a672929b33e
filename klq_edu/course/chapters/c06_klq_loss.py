"""Chapter 06: the KLQ loss."""

import functools
from functools import partial

import numpy as np
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from klq_edu.core.improvement import action_values, klq_step
from klq_edu.core.objectives import klq_loss
from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter, differentiate
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, Picture, panels, plain_axes
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.loop import reference_means
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.replay import Memory
from klq_kernels.reference import kl_divergence

OLD, REF = (0.40, 0.30, 0.20, 0.10), (0.55, 0.25, 0.15, 0.05)
GAINS = (-0.4, 0.1, 0.5, 0.9)
MOVED = {"ylabel": "KL(new‖old) [nats]", "yscale": "log", "ylim": (1e-5, 5)}  # how far a step goes, in every figure
PREFIXES, EARNS = ((1, 2, 3, 4), (5, 0, 3, 1), (2, 2, 5, 4), (0, 4, 1, 3)), (2.75, 2.875, 3.125, 3.25)


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
    alphas = np.linspace(0.02, 1, 50)
    moved = [kl_divergence(klq_step(old, value, gains, ref, tau, a)[0].log(), old.log()).item() for a in alphas]
    right.plot(alphas, moved, color=ORANGE)
    right.plot(alpha, kl_divergence(new.log(), old.log()), "o", color=ORANGE, ms=8)
    right.set(xlabel="step size α", title="how far one step goes", xlim=(0, 1.05), **MOVED)


STEP = Widget(
    "06-step", draw_step, {"tau": [0.1, 0.2, 0.5, 1.0, 2.0], "alpha": [0.1, 0.2, 0.3, 0.5, 0.7, 1.0]},
    [{"tau": 0.5, "alpha": 0.2}, {"tau": 0.5, "alpha": 1.0}, {"tau": 2.0, "alpha": 1.0}],
    "One exact step from the same old policy with the same Δ. A larger α goes further, a larger τ less: what counts "
    "is α/τ, so τ = 2, α = 1 would take the very step of τ = 1, α = 0.5. The orange curve shows how far each α goes, "
    "on the same logarithmic axis in all three.",
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


def fit_sampled(old: Tensor, token: int, shift: Tensor | float, tau: float) -> Tensor:
    """The policy nearest to `old` [A] that fits the sampled token alone, with V held: τ log(π/π_old) = shift there.

    The other tokens keep their proportions. A shift that asks for more than certainty gets certainty. -> [A]
    """
    probability = (old[token] * torch.as_tensor(shift / tau).exp()).clamp(max=1.0)
    return (old * (1 - probability) / (1 - old[token])).index_fill(0, torch.tensor(token), probability.item())


def draw_offset(alpha: float = 0.2) -> Picture:
    """How far the policy moves to fit one sampled token whose only error is the value's offset, for three τ."""
    figure, (axis,) = panels(1, width=5.6)
    old, offsets = torch.tensor(OLD, dtype=torch.float64), np.linspace(-3, 3, 241)
    looks = {0.05: (ORANGE, "-"), 0.2: (BLUE, "--"), 1.0: (GREEN, ":")}
    for tau, (colour, line) in looks.items():
        new = [fit_sampled(old, 1, -alpha * c, tau) for c in offsets]
        axis.plot(offsets, [kl_divergence(x.log(), old.log()).item() for x in new], line, color=colour, lw=1.8,
                  label=f"τ = {tau:g}")  # fmt: skip
    axis.set(xlabel="offset c of the value [reward]", title=f"fitting one sampled token, α = {alpha:g}", **MOVED)
    axis.legend(frameon=False, loc="lower right")
    return Picture(
        figure,
        "A token that was neither better nor worse than the others (Δ = 0), of probability 0.3, and a value that is "
        "off by c and does not move. Left of 0 the value is too low, and the token ends up certain (flat part); right "
        "of 0 it is too high, and the token is given up. The smaller τ, the smaller the offset that does it.",
        "Curves of the KL moved against the value's offset from −3 to 3 for three τ: zero at offset 0, rising on both "
        "sides to a plateau, which τ = 0.05 reaches at once and τ = 1 not at all.",
    )


def tiny_model(spread: float = 0.2) -> ActorCritic:
    """A GPT-2 of one layer, width 8 and six tokens with a value head on its trunk, in float64."""
    sizes = {"vocab_size": 6, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=spread))
        model = ActorCritic(lm).double()
        torch.nn.init.normal_(model.value_head.weight, std=spread)
    return model


def read_model(model: ActorCritic) -> tuple[Tensor, Tensor]:
    """log π [4, 4, 6] and V [4, 4] after each prefix of the four prompts."""
    ids = torch.tensor(PREFIXES)
    hidden, values = model.features(model.encode(ids, torch.ones_like(ids)), slice(None))
    return model.head(hidden).log_softmax(-1), values


@functools.cache
def nothing_to_learn(start=0.0, scale=None, centre="none", adam=True, updates=40) -> np.ndarray:
    """KL(π ‖ π_b) and V, means over the prefixes, before each update where every token of a prompt earns the same.

    So the reference is optimal. One token is sampled after each prefix, and is a whole completion. V starts at `start`;
    `scale` is TrainConfig's value_grad_scale, `centre` its own; without `adam`, plain gradient descent.
    [updates, 2], in nats and units of reward.
    """
    config = TrainConfig(tau=0.05, centre=centre, value_grad_scale=scale)
    model, memory, earned = tiny_model(), Memory(1), torch.tensor(EARNS, dtype=torch.float64)
    model.value_grad_scale = config.trunk_scale
    model.start_value(start)
    memory.baselines = reference_means(4, config, earned, None, EARNS if centre == "prompt" else None)
    rewards = memory.centred(earned, [0, 1, 2, 3]).repeat_interleave(4)
    weights, rows, generator = model.trainable().values(), [], torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(weights, lr=config.learning_rate) if adam else torch.optim.SGD(weights, lr=0.1)
    ref = read_model(model)[0].detach()
    for _ in range(updates):
        with torch.no_grad():
            policy, values = read_model(model)
        rows.append((kl_divergence(policy, ref).mean().item(), values.mean().item()))
        tokens = torch.multinomial(policy.flatten(0, 1).exp(), 1, generator=generator).view(4, 4, 1)
        given = rewards, values.flatten(), *(x.gather(-1, tokens).flatten() for x in (policy, ref))
        _fit(model, tokens, [x.unsqueeze(1) for x in given], optimiser, config)
    return np.array(rows)


def _fit(model: ActorCritic, tokens: Tensor, given: list[Tensor], optimiser, config: TrainConfig) -> None:
    """One update: targets of rewards, V, log π and log π_b [16, 1], and some steps towards them."""
    mask = torch.ones_like(given[0], dtype=torch.bool)
    targets = lambda_returns(*given, mask, tau=config.tau, alpha=config.alpha).targets
    for _ in range(config.epochs):
        policy, values = read_model(model)
        logp, v = policy.gather(-1, tokens).view(-1, 1), values.view(-1, 1)
        loss = klq_loss(logp, given[3], v, targets, mask, tau=config.tau)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def draw_cures() -> Picture:
    """How far the policy strays although there is nothing to learn, with and without the cures."""
    figure, (axis,) = panels(1, width=5.6)
    for label, settings, colour, line in (
        ("V = 0", {}, ORANGE, "-"),
        ("V at the mean reward", {"start": sum(EARNS) / len(EARNS)}, BLUE, "--"),
        ("V = 0, centred per prompt", {"centre": "prompt"}, GREEN, ":"),
    ):
        axis.plot(nothing_to_learn(**settings)[:, 0], color=colour, ls=line, lw=1.8, label=label)
    axis.set(xlabel="updates", ylabel="KL(π‖reference) [nats]", title="nothing to learn, τ = 0.05", ylim=(-0.01, None))
    axis.legend(frameon=False)
    return Picture(
        figure,
        "Whatever is written after a prompt earns the same, so the best policy is the reference, at KL 0. With V = 0 "
        "the policy strays furthest. With V at the mean over all prompts a smaller offset is left in each of them, and "
        "at this τ that is still felt. With each prompt's own mean subtracted nothing moves at all.",
        "Curves of the KL to the reference against updates: highest with V = 0, lower with V at the mean reward, zero "
        "with rewards centred per prompt.",
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


def sampled_step(old, token, advantage, offset, tau, alpha, *, shift=None, fit=fit_sampled, kl=kl_divergence):
    """Exercise 6.3; the keywords are for mistakes."""
    shift = alpha * (advantage - offset) if shift is None else shift(advantage, offset, tau, alpha)
    new = fit(old, token, shift, tau)
    return new, kl(new.log(), old.log())


def _off(generator: Generator) -> tuple:
    """A value so much too high that the token loses probability, whatever its Δ."""
    old = (0.5 * torch.randn(5, generator=generator, dtype=torch.float64)).softmax(0)
    gain, offset, tau, alpha = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    token = int(torch.randint(5, (), generator=generator))
    return old, token, gain - 0.5, 0.6 + offset, 0.15 + 0.5 * tau, 0.1 + 0.8 * alpha


def _renormalised(old: Tensor, token: int, shift: float, tau: float) -> Tensor:
    """The exact step of a state in which only this token's Δ is not 0."""
    score = old.log()
    score[token] += shift / tau
    return score.softmax(-1)


def _others_kept(old: Tensor, token: int, shift: float, tau: float) -> Tensor:
    new = old.clone()
    new[token] = fit_sampled(old, token, shift, tau)[token]
    return new


def _others_alike(old: Tensor, token: int, shift: float, tau: float) -> Tensor:
    new = old + (old[token] - fit_sampled(old, token, shift, tau)[token]) / (len(old) - 1)
    new[token] = fit_sampled(old, token, shift, tau)[token]
    return new


def _beyond(old, token, advantage, offset, tau, alpha, shift):
    """Exercise 6.3 as one types it, with a shift that may ask for more than certainty: NaN in the KL then."""
    p = old[token] * torch.tensor(shift(advantage, offset, tau, alpha) / tau, dtype=old.dtype).exp()
    new = (old * (1 - p) / (1 - old[token])).index_fill(0, torch.tensor(token), p.item())
    return new, (new * (new / old).log()).sum()


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
    "6.3": Exercise(
        "6.3", "What an offset costs", 2, 12, sampled_step, _off,
        (
            Mistake("no offset", partial(_beyond, shift=lambda d, c, tau, alpha: alpha * d),
                    "you forgot the offset: the old value was too high by c, so what was seen is Δ − c."),
            Mistake("offset's sign", partial(_beyond, shift=lambda d, c, tau, alpha: alpha * (d + c)),
                    "the offset has the wrong sign: a value that is too high makes the token look worse."),
            Mistake("no α", partial(sampled_step, shift=lambda d, c, tau, alpha: d - c),
                    "you forgot α: the target goes only that part of the way."),
            Mistake("α on Δ only", partial(sampled_step, shift=lambda d, c, tau, alpha: alpha * d - c),
                    "α multiplies all of Δ − c, the offset included."),
            Mistake("no τ", partial(sampled_step, shift=lambda d, c, tau, alpha: tau * alpha * (d - c)),
                    "you forgot τ: the log-ratio is α(Δ − c) *divided by* τ."),
            Mistake("times τ", partial(sampled_step, shift=lambda d, c, tau, alpha: tau**2 * alpha * (d - c)),
                    "you multiplied by τ, where the log-ratio is α(Δ − c) divided by it."),
            Mistake("renormalised", partial(sampled_step, fit=_renormalised),
                    "you renormalised as in the exact step: there V takes up what normalising removes, here it is "
                    "held. The token's own log-ratio must be what the target asks for; the others make up the rest."),
            Mistake("others kept", partial(sampled_step, fit=_others_kept),
                    "your policy does not sum to 1: what the token loses, the others gain."),
            Mistake("others alike", partial(sampled_step, fit=_others_alike),
                    "you gave each of the others the same amount; they keep their *proportions*: one common factor."),
            Mistake("KL direction", partial(sampled_step, kl=lambda new, old: kl_divergence(old, new)),
                    "the policy is right, but the KL is the other way round: KL(new‖old) averages under the new one."),
        ),
        ("The old Q of the token is too high by c as well. What does that do to its Δ? (6.10) with λ = 1.",
         "V is held, so τ (log π − log π_old) has to make up for all of α(Δ − c): that is π(a).",
         "π(a) = π_old(a) e^{α(Δ − c)/τ}; every other token times (1 − π(a)) / (1 − π_old(a)); KL = Σ π log(π/π_old)."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "06", "klq_loss", "The KLQ loss",
    "How does a language model become an action-value function, and what does it regress on?",
    "theory", "§3, the algorithm: (6), (7) and (13)",
    ("klq_kernels.reference.klq_loss", "klq_edu.core.improvement.klq_step", "klq_kernels.logits_klq_loss"),
    needs=("01", "05"), place=(5, 0), short="the KLQ loss", exercises=EXERCISES,
)  # fmt: skip
