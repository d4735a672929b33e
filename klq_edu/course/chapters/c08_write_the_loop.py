"""Chapter 08: write the loop, break it, repair it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.returns import lambda_returns, whiten
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter, differentiate, on_any_padding
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake, Wrong, grade
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.rollout import Rollout
from klq_kernels.reference import klq_loss

SCHEDULES = {  # of the committed sweep: what its figure calls them
    "on_policy": "completions used once", "equal": "cooled replay, equal compute", "replay": "cooled replay",
}  # fmt: skip


class Batch(NamedTuple):
    """What an update reads of a `Rollout`, for a table: all [B, T]."""

    rewards: Tensor
    values: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    mask: Tensor


def update(batch, forward, step, config) -> Tensor:
    """Exercise 8.1."""
    out = lambda_returns(
        batch.rewards, batch.values, batch.logprobs, batch.ref_logprobs, batch.mask,
        tau=config.tau, gamma=config.gamma, lam=config.lam, alpha=config.alpha,
    )  # fmt: skip
    losses = []
    for _ in range(config.epochs):
        logprobs, values = forward()
        loss = klq_loss(logprobs, batch.ref_logprobs, values, out.targets, batch.mask, tau=config.tau)
        loss = loss / (config.alpha * config.tau)
        step(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


def yours(number: str, answer: Callable) -> Callable:
    """The answer to an exercise if it passes, else the chapter's: so that what is built on it runs in any case."""
    passed = grade(EXERCISES[number], answer).passed
    print(f"From here on {'your answer' if passed else 'the answer of the course'} to {number} is used.")
    return answer if passed else EXERCISES[number].solution


def doubled(rollout: Rollout) -> Rollout:
    """The same in float64, for checks."""
    floats = {name: x.double() for name, x in vars(rollout).items() if isinstance(x, Tensor) and x.is_floating_point()}
    return replace(rollout, **floats)


def on_a_table(heart: Callable, config: TrainConfig, after: tuple[int, ...] = (20, 40, 80), size: int = 64) -> dict:
    """Train logits and values of a small tree, from next to its optimum: KL(π‖π*) in nats after so many updates."""
    tree, generator = TokenTree.random(4, 3, eos=0, seed=1), torch.Generator().manual_seed(0)
    _, values, best = tree.optimum(config.tau)
    logits = (best.log() + 0.1 * torch.randn(best.shape, generator=generator)).requires_grad_()
    critic, nats = values.clone().requires_grad_(), {}
    optimizer = torch.optim.Adam([logits, critic], lr=0.05)

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for u in range(1, max(after) + 1):
        policy = logits.detach().softmax(-1)
        found = tree.rollout(policy, size, generator)
        at = found.states, found.tokens
        batch = Batch(found.rewards, critic.detach()[at[0]], policy[at].log(), tree.ref[at].log(), found.mask)
        heart(batch, lambda at=at: (logits.log_softmax(-1)[at], critic[at[0]]), step, config)
        if u in after:
            gap = values[tree.roots].mean() - tree.objective(logits.detach().softmax(-1), config.tau)
            nats[u] = gap.item() / config.tau
    return nats


def frame(runs: dict[str, list[dict]], size: int) -> pd.DataFrame:
    """Rows of some runs (name of an algorithm -> its rows), of batches of this size, as `figures` reads them."""
    rows = pd.concat([pd.DataFrame(part).assign(algorithm=name, seed=0) for name, part in runs.items()])
    return rows.assign(rollouts=(rows["update"] + 1) * size)


def sweep() -> pd.DataFrame:
    """The committed comparison over τ and seeds; FileNotFoundError where the repository's results are missing."""
    places = [folder / "results" / "grammar_sweep.csv" for folder in (*Path(__file__).parents, *Path.cwd().parents)]
    if not (found := [place for place in places if place.exists()]):
        raise FileNotFoundError("results/grammar_sweep.csv is in the repository, which this notebook is not part of")
    return pd.read_csv(found[0])


SHOWN = {  # what is drawn: of the batches, exact at some updates, label
    "J": ("objective", "J", "objective J [reward]"),
    "KL to the reference": ("kl", "exact_kl", "KL(π ‖ π_b) [nats]"),
    "V": ("value_0", "J", "V(s_0), and J [reward]"),
}


