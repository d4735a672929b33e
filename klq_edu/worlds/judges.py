"""Judges of texts that work offline: pointwise scores f(prompts, completions, reference), better is higher.

MiniLM never labels anything that is trained on, so it is the independent one. How biased each of them is, for length or
copying, `gold.hacks` shows.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel, AutoTokenizer

from klq_edu.rlhf.identity import code_of, fingerprint
from klq_edu.rlhf.reading import Reader


class EmbeddingJudge:
    """Cosine between the sentence embeddings of completion and reference: do they mean the same?

    `folder` holds a model whose sentence embedding is the mean of its last hidden states, all-MiniLM-L6-v2 for one.
    """

    def __init__(self, folder: str | Path, batch_size: int = 64):
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
        self.batch_size = batch_size
        self.identity = f"EmbeddingJudge {fingerprint([code_of(EmbeddingJudge), self.model.state_dict()])}"

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [N, d]."""
        found = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(texts[start : start + self.batch_size], padding=True, truncation=True,
                                   return_tensors="pt")  # fmt: skip
            hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(2)
            found.append(normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
        return torch.cat(found)

    def __call__(self, prompts, completions, reference: Sequence[str], **_) -> list[float]:
        """Cosines in [−1, 1]."""
        return (self.embed(completions) * self.embed(reference)).sum(1).tolist()


class ReferenceJudge:
    """How probable a frozen language model finds the reference after the completion, in nats per token: what does the
    completion tell of it?"""

    def __init__(self, reader: Reader):
        self.reader, self.identity = reader, f"ReferenceJudge {fingerprint([code_of(ReferenceJudge), reader.identity])}"

    def __call__(self, prompts, completions, reference: Sequence[str], **_) -> list[float]:
        """Mean log p(reference | completion) per token."""
        told = [f"{c.strip()}\nIn other words:" for c in completions]
        return self.reader(told, [f" {r}" for r in reference]).logprob.tolist()
