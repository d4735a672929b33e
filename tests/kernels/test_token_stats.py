"""token_stats against an oracle in plain Python floats: values, gradients, masks, forbidden tokens, tiny KLs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels import token_stats

F64 = torch.float64
INF = float("inf")
NAN = float("nan")


def log_softmax(row, temperature):
    scaled = [z / temperature for z in row]
    top = max(scaled)
    log_total = math.log(math.fsum(math.exp(z - top) for z in scaled))
    return [z - top - log_total for z in scaled]


def oracle_row(row, token, ref, temperature):
    """(log p(token), entropy, log q(token), KL) of one position, by exact summation over allowed tokens."""
    logp, logq = log_softmax(row, temperature), log_softmax(ref, temperature)
    allowed = [(lp, lq) for lp, lq in zip(logp, logq, strict=True) if lp > -INF]
    entropy = -math.fsum(math.exp(lp) * lp for lp, _ in allowed)
    kl = INF if any(lq == -INF for _, lq in allowed) else math.fsum(math.exp(lp) * (lp - lq) for lp, lq in allowed)
    return logp[token], entropy, logq[token], kl


def oracle(logits, tokens, ref, temperature=1.0):
    vocab = logits.shape[-1]
    rows = zip(logits.double().reshape(-1, vocab).tolist(), tokens.flatten().tolist(),
               ref.double().reshape(-1, vocab).tolist(), strict=True)  # fmt: skip
    out = [oracle_row(row, token, ref_row, temperature) for row, token, ref_row in rows]
    return [torch.tensor([r[i] for r in out], dtype=F64).reshape(tokens.shape) for i in range(4)]


def draw(shape, vocab, dtype=F64, scale=2.0):
    logits, ref = (scale * torch.randn(*shape, vocab, dtype=F64) for _ in range(2))
    return logits.to(dtype), torch.randint(vocab, shape), ref.to(dtype)


def assert_matches(stats, expected, **tolerance):
    for name, want in zip(stats._fields, expected, strict=True):
        got = getattr(stats, name)
        torch.testing.assert_close(got.double(), want, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 5), (1, 1), (2, 3, 4), (0,), (0, 3)])
@pytest.mark.parametrize("vocab", [1, 2, 37])
def test_any_leading_shape_matches_the_oracle(shape, vocab):
    logits, tokens, ref = draw(shape, vocab)
    stats = token_stats(logits, tokens, ref, temperature=0.7)
    assert all(x.shape == shape for x in stats)
    assert_matches(stats, oracle(logits, tokens, ref, 0.7), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_low_precision_inputs_give_accurate_float32_results(dtype, temperature):
    logits, tokens, ref = draw((3, 5), 37, dtype)
    stats = token_stats(logits, tokens, ref, temperature=temperature)
    assert all(x.dtype == torch.float32 for x in stats)
    assert_matches(stats, oracle(logits, tokens, ref, temperature), rtol=2e-6, atol=2e-6)


def test_without_a_reference_there_is_no_kl():
    logits, tokens, ref = draw((4,), 5)
    alone, both = token_stats(logits, tokens), token_stats(logits, tokens, ref)
    assert alone.ref_logprob is None and alone.kl is None
    assert torch.equal(alone.logprob, both.logprob) and torch.equal(alone.entropy, both.entropy)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_common_offset_neither_overflows_nor_changes_the_distribution(backend, temperature, dtype, offset):
    """… at any temperature: divided by 0.7 first, logits near 1000 would round to 6e-5. By the oracle, since the other
    backends' tests ask no more of offsets than what `reference` does in the same dtype."""
    logits, tokens, ref = draw((6,), 9, torch.bfloat16)  # few mantissa bits, so that adding 1000 in float32 is exact
    logits, ref = (x.float().mul(64).round().div(64).to(dtype) for x in (logits, ref))
    shifted = token_stats(logits + offset, tokens, ref - offset, temperature=temperature, backend=backend)
    assert_matches(shifted, oracle(logits, tokens, ref, temperature), rtol=3e-6, atol=3e-6)


