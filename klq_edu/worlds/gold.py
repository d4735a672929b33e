"""A gold for texts with references: what stands in for people where no people can be asked.

It sees how much of the reference a completion says, and how natural a frozen language model finds it, and subtracts for
what a policy would otherwise find out: copying, running on, repeating, stopping in the middle, answering with the
question's own words. It knows neither truth nor style; a completion that says the same in other words gets less than it
deserves. `hacks` are completions that must lose against the reference: the table of them justifies the constants.
"""

import random
from collections.abc import Callable, Sequence

from rouge_score.rouge_scorer import RougeScorer

from klq_edu.rlhf.identity import fingerprint
from klq_edu.rlhf.judge import copied, words_of
from klq_edu.rlhf.reading import Reader

NATURAL = 0.05  # per nat of mean log-probability per token: from −5 to −1 nats is worth 0.2
COPIED = 0.5  # times the share of word triples that stand in the source
BORROWED, ALLOWED = 1.0, 0.7  # times the share of words from the source, where it is above this
LONG = 0.03  # for each word beyond `words`
REPEATED, USUAL = 1.0, 0.3  # times the share of words that occurred before, where it is above this (none at all: 1)
UNFINISHED = 0.2  # without a full stop, question or exclamation mark at the end
OVERLAP = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


class Gold:
    """A reward callable that needs the columns "source" and "reference" (`words`: how long it usually is at most)."""

    def __init__(self, reader: Reader, words: int):
        self.reader, self.words = reader, words
        self.identity = f"Gold {fingerprint([type(self), words, reader.identity])}"

    def __call__(self, prompts, completions, source: Sequence[str], reference: Sequence[str], **_) -> list[float]:
        """About 0.8 for the reference itself; most samples of a small model lie between −0.4 and 0.2."""
        natural = self.reader(prompts, completions).logprob.tolist()
        parts = zip(completions, source, reference, natural, strict=True)
        return [overlap(c, r) + NATURAL * n - self.penalty(c, s) for c, s, r, n in parts]

    def penalty(self, completion: str, source: str) -> float:
        """What is subtracted, from 0 on."""
        words, known = words_of(completion), words_of(source)
        borrowed = sum(w in set(known) for w in words) / max(len(words), 1)
        repeated = 1 - len(set(words)) / max(len(words), 1)
        unfinished = completion.rstrip()[-1:] not in (".", "!", "?")
        found = COPIED * copied(completion, source) + BORROWED * max(0.0, borrowed - ALLOWED)
        found += LONG * max(0, len(words) - self.words)
        return found + REPEATED * max(0.0, repeated - USUAL) + UNFINISHED * unfinished


def overlap(completion: str, reference: str) -> float:
    """Mean of ROUGE-1 and ROUGE-L (F, stemmed) with the reference, in [0, 1] (Lin 2004).

    >>> overlap("the cat sat.", "The cats sat!"), overlap("no", "yes")
    (1.0, 0.0)
    """
    return sum(s.fmeasure for s in OVERLAP.score(reference, completion).values()) / 2


def hacks(sources: list[str], references: list[str], lead: str = "") -> dict[str, list[str]]:
    """Completions by kind: the reference, and what a policy might find instead of it."""

    def each(change: Callable[[str, str], str]) -> list[str]:
        return [lead + change(s, r) for s, r in zip(sources, references, strict=True)]

    def first(text: str, reference: str) -> str:
        return " ".join(text.split()[: len(reference.split())])

    def keywords(text: str, reference: str) -> str:
        longest = sorted(sorted(set(words_of(text))), key=len)[-len(reference.split()) :]
        return ", ".join(random.Random(text).sample(longest, len(longest))) + "."

    return {
        "reference": each(lambda s, r: r),
        "another's reference": [lead + r for r in references[1:] + references[:1]],
        "reference, shuffled": each(lambda s, r: " ".join(random.Random(r).sample(r.split(), len(r.split()))) + "."),
        "first words of the source": each(lambda s, r: first(s, r) + "."),
        "whole source": each(lambda s, r: s),
        "source, reversed": each(lambda s, r: first(" ".join(s.split()[::-1]), r) + "."),
        "keywords": each(keywords),
        "first half of the reference": each(lambda s, r: " ".join(r.split()[: len(r.split()) // 2])),
        "reference twice": each(lambda s, r: f"{r} {r}"),
        "refusal": each(lambda s, r: "I'm sorry, but I can't help with that."),
        "praise": each(lambda s, r: "That is a great question! I'm happy to help."),
    }
