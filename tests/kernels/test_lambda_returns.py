"""lambda_returns against the forward view in plain Python: values, identities, masks, dtypes, errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels import lambda_returns

F64 = torch.float64
T = 6
UNIT = st.floats(0, 1)
NAMES = ("rewards", "values", "logprobs", "ref_logprobs")


def oracle_row(r, v, logp, logq, c, *, tau, gamma, lam, alpha):
    """(Ĝ, Δ, δ) of one completion, Δ_t = Σ_k (γλ)^k c_{t+1}…c_{t+k} δ_{t+k} as a sum, not as the recursion."""
    n = len(r)
    q = [tau * (logp[t] - logq[t]) + v[t] for t in range(n)]
    td = [r[t] + gamma * (v[t + 1] if t + 1 < n else 0.0) - q[t] for t in range(n)]
    adv = [
        math.fsum((gamma * lam) ** (k - t) * math.prod(c[t + 1 : k + 1]) * td[k] for k in range(t, n)) for t in range(n)
    ]
    return [q[t] + alpha * adv[t] for t in range(n)], adv, td


def oracle(batch, lengths, **coefficients):
    """The three [B, T] results, row by row, zero after each length."""
    out = torch.zeros(3, len(lengths), T, dtype=F64)
    for row, n in enumerate(lengths):
        args = [batch[name][row, :n].tolist() for name in (*NAMES, "trace_weights")]
        out[:, row, :n] = torch.tensor(oracle_row(*args, **coefficients), dtype=F64)
    return out


def draw(lengths, seed=0, dtype=F64, poison=float("nan")):
    """A batch of completions of these lengths whose padding holds `poison` in every argument."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(T)[None, :] < torch.tensor(lengths)[:, None]
    batch = {name: torch.randn(mask.shape, generator=rng, dtype=F64) for name in NAMES}
    batch["trace_weights"] = torch.rand(mask.shape, generator=rng, dtype=F64)
    return {name: x.masked_fill(~mask, poison).to(dtype) for name, x in batch.items()} | {"mask": mask}


@given(
    lengths=st.lists(st.integers(0, T), min_size=1, max_size=4),
    seed=st.integers(0, 10**6),
    tau=st.floats(0.01, 5),
    gamma=UNIT,
    lam=UNIT,
    alpha=st.floats(0.01, 1),
    retrace=st.booleans(),
)
def test_recursion_equals_the_forward_view(lengths, seed, tau, gamma, lam, alpha, retrace):
    """Any lengths, coefficients and trace weights, NaN in every padded entry; rows of length 0 are zero."""
    batch = draw(lengths, seed)
    coefficients = dict(tau=tau, gamma=gamma, lam=lam, alpha=alpha)
    if not retrace:
        batch["trace_weights"] = torch.ones_like(batch["trace_weights"])
    want = oracle(batch, lengths, **coefficients)
    weights = batch if retrace else {k: v for k, v in batch.items() if k != "trace_weights"}
    torch.testing.assert_close(torch.stack(lambda_returns(**weights, **coefficients)), want, rtol=0, atol=1e-11)


@given(lengths=st.lists(st.integers(1, T), min_size=1, max_size=4), seed=st.integers(0, 10**6), gamma=UNIT, lam=UNIT)
def test_advantages_are_gae_on_kl_shaped_rewards(lengths, seed, gamma, lam):
    """Claim 1: PPO's recursion, with reward r − τ log π/π_b and bootstrapped values, gives Δ."""
    batch, tau = draw(lengths, seed), 0.3
    got = lambda_returns(*(batch[n] for n in (*NAMES, "mask")), tau=tau, gamma=gamma, lam=lam).advantages
    for row, n in enumerate(lengths):
        r, v, logp, logq = (batch[name][row, :n].tolist() for name in NAMES)
        tail = 0.0
        for t in reversed(range(n)):
            delta = (r[t] - tau * (logp[t] - logq[t])) + gamma * (v[t + 1] if t + 1 < n else 0) - v[t]
            tail = delta + gamma * lam * tail
            assert got[row, t].item() == pytest.approx(tail, abs=1e-12)


