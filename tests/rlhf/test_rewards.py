"""Scores land on the last real token, and a reward that misbehaves is named."""

import pytest
import torch

from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import Rollout


def rollout():
    mask, zeros = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(), torch.zeros(3, 3)
    texts = ["a", "b", "c"]
    return Rollout(texts, texts, zeros.long(), mask, zeros, zeros, zeros, zeros, zeros, zeros, {})


def test_scores_are_paid_on_the_last_real_token():
    batch = rollout()
    scores = score(lambda prompts, completions: [1.0, torch.tensor(2.0), 3], batch)
    assert scores.tolist() == [1, 2, 3]
    assert batch.rewards.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0]]


def test_columns_of_the_dataset_reach_the_reward():
    seen = {}
    score(lambda **kwargs: seen.update(kwargs) or [0.0] * 3, rollout(), answer=["x", "y", "z"])
    assert seen == {"prompts": ["a", "b", "c"], "completions": ["a", "b", "c"], "answer": ["x", "y", "z"]}


def test_columns_may_have_any_name():
    assert score(lambda reward, rollout, **_: reward, rollout(), reward=[1.0, 2.0, 3.0], rollout=[0] * 3).tolist() == [
        1,
        2,
        3,
    ]


def broken(prompts, completions, **_):
    raise KeyError("lexicon")


@pytest.mark.parametrize(
    "reward, error, message",
    [
        (lambda **_: [1.0, 2.0], ValueError, "one score per completion, 3, got 2"),
        (lambda **_: [1.0, float("nan"), 2.0], ValueError, "finite numbers, got nan for completion 'b'"),
        (lambda **_: [1.0, float("inf"), 2.0], ValueError, "finite numbers, got inf"),
        (lambda **_: [1.0, 1e39, 2.0], ValueError, "finite numbers, got 1e\\+39"),
        (lambda **_: [1.0, None, 2.0], ValueError, "finite numbers, got None"),
        (lambda **_: ["1", "2", "3"], ValueError, "finite numbers, got '1'"),
        (lambda **_: None, TypeError, "must return a list of numbers, got NoneType"),
        (broken, RuntimeError, "the reward broken raised KeyError: 'lexicon'"),
    ],
)
def test_a_misbehaving_reward_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        score(reward, rollout(), answer=["x", "y", "z"])
