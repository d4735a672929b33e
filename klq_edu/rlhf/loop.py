"""The RL loop: roll out, score, targets, epochs of minibatches, update, log. Read `train` top to bottom."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from datasets import Dataset
from torch import Tensor

from klq_edu.core.estimators import k3
from klq_edu.machine import resolve_device, resolve_dtype
from klq_edu.rlhf.algorithms import ALGORITHMS, Targets, make_targets
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import fingerprint, identity, reward_identity
from klq_edu.rlhf.optim import clip_gradients, learning_rate_factor
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.replay import Memory, join, refreshed
from klq_edu.rlhf.rewards import Reward, score
from klq_edu.rlhf.rollout import PROVIDED, Constraint, Rollout, check_prompts, collect
from klq_edu.rlhf.runs import Run, TrainState
from klq_edu.rlhf.signals import StopSignals
from klq_kernels.reference import masked_mean
from klq_kernels.types import select

METRICS = {
    "update": "number of this update, from 0; everything below is measured on its new completions",
    "tau": "KL coefficient τ_u of this update's targets and losses: above τ while cooling",
    "rollouts": "completions sampled so far, those for the reference's mean rewards included",
    "row_steps": "completions times optimiser steps they took part in, so far: the compute of the fit",
    "reward": "mean score of the batch's completions",
    "reward_std": "standard deviation of the scores within the batch",
    "kl": "mean over completions of Σ_t D(π‖π_b)(s_t), exact over the vocabulary, in nats",
    "objective": "reward − τ kl at the final τ: a sample of J(π), what every algorithm here maximises (γ = 1)",
    "entropy": "mean over tokens of H(π(·|s_t)), in nats",
    "length": "mean number of tokens per completion, EOS included",
    "unknown": "share of tokens beyond the tokenizer (the model's vocabulary is padded), which decode to nothing",
    "value": "mean over tokens of V(s_t) before the update",
    "advantage_rms": "root mean square of Δ_t (before whitening): how far Q is from its λ-return",
    "loss": "mean loss over the update's optimiser steps, on the algorithm's own scale; replayed completions included",
    "grad_norm": "mean gradient norm of the policy over these steps, before clipping",
    "kl_old": "mean over tokens of KL(π_old‖π), k3 from samples, just before the update's last optimiser step",
    "learning_rate": "Adam's step size in this update",
    "seconds": "wall-clock time of this update, evaluation excluded",
}


def train(
    policy: ActorCritic, tokenizer, prompts: Dataset, reward: Reward, config: TrainConfig, *, run: Run,
    constraint: Constraint | None = None, evaluate: Callable[[ActorCritic], dict] | None = None,
    on_update: Callable[[dict], None] = lambda row: None, baselines: Sequence[float] | None = None,
) -> list[dict]:  # fmt: skip
    """Train `policy` in place and return one row of metrics per update (see METRICS), logged to `run` as they come.

    `prompts` needs a column "prompt", checked before the first update; further columns are passed to the reward.
    `evaluate(policy)` adds columns every `config.eval_every` updates. A fresh value head starts at the mean reward of
    the first batch, which the reference sampled, less what is subtracted from rewards. `baselines`, one number per
    prompt, are that where it is known; otherwise the reference is sampled for them (see `config.centre`). A value head
    that is not fresh keeps the level it has: centre rewards only if it was trained on centred ones.

    If `run` holds a checkpoint of the same run, training continues from it with the same random numbers. Ctrl-C,
    SIGTERM and SIGHUP drop an update that has not changed the policy yet and finish one that has (a second signal stops
    at once); then the state is saved. So it is after an error, unless that came amid an update that has changed the
    policy or tells of divergence: then the last checkpoint counts.

    Raises ValueError for prompts or a policy that do not fit, or a run folder that is in use or holds another run.
    """
    prepare(policy, prompts, config)
    baselines = None if baselines is None else checked_baselines(baselines, len(prompts), config)
    given = config.to_dict()
    if differ := {k: (v, given[k]) for k, v in run.settings.items() if k in given and v != given[k]}:
        raise ValueError(f"run and config have other settings (run, config): {differ}; make both of one config")
    check_prompts(tokenizer, prompts["prompt"], policy, config.max_new_tokens)
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=config.learning_rate)
    generator, memory = torch.Generator().manual_seed(config.seed), Memory(config.replay_batches)
    schedule = {name: given[name] for name in ("updates", "warmup_updates", "final_lr_fraction")}
    state, value_was_set = TrainState(policy.trainable(), optimizer, generator, memory), policy.value_is_set
    sample = partial(collect_scored, policy, tokenizer, prompts, reward, config, constraint, generator)
    samples_per_mean = config.centre_samples if config.centre == "prompt" and baselines is None else 0
    with run.writing(), StopSignals() as stop:
        rest = {"tokenizer": fingerprint(tokenizer), "constraint": fingerprint(constraint)}
        rest |= {"baselines": fingerprint(baselines)} if config.centre == "prompt" else {}
        run.claim(identity(prompts, reward, policy) | rest)
        policy.dtype = getattr(torch, run.keep("dtype", str(policy.dtype).removeprefix("torch.")))
        rows = run.resume(state)
        policy.value_is_set = policy.value_is_set or bool(rows)  # the checkpoint's head has found its level
        if len(rows) >= config.updates:
            run.say_finished(len(rows))
            return rows
        optimizer.register_step_pre_hook(lambda *_: stop.start())
        try:
            for update in range(len(rows), config.updates):
                start, now = time.perf_counter(), config.cooled(update)
                policy.value_grad_scale = now.trunk_scale
                for group in optimizer.param_groups:  # a function of the update, so nothing to save
                    group["lr"] = config.learning_rate * learning_rate_factor(update, **schedule)
                index = batch_rows(len(prompts), config, update)
                rollout, scores = sample(index)
                if update == 0:
                    memory.baselines = reference_means(len(prompts), config, scores, sample, baselines)
                    rollout = start_values(policy, rollout, memory.centred(scores, index).mean())
                rollout = rollout.rewarded(memory.centred(scores, index))
                old = memory.draw(config.replay, generator)
                batch = rollout if old is None else join(rollout, refreshed(policy, old))
                targets = make_targets(batch, now)
                steps = fit(policy, batch, targets, now, optimizer, generator, len(rollout))

                before = memory.baselines.isfinite().sum().item() * samples_per_mean
                row = {"update": update, "tau": now.tau, "rollouts": before + (update + 1) * config.batch_size}
                row["row_steps"] = (rows[-1]["row_steps"] if rows else 0) + config.epochs * len(batch)
                count, length = rollout.mask.shape
                its = Targets(*(x[:count, :length] for x in targets))
                row |= summarise(rollout, scores, its, steps, config.tau)
                row |= {"learning_rate": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - start}
                if evaluate and (update % config.eval_every == config.eval_every - 1 or update == config.updates - 1):
                    row |= measured(evaluate(policy))
                rows.append(row)
                run.log(row, rollout)
                if config.replay:
                    memory.add(rollout)
                state.finish_update()
                stop.done()
                on_update(row)
                if update % config.checkpoint_every == config.checkpoint_every - 1 or update == config.updates - 1:
                    run.save(state)
        except BaseException as error:
            if not (state.updates or stop.busy):  # the dropped first update may have set V
                policy.value_is_set = value_was_set
            if not (stop.busy or stop.again or isinstance(error, FloatingPointError)):
                run.save(state)
            raise
        finally:
            run.claim({"reward": reward_identity(reward)}, again=True)
    return rows


def collect_scored(
    policy, tokenizer, prompts: Dataset, reward: Reward, config: TrainConfig, constraint, generator, index: list[int]
) -> tuple[Rollout, Tensor]:  # fmt: skip
    """A completion of each of these rows of the prompts, not rewarded yet, and its score."""
    batch = prompts[index]
    rollout = collect(
        policy, tokenizer, batch.pop("prompt"), max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        constraint=constraint, generator=generator,
    )  # fmt: skip
    return rollout, score(reward, rollout, **batch)


def reference_means(count: int, config: TrainConfig, scores: Tensor, sample, given: Sequence[float] | None) -> Tensor:
    """What is subtracted from the rewards of each of `count` prompts, [P], while the policy still is the reference:
    nothing, the mean of the first batch's `scores`, or each prompt's own: those given, or of new completions of the
    prompts that this run will use (NaN for the others)."""
    if config.centre != "prompt":
        return torch.full((count,), 0.0 if config.centre == "none" else scores.mean().item())
    if given is not None:
        return torch.tensor(given)
    used = torch.tensor([i for u in range(config.updates) for i in batch_rows(count, config, u)]).unique()
    parts = used.repeat_interleave(config.centre_samples).split(config.batch_size)
    found = torch.cat([sample(part.tolist())[1].cpu() for part in parts])
    return torch.full((count,), torch.nan).index_put((used,), found.view(-1, config.centre_samples).mean(1))


def start_values(policy, rollout: Rollout, mean: Tensor) -> Rollout:
    """A value head that is still fresh starts at the first batch's mean reward, and so does V in that batch."""
    if policy.value_is_set:
        return rollout
    policy.start_value(mean.item())
    return replace(rollout, values=torch.where(rollout.mask, mean, 0.0))