def curves(runs: dict[str, list[dict]], best: float) -> Widget:
    """The runs of the notebook, each against the sound one; `best` is J*."""
    sound, *others = runs

    def draw(figure: FigureBase, run: str, shown: str) -> None:
        (axis,) = plain_axes(figure)
        sampled, exact, label = SHOWN[shown]
        for name, colour, line, marker in ((sound, BLUE, "-", "o"), (run, ORANGE, "--", "s")):
            rows = pd.DataFrame(runs[name])
            axis.plot(rows["update"] + 1, rows[sampled], color=colour, ls=line, lw=1.4, label=name)
            known = rows.dropna(subset=[exact])
            axis.plot(known["update"] + 1, known[exact], marker, color=colour, ms=7)
        if exact == "J":
            axis.axhline(best, color=GREY, ls=":", lw=1.2)
            axis.annotate("J*", (1, best), va="bottom", color=GREY)
        axis.set(xlabel="updates", ylabel=label, title=f"{shown}: {run}")
        axis.legend(frameon=False, fontsize=8)

    return Widget(
        "08-curves", draw, {"run": others, "shown": list(SHOWN)},
        [{"run": others[0], "shown": "J"}, {"run": "whitened", "shown": "V"}],
        "Lines: what the batches say, update by update. Marks: exact J, by enumeration. Blue is the sound loop, orange "
        "dashed the chosen one. On the left a value head that starts ten rewards too low costs the first updates; on "
        "the right a whitened loop: V(s_0) should be the policy's J (marks), and stays near 0.",
        "Two line plots against updates: the objective of the loop with a value offset, which lies far below the sound "
        "loop's and catches up late; and the first state's value in the whitened loop, which stays near zero "
        "while the sound loop's rises with J.",
        size=(5.2, 3.6),
    )  # fmt: skip


def _tables(generator: Generator) -> tuple:
    """Logits [S, A], values [S] and the reference's log-probs; states, tokens, rewards and mask [B, T]; τ, α, λ, γ."""

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, tokens = (torch.randint(n, (4, 4), generator=generator) for n in (3, 4))
    mask = torch.arange(4) < torch.tensor([4, 1, 3, 2])[torch.randperm(4, generator=generator)][:, None]
    rewards = torch.where(mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:], random(4, 4) + 2, 0.0)
    numbers = (0.3 + 0.4 * torch.rand(3, generator=generator)).tolist()
    gamma = 0.8 + 0.2 * torch.rand(1, generator=generator).item()
    return random(3, 4), random(3), random(3, 4).log_softmax(-1), states, tokens, rewards, mask, *numbers, gamma


def _updated(answer, logits, critic, ref, states, tokens, rewards, mask, tau, alpha, lam, gamma) -> dict[str, Tensor]:
    """The losses an update reports, and the tables after it, whose steps are plain gradient descent."""
    now, at = [logits.clone().requires_grad_(), critic.clone().requires_grad_()], (states, tokens)

    def forward():
        return now[0].log_softmax(-1)[at], now[1][states]

    def step(loss):
        grads = differentiate(loss, *now)
        now[:] = [(x - 0.3 * g).detach().requires_grad_() for x, g in zip(now, grads, strict=True)]

    logprobs, values = (torch.where(mask, x.detach(), torch.nan) for x in forward())
    config = TrainConfig(tau=tau, gamma=gamma, alpha=alpha, lam=lam, epochs=3)
    losses = answer(Batch(rewards, values, logprobs, ref[at], mask), forward, step, config)
    if isinstance(losses, list | tuple):
        raise Wrong(f"your update returns a {type(losses).__name__}: stack the losses, the loop wants one tensor.")
    if getattr(losses, "requires_grad", False):
        raise Wrong("your losses are not detached: each would keep its whole graph in memory. Collect loss.detach().")
    after = {"the logits after it: ": now[0].detach(), "the values after it: ": now[1].detach()}
    return {"the losses: ": losses} | after


def _wrong_update(
    again=False, once=False, alpha=None, scale=None, epochs=None, ref=lambda b: b.ref_logprobs, gains=None, fixed=False,
    everywhere=False, twice=False, gamma=None, idle=False,
):  # fmt: skip
    """`update` with one thing wrong: the catalogue of 8.1."""

    def wrong(batch, forward, step, c):
        tau, size = c.tau, c.alpha if alpha is None else alpha
        made, losses = None, []
        rewards = batch.rewards - twice * tau * (batch.logprobs - batch.ref_logprobs)
        read = forward() if once else None
        for _ in range(epochs or c.epochs):
            logprobs, values = read or forward()
            old = (values.detach(), logprobs.detach()) if again else (batch.values, batch.logprobs)
            if made is None or again:
                made = lambda_returns(
                    rewards, *old, ref(batch), batch.mask, tau=tau, gamma=gamma or c.gamma, lam=c.lam, alpha=size
                )
            goal = made.targets if gains is None else made.targets + size * (gains(made, batch) - made.advantages)
            values = values.detach() if fixed else values
            loss = klq_loss(logprobs, ref(batch), values, goal, batch.mask, tau=tau)
            if everywhere:
                loss = loss * batch.mask.double().mean()
            loss = loss / (c.alpha * tau if scale is None else scale)
            if not idle:
                step(loss)
            losses.append(loss.detach())
        return torch.stack(losses)

    return wrong


