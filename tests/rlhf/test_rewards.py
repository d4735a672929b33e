"""Scores land on the last real token, and a reward that misbehaves is named."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import Rollout


def rollout():
    mask, zeros = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool(), torch.zeros(3, 3)
    texts = ["a", "b", "c"]
    return Rollout(texts, texts, zeros.long(), mask, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)


def test_scores_are_paid_on_the_last_real_token():
    batch = rollout()
    scores = score(lambda prompts, completions: [1.0, torch.tensor(2.0), 3], batch)
    assert scores.tolist() == [1, 2, 3]
    assert batch.rewarded(scores).rewards.tolist() == [[0, 1, 0], [0, 0, 2], [3, 0, 0]]


def test_a_module_is_asked_by_its_forward():
    class Scorer(torch.nn.Module):
        def forward(self, prompts, completions, completion_ids):
            return [float(len(ids)) for ids in completion_ids]

    assert score(Scorer(), rollout()).tolist() == [2, 3, 1]


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


class Ended(torch.nn.Module):
    def forward(self, prompts, completions):
        return torch.ones(3)


def by_ids(prompts, completions, completion_ids, **columns):
    assert completion_ids == [[4, 1], [5, 6, 7], [1]] and set(columns) <= {"answer"}
    return [float(len(ids)) for ids in completion_ids]


def by_end(prompts, completions, scale, ended):
    return [scale * end for end in ended]


class Judge:
    def __call__(self, prompts, completions, *, ended, completion_ids):
        return [len(ids) * end for ids, end in zip(completion_ids, ended, strict=True)]


@pytest.mark.parametrize(
    "reward, scores",
    [
        (by_ids, [2, 3, 1]),
        (partial(by_end, scale=2.0), [2, 0, 2]),
        (Judge(), [2, 0, 1]),
        (lambda prompts, completions: [1.0] * 3, [1, 1, 1]),
        (lambda prompts, completions, **columns: [float(len(columns))] * 3, [0, 0, 0]),
        (lambda *args, **kwargs: (lambda prompts, completions: [1.0] * 3)(*args, **kwargs), [1, 1, 1]),
        (Ended(), [1, 1, 1]),
    ],
)
def test_token_ids_and_endings_reach_the_rewards_that_name_them_and_no_other(reward, scores):
    """TRL's `completion_ids`: without padding, EOS included. Wrappers and ** get what they got before."""
    tokens, ended = torch.tensor([[4, 1, 99], [5, 6, 7], [1, 99, 99]]), torch.tensor([True, False, True])
    batch = replace(rollout(), tokens=tokens, ended=ended)
    assert score(reward, batch).tolist() == scores


@pytest.mark.parametrize(
    "scores", [torch.arange(3.0), np.arange(3), (0, 1, 2), iter([0, 1, 2]), [np.int64(0), True, 2.0]]
)
def test_scores_may_come_in_any_sequence_of_numbers(scores):
    assert score(lambda **_: scores, rollout()).tolist() == [0, 1, 2]


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
        (lambda **_: np.array(["1", "2", "3"]), ValueError, "finite numbers, got .*'1'"),
        (lambda **_: None, TypeError, "must return a list of numbers, got NoneType"),
        (lambda **_: {0: 0.5, 1: 0.5, 2: 0.5}, TypeError, "must return a list of numbers, got dict"),
        (lambda **_: {0.0, 1.0, 2.0}, TypeError, "must return a list of numbers, got set"),
        (lambda **_: "123", TypeError, "must return a list of numbers, got str"),
        (lambda **_: b"123", TypeError, "must return a list of numbers, got bytes"),
        (dict, TypeError, "the reward dict must return a list of numbers, got dict"),  # a callable without a signature
        (broken, RuntimeError, "the reward broken raised KeyError: 'lexicon'"),
    ],
)
def test_a_misbehaving_reward_is_named(reward, error, message):
    with pytest.raises(error, match=message):
        score(reward, rollout(), answer=["x", "y", "z"])
