"""The bijection (π, V) <-> Q, soft policy improvement, and the three claims that make KLQ a PPO."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_edu.core.improvement import (
    action_values,
    boltzmann,
    kl_penalised_argmax,
    klq_step,
    penalty_coefficient,
    ppo_penalty_step,
    soft_policy_iteration,
)
from klq_edu.core.objectives import klq_loss, ppo_clip_loss, value_loss
from klq_edu.core.returns import gae, kl_shaped_rewards, lambda_returns, whiten
from klq_edu.core.tree import TokenTree

F64 = torch.float64
TAU = 0.4
SEEDS = range(3)
V = 5


def assert_same(got, want, tolerance=1e-10):
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def state(seed=0, states=4):
    """Arbitrary (policy, values, reference, advantages) over `states` states."""
    rng = torch.Generator().manual_seed(seed)
    policy, ref, advantages = (torch.randn(states, V, generator=rng, dtype=F64) for _ in range(3))
    return policy.softmax(-1), torch.randn(states, generator=rng, dtype=F64), ref.softmax(-1), advantages


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


# --- the bijection (13) -------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(0.05, 5))
def test_policy_and_values_to_q_and_back(seed, tau):
    """For any (π, V): the Boltzmann policy of Q is π, its Boltzmann value is V, and E_π Q − τ D(π‖π_b) = V."""
    policy, values, ref, _ = state(seed)
    q = action_values(policy, values, ref, tau)
    got_policy, got_values = boltzmann(q, ref, tau)
    assert_same(got_policy, policy)
    assert_same(got_values, values)
    assert_same((policy * q).sum(-1) - tau * kl(policy, ref), values)


@given(st.integers(0, 10**6), st.floats(0.05, 5))
def test_q_to_policy_and_values_and_back(seed, tau):
    """Any Q is the Q of its own Boltzmann policy and value: language model plus value head miss none."""
    _, _, ref, q = state(seed)
    assert_same(action_values(*boltzmann(q, ref, tau), ref, tau), q)


def test_at_the_reference_policy_q_is_the_value():
    _, values, ref, _ = state()
    assert torch.equal(action_values(ref, values, ref, TAU), values[:, None].expand(-1, V))


def test_a_forbidden_token_stays_forbidden_and_finite():
    policy, values, ref, advantages = state()
    for p in (policy, ref):
        p[:, 2] = 0
        p /= p.sum(-1, keepdim=True)
    assert_same(action_values(policy, values, ref, TAU)[:, 2], values)
    new_policy, new_values = klq_step(policy, values, advantages, ref, TAU, 0.5)
    assert (new_policy[:, 2] == 0).all() and torch.isfinite(new_values).all()
    assert_same(new_policy.sum(-1), torch.ones(4, dtype=F64))


# --- claim 1: the same estimator ----------------------------------------------------------------------------------


def rollout(seed, policy_of, n=64):
    """A random tree, an old policy, arbitrary values, and what KLQ and PPO both store of n rollouts."""
    tree = TokenTree.random(3, 4, eos=0, seed=seed)
    policy = policy_of(tree, seed + 100)
    values = torch.randn(len(tree.ref), generator=torch.Generator().manual_seed(seed), dtype=F64)
    episodes = tree.rollout(policy, n, torch.Generator().manual_seed(seed))
    return tree, policy, values, episodes


def stored(tree, policy, values, episodes):
    """(values, logprobs, ref_logprobs), each [n, T], at the visited states and taken tokens."""
    s, a = episodes.states, episodes.tokens
    return values[s], policy.log()[s, a], tree.ref.log()[s, a]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.8, 0.0)])
def test_claim_1_klq_s_td_error_is_gae_s_on_kl_shaped_reward(seed, gamma, lam, random_policy):
    tree, policy, values, episodes = rollout(seed, random_policy)
    v, logp, logq = stored(tree, policy, values, episodes)
    klq = lambda_returns(episodes.rewards, v, logp, logq, episodes.mask, tau=TAU, gamma=gamma, lam=lam)
    shaped = kl_shaped_rewards(episodes.rewards, logp, logq, TAU)
    assert_same(klq.td_errors, gae(shaped, v, episodes.mask, gamma=gamma, lam=0.0))
    assert_same(klq.advantages, gae(shaped, v, episodes.mask, gamma=gamma, lam=lam))
    assert klq.advantages.abs().max() > 0.1


# --- claim 2: the same first gradient -----------------------------------------------------------------------------


def first_gradients(seed, random_policy, alpha, value_coef, advantage_map=None):
    """∇ at θ_old of KLQ's loss and of ατ · (PPO-clip + value_coef · value loss), for a tabular policy and values."""
    tree, policy, old_values, episodes = rollout(seed, random_policy)
    s, a, mask = episodes.states, episodes.tokens, episodes.mask
    logits, values = policy.log().requires_grad_(), old_values.clone().requires_grad_()
    logp, v, logq = logits.log_softmax(-1)[s, a], values[s], tree.ref.log()[s, a]
    out = lambda_returns(episodes.rewards, v, logp, logq, mask, tau=TAU, alpha=alpha)
    klq = klq_loss(logp, logq, v, out.targets, mask, tau=TAU)
    advantages = advantage_map(out.advantages, mask) if advantage_map else out.advantages
    ppo = ppo_clip_loss(logp, logp.detach(), advantages, mask)
    ppo = ppo + value_coef * value_loss(v, (v + out.advantages).detach(), mask)
    grads = [torch.autograd.grad(x, (logits, values), retain_graph=True) for x in (klq, alpha * TAU * ppo)]
    return [torch.cat([g.flatten() for g in pair]) for pair in grads]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_claim_2_first_gradient_is_ppo_s_with_value_coefficient_one_over_tau(seed, alpha, random_policy):
    klq, ppo = first_gradients(seed, random_policy, alpha, 1 / TAU)
    assert_same(klq, ppo)
    assert klq.norm() > 0.01