def centred(scores: Tensor, prompts: Tensor, ref_scores: Tensor) -> Tensor:
    """Exercise 8.2."""
    return scores - ref_scores.mean(1)[prompts]


def _scored(generator: Generator) -> tuple:
    prompts = torch.tensor([0, 2, 2, 5, 0, 5])[torch.randperm(6, generator=generator)]
    level = 5 * torch.randn(6, generator=generator, dtype=torch.float64) + 4
    ref_scores = level[:, None] + torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return level[prompts] + torch.randn(6, generator=generator, dtype=torch.float64), prompts, ref_scores


def _of_the_batch(scores: Tensor, prompts: Tensor, spread: bool = False) -> Tensor:
    """Less the batch's own mean for each prompt, and divided by its standard deviation."""
    out = scores.clone()
    for group in (prompts == x for x in prompts.unique()):
        out[group] -= scores[group].mean()
        out[group] /= scores[group].std() if spread else 1.0
    return out


def refreshed_targets(rewards, ref_logprobs, mask, old_logprobs, old_values, logprobs, values, tau, lam, alpha):
    """Exercise 8.3."""
    return lambda_returns(rewards, values, logprobs, ref_logprobs, mask, tau=tau, lam=lam, alpha=alpha).targets


def _refresh_wrongly(pick, weigh=False):
    def answer(rewards, ref_logprobs, mask, old_logprobs, old_values, logprobs, values, tau, lam, alpha):
        named = {"old": (old_values, old_logprobs), "new": (values, logprobs)}
        v, p, q = pick(named, ref_logprobs)
        paid = rewards * (logprobs - old_logprobs).exp() if weigh else rewards
        return lambda_returns(paid, v, p, q, mask, tau=tau, lam=lam, alpha=alpha).targets

    return answer


def _stored_delta(rewards, ref_logprobs, mask, old_logprobs, old_values, logprobs, values, tau, lam, alpha):
    old = lambda_returns(rewards, old_values, old_logprobs, ref_logprobs, mask, tau=tau, lam=lam)
    return torch.where(mask, tau * (logprobs - ref_logprobs) + values + alpha * old.advantages, 0.0)


def _remembered(generator: Generator) -> tuple:
    ref, old, new = -torch.rand(3, 3, 4, generator=generator, dtype=torch.float64) - 0.2
    values = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2, 3])[torch.randperm(3, generator=generator)][:, None]
    last = mask & ~torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    rewards = torch.where(last, 1 + torch.rand(3, 4, generator=generator, dtype=torch.float64), 0.0)
    hidden = (torch.where(mask, x, torch.nan) for x in (rewards, ref))
    stored = (torch.where(mask, x, torch.nan) for x in (old, values[0], new, values[1]))
    tau, lam, alpha = (0.3 + 0.4 * torch.rand(3, generator=generator)).tolist()
    return (*hidden, mask, *stored, tau, lam, alpha)


def distance(probs: Tensor, ref_probs: Tensor, rewards: Tensor, tau: float) -> Tensor:
    """Exercise 8.4."""
    best = tau * torch.logsumexp(ref_probs.log() + rewards / tau, -1)
    objective = (probs * (rewards - tau * (probs / ref_probs).log())).sum(-1)
    return (best - objective) / tau


def _optimum(ref_probs, rewards, tau):
    return torch.log_softmax(ref_probs.log() + rewards / tau, -1)


def _cold_and_warm(answer, probs, ref_probs, rewards, tau) -> dict[str, Tensor]:
    """At a τ far below the rewards, and at one of their size."""
    return {f"at τ = {t:.3g}: ": answer(probs, ref_probs, rewards, t) for t in (tau, 200 * tau)}


def _completions(generator: Generator) -> tuple:
    a, b, c = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    return a.softmax(0), b.softmax(0), 3 * c, (0.003 + 0.003 * torch.rand(1, generator=generator)).item()


