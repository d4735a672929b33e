"""PPO-clip, PPO-penalty and the value loss against scalar oracles and enumeration; masks; errors."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_edu.core import objectives
from klq_edu.core.objectives import ppo_clip_loss, ppo_penalty_loss, value_loss
from klq_kernels import reference

F64 = torch.float64
NAN = float("nan")


def draw(shape=(3, 5), seed=0, count=3):
    rng = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=rng, dtype=F64) for _ in range(count)]
    return *tensors, torch.rand(shape, generator=rng) < 0.7


def exact(x):
    """One unmasked token as a tensor, with gradient."""
    return torch.tensor([x], dtype=F64, requires_grad=True)


ONE = torch.tensor([True])


def test_klq_loss_has_one_definition():
    assert objectives.klq_loss is reference.klq_loss and objectives.masked_mean is reference.masked_mean


@given(st.integers(0, 10**6), st.floats(0.05, 0.9))
def test_ppo_clip_is_the_mean_of_the_smaller_gain(seed, clip):
    logp, old, advantages, mask = draw(seed=seed)
    terms = []
    for lp, lo, a in zip(logp[mask].tolist(), old[mask].tolist(), advantages[mask].tolist(), strict=True):
        ratio = math.exp(lp - lo)
        terms.append(-min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
    want = math.fsum(terms) / max(len(terms), 1)
    assert ppo_clip_loss(logp, old, advantages, mask, clip=clip).item() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.9, 1.0, 1.1, 2.0])
def test_clipping_stops_the_gradient_only_in_the_direction_already_taken(advantage, ratio):
    """Beyond 1 ± clip the gradient is 0 if the advantage wants to go further, and −ρÂ if it wants to come back."""
    logp = exact(math.log(ratio))
    ppo_clip_loss(logp, torch.zeros(1, dtype=F64), torch.tensor([advantage], dtype=F64), ONE, clip=0.2).backward()
    stopped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert logp.grad.item() == pytest.approx(0.0 if stopped else -ratio * advantage)


def categorical(seed=0, vocab=7):
    """(logits of π with gradient, log π_old, advantages) over one state's tokens."""
    rng = torch.Generator().manual_seed(seed)
    logits, old, advantages = (torch.randn(vocab, generator=rng, dtype=F64) for _ in range(3))
    return logits.requires_grad_(), old.log_softmax(-1), advantages


def penalised(logits, old, advantages, coef):
    """−E_π[Â] + coef · KL(π ‖ π_old), exactly."""
    logp = logits.log_softmax(-1)
    return (logp.exp() * (-advantages + coef * (logp - old))).sum()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("given_kl", [True, False])
def test_ppo_penalty_is_unbiased_in_value_and_gradient(seed, given_kl):
    """Enumerating a ~ π_old, both forms give −E_π[Â] + coef · KL(π ‖ π_old): not the forward KL, and no k1."""
    logits, old, advantages = categorical(seed)
    want = torch.autograd.grad(penalised(logits, old, advantages, 0.3), logits)[0]
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - old)).sum().expand(1) if given_kl else None
    samples = [
        ppo_penalty_loss(logp[a : a + 1], old[a : a + 1], advantages[a : a + 1], ONE, coef=0.3, kl=kl) for a in range(7)
    ]
    value = (old.exp() * torch.stack(samples)).sum()
    torch.testing.assert_close(value, penalised(logits, old, advantages, 0.3))
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], want)


def test_the_sampled_penalty_is_never_negative_and_zero_at_the_old_policy():
    logp, old, _, _ = draw()
    everywhere, nothing = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, 5, dtype=F64)
    for lp, lo in zip(logp.flatten(), old.flatten(), strict=True):
        assert ppo_penalty_loss(lp[None], lo[None], torch.zeros(1, dtype=F64), ONE, coef=1.0) > 0
    assert ppo_penalty_loss(old, old, nothing, everywhere, coef=1.0) == 0


@given(st.integers(0, 10**6), st.floats(0.05, 2))
def test_value_loss_is_half_the_worse_square(seed, clip):
    values, targets, old, mask = draw(seed=seed)
    plain, clipped = [], []
    for v, g, o in zip(values[mask].tolist(), targets[mask].tolist(), old[mask].tolist(), strict=True):
        plain.append((v - g) ** 2 / 2)
        clipped.append(max((v - g) ** 2, (min(max(v, o - clip), o + clip) - g) ** 2) / 2)
    n = max(len(plain), 1)
    assert value_loss(values, targets, mask).item() == pytest.approx(math.fsum(plain) / n, abs=1e-12)
    got = value_loss(values, targets, mask, clip=clip, old_values=old)
    assert got.item() == pytest.approx(math.fsum(clipped) / n, abs=1e-12)


