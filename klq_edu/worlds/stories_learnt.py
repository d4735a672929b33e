"""The stories world with a learnt reward: the lexicon labels pairs of the model's own continuations, with noise, a
reward model learns from the pairs, and RL maximises what it says. The lexicon and TextBlob look on.
"""

from dataclasses import replace

from klq_edu.worlds import stories
from klq_edu.worlds.road import load_task
from klq_edu.worlds.world import World


def load(remake: str | None = None) -> World:
    """The stories world behind a reward model; the first call takes the road up to it."""
    return load_task(replace(stories.TASK, name="stories_learnt", description=__doc__), remake)
