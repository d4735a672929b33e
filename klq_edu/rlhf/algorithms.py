"""KLQ, PPO-clip and PPO-penalty as losses on the same rollout: what differs between them is on this page.

Each loss is scaled so that its first gradient through log π is −E[Â ∇log π] whatever τ and α are, so that a norm to
clip gradients at means the same for all: KLQ's is divided by ατ (claim 2 of the equivalence).
"""

from typing import NamedTuple

from torch import Tensor

from klq_edu.core.objectives import ppo_clip_loss, ppo_penalty_loss, value_loss
from klq_edu.core.returns import lambda_returns, retrace_weights, whiten
from klq_edu.rlhf.config import AlgorithmConfig
from klq_edu.rlhf.evaluate import regression, score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import Rollout


class Targets(NamedTuple):
    """What a batch is fitted to, each [B, T]: Ĝ for Q, Â for the policy gradient, V_old + Δ for a separate V loss."""

    q: Tensor
    advantages: Tensor
    values: Tensor


class Step(NamedTuple):
    """What one optimiser step starts from: the loss, and the new policy's log-probs [B, T] for the logs."""

    loss: Tensor
    logprobs: Tensor


def make_targets(rollout: Rollout, config: AlgorithmConfig) -> Targets:
    """λ-return targets of a scored rollout; with `whiten`, Â = whiten(Δ) replaces Δ in both Ĝ and Â, never in V's; with
    `retrace`, c = min(1, π/μ) cuts the traces of tokens that the present policy would rarely choose."""
    old = rollout.behaviour if config.retrace else None
    cut = None if old is None else retrace_weights(rollout.logprobs, old)
    out = lambda_returns(
        rollout.rewards, rollout.values, rollout.logprobs, rollout.ref_logprobs, rollout.mask,
        tau=config.tau, gamma=config.gamma, lam=config.lam, alpha=config.alpha, trace_weights=cut,
    )  # fmt: skip
    gains = whiten(out.advantages, rollout.mask) if config.whiten else out.advantages
    return Targets(out.targets + config.alpha * (gains - out.advantages), gains, rollout.values + out.advantages)


def klq(policy: ActorCritic, old: Rollout, targets: Targets, config: AlgorithmConfig) -> Step:
    """½(τ log π/π_b + V − Ĝ)² / (ατ): one regression trains policy and critic together (6)."""
    loss, new = regression(policy, old)(
        targets=targets.q, tau=config.tau, loss=config.loss, clip=config.clip, log_ratio_clip=config.log_ratio_clip,
        delta=config.delta,
    )  # fmt: skip
    return Step(loss / (config.alpha * config.tau), new.logprob)


def ppo_clip(policy: ActorCritic, old: Rollout, targets: Targets, config: AlgorithmConfig) -> Step:
    """PPO's clipped surrogate plus vf_coef times the value loss."""
    new, values = score(policy, old)
    surrogate = ppo_clip_loss(new.logprob, old.logprobs, targets.advantages, old.mask, clip=config.ratio_clip)
    critic = value_loss(values, targets.values, old.mask, clip=config.clip, old_values=old.values)
    return Step(surrogate + config.vf_coef * critic, new.logprob)


def ppo_penalty(policy: ActorCritic, old: Rollout, targets: Targets, config: AlgorithmConfig) -> Step:
    """−E[ρÂ] + (τ/α) KL(π ‖ π_old), KLQ's counterpart (claim 3), plus vf_coef times the value loss."""
    new, values = score(policy, old)
    coef = config.tau / config.alpha
    surrogate = ppo_penalty_loss(new.logprob, old.logprobs, targets.advantages, old.mask, coef=coef)
    critic = value_loss(values, targets.values, old.mask, clip=config.clip, old_values=old.values)
    return Step(surrogate + config.vf_coef * critic, new.logprob)


ALGORITHMS = {"klq": klq, "ppo_clip": ppo_clip, "ppo_penalty": ppo_penalty}
