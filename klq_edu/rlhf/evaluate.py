"""How a policy scores a rollout. Only here is it known whether logits are constrained, and so which operation is used.

Without a constraint log-probabilities and losses come from hidden states and no logits exist; with one, what it forbids
becomes −inf in the logits of policy and reference alike.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear

from klq_edu.rlhf.config import AlgorithmConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_kernels import TokenStats, linear_klq_loss, linear_token_stats, logits_klq_loss, token_stats

if TYPE_CHECKING:
    from klq_edu.rlhf.rollout import Rollout


def score(policy: ActorCritic, rollout: "Rollout", reference: bool = False) -> tuple[TokenStats, Tensor]:
    """Differentiable statistics and values [B, T] of a rollout's tokens now; `reference` adds log π_b and exact KL."""
    given, values = _arguments(policy, rollout, reference)
    stats = token_stats if "logits" in given else linear_token_stats
    return stats(**given), values


def regress(
    policy: ActorCritic, rollout: "Rollout", targets: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, TokenStats]:
    """KLQ's loss of fitting Q to targets [B, T] (6), and the statistics of the policy as it is now, detached."""
    given, values = _arguments(policy, rollout)
    loss = logits_klq_loss if "logits" in given else linear_klq_loss
    return loss(
        **given, ref_logprobs=rollout.ref_logprobs, values=values, targets=targets,
        tau=config.tau, loss=config.loss, clip=config.clip, log_ratio_clip=config.log_ratio_clip, delta=config.delta,
        old_logprobs=rollout.logprobs, old_values=rollout.values, return_stats=True,
    )  # fmt: skip


def _arguments(policy: ActorCritic, rollout: "Rollout", reference: bool = False) -> tuple[dict, Tensor]:
    """What an operation is told of tokens and models (constrained logits, or heads and their inputs), and V [B, T]."""
    inputs = policy.encode(rollout.input_ids, rollout.attention_mask, rollout.trunk)
    place = inputs, slice(-rollout.tokens.shape[1], None)  # where the completion's tokens are predicted
    hidden, values = policy.features(*place)
    models = {"": {"hidden": hidden} | policy.head_tensors(policy.head)}
    if reference:
        models["ref_"] = {"hidden": policy.reference_features(*place)} | policy.head_tensors(policy.ref_head)
    if rollout.allowed is not None:
        for name, model in models.items():
            logits = linear(model["hidden"], model["weight"], model["bias"])
            models[name] = {"logits": logits.masked_fill(~rollout.allowed, -torch.inf)}
    given = {name + part: x for name, model in models.items() for part, x in model.items()}
    about = {"tokens": policy.action_ids(rollout.tokens), "mask": rollout.mask, "temperature": rollout.temperature}
    return given | about, values