def measured(columns: dict) -> dict[str, float]:
    """What `evaluate` returned, as plain numbers (0-dimensional tensors are some); TypeError names what is none."""
    if not isinstance(columns, dict):
        raise TypeError(f"evaluate must return a dict of numbers, got {type(columns).__name__}")
    numbers = {name: x.item() if getattr(x, "ndim", None) == 0 else x for name, x in columns.items()}
    for name, x in numbers.items():
        if not isinstance(name, str) or name in METRICS or not isinstance(x, int | float):
            raise TypeError(f"evaluate must return a dict of numbers under names of its own, got {name!r}: {x!r}")
    return numbers


def fit(
    policy, rollout: Rollout, targets: Targets, config: TrainConfig, optimizer, generator, fresh: int | None = None
) -> Tensor:  # fmt: skip
    """Epochs of minibatches on one batch. Returns [steps, 3]: loss, gradient norm, KL(π_old ‖ π) before each step, the
    last from the first `fresh` rows (all by default), which π_old sampled."""
    steps = []
    for _ in range(config.epochs):
        for index in torch.randperm(len(rollout), generator=generator).tensor_split(config.minibatches):
            old, goal = rollout.rows(index.to(policy.device)), select(targets, index.to(policy.device))
            loss, logprobs = ALGORITHMS[config.algorithm](policy, old, goal, config)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = clip_gradients(policy, config.max_grad_norm)
            optimizer.step()
            sampled = old.mask & (index < (fresh or len(rollout))).to(policy.device).unsqueeze(1)
            kl_old = masked_mean(k3(old.logprobs - logprobs.detach()), sampled)
            steps.append(torch.stack([loss.detach(), grad_norm, kl_old]))
    return torch.stack(steps)


