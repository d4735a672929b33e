"""What lies between a loss and an optimiser's step, for the loop and for any other trainer: schedule and clipping."""

import torch
from torch import Tensor

from klq_edu.rlhf.policy import ActorCritic


def learning_rate_factor(update: int, *, updates: int, warmup_updates: int, final_lr_fraction: float) -> float:
    """Share of the learning rate in this update: a linear rise, then a linear fall to `final_lr_fraction`.

    >>> schedule = {"updates": 11, "warmup_updates": 1, "final_lr_fraction": 0.0}
    >>> [round(learning_rate_factor(u, **schedule), 2) for u in (0, 1, 5, 10)]
    [0.5, 0.9, 0.5, 0.0]
    """
    rise = min(1.0, (update + 1) / (warmup_updates + 1))
    return rise * (1 - (1 - final_lr_fraction) * min(1.0, update / max(updates - 1, 1)))


def clip_gradients(policy: ActorCritic, limit: float) -> Tensor:
    """Clip the gradient of what only V uses and that of the rest to norm `limit` each; returns the latter's norm.

    Apart, because KLQ's value gradient is 1/τ times PPO's: clipped together it would shrink the policy's to nothing.
    Raises FloatingPointError, before any parameter has changed, where a gradient is not finite.
    """
    critic = policy.critic_modules()
    others = [p for name, p in policy.trainable().items() if name.split(".")[0] not in critic]
    norms = [torch.nn.utils.clip_grad_norm_(group, limit) for group in (critic.parameters(), others)]
    norms = torch.stack([n.to(policy.device) for n in norms])  # that of no gradients is on the CPU
    if not norms.isfinite().all():
        raise FloatingPointError(f"gradient norms (critic, policy) are {norms.tolist()}: lower learning_rate")
    return norms[1]
