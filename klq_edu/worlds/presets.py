"""The settings each world's demo uses, for every algorithm alike but for what defines the algorithm.

Standard library only, so that `--help` is instant.
"""

from dataclasses import replace

from klq_edu.rlhf.config import TrainConfig

VARIANTS = {
    "klq": {},
    "ppo_clip": {"algorithm": "ppo_clip"},
    "ppo_clip_whitened": {"algorithm": "ppo_clip", "whiten": True},
    "ppo_penalty": {"algorithm": "ppo_penalty"},
}
WORLDS = {
    "grammar": TrainConfig(max_new_tokens=5, critic="separate"),
    "stories": TrainConfig(
        updates=24, batch_size=32, epochs=2, learning_rate=2e-4, warmup_updates=3, tau=0.05, max_new_tokens=20,
        temperature=0.8,
    ),
}  # fmt: skip
DEMO = {"grammar": ("klq", "ppo_clip", "ppo_penalty"), "stories": ("klq", "ppo_clip")}
QUICK_UPDATES = {"grammar": 30, "stories": 10}


def preset(world: str, variant: str = "klq", **changes) -> TrainConfig:
    """The demo's settings for an algorithm variant in a world, with changes.

    >>> preset("grammar", "ppo_clip_whitened", tau=1.0).whiten
    True
    """
    for name, value, known in (("world", world, WORLDS), ("variant", variant, VARIANTS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {tuple(known)}, got {value!r}")
    return replace(WORLDS[world], **(VARIANTS[variant] | changes))


def variant_of(settings: dict) -> str:
    """The name of the variant that these settings belong to: the inverse of `preset`."""
    return settings["algorithm"] + ("_whitened" if settings["whiten"] else "")