def test_value_clipping_stops_the_gradient_only_when_the_clamped_value_is_worse():
    """V beyond V_old ± clip: on the way to G the clamped square is worse and constant; past G the plain one is."""
    for value, target, gradient in [(1.0, 2.0, 0.0), (1.0, -2.0, 3.0), (0.1, 2.0, -1.9)]:
        v = exact(value)
        value_loss(v, torch.tensor([target]).double(), ONE, clip=0.2, old_values=torch.zeros(1).double()).backward()
        assert v.grad.item() == pytest.approx(gradient)


# name -> (loss of four tensors and a mask, the arguments that learn)
LOSSES = {
    "ppo_clip": (lambda a, b, c, d, m: ppo_clip_loss(a, b, c, m), (0,)),
    "ppo_penalty, sampled": (lambda a, b, c, d, m: ppo_penalty_loss(a, b, c, m, coef=0.3), (0,)),
    "ppo_penalty, exact": (lambda a, b, c, d, m: ppo_penalty_loss(a, b, c, m, coef=0.3, kl=d), (0, 3)),
    "value": (lambda a, b, c, d, m: value_loss(a, b, m), (0,)),
    "value, clipped": (lambda a, b, c, d, m: value_loss(a, b, m, clip=0.2, old_values=c), (0,)),
}
each_loss = pytest.mark.parametrize("loss, learns", LOSSES.values(), ids=LOSSES.keys())


def value_and_gradients(loss, tensors, mask):
    """The loss and its gradient for each of four tensors, None where there is none."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves, mask)
    return value.detach(), torch.autograd.grad(value, leaves, allow_unused=True)


@each_loss
@pytest.mark.parametrize("poison", [NAN, float("inf"), -float("inf")])
def test_masked_entries_are_as_good_as_removed(loss, learns, poison):
    *tensors, mask = draw(count=4)
    dirty, dirty_grads = value_and_gradients(loss, [x.masked_fill(~mask, poison) for x in tensors], mask)
    clean, clean_grads = value_and_gradients(loss, [x[mask] for x in tensors], mask[mask])
    torch.testing.assert_close(dirty, clean)
    for i in learns:
        torch.testing.assert_close(dirty_grads[i][mask], clean_grads[i])
        assert (dirty_grads[i][~mask] == 0).all() and clean_grads[i].abs().sum() > 0


@each_loss
def test_gradients_flow_to_what_learns_and_to_nothing_else(loss, learns):
    *tensors, mask = draw(count=4)
    _, grads = value_and_gradients(loss, tensors, mask)
    assert tuple(i for i, g in enumerate(grads) if g is not None) == learns


@each_loss
@pytest.mark.parametrize("shape", [(2, 3), (0,), (0, 4)])
def test_nothing_unmasked_is_a_zero_loss_with_zero_gradients(loss, learns, shape):
    tensors = [torch.full(shape, NAN, dtype=F64) for _ in range(4)]
    value, grads = value_and_gradients(loss, tensors, torch.zeros(shape, dtype=torch.bool))
    assert value == 0 and all((grads[i] == 0).all() for i in learns)


@each_loss
def test_a_float_mask_is_refused(loss, learns):
    *tensors, mask = draw(count=4)
    with pytest.raises(TypeError, match="mask must be boolean"):
        loss(*tensors, mask.double())


A, B, C, M = draw()
BAD = {
    "clip 0": (lambda: ppo_clip_loss(A, B, C, M, clip=0.0), "clip must be"),
    "coef 0": (lambda: ppo_penalty_loss(A, B, C, M, coef=0.0), "coef must be"),
    "coef NaN": (lambda: ppo_penalty_loss(A, B, C, M, coef=NAN), "coef must be"),
    "value clip 0": (lambda: value_loss(A, B, M, clip=0.0, old_values=C), "clip must be"),
    "clip without old values": (lambda: value_loss(A, B, M, clip=0.2), "needs old_values"),
    "old_logprobs broadcast": (lambda: ppo_clip_loss(A, B[:, :1], C, M), "old_logprobs must have"),
    "advantages broadcast": (lambda: ppo_clip_loss(A, B, C[:1], M), "advantages must have"),
    "mask broadcast": (lambda: ppo_penalty_loss(A, B, C, M[:1], coef=1.0), "mask must have"),
    "kl broadcast": (lambda: ppo_penalty_loss(A, B, C, M, coef=1.0, kl=C[:, :1]), "kl must have"),
    "returns broadcast": (lambda: value_loss(A, B[:1], M), "returns must have"),
    "old_values broadcast": (lambda: value_loss(A, B, M, clip=0.2, old_values=C[:1]), "old_values must have"),
}


@pytest.mark.parametrize("call, message", BAD.values(), ids=BAD.keys())
def test_bad_input_raises_an_error_that_names_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
