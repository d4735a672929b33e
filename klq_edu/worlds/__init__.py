"""What there is to train on. `registry` lists the worlds; `load(name)` imports one with all that it needs."""

from importlib import import_module

from klq_edu.worlds.registry import WORLDS, named


def load(name: str):
    """The World of this name. ValueError if the registry does not know it, or says that it is exact and it is not."""
    from transformers.utils import logging

    entry = named("world", name, WORLDS)
    logging.disable_progress_bar()  # models load in a second, and bars of our own are on the screen
    world = import_module(f"klq_edu.worlds.{name}").load()
    if world.exact != entry.exact:
        raise ValueError(f"the registry says exact={entry.exact} of the world {name}, its tree says {world.exact}")
    return world
