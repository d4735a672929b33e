"""The grammar world: its size, its exactness, and that KLQ learns in it."""

import pytest
import torch

from klq_edu.app.experiment import run_experiment
from klq_edu.core.tree import TokenTree
from klq_edu.rlhf.rollout import collect
from klq_edu.worlds import load
from klq_edu.worlds.grammar import (
    LONGEST,
    PROMPTS,
    TASTE,
    modes,
    policy_table,
    raw_score,
    successors,
    win_rate,
    words_of,
)
from klq_edu.worlds.registry import preset


def test_it_is_as_large_as_promised(grammar):
    """50–100 words, sixteen prompts with at least 1,000 completions each, about 100,000 parameters."""
    starts = [tuple(grammar.tokenizer(p)["input_ids"]) for p in PROMPTS]
    counts = [sum(c[: len(s)] == s for c in grammar.tree.completions()) for s in starts]
    words = len(grammar.tokenizer) - 1  # <pad> is none
    parameters = sum(p.numel() for p in grammar.make_policy(preset("grammar")).lm.parameters())
    assert len(set(PROMPTS)) == 16 and min(counts) >= 1000
    assert 50 <= words <= 100 and 80_000 < parameters < 130_000


@pytest.mark.parametrize("name", ["grammar", "grammar_proxy"])
def test_rewards_have_mean_zero_and_standard_deviation_one_under_the_reference(name):
    tree = load(name).tree
    weights, (states, tokens) = tree.sequence_distribution(tree.ref), tree.leaves
    rewards = tree.rewards[states, tokens]
    assert abs((weights * rewards).sum()) < 1e-12
    assert abs((weights * rewards**2).sum() - 1) < 1e-12