@pytest.mark.parametrize("seed", SEEDS)
def test_claim_2_stops_at_another_value_coefficient(seed, random_policy):
    """With the customary ½ neither the length nor the direction of the joint gradient survives."""
    klq, ppo = first_gradients(seed, random_policy, 1.0, 0.5)
    assert (klq - ppo).norm() > 0.5 * klq.norm()
    assert torch.cosine_similarity(klq, ppo, dim=0) < 0.999


@pytest.mark.parametrize("seed", SEEDS)
def test_claim_2_stops_at_whitening(seed, random_policy):
    """Rescaling Δ would be harmless; centring it changes the direction for the policy's own parameters."""
    klq, ppo = first_gradients(seed, random_policy, 1.0, 1 / TAU, whiten)
    n = len(klq) * 3 // 4  # 3 logits for each value
    assert torch.cosine_similarity(klq[:n], ppo[:n], dim=0) < 0.99
    assert_same(klq[n:], ppo[n:])


# --- claim 3: the same finite step --------------------------------------------------------------------------------

alphas = pytest.mark.parametrize("alpha", [0.2, 0.7, 1.0])


@pytest.mark.parametrize("seed", SEEDS)
@alphas
def test_claim_3_the_klq_step_is_the_ppo_penalty_step(seed, alpha):
    policy, values, ref, advantages = state(seed)
    new, _ = klq_step(policy, values, advantages, ref, TAU, alpha)
    tilted = policy * (alpha * advantages / TAU).exp()
    assert_same(new, tilted / tilted.sum(-1, keepdim=True))
    q = action_values(policy, values, ref, TAU) + advantages
    assert_same(new, ppo_penalty_step(policy, q, ref, TAU, penalty_coefficient(TAU, alpha)))
    assert_same(new, kl_penalised_argmax(advantages, (policy, TAU / alpha))[0])


@pytest.mark.parametrize("alpha", [0.2, 0.7])
def test_claim_3_fails_with_beta_on_the_bare_advantage(alpha):
    """With the advantage alone the coefficient is τ/α = τ + β; β itself gives another policy."""
    policy, values, ref, advantages = state()
    beta = penalty_coefficient(TAU, alpha)
    assert beta + TAU == pytest.approx(TAU / alpha)
    wrong = kl_penalised_argmax(advantages, (policy, beta))[0]
    assert (wrong - klq_step(policy, values, advantages, ref, TAU, alpha)[0]).abs().max() > 0.01


def test_claim_3_without_damping_beta_is_zero_and_the_step_is_soft_improvement():
    policy, values, ref, advantages = state()
    assert penalty_coefficient(TAU, 1.0) == 0
    new, _ = klq_step(policy, values, advantages, ref, TAU, 1.0)
    assert_same(new, boltzmann(action_values(policy, values, ref, TAU) + advantages, ref, TAU)[0])


@pytest.mark.parametrize("seed", SEEDS)
@alphas
def test_the_klq_step_fits_the_target_exactly(seed, alpha):
    """Q of the new (π, V) is Q_old + αΔ everywhere, so no regression can do better; V is that target's soft maximum."""
    policy, values, ref, advantages = state(seed)
    target = action_values(policy, values, ref, TAU) + alpha * advantages
    new_policy, new_values = klq_step(policy, values, advantages, ref, TAU, alpha)
    assert_same(action_values(new_policy, new_values, ref, TAU), target)
    assert_same(new_values, TAU * (ref * (target / TAU).exp()).sum(-1).log())


def maximise(objective):
    """argmax over policies of a concave objective [V] -> scalar, by LBFGS on softmax logits: knows no closed form."""
    logits = torch.zeros(V, dtype=F64, requires_grad=True)
    search = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        search.zero_grad()
        loss = -objective(logits.softmax(-1))
        loss.backward()
        return loss

    search.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_numerical_optimiser_confirms_every_closed_form(seed):
    alpha = 0.4
    policy, values, ref, advantages = state(seed, states=1)
    old, b, adv = policy[0], ref[0], advantages[0]
    q = action_values(policy, values, ref, TAU)[0] + adv
    beta = penalty_coefficient(TAU, alpha)
    step = klq_step(policy, values, advantages, ref, TAU, alpha)[0][0]
    found = maximise(lambda p: (p * q).sum() - TAU * kl(p, b) - beta * kl(p, old))
    assert_same(found, step, 1e-6)
    assert_same(maximise(lambda p: (p * adv).sum() - TAU / alpha * kl(p, old)), step, 1e-6)
    assert_same(maximise(lambda p: (p * q).sum() - TAU * kl(p, b)), boltzmann(q, b, TAU)[0], 1e-6)


