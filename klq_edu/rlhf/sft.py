"""Supervised fine-tuning: the log-likelihood of reference completions, EOS included, given their prompts.

The same policy object, the same frozen trunk and the same fused log-probabilities as in RL; the trunk's activations are
computed once, since only the blocks above it change.
"""

from collections.abc import Callable

import torch
from datasets import Dataset

from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.optim import clip_gradients
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import Rollout, transcribe
from klq_kernels.reference import masked_mean


def finetune(
    policy: ActorCritic, tokenizer, examples: Dataset, held_out: Dataset, *, epochs: int = 2, batch_size: int = 16,
    learning_rate: float = 3e-4, max_grad_norm: float = 1.0, seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, float]]:  # fmt: skip
    """Train `policy` in place on examples with columns "prompt" and "completion".

    Minimises the mean of −log π(a_t | s_t) over the completions' tokens (prompts count nothing) by Adam, its step size
    falling linearly to zero. Batches hold examples of similar length and come in a new order each epoch. Returns a row
    before training and one per epoch: "epoch", "loss" (of the epoch's steps) and "held_out" loss, in nats per token.
    """
    batches, unseen = (_batches(policy, tokenizer, data, batch_size) for data in (examples, held_out))
    optimizer, total = torch.optim.Adam(policy.trainable().values(), lr=learning_rate), epochs * len(batches)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    generator, rows = torch.Generator().manual_seed(seed), [{"epoch": 0, "held_out": mean_loss(policy, unseen)}]
    for epoch in range(epochs):
        losses = []
        for i in torch.randperm(len(batches), generator=generator).tolist():
            loss = _loss(policy, batches[i])
            optimizer.zero_grad()
            loss.backward()
            clip_gradients(policy, max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            on_step(epoch * len(batches) + len(losses), total)
        held_out_loss = mean_loss(policy, unseen)
        rows.append({"epoch": epoch + 1, "loss": sum(losses) / len(losses), "held_out": held_out_loss})
    return rows


@torch.no_grad()
def mean_loss(policy: ActorCritic, batches: list[Rollout]) -> float:
    """Mean of −log π over all tokens of these batches."""
    counts = [batch.mask.sum().item() for batch in batches]
    return sum(_loss(policy, batch).item() * n for batch, n in zip(batches, counts)) / sum(counts)


def _loss(policy: ActorCritic, batch: Rollout) -> torch.Tensor:
    stats, _ = score(policy, batch)
    return -masked_mean(stats.logprob, batch.mask)


def _batches(policy: ActorCritic, tokenizer, data: Dataset, batch_size: int) -> list[Rollout]:
    """The examples in batches of similar length; ValueError where a column is missing or no row is there."""
    if missing := {"prompt", "completion"} - set(data.column_names):
        raise ValueError(f"examples need the columns prompt and completion, {', '.join(sorted(missing))} is missing")
    if not len(data):
        raise ValueError("examples must not be empty: got 0 rows")
    order = sorted(range(len(data)), key=lambda i: len(data[i]["prompt"]) + len(data[i]["completion"]))
    parts = (data[order[k : k + batch_size]] for k in range(0, len(order), batch_size))
    return [transcribe(policy, tokenizer, part["prompt"], part["completion"]) for part in parts]
