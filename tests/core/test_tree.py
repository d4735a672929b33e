"""TokenTree against brute force: every completion is listed, its probability and log-ratio multiplied out."""

import itertools
import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
import torch

from klq_edu.core.tree import ENDS, TokenTree

F64 = torch.float64
TAU = 0.4


class Case(NamedTuple):
    """A tree and the functions it was grown from, so that no oracle reads the tree's own tables of them."""

    tree: TokenTree
    ref: dict
    reward: dict
    vocab: int
    depth: int
    eos: int | tuple | None
    prompts: tuple


def ends(case):
    return (case.eos,) if isinstance(case.eos, int) else case.eos or ()


def build(vocab, depth, eos=None, forbidden=None, prompts=((),), seed=0):
    rng = torch.Generator().manual_seed(seed)
    ref, reward = {}, {}

    def ref_of(prefix):
        logits = torch.randn(vocab, generator=rng, dtype=F64)
        if forbidden is not None:
            logits[forbidden] = -math.inf
        ref[prefix] = logits.softmax(-1)
        return ref[prefix]

    def reward_of(y):
        reward[y] = torch.randn((), generator=rng, dtype=F64).item()
        return reward[y]

    tree = TokenTree.grow(vocab, depth, ref_of, reward_of, eos, prompts)
    return Case(tree, ref, reward, vocab, depth, eos, prompts)


CASES = {
    "binary": build(2, 4),
    "eos": build(3, 3, eos=0),
    "forbidden token": build(4, 3, eos=3, forbidden=1),
    "two prompts": build(3, 2, eos=2, prompts=((7,), (8, 9))),
    "two ends": build(4, 3, eos=(3, 1)),
    "one step": build(5, 1),
    "one token": build(1, 3),
}
SINGLE = [name for name, case in CASES.items() if len(case.prompts) == 1]
OF_SEVERAL = [name for name in CASES if name != "one token"]  # one token leaves nothing to choose


def completions_of(case, prompt):
    """Every completion of a prompt, found among all V^depth strings: cut at the first eos, keep what is allowed."""
    found = set()
    for y in itertools.product(range(case.vocab), repeat=case.depth):
        cut = next((i + 1 for i, token in enumerate(y) if token in ends(case)), case.depth)
        found.add((*prompt, *y[:cut]))
    allowed = [y for y in found if all(case.ref[y[:k]][y[k]] > 0 for k in range(len(prompt), len(y)))]
    return sorted(allowed)


def probability(case, table, prompt, y):
    """Π_t π(y_t | y_<t), where `table` maps a prefix to its token probabilities."""
    return math.prod(table[y[:k]][y[k]].item() for k in range(len(prompt), len(y)))


def rows(case, policy):
    """The policy as a table from prefix to token probabilities."""
    return dict(zip(case.tree.prefixes, policy, strict=True))


def brute_objective(case, policy):
    """J = mean over prompts of Σ_y π(y) (R(y) − τ log π(y)/π_b(y))."""
    table, total = rows(case, policy), 0.0
    for prompt in case.prompts:
        for y in completions_of(case, prompt):
            p, q = probability(case, table, prompt, y), probability(case, case.ref, prompt, y)
            total += p * (case.reward[y] - TAU * math.log(p / q))
    return total / len(case.prompts)


def brute_value(case, table, prefix, left, gamma, backup):
    """V(prefix) by recursion over strings; `backup(p, q, Q)` turns lists of π, π_b and Q into a value."""
    allowed = [a for a in range(case.vocab) if case.ref[prefix][a] > 0]
    q = []
    for a in allowed:
        y = (*prefix, a)
        last = a in ends(case) or left == 1
        q.append(case.reward[y] if last else gamma * brute_value(case, table, y, left - 1, gamma, backup))
    return backup([table[prefix][a].item() for a in allowed], [case.ref[prefix][a].item() for a in allowed], q)


def soft_evaluation(p, b, q):
    return sum(pi * qi - TAU * pi * math.log(pi / bi) for pi, bi, qi in zip(p, b, q, strict=True))


