"""What there is to train on. `registry` lists the worlds; `load(name)` imports one with all that it needs."""

from importlib import import_module

from klq_edu.worlds.registry import WORLDS, named


def load(name: str, **options):
    """The World of this name; ValueError if the registry does not know it. Text tasks take `remake`, a stage's name."""
    import datasets
    from transformers.utils import logging

    named("world", name, WORLDS)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()  # models load in a second, and bars of our own are on the screen
    return import_module(f"klq_edu.worlds.{name}").load(**options)
