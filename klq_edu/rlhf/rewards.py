"""A reward is a callable f(prompts, completions, **columns) -> list of floats, one per completion (TRL's contract)."""

import math
from collections.abc import Callable

import torch

from klq_edu.rlhf.rollout import Rollout

Reward = Callable[..., list[float]]


def score(reward: Reward, rollout: Rollout, **columns: list) -> torch.Tensor:
    """Call `reward` on the rollout's texts and put each score on the completion's last real token.

    `columns` are the dataset's further columns for these prompts. Fills `rollout.rewards` [B, T] and returns the scores
    [B]. Raises ValueError where the reward returns the wrong number of scores or one that is not a finite number, and
    RuntimeError, from the original error, where the callable itself raises.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    try:
        scores = reward(prompts=rollout.prompts, completions=rollout.completions, **columns)
    except Exception as error:
        raise RuntimeError(
            f"the reward {name} raised {type(error).__name__}: {error}. It is called as "
            f"f(prompts=[…], completions=[…], **columns) with columns {sorted(columns)}"
        ) from error
    scores = list(scores)
    if len(scores) != len(rollout):
        raise ValueError(f"the reward {name} must return one score per completion, {len(rollout)}, got {len(scores)}")
    for i, s in enumerate(scores):
        if not (isinstance(s, (int, float)) or getattr(s, "ndim", None) == 0) or not math.isfinite(s):
            raise ValueError(
                f"the reward {name} must return finite numbers, got {s!r} for completion {rollout.completions[i]!r}"
            )
    scores = torch.tensor([float(s) for s in scores], device=rollout.mask.device)
    last = rollout.mask.sum(1, keepdim=True) - 1
    rollout.rewards = torch.zeros(rollout.mask.shape, device=scores.device).scatter(1, last, scores[:, None])
    return scores
