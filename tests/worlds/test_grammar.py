"""The grammar world: its size, its exactness, and that KLQ learns in it."""

import pytest
import torch

from klq_edu.app.experiment import run_experiment
from klq_edu.rlhf.rollout import collect
from klq_edu.worlds.grammar import LONGEST, PROMPTS, raw_score, successors
from klq_edu.worlds.registry import preset


def test_it_is_as_large_as_promised(grammar):
    """50–100 words, at least four prompts with at least 1,000 completions each, about 100,000 parameters."""
    starts = [tuple(grammar.tokenizer(p)["input_ids"]) for p in PROMPTS]
    counts = [sum(c[: len(s)] == s for c in grammar.tree.completions()) for s in starts]
    words = len(grammar.tokenizer) - 1  # <pad> is none
    parameters = sum(p.numel() for p in grammar.make_policy(preset("grammar")).lm.parameters())
    assert len(PROMPTS) >= 4 and min(counts) >= 1000
    assert 50 <= words <= 100 and 80_000 < parameters < 130_000


def test_rewards_have_mean_zero_and_standard_deviation_one_under_the_reference(grammar):
    tree = grammar.tree
    weights, (states, tokens) = tree.sequence_distribution(tree.ref), tree.leaves
    rewards = tree.rewards[states, tokens]
    assert abs((weights * rewards).sum()) < 1e-12
    assert abs((weights * rewards**2).sum() - 1) < 1e-12


def test_the_tree_is_the_restricted_language_model(grammar):
    """The table read in one batched pass equals sampling's own log-probabilities, hence π*, J* and J(π) are exact."""
    policy = grammar.make_policy(preset("grammar"))
    rollout = collect(
        policy, grammar.tokenizer, list(PROMPTS) * 50, max_new_tokens=LONGEST, constraint=grammar.constraint,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    index = {c: i for i, c in enumerate(grammar.tree.completions())}
    exact = grammar.tree.sequence_distribution(grammar.tree.ref).log()
    for i, prompt in enumerate(rollout.prompts):
        ids = tuple(grammar.tokenizer(prompt)["input_ids"]) + tuple(rollout.tokens[i][rollout.mask[i]].tolist())
        expected = exact[index[ids]] + torch.tensor(len(PROMPTS)).log()  # given the prompt
        assert abs(rollout.logprobs[i].sum() - expected) < 1e-4


def test_exact_metrics_at_the_reference(grammar):
    config = preset("grammar")
    metrics = grammar.evaluate(config)(grammar.make_policy(config))
    assert metrics == pytest.approx(
        {"J": 0, "attained": 0, "exact_reward": 0, "exact_kl": 0, "regret": metrics["regret"]}
    )
    assert metrics["regret"] > 1 and set(metrics) == set(grammar.metrics)


def test_the_reward_of_a_text_is_its_standardised_lexicon_score(grammar):
    """One affine map takes raw scores to rewards, with and without the final full stop."""
    texts = ["old thief helps together .", "cruel storm breaks bitterly", "kind queen smiles .", "tower rests"]
    rewards = grammar.reward(["at dawn the"] * 4, texts)
    raw = [raw_score(tuple(t.removesuffix(".").split())) for t in texts]
    slopes = [(rewards[i] - rewards[1]) / (raw[i] - raw[1]) for i in (0, 2, 3)]
    assert slopes == pytest.approx([slopes[0]] * 3) and slopes[0] > 0


def test_the_grammar_ends_every_completion():
    def longest(words):
        return len(words) if words and words[-1] == "." else max(longest((*words, w)) for w in successors(words))

    assert longest(()) == LONGEST


def test_prompts_outside_the_grammar_are_refused(grammar):
    with pytest.raises(ValueError, match="prompts must be among .* got 'once upon'"):
        grammar.constraint.start(["once upon"])


@pytest.mark.parametrize("variant", ["klq", "ppo_clip", "ppo_penalty"])
def test_every_algorithm_gains_most_of_what_can_be_gained(grammar, tmp_path, variant):
    """2,560 rollouts are half the demo's budget; an algorithm with a wrong sign or mask stays far below."""
    result = run_experiment(grammar, preset("grammar", variant, updates=40, eval_every=40), tmp_path)
    assert result.rows[-1]["attained"] > 0.85
    assert result.after["reward"].mean() > result.before["reward"].mean() + 1
