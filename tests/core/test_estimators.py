"""k1, k2, k3 by enumeration on a categorical: what they estimate as values, and what they descend as losses."""

import pytest
import torch

from klq_edu.core.estimators import k1, k2, k3

F64 = torch.float64
V = 9


def policies(seed=0):
    """(logits of π, with gradient; log π_b)."""
    rng = torch.Generator().manual_seed(seed)
    logits, ref = (torch.randn(V, generator=rng, dtype=F64) for _ in range(2))
    return logits.requires_grad_(), ref.log_softmax(-1)


def expectation(k, logits, logq):
    """E_{a~π}[k(ℓ)] with the samples held fixed: gradient flows through log π only, as in a training loss."""
    logp = logits.log_softmax(-1)
    return (logp.exp().detach() * k(logp - logq)).sum()


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def grad(value, logits):
    return torch.autograd.grad(value, logits)[0]


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_values_and_k2_is_not(seed):
    logits, logq = policies(seed)
    exact = kl(logits.log_softmax(-1), logq)
    for k in (k1, k3):
        torch.testing.assert_close(expectation(k, logits, logq), exact)
    assert (expectation(k2, logits, logq) - exact).abs() > 0.01 * exact


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_k1_has_zero_expected_gradient(seed):
    logits, logq = policies(seed)
    got = grad(expectation(k1, logits, logq), logits)
    torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_k2_descends_the_reverse_kl(seed):
    logits, logq = policies(seed)
    want = grad(kl(logits.log_softmax(-1), logq), logits)
    torch.testing.assert_close(grad(expectation(k2, logits, logq), logits), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("seed", range(3))
def test_as_a_loss_k3_descends_the_forward_kl(seed):
    """Not the KL it estimates: the gradient of k3 is that of D(π_b ‖ π)."""
    logits, logq = policies(seed)
    got = grad(expectation(k3, logits, logq), logits)
    torch.testing.assert_close(got, grad(kl(logq, logits.log_softmax(-1)), logits), rtol=1e-10, atol=1e-14)
    assert not torch.allclose(got, grad(kl(logits.log_softmax(-1), logq), logits), rtol=0.01)


def test_k2_and_k3_are_never_negative_and_agree_with_kl_to_second_order():
    ratio = torch.linspace(-5, 5, 101)
    assert (k2(ratio) >= 0).all() and (k3(ratio) >= 0).all() and (k1(ratio) < 0).any()
    small = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(k3(small), k2(small), rtol=1e-3, atol=0)
