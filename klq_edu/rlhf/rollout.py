"""Prompts -> Rollout: sampled completions with everything the losses need, in the shapes of the contract.

Completions are sampled from exactly the distribution whose log-probabilities are stored: one temperature, no top-k, no
top-p, no penalties. At the borders of a text the model's own `generate` is followed:

- A prompt gets the special tokens that its tokenizer puts before a text (BOS), unless it begins with them, as a
  formatted chat does; those put behind a text (EOS) are left out.
- A completion ends with any of `generation_config.eos_token_id`, else the config's, else the tokenizer's.
- Ids beyond the tokenizer, where the model's vocabulary is padded, can be sampled. They decode to nothing and are
  counted in the metrics.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic, context
from klq_edu.rlhf.sampling import sample
from klq_kernels.checks import right_padded

PROVIDED = ("prompts", "completions", "completion_ids", "ended")  # what a reward is given beside the dataset's columns


class Constraint(Protocol):
    """Which tokens may follow: policy and reference logits become −inf elsewhere (a grammar, say)."""

    def start(self, prompts: list[str]) -> Tensor:
        """State per prompt, [B]."""

    def allowed(self, state: Tensor) -> Tensor:
        """Boolean [B, A]: the tokens that may be chosen in these states."""

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """States after the chosen tokens, [B]."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """A batch of B completions of up to T tokens, never changed. Index t holds action a_t, V(s_t) and r_{t+1}.
    Raises ValueError for an empty row or a mask with holes."""

    prompts: list[str]
    completions: list[str]
    tokens: Tensor  # [B, T] vocabulary ids; anything where masked
    mask: Tensor  # [B, T] boolean, True up to and including EOS (or to the length limit)
    # [B, T] float32 under the policy that sampled, recomputed by the training forward:
    logprobs: Tensor  # log π(a_t|s_t)
    ref_logprobs: Tensor  # log π_b(a_t|s_t)
    values: Tensor  # V(s_t)
    entropy: Tensor  # H(π)
    kl: Tensor  # exact D(π ‖ π_b)
    rewards: Tensor  # [B, T] the score on the last real token, 0 elsewhere; zeros until `rewarded`
    input_ids: Tensor  # [B, L] what a model reads: left-padded prompts, completions without the last token
    attention_mask: Tensor  # [B, L]
    trunk: Tensor | None = None  # [B, L, d] the frozen blocks' activations there; None where all blocks are trained
    allowed: Tensor | None = None  # [B, T, A] tokens that could have been chosen
    temperature: float = 1.0  # what divided the logits
    ended: Tensor | None = None  # [B] boolean, True where EOS was sampled, False where the length limit cut it off
    unknown: Tensor | None = None  # [B, T] boolean, True on real tokens that the tokenizer does not have
    behaviour: Tensor | None = None  # [B, T] log-probs at sampling; in replay `logprobs` are a newer policy's

    def __post_init__(self):
        right_padded(self.mask)
        if len(empty := (~self.mask.any(dim=1)).nonzero()):
            raise ValueError(f"mask: row {empty[0].item()} is empty; every completion needs at least one real token")

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, index: Tensor) -> "Rollout":
        """The sub-batch with these rows."""
        texts = {name: [x[i] for i in index.tolist()] for name, x in vars(self).items() if isinstance(x, list)}
        return replace(self, **texts, **self._tensors(lambda x: x[index]))

    def to(self, device: torch.device | str) -> "Rollout":
        """The same with its tensors on this device."""
        return replace(self, **self._tensors(lambda x: x.to(device)))

    def _tensors(self, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        return {name: change(x) for name, x in vars(self).items() if isinstance(x, Tensor)}

    def rewarded(self, scores: Tensor) -> "Rollout":
        """The same with each completion's score [B] on its last real token."""
        last = self.mask.sum(1, keepdim=True) - 1
        return replace(self, rewards=scores.new_zeros(self.mask.shape).scatter(1, last, scores.unsqueeze(1)))


@torch.no_grad()
def collect(
    policy: ActorCritic, tokenizer, prompts: list[str], *, max_new_tokens: int, temperature: float = 1.0,
    constraint: Constraint | None = None, generator: torch.Generator | None = None,
) -> Rollout:  # fmt: skip
    """Sample one completion per prompt and compute its statistics; rewards are left at zero. Raises ValueError for
    prompts that can't be used (see `check_prompts`), FloatingPointError for probabilities that are NaN."""
    prompt_ids, attention = encode_prompts(tokenizer, prompts, policy, max_new_tokens)
    eos = torch.tensor(stop_ids(policy, tokenizer), dtype=torch.long, device=policy.device)
    state = None if constraint is None else constraint.start(prompts)
    tokens, mask, allowed, trunk = sample(
        policy, prompt_ids, attention, eos, constraint, state, max_new_tokens, temperature, generator
    )
    known = torch.isin(tokens, _known_ids(tokenizer, len(tokenizer)).to(policy.device))
    texts = [tokenizer.decode(row[keep].tolist(), skip_special_tokens=True) for row, keep in zip(tokens, mask & known)]
    zeros = torch.zeros(mask.shape, device=policy.device)
    sampled = Rollout(
        list(prompts), texts, tokens, mask, zeros, zeros, zeros, zeros, zeros, zeros,
        input_ids=torch.cat([prompt_ids, tokens], dim=1)[:, :-1],  # the last token is predicted, never read
        attention_mask=torch.cat([attention, torch.ones_like(tokens)], dim=1)[:, :-1],
        trunk=trunk, allowed=allowed, temperature=temperature,
        ended=torch.isin(tokens, eos).any(1),  # masked tokens follow one in any case
        unknown=mask & ~known,
    )  # fmt: skip
    stats, values = score(policy, sampled, reference=True)
    logs = {"logprobs": stats.logprob, "ref_logprobs": stats.ref_logprob, "kl": stats.kl, "entropy": stats.entropy}
    return replace(sampled, **logs, behaviour=stats.logprob, values=torch.where(mask, values, 0.0))


