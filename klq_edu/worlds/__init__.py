"""What there is to train on. `load(name)` gives a World; its dependencies are imported only then."""


def load(name: str):
    """The World called `name`: "grammar" (exact optimum, trains anywhere) or "stories" (a real language model)."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # models load in a second, and bars of our own are on the screen
    if name == "grammar":
        from klq_edu.worlds.grammar import load_grammar

        return load_grammar()
    if name == "stories":
        from klq_edu.worlds.stories import load_stories

        return load_stories()
    raise ValueError(f"world must be 'grammar' or 'stories', got {name!r}")
