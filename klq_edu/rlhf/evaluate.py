"""How a policy scores a rollout. Only here is it known whether logits are constrained, and so which operation is used.

Without a constraint log-probabilities and losses come from hidden states and no logits exist; with one, what it forbids
becomes −inf in the logits of policy and reference alike.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from klq_edu.rlhf.policy import ActorCritic
from klq_kernels import TokenStats, linear_klq_loss, linear_token_stats, logits_klq_loss, token_stats


def score(policy: ActorCritic, rollout, reference: bool = False) -> tuple[TokenStats, Tensor]:
    """Differentiable statistics and values [B, T] of a `Rollout` under the policy as it is now.

    With `reference` the statistics include log π_b and the exact KL, which cost a pass of the frozen reference.
    """
    given, values = _arguments(policy, rollout, reference)
    stats = token_stats if "logits" in given else linear_token_stats
    return stats(**given), values


def regression(policy: ActorCritic, rollout) -> Callable[..., tuple[Tensor, TokenStats]]:
    """KLQ's fused loss for this policy on a `Rollout`: given targets [B, T] and settings it returns the loss (6) and
    the present statistics, detached."""
    given, values = _arguments(policy, rollout)
    given |= {"values": values, "old_logprobs": rollout.logprobs, "old_values": rollout.values}
    loss = logits_klq_loss if "logits" in given else linear_klq_loss
    return partial(loss, **given, ref_logprobs=rollout.ref_logprobs, return_stats=True)


def _arguments(policy: ActorCritic, rollout, reference: bool = False) -> tuple[dict, Tensor]:
    """What an operation is told of tokens and models (constrained logits, or heads and their inputs), and V [B, T]."""
    inputs = policy.encode(rollout.input_ids, rollout.attention_mask, rollout.trunk)
    place = inputs, slice(-rollout.tokens.shape[1], None)  # where the completion's tokens are predicted
    hidden, values = policy.features(*place)
    models = {"": (hidden, policy.head)}
    if reference:
        models["ref_"] = policy.reference_features(*place), policy.ref_head
    given = {"tokens": policy.action_ids(rollout.tokens), "mask": rollout.mask, "temperature": rollout.temperature}
    for name, (hidden, head) in models.items():
        weight, bias = policy.cast(head.weight), policy.cast(head.bias)
        if rollout.allowed is None:
            given |= {f"{name}hidden": hidden, f"{name}weight": weight, f"{name}bias": bias}
        else:
            given[f"{name}logits"] = linear(hidden, weight, bias).masked_fill(~rollout.allowed, -torch.inf)
    return given, values