def soft_optimality(_, b, q):
    return TAU * math.log(sum(bi * math.exp(qi / TAU) for bi, qi in zip(b, q, strict=True)))


@pytest.mark.parametrize("name", CASES)
def test_completions_are_all_strings_that_the_rules_allow(name):
    case = CASES[name]
    want = [y for prompt in case.prompts for y in completions_of(case, prompt)]
    assert sorted(case.tree.completions()) == sorted(want) == sorted(case.reward)


@pytest.mark.parametrize("name", CASES)
def test_children_append_the_token_and_levels_count_them(name):
    tree = CASES[name].tree
    for s, a in torch.nonzero(tree.children != ENDS).tolist():
        assert tree.prefixes[tree.children[s, a]] == (*tree.prefixes[s], a)
    start = {len(p) for p in CASES[name].prompts}
    assert sorted(torch.cat(tree.levels).tolist()) == list(range(len(tree.prefixes)))
    for depth, level in enumerate(tree.levels):
        assert {len(tree.prefixes[s]) - depth for s in level.tolist()} <= start


@pytest.mark.parametrize("name", CASES)
def test_objective_is_the_brute_force_sum_over_completions(name, random_policy):
    """Equation (4), with and without eos, forbidden tokens and several prompts."""
    policy = random_policy(CASES[name].tree, 1)
    assert CASES[name].tree.objective(policy, TAU).item() == pytest.approx(
        brute_objective(CASES[name], policy), abs=1e-12
    )


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("name", SINGLE)
def test_evaluation_and_optimum_equal_a_recursion_over_strings(name, gamma, random_policy):
    case = CASES[name]
    policy = random_policy(case.tree, 2)
    for backup, values in (
        (soft_evaluation, case.tree.evaluate(policy, TAU, gamma)[1]),
        (soft_optimality, case.tree.optimum(TAU, gamma)[1]),
    ):
        want = brute_value(case, rows(case, policy), (), case.depth, gamma, backup)
        assert values[0].item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("gamma", [0.7, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_the_optimal_policy_attains_the_optimal_values(name, gamma):
    """(Q*, V*) is the fixed point: evaluating π* gives it back at every state."""
    q, v, policy = CASES[name].tree.optimum(TAU, gamma)
    for got, want in zip(CASES[name].tree.evaluate(policy, TAU, gamma), (q, v), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", SINGLE)
def test_optimum_tilts_the_reference_by_the_exponential_reward(name):
    """π*(y) ∝ π_b(y) exp(R/τ) and V*(s_0) = τ log E_b exp(R/τ)."""
    case = CASES[name]
    _, v, policy = case.tree.optimum(TAU)
    weight = {y: probability(case, case.ref, (), y) * math.exp(case.reward[y] / TAU) for y in completions_of(case, ())}
    total = math.fsum(weight.values())
    got = dict(zip(case.tree.completions(), case.tree.sequence_distribution(policy).tolist(), strict=True))
    assert got == pytest.approx({y: w / total for y, w in weight.items()}, abs=1e-12)
    assert v[0].item() == pytest.approx(TAU * math.log(total), abs=1e-12)


@pytest.mark.parametrize("name", OF_SEVERAL)
@pytest.mark.parametrize("seed", range(5))
def test_the_shortfall_of_any_policy_is_its_kl_to_the_optimum(name, seed, random_policy):
    """J* − J(π) = τ KL(π ‖ π*) > 0: no policy beats the optimum, and this is by how much each fails to."""
    tree = CASES[name].tree
    policy, best = random_policy(tree, seed), tree.optimum(TAU)[2]
    gap = tree.objective(best, TAU) - tree.objective(policy, TAU)
    torch.testing.assert_close(gap, TAU * tree.with_ref(best).sequence_kl(policy), rtol=1e-9, atol=1e-12)
    assert gap > 0


@pytest.mark.parametrize("name", CASES)
def test_sequence_kl_and_expected_reward_are_sums_over_completions(name, random_policy):
    case = CASES[name]
    policy = random_policy(case.tree, 3)
    table, kl, reward = rows(case, policy), 0.0, 0.0
    for prompt in case.prompts:
        for y in completions_of(case, prompt):
            p, q = probability(case, table, prompt, y), probability(case, case.ref, prompt, y)
            kl += p * math.log(p / q) / len(case.prompts)
            reward += p * case.reward[y] / len(case.prompts)
    assert case.tree.sequence_kl(policy).item() == pytest.approx(kl, abs=1e-12)
    assert case.tree.expected_reward(policy).item() == pytest.approx(reward, abs=1e-12)
    assert case.tree.sequence_distribution(policy).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["eos", "forbidden token", "two prompts"])
def test_rollout_frequencies_match_the_sequence_distribution(name, random_policy):
    """Pearson's χ² stays below its mean plus five standard deviations."""
    tree, n = CASES[name].tree, 20_000
    policy = random_policy(tree, 4)
    episodes = tree.rollout(policy, n, torch.Generator().manual_seed(0))
    steps = zip(episodes.states[:, 0].tolist(), episodes.tokens.tolist(), episodes.mask.sum(1).tolist(), strict=True)
    counts = Counter((*tree.prefixes[s], *tokens[:length]) for s, tokens, length in steps)
    expected = dict(zip(tree.completions(), (n * tree.sequence_distribution(policy)).tolist(), strict=True))
    assert set(counts) <= set(expected)
    chi2, df = sum((counts[y] - e) ** 2 / e for y, e in expected.items()), len(expected) - 1
    assert chi2 < df + 5 * math.sqrt(2 * df)


@pytest.mark.parametrize("name", ["eos", "two prompts", "binary"])
def test_rollouts_are_right_padded_and_pay_the_reward_on_the_last_token(name, random_policy):
    """No mask plus one, no sentinel: the reward sits on the token that ends the completion, everything later is 0."""
    case = CASES[name]
    states, tokens, rewards, mask = case.tree.rollout(random_policy(case.tree, 5), 200)
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(mask.shape[1])[None] < lengths[:, None]) and (lengths > 0).all()
    assert all((x[~mask] == 0).all() for x in (states, tokens, rewards))
    for i, length in enumerate(lengths.tolist()):
        y = (*case.tree.prefixes[states[i, 0]], *tokens[i, :length].tolist())
        assert [case.tree.prefixes[s] for s in states[i, :length]] == [y[: len(y) - length + t] for t in range(length)]
        assert rewards[i].tolist() == [case.reward[y] if t == length - 1 else 0.0 for t in range(mask.shape[1])]


def test_a_seeded_generator_repeats_a_rollout(random_policy):
    tree = CASES["eos"].tree
    first, again, other = (tree.rollout(tree.ref, 50, torch.Generator().manual_seed(s)) for s in (3, 3, 4))
    assert torch.equal(first.tokens, again.tokens) and not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("name", OF_SEVERAL)
def test_attained_is_zero_at_the_reference_and_one_at_the_optimum(name):
    tree = CASES[name].tree
    assert tree.attained(tree.ref, TAU) == 0
    assert tree.attained(tree.optimum(TAU)[2], TAU) == pytest.approx(1.0, abs=1e-12)


def test_state_kl_follows_the_zero_conventions():
    """p = 0 costs nothing, p > 0 with q = 0 costs +inf, and only states that are reached are charged."""
    tree = build(2, 2).tree
    ref = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    policy = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=F64)
    kl = tree.with_ref(ref).state_kl(policy)
    assert kl.tolist() == pytest.approx([math.log(2), 0.0, math.inf])
    assert tree.with_ref(ref).sequence_kl(policy).item() == pytest.approx(math.log(2))


