"""Reading given texts with a frozen language model: how probable each completion is, and what its layers make of it."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from klq_edu.rlhf.identity import code_of, fingerprint
from klq_edu.rlhf.policy import context
from klq_edu.rlhf.rollout import padded, tokenise
from klq_edu.rlhf.sampling import positions
from klq_kernels import linear_token_stats


class Reading(NamedTuple):
    """What a model made of N completions."""

    logprob: Tensor  # [N] mean log-probability per token, in nats
    length: Tensor  # [N] tokens
    means: Tensor  # [N, layers · d] hidden states after the reader's layers, means over the completion's tokens


class Reader:
    """A frozen language model that reads completions after prompts; it never sees an end of text.

    Args:
        lm: a Hugging Face causal LM with a linear head; its parameters are frozen here.
        tokenizer: its tokenizer.
        dtype: of forward passes (autocast).
        batch_size: completions at a time, those of one prompt together, which is read once.
        layers: those after which hidden states are wanted; 0 is the embedding.
        progress: shows how far it is: gets the list of batches and yields them one by one.
    """

    def __init__(
        self, lm: PreTrainedModel, tokenizer, *, dtype: torch.dtype = torch.float32, batch_size: int = 32,
        layers: Sequence[int] = (), progress: Callable[[list], Iterable] = iter,
    ):  # fmt: skip
        self.layers, self.progress = tuple(layers), progress
        self.lm, self.tokenizer = lm.eval().requires_grad_(False), tokenizer
        self.known: dict[tuple, tuple[Tensor, ...]] | None = None  # (prompt, completion) -> its row of a Reading
        self.latest: tuple[list, Reading] | None = None  # what was asked last, since the next may want to know the same
        self.dtype, self.batch_size, self.width = dtype, batch_size, lm.get_output_embeddings().in_features

    @cached_property
    def identity(self) -> str:
        """The model and how it reads in digits, wherever it was loaded from."""
        return f"{type(self.lm).__name__} {fingerprint([code_of(Reader), self.layers, self.lm.state_dict()])}"

    @contextmanager
    def remembering(self):
        """Within this context nothing is read twice. Elsewhere a text is read on every call but one that repeats the
        last: what it is read beside decides about its last digits, and they may not depend on what was read before."""
        self.known = {}
        try:
            yield
        finally:
            self.known = self.latest = None  # it was read beside what was still unknown

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> Reading:
        """Read them all, each once. An empty completion is read as an end of text: there is nothing else to read.
        ValueError for a prompt without tokens, and for more than the model's context."""
        keys = list(zip(prompts, completions, strict=True))
        if self.latest and self.latest[0] == keys:
            return self.latest[1]
        known = {} if self.known is None else self.known
        new = [key for key in dict.fromkeys(keys) if key not in known]
        front = tokenise(self.tokenizer, [prompt for prompt, _ in new]) if new else []
        back = self.tokenizer([text for _, text in new], add_special_tokens=False)["input_ids"] if new else []
        back = [row or [self.tokenizer.eos_token_id] for row in back]
        for (prompt, text), f, b in zip(new, front, back, strict=True):
            if not f or len(f) + len(b) > context(self.lm):
                rule = f"prompts need tokens, and at most {context(self.lm)} with their completion"
                raise ValueError(f"{rule}, got {prompt!r:.60} with {text!r:.60}")
        order = sorted(range(len(new)), key=lambda i: (len(front[i]), front[i], len(back[i])))
        for part in self.progress([order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]):
            found = self._read([front[i] for i in part], [back[i] for i in part])
            known |= {new[i]: row for i, row in zip(part, zip(*found), strict=True)}
        self.latest = keys, Reading(*map(torch.stack, zip(*(known[key] for key in keys), strict=True)))
        return self.latest[1]

    def _read(self, front: list[list[int]], back: list[list[int]]) -> Reading:
        """One batch: the different prompts, padded on the left, then the completions, padded on the right."""
        once, place = list(dict.fromkeys(map(tuple, front))), self.lm.device
        which = torch.tensor([once.index(tuple(f)) for f in front], device=place)
        prompts, known = padded(once, "left", place)
        tokens, spoken = padded(back, "right", place)
        with torch.autocast(place.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            told = self.lm.base_model(input_ids=prompts, attention_mask=known, position_ids=positions(known),
                                      use_cache=True)  # fmt: skip
            told.past_key_values.batch_select_indices(which)
            seen = torch.cat([known[which], spoken], dim=1)
            out = self.lm.base_model(
                input_ids=tokens, attention_mask=seen, position_ids=positions(seen)[:, -tokens.shape[1] :],
                past_key_values=told.past_key_values, output_hidden_states=bool(self.layers),
            )  # fmt: skip
        head = self.lm.get_output_embeddings()
        hidden = torch.cat([told.last_hidden_state[which, -1:], out.last_hidden_state[:, :-1]], dim=1)
        stats = linear_token_stats(
            hidden.to(head.weight.dtype), head.weight, tokens, bias=head.bias, mask=spoken.bool()
        )  # fmt: skip
        counts = spoken.sum(1, keepdim=True)
        means = [(out.hidden_states[k].float() * spoken.unsqueeze(2)).sum(1) / counts for k in self.layers]
        means = torch.cat(means, dim=1) if means else counts.new_zeros((len(front), 0))
        length = counts.squeeze(1)
        return Reading((stats.logprob.sum(1) / length).cpu(), length.float().cpu(), means.cpu())