@given(st.integers(0, 10**6), st.floats(0.05, 3), st.floats(0, 3))
def test_the_maximum_is_the_objective_at_the_maximiser(seed, c1, c2):
    """kl_penalised_argmax returns a pair that belongs together, and no random policy does better."""
    policy, _, ref, q = state(seed)
    best, maximum = kl_penalised_argmax(q, (ref, c1), (policy, c2))

    def objective(p):
        return (p * q).sum(-1) - c1 * kl(p, ref) - c2 * kl(p, policy)

    assert_same(objective(best), maximum, 1e-9)
    assert (objective(policy) <= maximum + 1e-12).all() and (objective(ref) <= maximum + 1e-12).all()


# --- soft policy iteration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("depth, gamma", [(1, 1.0), (3, 1.0), (4, 0.8)])
def test_soft_policy_iteration_reaches_the_optimum_in_as_many_sweeps_as_levels(seed, depth, gamma):
    """Exactly T sweeps: π_T is optimal at every state, π_{T−1} is not yet, and no sweep makes the objective worse."""
    tree = TokenTree.random(3, depth, eos=2, seed=seed)
    assert len(tree.levels) == depth
    policies = soft_policy_iteration(tree, TAU, depth, gamma)
    best = tree.optimum(TAU, gamma)[2]
    assert len(policies) == depth + 1 and torch.equal(policies[0], tree.ref)
    assert_same(policies[-1], best)
    assert (policies[-2] - best).abs().max() > 1e-7  # far above what π_T misses it by
    scores = torch.stack([tree.objective(p, TAU, gamma) for p in policies])
    assert (scores.diff() > 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_klq_steps_on_exact_advantages_are_soft_policy_iteration(seed, random_policy):
    """Δ = Q_π − Q(π, V_π): at α = 1 the step is π's Boltzmann improvement, damped steps improve less but always."""
    tree = TokenTree.random(3, 3, seed=seed)
    policy = random_policy(tree, seed)
    q, v = tree.evaluate(policy, TAU)
    advantages = q - action_values(policy, v, tree.ref, TAU)
    steps = [klq_step(policy, v, advantages, tree.ref, TAU, alpha)[0] for alpha in (0.1, 0.4, 1.0)]
    assert_same(steps[-1], boltzmann(q, tree.ref, TAU)[0])
    scores = torch.stack([tree.objective(p, TAU) for p in (policy, *steps)])
    assert (scores.diff() > 0).all()


# --- errors -------------------------------------------------------------------------------------------------------

P, X, R, D = state()
BAD = {
    "boltzmann, tau 0": (lambda: boltzmann(D, R, 0.0), "tau must be"),
    "action_values, negative tau": (lambda: action_values(P, X, R, -1.0), "tau must be"),
    "klq_step, alpha 0": (lambda: klq_step(P, X, D, R, TAU, 0.0), "alpha must"),
    "klq_step, alpha 2": (lambda: klq_step(P, X, D, R, TAU, 2.0), "alpha must"),
    "klq_step, tau 0": (lambda: klq_step(P, X, D, R, 0.0), "tau must be"),
    "penalty_coefficient, alpha 0": (lambda: penalty_coefficient(TAU, 0.0), "alpha must"),
    "penalty_coefficient, tau 0": (lambda: penalty_coefficient(0.0, 0.5), "tau must be"),
    "ppo_penalty_step, tau 0": (lambda: ppo_penalty_step(P, D, R, 0.0, 1.0), "tau must be"),
    "ppo_penalty_step, negative beta": (
        lambda: ppo_penalty_step(P, D, R, TAU, -0.1),
        "beta must be a finite number >= 0",
    ),
    "kl_penalised_argmax, no penalty": (lambda: kl_penalised_argmax(D, (R, 0.0)), "penalty must be"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_a_coefficient_out_of_range_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_zero_probabilities_are_not_multiplied_by_infinity():
    """β = 0 leaves no trace of a policy with a zero; log(0/π_b) is −inf, and log(0/0) of a forbidden token is 0."""
    old, ref, q = (torch.tensor(x).double() for x in ([0.0, 0.4, 0.6], [0.2, 0.3, 0.5], [1.0, 0.5, -0.2]))
    torch.testing.assert_close(ppo_penalty_step(old, q, ref, 0.5, 0.0), boltzmann(q, ref, 0.5)[0])
    zero_one, value = torch.tensor([0.0, 1.0]).double(), torch.tensor(2.0).double()
    assert action_values(zero_one, value, torch.tensor([0.5, 0.5]).double(), 0.3)[0] == -torch.inf
    assert action_values(zero_one, value, zero_one, 0.3).tolist() == [2.0, 2.0]
    assert klq_step(zero_one, value, torch.ones(2).double(), torch.full((2,), 0.5).double(), 0.3)[0][0] == 0