def checked_baselines(given: Sequence[float], count: int, config: TrainConfig) -> list[float]:
    """Mean rewards that were handed in, as a list of our own; ValueError unless there is a finite one per prompt."""
    if config.centre != "prompt":
        raise ValueError(f"baselines are for config.centre = 'prompt', which is {config.centre!r}")
    try:
        numbers = [float(x) for x in given]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise ValueError(f"baselines must be {count} finite numbers, one per prompt, got {given!r:.100}")
    return numbers


def prepare(policy: ActorCritic, prompts: Dataset, config: TrainConfig) -> None:
    """Check that policy and prompts fit the settings, and put those settings into the policy that it carries out."""
    if not isinstance(prompts, Dataset):
        raise TypeError(f"prompts must be a datasets.Dataset with a column 'prompt', got {type(prompts).__name__}")
    if "prompt" not in prompts.column_names:
        raise ValueError(f"prompts must have a column 'prompt', got columns {prompts.column_names}")
    if taken := sorted(set(PROVIDED) & set(prompts.column_names)):
        raise ValueError(f"prompts: the columns {taken} have names of what a reward is given beside them: rename them")
    critic = "shared" if policy.critic_body is None else "separate"
    if critic != config.critic:
        raise ValueError(f"config.critic is {config.critic!r} but the policy was built with critic={critic!r}")
    policy.to(resolve_device(config.device))
    policy.value_grad_scale, policy.dtype = config.trunk_scale, resolve_dtype(config.dtype, policy.device)


def summarise(rollout: Rollout, scores: Tensor, targets: Targets, steps: Tensor, tau: float) -> dict[str, float]:
    """The batch's metrics, as METRICS documents them; `steps` [n, 3] holds loss, gradient norm and KL(π_old ‖ π)."""
    mask, kl = rollout.mask, rollout.kl.sum(1).mean()
    return {
        "reward": scores.mean().item(),
        "reward_std": scores.std(correction=0).item(),
        "kl": kl.item(),
        "objective": (scores.mean() - tau * kl).item(),
        "entropy": masked_mean(rollout.entropy, mask).item(),
        "length": mask.sum(1).float().mean().item(),
        "unknown": 0.0 if rollout.unknown is None else masked_mean(rollout.unknown.float(), mask).item(),
        "value": masked_mean(rollout.values, mask).item(),
        "advantage_rms": masked_mean((targets.values - rollout.values) ** 2, mask).sqrt().item(),
        "loss": steps[:, 0].mean().item(),
        "grad_norm": steps[:, 1].mean().item(),
        "kl_old": steps[-1, 2].item(),
    }


def batch_rows(count: int, config: TrainConfig, update: int) -> list[int]:
    """Rows of the prompts for this update, each as often as `samples_per_prompt` says: an endless reshuffled stream, so
    every prompt is used equally often. A function of (seed, update) alone: a resumed run sees the same prompts.

    >>> pairs = TrainConfig(batch_size=2)
    >>> sorted(batch_rows(4, pairs, 0) + batch_rows(4, pairs, 1))
    [0, 1, 2, 3]
    """
    batch = config.batch_size // config.samples_per_prompt
    first, start = divmod(update * batch, count)
    epochs = range(first, 1 + (update * batch + batch - 1) // count)
    seeds = (torch.Generator().manual_seed(config.seed * 1_000_003 + epoch) for epoch in epochs)
    rows = torch.cat([torch.randperm(count, generator=seed) for seed in seeds])[start : start + batch]
    return rows.repeat_interleave(config.samples_per_prompt).tolist()