def forbid(logits, ref, where):
    logits, ref = logits.clone(), ref.clone()
    if where in ("both", "policy"):
        logits[..., 1] = -INF
    if where in ("both", "reference"):
        ref[..., 1] = -INF
    return logits, ref


@pytest.mark.parametrize("where", ["both", "policy", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_forbidden_tokens_have_the_oracle_s_value(where, dtype):
    """p = 0 contributes nothing; p > 0 with q = 0 is an infinite KL."""
    logits, tokens, ref = draw((5,), 6, dtype)
    logits, ref = forbid(logits, ref, where)
    expected = oracle(logits, tokens, ref)
    assert torch.isinf(expected[3]).all() == (where == "reference")
    assert_matches(token_stats(logits, tokens, ref), expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("where", ["both", "policy"])
def test_forbidden_tokens_get_no_gradient_and_spoil_no_other(where):
    logits, tokens, ref = draw((3,), 6)
    tokens = torch.tensor([0, 2, 5])
    w = torch.randn(3, 3, dtype=F64)
    ref = forbid(logits, ref, where)[1]
    allowed = torch.tensor([0, 2, 3, 4, 5])

    def weighted(finite):
        full = torch.full((3, 6), -INF, dtype=F64).index_copy(1, allowed, finite)
        stats = token_stats(full, tokens, ref)
        return (w * torch.stack([stats.logprob, stats.entropy, stats.kl])).sum()

    assert torch.autograd.gradcheck(weighted, logits[:, allowed].requires_grad_())
    full = forbid(logits.detach(), ref, "policy")[0].requires_grad_()
    stats = token_stats(full, tokens, ref)
    (w * torch.stack([stats.logprob, stats.entropy, stats.kl])).sum().backward()
    assert torch.isfinite(full.grad).all() and (full.grad[:, 1] == 0).all()


def test_an_infinite_kl_leaves_other_rows_and_other_statistics_finite():
    logits, tokens, ref = draw((3,), 4)
    ref[1, 2] = -INF
    leaf = logits.requires_grad_()
    stats = token_stats(leaf, tokens, ref)
    (only_others,) = torch.autograd.grad(stats.kl[[0, 2]].sum(), leaf, retain_graph=True)
    (statistics,) = torch.autograd.grad((stats.logprob + stats.entropy).sum(), leaf)
    assert stats.kl[1] == INF
    assert torch.isfinite(only_others[[0, 2]]).all() and torch.isfinite(statistics).all()


@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_masked_entries_reach_neither_results_nor_gradients(poison):
    """Whatever the masked rows and tokens hold, the rest is computed as if they had been removed."""
    logits, tokens, ref = draw((2, 4), 7)
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    want = oracle(logits[mask], tokens[mask], ref[mask])
    logits[~mask], ref[~mask], tokens[~mask] = poison, poison, -100
    leaf = logits.requires_grad_()
    stats = token_stats(leaf, tokens, ref, mask=mask)
    for got, exact in zip(stats, want, strict=True):
        torch.testing.assert_close(got[mask], exact)
        assert (got[~mask] == 0).all()
    (stats.logprob + stats.entropy + stats.kl).sum().backward()
    assert (leaf.grad[~mask] == 0).all() and (leaf.grad[mask] != 0).all()


def test_an_all_masked_batch_is_zero_with_zero_gradient():
    logits = torch.full((3, 5), NAN, requires_grad=True)
    stats = token_stats(logits, torch.full((3,), -100), logits.detach(), mask=torch.zeros(3, dtype=torch.bool))
    sum(x.sum() for x in stats).backward()
    assert all((x == 0).all() for x in stats) and (logits.grad == 0).all()


def test_a_token_that_underflows_gets_no_gradient_whatever_its_logit():
    """finfo.min in place of −inf: times an upstream gradient above 1 it would overflow, and 0 · inf is NaN."""
    logits = torch.tensor([[0.0, 1.0, torch.finfo(torch.float32).min]], requires_grad=True)
    (4 * token_stats(logits, torch.tensor([0]), backend="reference").entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 2] == 0


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.05, 3.0])  # KLs on both sides of |log p/q| = 1, where the formula switches
def test_joint_gradient_for_random_upstream_gradients(temperature, scale):
    logits, tokens, ref = draw((2, 3), 5, scale=scale)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    w = torch.randn(3, 2, 3, dtype=F64)

    def weighted(x):
        stats = token_stats(x, tokens, ref, temperature=temperature, mask=mask)
        return (w * torch.stack([stats.logprob, stats.entropy, stats.kl])).sum()

    assert torch.autograd.gradcheck(weighted, logits.requires_grad_())


def test_no_gradient_reaches_the_reference():
    logits, tokens, ref = draw((4,), 5)
    logits.requires_grad_(), ref.requires_grad_()
    stats = token_stats(logits, tokens, ref)
    assert not stats.ref_logprob.requires_grad
    (stats.logprob + stats.kl).sum().backward()
    assert ref.grad is None and logits.grad.abs().sum() > 0


@given(st.integers(0, 2**31), st.integers(2, 64), st.floats(0, 5), st.floats(1e-5, 5e-4))
def test_float32_keeps_tiny_kls(seed, vocab, scale, size):
    """KLs around 1e-8 to 1% relative error and never negative: Σ p log(p/q) in float32 would lose them entirely."""
    rng = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(4, vocab, generator=rng)
    ref = logits + size * torch.randn(4, vocab, generator=rng)
    tokens = torch.zeros(4, dtype=torch.long)
    kl = token_stats(logits, tokens, ref).kl
    exact = oracle(logits, tokens, ref)[3]
    assert (kl >= 0).all()
    assert ((kl - exact).abs() <= 0.01 * exact.clamp_min(1e-8)).all()


@given(st.integers(0, 2**31), st.integers(1, 50), st.floats(0.0, 30.0))
def test_kl_is_never_negative_and_zero_for_equal_distributions(seed, vocab, scale):
    rng = torch.Generator().manual_seed(seed)
    logits, ref = (scale * torch.randn(8, vocab, generator=rng) for _ in range(2))
    tokens = torch.zeros(8, dtype=torch.long)
    assert (token_stats(logits, tokens, ref).kl >= 0).all()
    assert (token_stats(logits, tokens, logits.clone()).kl == 0).all()


BAD = {
    "tokens of another length": (dict(tokens=torch.zeros(4, dtype=torch.long)), ValueError, "tokens must have the"),
    "mask of another shape": (dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, "mask must have the shape"),
    "reference of another vocabulary": (dict(ref_logits=torch.zeros(3, 6)), ValueError, "ref_logits must have"),
    "float mask": (dict(mask=torch.ones(3)), TypeError, "mask must be boolean"),
    "float tokens": (dict(tokens=torch.tensor([0.0, 1.5, 2.0])), TypeError, "tokens must hold integer"),
    "complex tokens": (dict(tokens=torch.ones(3, dtype=torch.cfloat)), TypeError, "tokens must hold integer"),
    "boolean tokens": (dict(tokens=torch.ones(3, dtype=torch.bool)), TypeError, "tokens must hold integer"),
    "token too large": (dict(tokens=torch.tensor([0, 5, 1])), ValueError, "tokens must lie in"),
    "negative token, not masked": (dict(tokens=torch.tensor([0, -100, 1])), ValueError, "tokens must lie in"),
    "temperature 0": (dict(temperature=0.0), ValueError, "temperature"),
    "negative temperature": (dict(temperature=-1.0), ValueError, "temperature"),
    "NaN temperature": (dict(temperature=NAN), ValueError, "temperature"),
    "unknown backend": (dict(backend="cuda"), ValueError, "backend"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_raises_an_error_that_names_the_argument(change, error, message):
    good = dict(logits=torch.zeros(3, 5), tokens=torch.tensor([0, 1, 4]), ref_logits=torch.zeros(3, 5))
    token_stats(**good)
    with pytest.raises(error, match=message):
        token_stats(**(good | change))
