"""What there is to train on. `registry` lists the worlds; `load(name)` imports one with all that it needs."""

from importlib import import_module

from klq_edu.worlds.registry import WORLDS, named


def load(name: str, remake: str | None = None):
    """The World of this name; ValueError if the registry does not know it. A text task takes the road up to its reward
    model the first time, and from the stage `remake` on anew."""
    import datasets
    from transformers.utils import logging

    made = named("world", name, WORLDS).made
    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # models load in a second, and bars of our own are on the screen
    module = import_module(f"klq_edu.worlds.{name}")
    if not made:
        return module.load()
    from klq_edu.worlds.road import Road, model_folder

    return Road(module.TASK, model_folder(), WORLDS[name].settings, remake).world()