def test_undamped_undiscounted_targets_telescope():
    """λ = γ = α = 1: Ĝ_t = R − τ Σ_{k>t} log π/π_b, whatever the values are."""
    lengths, tau = [6, 3, 1], 0.7
    batch = draw(lengths)
    batch["rewards"] = torch.zeros(3, T, dtype=F64)
    batch["rewards"][range(3), [n - 1 for n in lengths]] = torch.tensor([2.0, -1.0, 0.5], dtype=F64)
    targets = lambda_returns(*(batch[n] for n in (*NAMES, "mask")), tau=tau, lam=1.0).targets
    ratio = (batch["logprobs"] - batch["ref_logprobs"]).nan_to_num(0.0)
    later = ratio.flip(1).cumsum(1).flip(1) - ratio
    want = batch["rewards"].sum(1, keepdim=True) - tau * later
    torch.testing.assert_close(targets, torch.where(batch["mask"], want, 0.0))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (0, 3), (3, 0)])
def test_smallest_shapes(shape):
    """Empty batches and zero or one token need no special case: with λ = 0 and V = 0, Δ = r − τℓ."""
    r, logp, logq = (torch.randn(shape, dtype=F64) for _ in range(3))
    out = lambda_returns(r, torch.zeros_like(r), logp, logq, torch.ones(shape, dtype=torch.bool), tau=0.5, lam=0.0)
    torch.testing.assert_close(out.advantages, r - 0.5 * (logp - logq))
    assert all(x.shape == shape for x in out)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_padding_never_reaches_a_result(poison):
    clean, dirty = draw([4, 0, 6, 1], poison=0.0), draw([4, 0, 6, 1], poison=poison)
    for a, b in zip(lambda_returns(**clean, tau=0.1), lambda_returns(**dirty, tau=0.1), strict=True):
        assert torch.equal(a, b) and (b[~dirty["mask"]] == 0).all()


def test_results_carry_no_gradient():
    batch = draw([6, 3])
    leaves = {k: v.requires_grad_() if v.dtype == F64 else v for k, v in batch.items()}
    assert not any(x.requires_grad for x in lambda_returns(**leaves, tau=0.1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_results_are_float64_for_float64_else_float32(dtype):
    batch = draw([6, 3], dtype=dtype)
    want = F64 if dtype == F64 else torch.float32
    assert {x.dtype for x in lambda_returns(**batch, tau=0.1)} == {want}
    batch["values"] = batch["values"].float()
    assert {x.dtype for x in lambda_returns(**batch, tau=0.1)} == {torch.float32}


def test_a_hole_in_the_mask_is_an_error_that_names_the_row():
    batch = draw([6, 6, 6])
    batch["mask"][1, 2] = False
    with pytest.raises(ValueError, match=r"mask must be right-padded.*row 1 is \[1, 1, 0, 1, 1, 1\]"):
        lambda_returns(**batch, tau=0.1)


@pytest.mark.parametrize(
    "name, value",
    [("tau", 0.0), ("tau", -1.0), ("tau", float("nan")), ("tau", float("inf")), ("gamma", -0.1), ("gamma", 1.1),
     ("gamma", float("nan")), ("lam", -0.1), ("lam", 1.1), ("alpha", 0.0), ("alpha", 1.1), ("alpha", float("nan")),
     ("backend", "tpu")],
)  # fmt: skip
def test_a_coefficient_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must"):
        lambda_returns(**draw([6, 3]), **({"tau": 0.1} | {name: value}))


@pytest.mark.parametrize("name", ["values", "logprobs", "ref_logprobs", "mask", "trace_weights"])
def test_a_tensor_of_another_shape_is_named(name):
    batch = draw([6, 3])
    batch[name] = batch[name][:, :-1]  # also catches the [B, T−1] log-prob of a shifted implementation
    with pytest.raises(ValueError, match=f"{name} must have the shape of rewards"):
        lambda_returns(**batch, tau=0.1)


def test_a_float_mask_and_flat_rewards_are_refused():
    batch = draw([6, 3])
    with pytest.raises(TypeError, match="mask must be boolean"):
        lambda_returns(**(batch | {"mask": batch["mask"].double()}), tau=0.1)
    with pytest.raises(ValueError, match=r"rewards must be \[B, T\]"):
        lambda_returns(**{k: v[0] for k, v in batch.items()}, tau=0.1)
