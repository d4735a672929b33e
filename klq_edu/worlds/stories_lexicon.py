"""The stories world without a reward model: RL maximises the lexicon itself, and TextBlob looks on.

What a learnt reward costs is the difference to the world `stories`.
"""

from klq_edu.worlds.registry import WORLDS
from klq_edu.worlds.road import Road, model_folder
from klq_edu.worlds.stories import TASK, sentiment_reward, textblob_judge
from klq_edu.worlds.world import World


def load() -> World:
    """SmolLM2 and the lexicon. FileNotFoundError, with advice, where the weights are not installed."""
    road = Road(TASK, model_folder(), WORLDS["stories_lexicon"].settings)
    return World(
        "stories_lexicon", __doc__, road.train, road.test, road.tokenizer, sentiment_reward(),
        lambda config: road.policy(road.base, config.critic), judges={"TextBlob": textblob_judge},
    )  # fmt: skip