@torch.no_grad()
def transcribe(policy: ActorCritic, tokenizer, prompts: list[str], completions: list[str]) -> Rollout:
    """Given completions as a Rollout, as if the policy had sampled them and then ended: tokens, mask and the frozen
    trunk's activations; all statistics are left at zero. ValueError where a token is not the policy's to choose."""
    eos = stop_ids(policy, tokenizer)[:1]
    rows = [row + eos for row in tokenizer(list(completions), add_special_tokens=False)["input_ids"]]
    tokens, mask = (pad_sequence(list(map(torch.tensor, x)), True) for x in (rows, [[True] * len(r) for r in rows]))
    tokens, mask = tokens.to(policy.device), mask.to(policy.device)
    if (unknown := mask & (policy.action_ids(tokens) < 0)).any():
        row, token = (x[0].item() for x in (unknown.nonzero()[:, 0], tokens[unknown]))
        raise ValueError(f"completions[{row}] has the token {tokenizer.decode([token])!r}, which `vocab` leaves out")
    prompt_ids, attention = encode_prompts(tokenizer, prompts, policy, mask.shape[1])
    seen = (prompt_ids, tokens), (attention, torch.ones_like(tokens))
    ids, attention = (torch.cat(x, dim=1)[:, :-1] for x in seen)
    trunk = policy.encode(ids, attention).get("hidden")  # what a model without a frozen trunk reads has none
    zeros = torch.zeros(mask.shape, device=policy.device)
    return Rollout(list(prompts), list(completions), tokens, mask, *[zeros] * 6, ids, attention, trunk)


@lru_cache(maxsize=2)
def _known_ids(tokenizer, size: int) -> Tensor:
    """All ids of a tokenizer of this size; listing a large vocabulary takes a tenth of a second."""
    return torch.tensor(sorted(tokenizer.get_vocab().values()))


def encode_prompts(tokenizer, prompts: list[str], policy: ActorCritic, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Left-padded prompt ids and attention mask, both [B, P], on the policy's device."""
    check_prompts(tokenizer, prompts, policy, max_new_tokens)
    return padded(tokenise(tokenizer, prompts), "left", policy.device)


def padded(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [N, L] of rows of different lengths; padding is a 0, since masked in any case."""
    rows = [torch.tensor(row) for row in rows]
    ids, mask = (pad_sequence(x, True, padding_side=side) for x in (rows, [torch.ones_like(r) for r in rows]))
    return ids.to(device), mask.to(device)


def check_prompts(tokenizer, prompts: Sequence[str], policy: ActorCritic, max_new_tokens: int) -> None:
    """Raise one ValueError that counts prompts which are no text, have no tokens or do not fit the model's context with
    their completion, shows the first of each kind and says how to filter."""
    if not len(prompts):
        raise ValueError("prompts must not be empty: got a list of 0 prompts")
    room, found = context(policy.lm) - max_new_tokens, {}
    known, foreign = policy.lm.get_input_embeddings().num_embeddings, "with tokens that the model does not have"
    long = f"of more than {room} tokens, the context of {context(policy.lm)} less max_new_tokens={max_new_tokens}"
    for start in range(0, len(prompts), 1000):  # so that the ids of a large dataset are not held at once
        part = prompts[start : start + 1000]
        rows = tokenise(tokenizer, [p if isinstance(p, str) else "" for p in part])
        for i, (prompt, row) in enumerate(zip(part, rows, strict=True), start):
            kind = "no text" if not isinstance(prompt, str) else "without tokens" if not row else long
            kind = foreign if max(row, default=0) >= known else kind
            if kind is not long or len(row) > room:
                found.setdefault(kind, []).append(i)
    if found:
        kinds = [f"{len(at)} {kind} (first: prompts[{at[0]}] = {prompts[at[0]]!r:.60})" for kind, at in found.items()]
        limit = f" <= {room - len(tokenise(tokenizer, [''])[0])}" if room < torch.inf else ""
        ids = "tokenizer(row['prompt'], add_special_tokens=False)['input_ids']"
        limit += f" and max({ids}) < {known}" if foreign in found else ""
        rule = f"isinstance(row['prompt'], str) and 0 < len({ids}){limit}"
        raise ValueError(f"prompts: {', '.join(kinds)}. Keep the others: prompts.filter(lambda row: {rule})")


def tokenise(tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Token ids of each prompt, after what the tokenizer puts before a text unless the prompt begins with that."""
    rows = tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)  # a prompt that is a BOS would be found in front of itself
    text = next((p for p, row in zip(prompts, rows, strict=True) if row and special.isdisjoint(row)), "a")
    bare, whole = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer(text)["input_ids"]
    front = whole[: next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)]
    return [row if row[: len(front)] == front else front + row for row in rows]


def stop_ids(policy: ActorCritic, tokenizer) -> list[int]:
    """The ids that end a completion: from the first source that names any which the policy can choose."""
    lm, possible = policy.lm, range(policy.head.out_features) if policy.vocab is None else set(policy.vocab.tolist())
    for source in (getattr(lm, "generation_config", None), lm.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if found := [i for i in (ids if isinstance(ids, list | tuple) else [ids]) if i in possible]:
            return found
    return []
