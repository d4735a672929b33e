"""gae, forward_view, retrace_weights, whiten and kl_shaped_rewards against their definitions in plain Python."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import klq_kernels
from klq_edu.core import returns

F64 = torch.float64
NAN = float("nan")
UNIT = st.floats(0, 1)
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


def draw(lengths, seed=0, count=2):
    """`count` random tensors [B, 6], NaN after each length, and the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]
    tensors = [torch.randn(mask.shape, generator=rng, dtype=F64).masked_fill(~mask, NAN) for _ in range(count)]
    return *tensors, mask


def test_lambda_returns_has_one_definition():
    assert returns.lambda_returns is klq_kernels.lambda_returns and returns.LambdaReturns is klq_kernels.LambdaReturns


@given(LENGTHS, st.integers(0, 10**6), UNIT, UNIT)
def test_gae_is_the_sum_of_discounted_td_errors(lengths, seed, gamma, lam):
    """Â_t = Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} − V_t, and 0 in the padding although it holds NaN."""
    rewards, values, mask = draw(lengths, seed)
    got = returns.gae(rewards, values, mask, gamma=gamma, lam=lam)
    assert (got[~mask] == 0).all()
    for row, n in enumerate(lengths):
        r, v = rewards[row, :n].tolist(), [*values[row, :n].tolist(), 0.0]
        td = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want = [math.fsum((gamma * lam) ** (k - t) * td[k] for k in range(t, n)) for t in range(n)]
        assert got[row, :n].tolist() == pytest.approx(want, abs=1e-12)


def test_gae_limits_are_the_td_error_and_the_return_minus_the_value():
    rewards, values, mask = draw([6])
    torch.testing.assert_close(returns.gae(rewards, values, mask, lam=1.0), rewards.flip(1).cumsum(1).flip(1) - values)
    next_values = torch.cat([values[:, 1:], torch.zeros(1, 1, dtype=F64)], 1)
    one_step = rewards + 0.9 * next_values - values
    torch.testing.assert_close(returns.gae(rewards, values, mask, gamma=0.9, lam=0.0), one_step)


@given(LENGTHS, st.integers(0, 10**6), UNIT, UNIT)
def test_forward_view_equals_the_recursion(lengths, seed, gamma, lam):
    """Sum and recursion agree on the same TD errors, padded NaNs and empty rows included."""
    rewards, values, mask = draw(lengths, seed)
    td_errors = returns.gae(rewards, values, mask, gamma=gamma, lam=0.0).masked_fill(~mask, NAN)
    got = returns.forward_view(td_errors, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(got, returns.gae(rewards, values, mask, gamma=gamma, lam=lam), rtol=0, atol=1e-11)


def test_kl_shaped_rewards_subtract_tau_log_ratio():
    rewards, logp, logq, _ = draw([6, 6], count=3)
    torch.testing.assert_close(returns.kl_shaped_rewards(rewards, logp, logq, 0.3), rewards - 0.3 * logp + 0.3 * logq)


def test_retrace_weights_are_importance_ratios_cut_at_one():
    got = returns.retrace_weights(torch.tensor([0.2, 0.9, 0.5]).log(), torch.tensor([0.4, 0.3, 0.5]).log())
    torch.testing.assert_close(got, torch.tensor([0.5, 1.0, 1.0]))


@given(LENGTHS, st.integers(0, 10**6))
def test_whitened_entries_have_mean_zero_and_deviation_one(lengths, seed):
    x, mask = draw(lengths, seed, count=1)
    white = returns.whiten(x, mask)
    assert (white[~mask] == 0).all() and torch.isfinite(white).all()
    if mask.sum() > 1:
        assert white[mask].mean().item() == pytest.approx(0, abs=1e-9)
        assert white[mask].std(correction=0).item() == pytest.approx(1, abs=1e-5)
        assert torch.equal(white[mask].argsort(), x[mask].argsort())


def test_whitening_equal_entries_gives_zero_and_no_nan():
    x = torch.full((2, 3), 0.25)
    assert (returns.whiten(x, torch.ones(2, 3, dtype=torch.bool)) == 0).all()
