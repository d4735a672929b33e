"""A reward is a callable f(prompts, completions, **columns) -> list of floats, one per completion (TRL's contract).

One that names a parameter `completion_ids` is given the sampled token ids, a list of ints per completion without
padding, EOS included (as in TRL); one that names `ended`, whether each completion ended (True) or was cut off.
"""

import inspect
from collections.abc import Callable, Mapping, Set

import torch
from transformers import PreTrainedModel

from klq_edu.rlhf.identity import fingerprint
from klq_edu.rlhf.rollout import Rollout

Reward = Callable[..., list[float]]


def score(reward: Reward, rollout: Rollout, /, **columns: list) -> torch.Tensor:
    """The scores [B] that `reward` gives to the rollout's texts; `rollout.rewarded(scores)` takes them up.

    `columns` are the dataset's further columns for these prompts. Raises TypeError or ValueError where the reward
    returns no list, the wrong number of scores or one that is no number finite in float32 (Python's, NumPy's, or a
    0-dimensional tensor), and RuntimeError, from the original error, where the callable itself raises.
    """
    name = getattr(reward, "__name__", type(reward).__name__)
    columns = _asked_for(reward, rollout) | columns
    try:
        scores = reward(prompts=rollout.prompts, completions=rollout.completions, **columns)
    except Exception as error:
        call = f"f(prompts=[…], completions=[…], **columns) with columns {sorted(columns)}"
        raise RuntimeError(f"the reward {name} raised {type(error).__name__}: {error}. Its call: {call}") from error
    if not hasattr(scores, "__iter__") or isinstance(scores, (str, bytes, Mapping, Set)):
        raise TypeError(f"the reward {name} must return a list of numbers, got {type(scores).__name__}")
    scores = list(scores)
    if len(scores) != len(rollout):
        raise ValueError(f"the reward {name} must return one score per completion, {len(rollout)}, got {len(scores)}")
    for completion, s in zip(rollout.completions, scores, strict=True):
        number = isinstance(s, (int, float)) or (getattr(s, "ndim", None) == 0 and not isinstance(s, str))
        if not (number and abs(float(s)) < torch.finfo(torch.float32).max):
            raise ValueError(f"the reward {name} must return finite numbers, got {s!r} for completion {completion!r}")
    return rollout.logprobs.new_tensor([float(s) for s in scores])


def _asked_for(reward: Reward, rollout: Rollout) -> dict[str, list]:
    """What the reward's signature names of `completion_ids` and `ended`; a ** alone gets the dataset's columns only."""
    try:
        names = inspect.signature(reward.forward if isinstance(reward, torch.nn.Module) else reward).parameters
    except (TypeError, ValueError):  # some builtins have none
        return {}
    facts = {"completion_ids": [row[keep].tolist() for row, keep in zip(rollout.tokens, rollout.mask, strict=True)]}
    facts |= {"ended": rollout.ended.tolist()} if rollout.ended is not None else {}
    return {name: facts[name] for name in facts if name in names}


class ClassifierReward:
    """A sequence-classification checkpoint with its own tokenizer as a reward: its first logit for prompt + completion.

    `template(prompt, completion)` makes the text it was trained on; plain concatenation by default. What is longer than
    the model reads is cut off in front, so that the completion stays. No end of text is appended;
    `missing_eos_penalty` is subtracted where the length limit cut a completion off.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer, *, template: Callable[[str, str], str] = str.__add__,
        missing_eos_penalty: float = 0.0, batch_size: int = 16,
    ):  # fmt: skip
        self.missing_eos_penalty = missing_eos_penalty
        self.model, self.tokenizer, self.template, self.batch_size = model.eval(), tokenizer, template, batch_size
        tokenizer.truncation_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id

    @property
    def identity(self) -> str:
        """What a run on this reward records: the model, how it is asked and what is subtracted, in digits."""
        parts = [self.model.state_dict(), self.template, self.missing_eos_penalty, self.tokenizer]
        return f"{type(self.model).__name__} {fingerprint(parts)}"

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str], ended=None, **columns) -> list[float]:
        """The scores of these completions; further columns of a dataset are not looked at."""
        texts, scores = list(map(self.template, prompts, completions)), []
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 10**6))
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(texts[start : start + self.batch_size], padding=True, truncation=True,
                                   max_length=limit, return_tensors="pt")  # fmt: skip
            scores += self.model(**batch.to(self.model.device)).logits[:, 0].float().tolist()
        cut = [not e for e in ended] if ended else [False] * len(scores)
        return [s - self.missing_eos_penalty * c for s, c in zip(scores, cut, strict=True)]
