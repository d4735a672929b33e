"""Preferences and what is learnt from them: samples, pairs labelled with noise, a reward model on a frozen model.

The chain of RLHF: completions of a policy -> pairs (prompt, chosen, rejected) -> a reward model by Bradley and Terry's
likelihood -> a reward callable. Whoever labels is an argument.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from klq_edu.rlhf.identity import fingerprint
from klq_edu.rlhf.reading import Reader

Scorer = Callable[[list[str], list[str]], Sequence[float]]
SIDES = ("chosen", "rejected")
PLAIN = 3  # features of a completion beside its hidden states


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of −log σ(chosen − rejected): the negative log-likelihood of preferences under Bradley and Terry (1952).

    Scores of the same shape, with gradients for both; nothing overflows. ValueError for other shapes or none at all.

    >>> round(bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0])).item(), 4)
    0.3133
    """
    if chosen.shape != rejected.shape or not chosen.numel():
        shapes = f"{list(chosen.shape)} and {list(rejected.shape)}"
        raise ValueError(f"chosen and rejected must be of one shape and not empty, got {shapes}")
    return -logsigmoid(chosen - rejected).mean()


def preference_pairs(
    prompts: list[str], completions: list[list[str]], scores: list[list[float]], *, scale: float, seed: int = 0
) -> Dataset:
    """All pairs of different completions of each prompt as a preference set: prompt, chosen, rejected, margin.

    The first of a pair is preferred with probability σ(scale · (its score − the other's)); `margin` is chosen minus
    rejected by the true scores, negative where the label is wrong.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    for prompt, texts, known in zip(prompts, completions, scores, strict=True):
        for i, j in combinations(range(len(texts)), 2):
            if texts[i] == texts[j]:
                continue
            preferred = torch.tensor(scale * (known[i] - known[j]), dtype=torch.float64).sigmoid().item()
            i, j = (i, j) if torch.rand((), generator=generator).item() < preferred else (j, i)
            rows.append((prompt, texts[i], texts[j], known[i] - known[j]))
    if not rows:
        raise ValueError(f"completions must differ: no pair of different ones in {len(prompts)} prompts")
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected", "margin"), map(list, zip(*rows)))))


class RewardModel(nn.Module):
    """A linear head on what a frozen language model makes of a completion: a reward callable like any other.

    The features are the means over the completion's tokens of the hidden states after the reader's layers, side by
    side, and three plain ones that means do not show: log-probability per token, length and its square. All are
    standardised, the plain ones to √(layers · d), so that a ridge holds them together no more than one hidden feature.
    The head has no bias, since preferences do not say where zero is.
    """

    def __init__(self, reader: Reader):
        super().__init__()
        self.reader = reader
        self.head = nn.Linear(len(reader.layers) * reader.width + PLAIN, 1, bias=False)
        self.register_buffer("mean", torch.zeros(self.head.in_features))
        self.register_buffer("std", torch.ones(self.head.in_features))

    @property
    def identity(self) -> str:
        """What a run on this reward records: head and reader in digits."""
        return f"RewardModel {fingerprint([self.state_dict(), self.reader.identity])}"

    def features(self, prompts: list[str], completions: list[str]) -> Tensor:
        """Standardised features [N, layers · d + 3]."""
        return (self.raw(prompts, completions) - self.mean) / self.std

    def raw(self, prompts: list[str], completions: list[str]) -> Tensor:
        """The same as they are read."""
        logprob, length, means = self.reader(prompts, completions)
        return torch.cat([means, torch.stack([logprob, length, length.square()], dim=1)], dim=1)

    def forward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The scores of these completions."""
        with torch.no_grad():
            return self.head(self.features(prompts, completions)).squeeze(1).tolist()

    def __call__(self, prompts, completions, **columns) -> list[float]:
        """Likewise; further columns of a dataset are not looked at."""
        return self.forward(prompts, completions)

    def fit(self, pairs: Dataset, *, ridge: float, steps: int = 200) -> list[float]:
        """Minimise `bradley_terry_loss` + ridge/2 |w|² over the head by L-BFGS; returns the loss of each evaluation."""
        texts = [self.raw(pairs["prompt"][:], pairs[name][:]) for name in SIDES]
        self.mean, self.std = torch.cat(texts).mean(0), torch.cat(texts).std(0).clamp(min=1e-6)
        self.std[-PLAIN:] /= (len(self.std) - PLAIN) ** 0.5
        chosen, rejected = ((x - self.mean) / self.std for x in texts)
        optimizer, losses = torch.optim.LBFGS(self.head.parameters(), max_iter=steps, line_search_fn="strong_wolfe"), []
        nn.init.zeros_(self.head.weight)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = bradley_terry_loss(self.head(chosen), self.head(rejected))
            losses.append(loss.item())
            (total := loss + ridge / 2 * self.head.weight.square().sum()).backward()
            return total

        optimizer.step(closure)
        return losses


def margins(reward: Scorer, pairs: Dataset) -> list[float]:
    """The reward of the chosen completion minus that of the rejected one, of each pair: above 0 they agree, and the
    odds that the label says so are exp(margin) if the reward is calibrated."""
    chosen, rejected = (reward(pairs["prompt"][:], pairs[side][:]) for side in SIDES)
    return [x - y for x, y in zip(chosen, rejected, strict=True)]