def test_under_another_reference_a_tree_lists_its_own_completions():
    """… although the first one's were already asked for; its rows sum to 1 as exactly as those of a grown tree."""
    tree = build(2, 2).tree
    assert len(tree.completions()) == 4
    other = tree.with_ref(torch.tensor([[0.4, 0.6], [1.0, 0.0], [0.0, 1.0]]))
    assert other.completions() == [(0, 0), (1, 1)] and len(tree.completions()) == 4
    torch.testing.assert_close(other.sequence_distribution(other.ref).sum().item(), 1.0, rtol=0, atol=1e-15)
    assert (other.ref.sum(1) - 1).abs().max() < 1e-15


NO_POLICIES = {
    "a sum of 1 + 1e−4": [0.5, 0.5001, 0.0], "a negative entry": [1.5, -0.5, 0.0], "NaN": [0.5, math.nan, 0.0],
    "mass on a token that is not the tree's": [0.5, 0.4, 0.1],
}  # fmt: skip


@pytest.mark.parametrize("row", NO_POLICIES.values(), ids=NO_POLICIES)
def test_what_is_no_policy_of_the_tree_is_named(row):
    """In a single state, by whatever evaluates it."""
    tree = TokenTree.grow(3, 2, constant(0.5, 0.5, 0.0), lambda y: 0.0)
    policy = tree.ref.clone()
    policy[1] = torch.tensor(row, dtype=F64)
    zeros = torch.zeros(len(policy), dtype=F64)
    for name, call in {
        "policy": lambda: tree.evaluate(policy, TAU), "ref": lambda: tree.with_ref(policy),
        "policy must": lambda: tree.td_errors(policy, zeros, TAU),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}.*the tree's own tokens"):
            call()