def test_the_tree_is_the_restricted_language_model(grammar):
    """The table read level by level equals sampling's own log-probabilities, hence π*, J* and J(π) are exact."""
    policy = grammar.make_policy(preset("grammar"))
    rollout = collect(
        policy, grammar.tokenizer, list(PROMPTS) * 12, max_new_tokens=LONGEST, constraint=grammar.constraint,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    index = {c: i for i, c in enumerate(grammar.tree.completions())}
    exact = grammar.tree.sequence_distribution(grammar.tree.ref).log()
    for i, prompt in enumerate(rollout.prompts):
        ids = tuple(grammar.tokenizer(prompt)["input_ids"]) + tuple(rollout.tokens[i][rollout.mask[i]].tolist())
        expected = exact[index[ids]] + torch.tensor(len(PROMPTS)).log()  # given the prompt
        assert abs(rollout.logprobs[i].sum() - expected) < 1e-4


@torch.no_grad()
def test_a_policy_that_has_left_the_reference_is_read_right(grammar):
    policy = grammar.make_policy(preset("grammar"))
    for p in policy.trainable().values():
        p.data += 0.02 * torch.randn(p.shape)
    some = torch.randperm(len(grammar.tree.ref))[:300]
    table = policy_table(grammar.tree, grammar.tokenizer, policy)
    for state in some.tolist():
        logits = policy.lm(torch.tensor([grammar.tree.prefixes[state]])).logits[0, -1].double()
        expected = logits.masked_fill(grammar.tree.ref[state] == 0, -torch.inf).softmax(-1)
        torch.testing.assert_close(table[state], expected, rtol=1e-3, atol=1e-6)
    assert (table - grammar.tree.ref).abs().max() > 0.05


def test_exact_metrics_at_the_reference_and_near_the_optimum(grammar):
    config = preset("grammar", tau=0.1)
    metrics = grammar.evaluate(config)(grammar.make_policy(config))
    tree, best = grammar.tree, grammar.tree.optimum(0.1)[2]
    assert set(metrics) == set(grammar.metrics)
    for name in ("J", "attained", "exact_reward", "exact_kl"):
        assert metrics[name] == pytest.approx(0, abs=1e-6)
    start = tree.sequence_distribution(tree.ref)
    likely = tree.sequence_distribution(best)
    assert metrics["kl_optimum"] == pytest.approx((start * (start / likely).log()).sum().item(), rel=1e-6)
    assert metrics["mode_mass"] == pytest.approx(start[modes(tree, 0.1)].sum().item(), rel=1e-6)


def test_exact_metrics_of_a_policy_that_has_left_the_reference(grammar):
    """At the reference the KL is 0, whatever its sign or weight. Everything here is summed over sentences anew."""
    config = preset("grammar", tau=0.3)
    policy, tree = grammar.make_policy(config), grammar.tree
    for p in policy.trainable().values():
        p.data += 0.02 * torch.randn(p.shape)
    found = grammar.evaluate(config)(policy)
    ours, start, best = (
        tree.sequence_distribution(table)
        for table in (policy_table(tree, grammar.tokenizer, policy), tree.ref, tree.optimum(0.3)[2])
    )
    reward, kl = (ours * tree.rewards[tree.leaves]).sum().item(), (ours * (ours / start).log()).sum().item()
    assert kl > 0.05 and (found["exact_reward"], found["exact_kl"]) == pytest.approx((reward, kl))
    assert found["J"] == pytest.approx(reward - 0.3 * kl)
    gap, whole = ((p * (p / best).log()).sum().item() for p in (ours, start))
    assert found["kl_optimum"] == pytest.approx(gap) and found["attained"] == pytest.approx(1 - gap / whole)


def test_the_modes_are_the_optimums_likeliest_sentences_and_differ_by_prompt(grammar):
    """No sentence may be the best after all prompts: then a score would say which of two sentences a run found."""
    tree, width = grammar.tree, len(grammar.tree.prefixes[0])
    mass = dict(zip(tree.completions(), tree.sequence_distribution(tree.optimum(0.05)[2]).tolist(), strict=True))
    found = [tree.completions()[i] for i in modes(tree, 0.05)]
    assert [c[:width] for c in found] == [tree.prefixes[r] for r in tree.roots]
    for c in found:
        assert mass[c] == max(p for other, p in mass.items() if other[:width] == c[:width])
    sentences = [words_of(c[width:]) for c in found]
    assert max(sentences.count(s) for s in sentences) <= len(PROMPTS) / 2 and len(set(sentences)) >= 5


def test_a_reward_is_the_standardised_lexicon_plus_a_taste_of_the_size_promised(grammar):
    """Under the reference the residual of the lexicon's scores has standard deviation TASTE where theirs is 1."""
    tree = grammar.tree
    weights = tree.sequence_distribution(tree.ref)
    lexicon = torch.tensor([raw_score(words_of(c)) for c in tree.completions()], dtype=torch.float64)
    lexicon = (lexicon - (weights * lexicon).sum()) / (
        weights * (lexicon - (weights * lexicon).sum()) ** 2
    ).sum().sqrt()
    rewards = tree.rewards[tree.leaves]
    slope = (weights * lexicon * rewards).sum()
    rest = (weights * (rewards - slope * lexicon) ** 2).sum().sqrt()
    assert rest / slope == pytest.approx(TASTE, abs=0.1)  # tastes happen to correlate a little with the lexicon


def test_the_reward_of_a_text_is_its_score_in_the_tree_with_or_without_the_full_stop(grammar):
    tree, index = grammar.tree, {c: i for i, c in enumerate(grammar.tree.completions())}
    texts = ["old thief helps together", "cruel storm breaks bitterly", "kind queen smiles .", "tower rests ."]
    ids = [tuple(grammar.tokenizer(f"at dusk the {t}")["input_ids"]) for t in texts]
    expected = [tree.rewards[tree.leaves][index[c]].item() for c in ids]
    assert grammar.reward(["at dusk the"] * 4, texts) == pytest.approx(expected)
    bare = [t.removesuffix(".") for t in texts]
    assert grammar.reward(["at dusk the"] * 4, bare) == pytest.approx(expected)
    assert grammar.reward(["at dusk the"] * 4, [f" {t} \n" for t in texts]) == pytest.approx(expected)
    with pytest.raises(ValueError, match="must be a sentence of the grammar after one of .*got 'at dusk the storm'"):
        grammar.reward(["at dusk the"], ["storm"])
    assert grammar.reward(["at dawn the"], texts[:1]) != grammar.reward(["at dusk the"], texts[:1])


def test_the_grammar_ends_every_completion():
    def longest(words):
        return len(words) if not successors(words) else max(longest((*words, w)) for w in successors(words))

    assert longest(()) == LONGEST


def test_the_proxy_correlates_with_the_truth_as_promised_and_the_judge_is_the_truth(grammar):
    proxy = load("grammar_proxy")
    truth, seen = (w.tree.rewards[w.tree.leaves] for w in (grammar, proxy))
    weights = grammar.tree.sequence_distribution(grammar.tree.ref)
    assert (weights * truth * seen).sum() == pytest.approx(0.86, abs=0.03)
    texts = [" ".join(words_of(c)) for c in grammar.tree.completions()[::5000]]
    prompts, completions = zip(*[(" ".join(t.split()[:3]), " ".join(t.split()[3:])) for t in texts])
    assert proxy.judges["true reward"](prompts, completions) == grammar.reward(prompts, completions)
    assert proxy.judges["true reward"](prompts, completions) != proxy.reward(prompts, completions)
    assert not grammar.judges and torch.equal(grammar.tree.ref, proxy.tree.ref)


def test_win_rates_count_every_pair_of_completions(random_policy):
    """Against a double loop over completions, on a tree with two prompts and tied rewards."""
    tree = TokenTree.grow(3, 2, lambda _: torch.full((3,), 1 / 3), lambda y: float(sum(y) % 3), 2, ((7,), (8,)))
    a, b = random_policy(tree, 1), random_policy(tree, 2)
    rewards, ys = tree.rewards[tree.leaves].tolist(), tree.completions()
    pa, pb = (2 * tree.sequence_distribution(p) for p in (a, b))
    total = sum(
        pa[i] * pb[j] * (1.0 if rewards[i] > rewards[j] else 0.5 if rewards[i] == rewards[j] else 0.0) / 2
        for i in range(len(ys)) for j in range(len(ys)) if ys[i][0] == ys[j][0]
    )  # fmt: skip
    assert win_rate(tree, a, b) == pytest.approx(total.item(), abs=1e-12)
    assert win_rate(tree, a, a) == pytest.approx(0.5) and win_rate(tree, b, a) == pytest.approx(1 - total.item())


def test_prompts_outside_the_grammar_are_refused(grammar):
    with pytest.raises(ValueError, match="prompts must be among .* got 'once upon'"):
        grammar.constraint.start(["once upon"])


@pytest.mark.parametrize("variant", ["klq", "ppo_clip", "ppo_penalty"])
def test_every_algorithm_gains_most_of_what_can_be_gained(grammar, tmp_path, variant):
    """On-policy, 2,560 rollouts: half the demo's budget; an algorithm with a wrong sign or mask stays far below."""
    config = preset("grammar", variant, updates=40, batch_size=64, replay=0, tau_start=None, eval_every=40)
    result = run_experiment(grammar, config, tmp_path)
    assert result.rows[-1]["attained"] > 0.7
    assert result.after["reward"].mean() > result.before["reward"].mean() + 1


def test_cooled_replay_gets_nearer_to_the_optimum_with_the_same_completions(grammar, tmp_path):
    """At τ = 1 after 1,280 completions; the sweep in results/ has the numbers at 5,120 and for the other τ."""
    replay = preset("grammar", tau=1.0, updates=40, eval_every=40)
    plain = preset("grammar", tau=1.0, updates=20, batch_size=64, replay=0, tau_start=None, eval_every=20)
    last = [run_experiment(grammar, c, tmp_path / str(c.replay)).rows[-1] for c in (replay, plain)]
    assert last[0]["rollouts"] == last[1]["rollouts"]
    assert last[0]["kl_optimum"] < 0.8 * last[1]["kl_optimum"]
