"""What a run remembers: its latest batches, to be learnt from again, and what is subtracted from rewards.

Replay is licensed by the Q view: the optimum has Δ = 0 along every path (`TokenTree.td_errors`), so it is a
fixed point whoever sampled the path. Replayed completions therefore get log-probs, values and targets under the present
policy, and no importance weights. Away from the optimum an uncorrected λ-return follows the old policy's continuation;
`retrace` cuts it where the present policy would rarely go. (Whitened advantages have no such fixed point: at Δ = 0 they
are rounding errors blown up to size 1.)
"""

from collections import deque
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import pad

from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import Rollout


class Memory:
    """The last `batches` rewarded batches, and `baselines` [P], subtracted from the rewards of each prompt."""

    def __init__(self, batches: int):
        self.batches: deque[Rollout] = deque(maxlen=batches)
        self.baselines = torch.zeros(0)

    def add(self, rollout: Rollout) -> None:
        """Remember a batch, on the CPU and without its trunk activations, which are the largest part of it."""
        self.batches.append(replace(rollout, trunk=None).to("cpu"))

    def draw(self, count: int, generator: torch.Generator | None = None) -> Rollout | None:
        """`count` different completions of the batches remembered, each as likely as any other; all if there are no
        more, None if there are none."""
        if not count or not self.batches:
            return None
        remembered = join(*self.batches)
        return remembered.rows(torch.randperm(len(remembered), generator=generator)[:count])

    def centred(self, scores: Tensor, rows: list[int]) -> Tensor:
        """Scores [B] of completions of these rows of the prompts, less their baselines. ValueError for a prompt without
        one: they were estimated for fewer updates."""
        shift = self.baselines[rows].to(scores)
        if shift.isnan().any():
            row = rows[shift.isnan().nonzero()[0].item()]
            raise ValueError(f"updates must not be raised to prompts without a mean reward, prompts[{row}] has none")
        return scores - shift

    def state_dict(self) -> dict:
        """Tensors, texts and numbers only, for a checkpoint."""
        return {"batches": [vars(b) for b in self.batches], "baselines": self.baselines}

    def load_state_dict(self, state: dict) -> None:
        """Take up what `state_dict` returned, in a memory that is still empty."""
        self.batches.extend(Rollout(**b) for b in state["batches"])
        self.baselines = state["baselines"]


@torch.no_grad()
def refreshed(policy: ActorCritic, rollout: Rollout) -> Rollout:
    """The same completions and rewards as the present policy sees them: its log-probs, entropy and values, and its
    frozen trunk's activations. (log π_b never changes; the exact KL stays that of the policy that sampled.)"""
    rollout = rollout.to(policy.device)
    rollout = replace(rollout, trunk=policy.encode(rollout.input_ids, rollout.attention_mask).get("hidden"))
    new, values = score(policy, rollout)
    return replace(rollout, logprobs=new.logprob, entropy=new.entropy, values=torch.where(rollout.mask, values, 0.0))


def join(*parts: Rollout) -> Rollout:
    """All rows in one batch, in this order: prompts padded on the left, completions on the right."""
    width = max(p.mask.shape[1] for p in parts)
    front = max(p.input_ids.shape[1] - p.mask.shape[1] for p in parts)
    fields = dict(vars(parts[0]))  # a number is the same for all
    for name, first in fields.items():
        if isinstance(first, list):
            fields[name] = list(chain(*(getattr(p, name) for p in parts)))
        elif isinstance(first, Tensor):
            fields[name] = torch.cat([_widened(p, name, front, width) for p in parts])
    return Rollout(**fields)


def _widened(part: Rollout, name: str, front: int, width: int) -> Tensor:
    """One field of a rollout for prompts (less one token) of `front` tokens and completions of `width`."""
    x, length = getattr(part, name), part.mask.shape[1]
    read = name in ("input_ids", "attention_mask", "trunk")  # what begins with the prompt
    left = front + length - part.input_ids.shape[1] if read else 0
    return pad(x, (0, 0) * (x.ndim - 2) + (left, width - length)) if x.ndim > 1 else x