def test_random_trees_repeat_by_seed():
    same, again, other = (TokenTree.random(3, 3, eos=0, seed=s) for s in (1, 1, 2))
    assert torch.equal(same.ref, again.ref) and torch.equal(same.rewards, again.rewards)
    assert not torch.equal(same.ref, other.ref)
    torch.testing.assert_close(same.ref.sum(-1), torch.ones(len(same.ref), dtype=F64))


def constant(*probs):
    return lambda _: torch.tensor(probs, dtype=F64)


BAD_TREES = {
    "no vocabulary": (dict(vocab=0), "vocab=0"),
    "no depth": (dict(depth=0), "depth=0"),
    "no prompt": (dict(prompts=()), "a prompt"),
    "eos = vocab": (dict(eos=2), "eos must lie in"),
    "negative eos": (dict(eos=-1), "eos must lie in"),
    "one eos of two": (dict(eos=(0, 2)), "eos must lie in"),
    "sum above 1": (dict(ref=constant(0.5, 0.6)), r"ref\(\) must be 2 probabilities"),
    "negative probability": (dict(ref=constant(-0.5, 1.5)), r"ref\(\) must be 2 probabilities"),
    "NaN probability": (dict(ref=constant(math.nan, 1.0)), r"ref\(\) must be 2 probabilities"),
    "too many probabilities": (dict(ref=constant(0.2, 0.3, 0.5)), r"ref\(\) must be 2 probabilities"),
}


@pytest.mark.parametrize("change, message", BAD_TREES.values(), ids=BAD_TREES.keys())
def test_grow_rejects_what_is_not_a_tree(change, message):
    good = dict(vocab=2, depth=2, ref=constant(0.5, 0.5), reward=lambda y: 0.0)
    TokenTree.grow(**good)
    with pytest.raises(ValueError, match=message):
        TokenTree.grow(**(good | change))


def test_eos_may_be_any_integer_or_several():
    def grow(eos):
        return len(TokenTree.grow(3, 3, constant(0.3, 0.3, 0.4), lambda y: 0.0, eos).completions())

    for one in (0, np.int64(0), torch.tensor(0), [0], {0}):
        assert grow(one) == 15
    assert grow(None) == grow(()) == 27 and grow((0, 1)) == 7
    with pytest.raises(TypeError):
        grow((0.5,))


def test_evaluate_rejects_bad_coefficients_and_shapes():
    tree = CASES["eos"].tree
    for args, message in [
        ((tree.ref, 0.0), "tau must be"), ((tree.ref, math.nan), "tau must be"), ((tree.ref, TAU, 1.5), "gamma must"),
        ((tree.ref[:, :-1], TAU), "policy must have the shape"), ((tree.ref[:1], TAU), "policy must have the shape"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tree.evaluate(*args)
