"""The grammar world behind a proxy: the reward that is trained on agrees with the true one only to r = 0.86.

A learnt reward model is such a proxy. Here the truth is known, so the judge of completions is the true reward itself,
and win-rates between policies are exact, by enumeration.
"""

from dataclasses import replace

from klq_edu.worlds import grammar
from klq_edu.worlds.world import World


def load() -> World:
    """The grammar world with other tastes added to its rewards, and the rewards without them as the judge."""
    return replace(grammar.load(proxy=True), name="grammar_proxy", description=__doc__)