EXERCISES = {
    "8.1": Exercise(
        "8.1", "The heart of the loop", 2, 15, update, _tables,
        (
            Mistake("targets again in every epoch", _wrong_update(again=True),
                    "you made new targets in every epoch, from the model that is being fitted. Targets are made once, "
                    "from the batch as it was sampled, and stay put."),
            Mistake("one reading for all epochs", _wrong_update(once=True),
                    "your losses are all the same, those of the old parameters: forward() and step(loss) both belong "
                    "inside the loop over epochs, the model read anew before every step."),
            Mistake("no step", _wrong_update(idle=True),
                    "nothing moved between epochs: a step(loss) is missing."),
            Mistake("no γ", _wrong_update(gamma=1.0),
                    "you forgot γ: config.gamma may be less than 1. Pass gamma=config.gamma to lambda_returns."),
            Mistake("full target", _wrong_update(alpha=1.0),
                    "you forgot α: the target goes all the way, Q + Δ. Pass alpha=config.alpha to lambda_returns."),
            Mistake("not divided", _wrong_update(scale=1.0),
                    "your loss is not divided by ατ: it is KLQ's, but the norm at which gradients are clipped then "
                    "means something else for every τ."),
            Mistake("one epoch", _wrong_update(epochs=1),
                    "you took one step; config.epochs are wanted, each with a loss of its own."),
            Mistake("old policy for the reference", _wrong_update(ref=lambda b: b.logprobs),
                    "you compare with the policy that sampled, not with the reference: each update is braked, but "
                    "nothing pulls the policy back to π_b."),
            Mistake("whitened", _wrong_update(gains=lambda out, b: whiten(out.advantages, b.mask)),
                    "you whitened Δ: KLQ's target takes it as it is."),
            Mistake("wrong way", _wrong_update(gains=lambda out, b: -out.advantages),
                    "the target is Q − αΔ: what went better than expected is made less likely. The sign is a plus."),
            Mistake("values held", _wrong_update(fixed=True),
                    "your loss does not reach the values: the gradient flows through log π and through V."),
            Mistake("padding counted", _wrong_update(everywhere=True),
                    "padding is in the denominator of your mean: average over real tokens (klq_loss does)."),
            Mistake("KL twice", _wrong_update(twice=True),
                    "you shaped the reward with the KL, which is in Q already: now it is paid twice (notebook 07)."),
        ),
        ("What is computed once per batch, and what once per epoch?",
         "Once: `lambda_returns` on what the batch stores. Then, per epoch: forward(), klq_loss, divide by ατ, "
         "step(loss).",
         "`out = lambda_returns(batch.rewards, batch.values, batch.logprobs, batch.ref_logprobs, batch.mask, tau=…, "
         "gamma=…, lam=…, alpha=…)`; in the loop `klq_loss(logprobs, batch.ref_logprobs, values, out.targets, "
         "batch.mask, tau=config.tau) / (config.alpha * config.tau)`; collect `loss.detach()`."),
        probe=_updated,
    ),
    "8.2": Exercise(
        "8.2", "The repair of an offset", 1, 8, centred, _scored,
        (
            Mistake("mean of the batch", lambda s, p, r: s - s.mean(),
                    "you subtracted the batch's own mean: it moves with the policy, so the reward of a fixed text "
                    "would change from update to update. And prompts of another level keep it."),
            Mistake("mean of the batch per prompt", lambda s, p, r: _of_the_batch(s, p),
                    "you subtracted the batch's own mean per prompt: it moves with the policy, and V has to start from "
                    "the reference's mean, `ref_scores`."),
            Mistake("standardised in the batch per prompt", lambda s, p, r: _of_the_batch(s, p, spread=True),
                    "you standardised within the prompt's group of the batch: its mean moves with the policy, and "
                    "dividing by its spread makes another reward of it."),
            Mistake("whitened", lambda s, p, r: (s - s.mean()) / s.std(),
                    "you whitened the batch's scores: its mean moves with the policy, its spread rescales the reward "
                    "(and with it what τ means), and prompts keep their different levels."),
            Mistake("one level for all", lambda s, p, r: s - r.mean(),
                    "you subtracted one mean for all prompts; each prompt has a level of its own."),
            Mistake("by place in the batch", lambda s, p, r: s - r.mean(1),
                    "you matched the batch's rows with the prompts' rows: completion i belongs to prompts[i]."),
            Mistake("standardised", lambda s, p, r: (s - r.mean(1)[p]) / r.std(1, correction=0)[p],
                    "you divided by the spread as well: that is another reward, and another optimum."),
            Mistake("standardised, n − 1", lambda s, p, r: (s - r.mean(1)[p]) / r.std(1)[p],
                    "you divided by the standard deviation as well: another reward has another optimum."),
            Mistake("sign", lambda s, p, r: r.mean(1)[p] - s,
                    "the sign is wrong: now good completions are punished."),
            Mistake("best of the reference", lambda s, p, r: s - r.max(1).values[p],
                    "you subtracted the best score of the reference; the level where V starts is its mean."),
        ),
        ("Which number does V start from, if the reward is what you return?",
         "At π = π_b the value of a prompt is the mean of the reference's scores for that prompt.",
         "`ref_scores.mean(1)` has one number per prompt; `[prompts]` picks that of each completion."),
    ),
    "8.3": Exercise(
        "8.3", "An old batch, seen anew", 2, 10, refreshed_targets, _remembered,
        (
            Mistake("nothing refreshed", _refresh_wrongly(lambda by, q: (*by["old"], q)),
                    "nothing is refreshed: these targets are those of the policy that sampled, and pull the present "
                    "one back to it."),
            Mistake("log-probs left", _refresh_wrongly(lambda by, q: (by["new"][0], by["old"][1], q)),
                    "you refreshed V only: Q is τ log π/π_b + V, and π has moved as well."),
            Mistake("values left", _refresh_wrongly(lambda by, q: (by["old"][0], by["new"][1], q)),
                    "you refreshed log π only: V has been learning as well."),
            Mistake("stored Δ", _stored_delta,
                    "Q is refreshed, Δ is not: it still says what was missing then. It needs the new Q and V too."),
            Mistake("reference moved", _refresh_wrongly(lambda by, q: (*by["new"], by["old"][1])),
                    "you put the policy that sampled in the place of the reference; π_b never changes."),
            Mistake("importance weights", _refresh_wrongly(lambda by, q: (*by["new"], q), weigh=True),
                    "you weighted the reward by π/π_old: this says how often a token is drawn, not what it is worth. A "
                    "fixed point that holds on every path needs no weights."),
        ),
        ("Go through the list: which of these depend on the policy as it is now?",
         "What the text is, what it earned and what the reference thinks of it have not changed.",
         "`lambda_returns(rewards, values, logprobs, ref_logprobs, mask, …)` with the *new* values and log-probs."),
        probe=on_any_padding,
    ),
    "8.4": Exercise(
        "8.4", "How far from the optimum?", 2, 10, distance, _completions,
        (
            Mistake("in reward", lambda p, b, r, tau: tau * distance(p, b, r, tau),
                    "that is J* − J, in units of reward; divided by τ it is in nats."),
            Mistake("other direction", lambda p, b, r, tau: (
                        _optimum(b, r, tau).exp() * (_optimum(b, r, tau) - p.log())).sum(-1),
                    "that is KL(π*‖π): J says KL(π‖π*)."),
            Mistake("greedy optimum", lambda p, b, r, tau: (r.max() - (p * (r - tau * (p / b).log())).sum(-1)) / tau,
                    "J* is not the largest reward: putting all probability there would cost KL."),
            Mistake("no reference in J*", lambda p, b, r, tau: distance(p, b, r, tau) + (
                        torch.logsumexp(r / tau, -1) - torch.logsumexp(b.log() + r / tau, -1)),
                    "you left π_b out of the logsumexp: J* weighs each e^{R/τ} by π_b."),
            Mistake("without KL", lambda p, b, r, tau: (
                        tau * torch.logsumexp(b.log() + r / tau, -1) - (p * r).sum(-1)) / tau,
                    "you left the KL out of J: J(π) = E[R] − τ KL(π‖π_b)."),
            Mistake("from the reference", lambda p, b, r, tau: (p * (p / b).log()).sum(-1),
                    "that is the distance from the reference, the price, not from the optimum."),
            Mistake("entropy", lambda p, b, r, tau: (
                        tau * torch.logsumexp(r / tau, -1) - (p * (r - tau * p.log())).sum(-1)) / tau,
                    "you forgot π_b, in J and in J*: what is left is a reward with an entropy bonus."),
        ),
        ("You need J(π) and J*, and no policy π* at all.", "J* = τ log Σ π_b(y) e^{R(y)/τ}: which function of torch "
         "does that without overflow?", "`tau * torch.logsumexp(ref_probs.log() + rewards / tau, -1)`, less the sum of "
         "`probs * (rewards - tau * (probs / ref_probs).log())`, all divided by τ."),
        probe=_cold_and_warm,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "08", "write_the_loop", "Write the loop",
    "How do the formulas become a training loop, how does it break, and why may it learn from old completions?",
    "practice", "§3 and §4, the algorithm, (6), (7) and (14)",
    ("klq_edu.rlhf.loop.train", "klq_edu.rlhf.replay", "klq_edu.core.tree.TokenTree.td_errors"),
    needs=("06", "07"), place=(7, 0.6), short="write the loop", exercises=EXERCISES,
)  # fmt: skip
