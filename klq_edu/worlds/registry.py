"""The worlds by name: what is known of them before they are loaded. All that lists worlds, `--help` included, reads it.

A new world is one file, klq_edu/worlds/<name>.py with a function `load() -> World` or, for a road, a `TASK`, and
one entry in WORLDS. Standard library only, so that `--help` is instant.
"""

from dataclasses import replace
from typing import NamedTuple

from klq_edu.rlhf.config import TrainConfig

VARIANTS = {
    "klq": {},
    "ppo_clip": {"algorithm": "ppo_clip"},
    "ppo_clip_whitened": {"algorithm": "ppo_clip", "whiten": True},
    "ppo_penalty": {"algorithm": "ppo_penalty"},
}


class Entry(NamedTuple):
    """A world's line for --help, and what its demo does."""

    about: str  # what it is, in a few words
    settings: TrainConfig  # of a run, for every algorithm alike but for what defines the algorithm
    demo: tuple[str, ...]  # the variants that its demo compares
    quick_updates: int  # per run of `klq demo --quick`
    made: tuple[str, ...] = ()  # the stages before RL, whose artefacts are in the cache


GRAMMAR = TrainConfig(
    updates=160, batch_size=32, replay=96, tau_start=0.5, eval_every=10, max_new_tokens=4, critic="separate"
)
ROAD = ("sft", "pairs", "reward")
TEXT = TrainConfig(
    updates=24, batch_size=32, samples_per_prompt=4, replay=32, centre="prompt", epochs=2, learning_rate=2e-4,
    warmup_updates=2, tau=0.1, tau_start=0.3, temperature=0.7, dtype="auto", eval_every=12,
)  # fmt: skip
WORLDS = {
    "stories": Entry(
        "SmolLM2-135M continues stories, rewarded by a learnt model of a lexicon's taste",
        replace(TEXT, max_new_tokens=20, temperature=0.8, samples_per_prompt=2, learning_rate=4e-4, eval_every=8),
        demo=("klq", "ppo_clip"), quick_updates=8, made=ROAD[1:],
    ),
    "stories_lexicon": Entry(
        "the same, rewarded by the lexicon itself",
        TrainConfig(updates=24, batch_size=32, epochs=2, learning_rate=2e-4, warmup_updates=3, tau=0.05,
                    max_new_tokens=20, temperature=0.8),
        demo=("klq", "ppo_clip"), quick_updates=10,
    ),
    "tldr": Entry(
        "SmolLM2-135M sums up posts, rewarded by a learnt model", replace(TEXT, max_new_tokens=24),
        demo=("klq", "ppo_clip"), quick_updates=8, made=ROAD,
    ),
    "dialogue": Entry(
        "SmolLM2-135M answers requests, rewarded by a learnt model", replace(TEXT, max_new_tokens=64),
        demo=("klq", "ppo_clip"), quick_updates=8, made=ROAD,
    ),
    "grammar": Entry(
        "a tiny language model whose exact optimum is known", GRAMMAR, demo=("klq", "ppo_clip", "ppo_penalty"),
        quick_updates=40,
    ),
    "grammar_proxy": Entry(
        "the same behind an imperfect proxy that the truth judges; the proxy's exact optimum is known", GRAMMAR,
        demo=("klq", "ppo_clip"), quick_updates=40,
    ),
}  # fmt: skip


def named(what: str, name: str, known: dict):
    """What `known` holds under this name; ValueError that lists the names, if it is none of them."""
    if name not in known:
        raise ValueError(f"{what} must be one of {tuple(known)}, got {name!r}")
    return known[name]


def preset(world: str, variant: str = "klq", **changes) -> TrainConfig:
    """The demo's settings for an algorithm variant in a world, with changes.

    >>> preset("grammar", "ppo_clip_whitened", tau=1.0).whiten
    True
    """
    return replace(named("world", world, WORLDS).settings, **(named("variant", variant, VARIANTS) | changes))


def variant_of(settings: dict) -> str:
    """The name of the variant that these settings belong to: the inverse of `preset`."""
    return settings["algorithm"] + ("_whitened" if settings["whiten"] else "")
