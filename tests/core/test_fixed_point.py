"""Δ = 0 along every path if and only if (π, V) is the optimum: what licenses learning from old completions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_edu.core.returns import lambda_returns
from klq_edu.core.tree import TokenTree

trees = st.builds(
    TokenTree.random, st.integers(2, 4), st.integers(1, 4), eos=st.sampled_from([None, 0, 1]), seed=st.integers(0, 999)
)
taus = st.floats(0.05, 3)


def paths(tree, policy, values, behaviour, tau, n=64, seed=0):
    """Completions sampled by `behaviour`, with rewards, values and both log-probs as [n, T], as KLQ is given them."""
    episodes = tree.rollout(behaviour, n, torch.Generator().manual_seed(seed))
    place = episodes.states, episodes.tokens
    return episodes, dict(
        rewards=episodes.rewards, values=values[episodes.states], logprobs=policy.log()[place],
        ref_logprobs=tree.ref.log()[place], mask=episodes.mask, tau=tau,
    )  # fmt: skip


@given(trees, taus, st.sampled_from([1.0, 0.8]))
def test_the_optimum_has_no_td_error_anywhere(tree, tau, gamma):
    _, values, policy = tree.optimum(tau, gamma)
    assert tree.td_errors(policy, values, tau, gamma).abs().max() < 1e-10


@given(trees, taus, st.integers(0, 99), st.floats(0, 1))
def test_who_has_small_td_errors_is_near_the_optimum(random_policy, tree, tau, seed, spread):
    """The "only if" with numbers: |V − V*| ≤ T max|δ| and τ|log π − log π*| ≤ (2T + 1) max|δ|, for any pair between
    the optimum and a random one."""
    _, best_values, best = tree.optimum(tau)
    noise = torch.randn(best_values.shape, generator=torch.Generator().manual_seed(seed), dtype=best.dtype)
    values = best_values + spread * noise
    policy = (1 - spread) * best + spread * random_policy(tree, seed)
    worst, depth = tree.td_errors(policy, values, tau)[tree.visits(tree.ref) > 0].abs().max(), len(tree.levels)
    ratio = torch.where(tree.ref > 0, (policy / best).log(), 0.0).abs().max()
    assert (values - best_values).abs().max() <= depth * worst + 1e-9
    assert tau * ratio <= (2 * depth + 1) * worst + 1e-9
    assert spread < 1e-3 or worst > 0


@given(trees, taus, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([1.0, 0.8]))
def test_off_the_optimum_some_path_has_an_advantage(random_policy, tree, tau, seed, lam, gamma):
    """The "only if" for what training sees: whatever λ is, δ ≠ 0 somewhere shows as Δ ≠ 0 somewhere."""
    policy, values = random_policy(tree, seed), tree.optimum(tau, gamma)[1]
    _, given_ = paths(tree, policy, values, tree.ref, tau, n=512)
    out = lambda_returns(**given_, lam=lam, gamma=gamma)
    episodes, _ = paths(tree, policy, values, tree.ref, tau, n=512)
    seen = torch.where(episodes.mask, tree.td_errors(policy, values, tau, gamma)[episodes.states, episodes.tokens], 0.0)
    torch.testing.assert_close(out.td_errors, seen, rtol=1e-9, atol=1e-9)
    assert (1 + gamma * lam) * out.advantages.abs().max() >= seen.abs().max() - 1e-9
    assert seen.abs().max() > 0


@given(trees, taus, st.integers(0, 99))
def test_along_a_path_the_errors_telescope(random_policy, tree, tau, seed):
    """Σ_t δ_t = R(y) − τ log π(y)/π_b(y) − V(s_0): the step on which the proof rests, and a sum over what δ is."""
    policy, values = random_policy(tree, seed), torch.randn(len(tree.ref), dtype=torch.float64)
    episodes, given_ = paths(tree, policy, values, tree.ref, tau)
    total = torch.where(episodes.mask, tree.td_errors(policy, values, tau)[episodes.states, episodes.tokens], 0.0)
    ratio = torch.where(episodes.mask, given_["logprobs"] - given_["ref_logprobs"], 0.0).sum(1)
    expected = episodes.rewards.sum(1) - tau * ratio - values[episodes.states[:, 0]]
    torch.testing.assert_close(total.sum(1), expected, rtol=1e-9, atol=1e-9)


@given(trees, taus, st.floats(0, 1), st.floats(0.1, 1), st.integers(0, 99))
def test_at_the_optimum_targets_do_not_vary_whoever_samples(random_policy, tree, tau, lam, alpha, seed):
    q, values, policy = tree.optimum(tau)
    episodes, given_ = paths(tree, policy, values, random_policy(tree, seed), tau)
    out = lambda_returns(**given_, lam=lam, alpha=alpha)
    expected = torch.where(episodes.mask, q[episodes.states, episodes.tokens], 0.0)
    torch.testing.assert_close(out.targets, expected, rtol=1e-9, atol=1e-9)


@given(trees, taus, st.floats(0, 1), st.floats(0.1, 1), st.integers(0, 99))
def test_noise_in_the_reward_reaches_a_target_shrunk_by_the_trace(random_policy, tree, tau, lam, alpha, seed):
    """A noisy reward is the limit: its ε arrives as α λ^k ε at the target k tokens before the end."""
    q, values, policy = tree.optimum(tau)
    episodes, given_ = paths(tree, policy, values, random_policy(tree, seed), tau)
    noise = torch.randn(len(episodes.mask), 1, dtype=torch.float64)
    left = episodes.mask.sum(1, keepdim=True) - 1 - torch.arange(episodes.mask.shape[1])
    given_["rewards"] = episodes.rewards + torch.where(left == 0, noise, 0.0)
    out = lambda_returns(**given_, lam=lam, alpha=alpha)
    error = torch.where(episodes.mask, alpha * lam ** left.clamp(min=0).double() * noise, 0.0)
    expected = torch.where(episodes.mask, q[episodes.states, episodes.tokens], 0.0) + error
    torch.testing.assert_close(out.targets, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gamma, same", [(1.0, True), (0.5, False)])
def test_centring_rewards_per_prompt_leaves_the_optimal_policy_alone_without_discounting(gamma, same):
    """With discounting a constant paid sooner is worth more, so sentences of different lengths change places."""
    shifts = {7: 2.0, 8: -1.0}

    def grow(shift):
        rng = torch.Generator().manual_seed(0)

        def reward(y):
            return torch.randn((), generator=rng, dtype=torch.float64).item() + shift * shifts[y[0]]

        return TokenTree.grow(3, 3, lambda _: torch.full((3,), 1 / 3), reward, 0, ((7,), (8,)))

    plain, shifted = (grow(s).optimum(0.4, gamma) for s in (0, 1))
    assert torch.allclose(plain[2], shifted[2], atol=1e-9) == same
    if same:
        torch.testing.assert_close(shifted[1][:2] - plain[1][:2], torch.tensor([2.0, -1.0], dtype=torch.float64))


def test_td_errors_of_forbidden_tokens_are_zero_and_bad_input_is_refused():
    ref = torch.tensor([0.5, 0.5, 0.0])
    tree = TokenTree.grow(3, 2, lambda _: ref, lambda y: float(sum(y)))
    values = torch.full((len(tree.ref),), 5.0, dtype=torch.float64)
    errors = tree.td_errors(tree.ref, values, 0.5)
    assert (errors[:, 2] == 0).all() and (errors[:, :2] != 0).any()
    for bad in ({"tau": 0.0}, {"gamma": 2.0}, {"values": values[:1]}, {"policy": tree.ref * 2}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            tree.td_errors(**({"policy": tree.ref, "values": values, "tau": 0.5} | bad))


def test_td_errors_of_values_in_float32_are_those_of_the_same_numbers_in_float64(random_policy):
    """A tree computes in float64: a critic's values are rounded already, log π/π_b and δ are not to be."""
    tree = TokenTree.random(3, 3, eos=0, seed=1)
    policy, values = random_policy(tree, 2), torch.randn(len(tree.ref))
    assert torch.equal(tree.td_errors(policy, values, 0.5, 0.9), tree.td_errors(policy, values.double(), 0.5, 0.9))
