"""klq_loss, all five variants, against the formulas in Python scalars: values, gradients, masks, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels.loss import LOSSES, VARIANTS, klq_terms
from klq_kernels.reference import klq_loss
from klq_kernels.types import LossInputs, LossSettings

F64 = torch.float64
TAU = 0.6
THRESHOLDS = dict(clip=0.3, log_ratio_clip=0.4, delta=0.5)
TENSORS = ("logprobs", "ref_logprobs", "values", "targets", "old_logprobs", "old_values")


def clamp(x, low, high):
    return min(max(x, low), high)


def oracle(loss, logp, logq, v, target, old_logp, old_v, *, clip, log_ratio_clip, delta, tau=TAU):
    """One token's loss, written from the formulas of the theory page."""
    ratio, old_ratio = logp - logq, old_logp - logq
    q, q_old = v + tau * ratio, old_v + tau * old_ratio
    e = abs(q - target)
    plain = e**2
    value = (clamp(q, q_old - clip, q_old + clip) - target) ** 2
    near = (v + tau * clamp(ratio, old_ratio - log_ratio_clip, old_ratio + log_ratio_clip) - target) ** 2
    return {
        "l2": plain / 2,
        "huber": plain / 2 if e <= delta else delta * (e - delta / 2),
        "value_clipped": max(plain, value) / 2,
        "ratio_clipped": max(plain, near) / 2,
        "double_clipped": max(plain, value, near) / 2,
    }[loss]


def draw(shape=(4, 6), seed=0):
    rng = torch.Generator().manual_seed(seed)
    batch = {name: torch.randn(shape, generator=rng, dtype=F64) for name in TENSORS}
    return batch | {"mask": torch.rand(shape, generator=rng) < 0.7}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)])
def test_every_variant_matches_its_formula(loss, shape):
    batch = draw(shape)
    rows = list(zip(*(batch[name].flatten().tolist() for name in TENSORS), strict=True))
    terms = torch.tensor([oracle(loss, *row, **THRESHOLDS) for row in rows], dtype=F64).reshape(shape)
    want = torch.where(batch["mask"], terms, 0.0)
    got = klq_loss(**batch, tau=TAU, loss=loss, **THRESHOLDS, reduction="none")
    torch.testing.assert_close(got, want)
    mean = want.sum() / batch["mask"].sum()
    torch.testing.assert_close(klq_loss(**batch, tau=TAU, loss=loss, **THRESHOLDS), mean)


def test_the_thresholds_bind_on_some_tokens_and_not_on_others():
    """Guards the two tests around it: on this data every variant takes both of its branches."""
    l2, *others = (klq_loss(**draw(), tau=TAU, loss=x, **THRESHOLDS, reduction="none")[draw()["mask"]] for x in LOSSES)
    for other in others:
        same = torch.isclose(l2, other)
        assert same.any() and not same.all()


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_for_random_upstream_gradients(loss):
    batch, weight = draw(), torch.randn(4, 6, dtype=F64)

    def weighted(logprobs, values):
        changed = batch | {"logprobs": logprobs, "values": values}
        return (weight * klq_loss(**changed, tau=TAU, loss=loss, **THRESHOLDS, reduction="none")).sum()

    leaves = batch["logprobs"].clone().requires_grad_(), batch["values"].clone().requires_grad_()
    assert torch.autograd.gradcheck(weighted, leaves)


def derivatives(function, inputs):
    """Autograd's derivatives of a sum over tokens in the log-probs and the values, zero where there is no such link."""
    leaves = [x.clone().requires_grad_() for x in (inputs.logprobs, inputs.values)]
    total = function(inputs._replace(logprobs=leaves[0], values=leaves[1])).sum()
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize("loss", VARIANTS)
def test_the_table_s_derivatives_are_those_of_autograd(loss):
    """Each candidate's error, and the loss made of the worst, inside and outside every clamp and threshold, whatever
    entries the table has. Each candidate is the worst somewhere: a clamp that does not bind never is."""
    variant, settings = VARIANTS[loss], LossSettings(TAU, loss, **THRESHOLDS)
    inputs = LossInputs(**(draw((400,)) | {"mask": torch.ones(400, dtype=torch.bool)}))
    candidates = [make(inputs, settings) for make in variant.candidates]
    for make, candidate in zip(variant.candidates, candidates, strict=True):
        want = derivatives(lambda x, make=make: make(x, settings).error, inputs)
        torch.testing.assert_close(candidate[1:], want)
    worst = torch.stack([c.error.abs() for c in candidates]).argmax(0)
    assert worst.unique().tolist() == list(range(len(candidates)))

    def terms(x):
        return klq_loss(**x._asdict(), **settings._asdict(), reduction="none")

    total, *got = klq_terms(inputs, settings)
    torch.testing.assert_close(total, terms(inputs).sum())
    torch.testing.assert_close(tuple(got), derivatives(terms, inputs))


@pytest.mark.parametrize("loss", ["value_clipped", "ratio_clipped", "double_clipped"])
def test_of_equally_bad_candidates_the_plain_one_counts(loss):
    """Q = ℓ = 1 comes from −1; both clamps leave 0, and Ĝ = ½ is as far from that as from Q: ½e² keeps its gradient."""
    x = dict(logprobs=1.0, ref_logprobs=0.0, values=0.0, targets=0.5, old_logprobs=-1.0, old_values=0.0)
    inputs = LossInputs(mask=torch.tensor([True]), **{k: torch.tensor([v], dtype=F64) for k, v in x.items()})
    settings = LossSettings(1.0, loss, clip=1.0, log_ratio_clip=1.0)
    by_autograd = derivatives(lambda x: klq_loss(**x._asdict(), **settings._asdict()), inputs)
    assert klq_terms(inputs, settings)[1:] == by_autograd == (0.5, 0.5)


def test_l2_gradient_is_the_error_times_tau_and_one():
    batch = draw()
    logp, v = batch["logprobs"].requires_grad_(), batch["values"].requires_grad_()
    klq_loss(**batch, tau=TAU).backward()
    error = (TAU * (logp - batch["ref_logprobs"]) + v - batch["targets"]).detach()
    want = torch.where(batch["mask"], error, 0.0) / batch["mask"].sum()
    torch.testing.assert_close(v.grad, want)
    torch.testing.assert_close(logp.grad, TAU * want)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_variant_carries_the_half(loss):
    """With thresholds too wide to bind each variant is ½e²."""
    batch = draw()
    wide = dict(clip=1e3, log_ratio_clip=1e3, delta=1e3)
    torch.testing.assert_close(klq_loss(**batch, tau=TAU, loss=loss, **wide), klq_loss(**batch, tau=TAU))


@given(st.integers(0, 10**6), st.floats(0.01, 2), st.floats(0.01, 2), st.floats(0.01, 3))
def test_double_clipped_is_the_most_pessimistic(seed, clip, log_ratio_clip, tau):
    def terms(loss):
        return klq_loss(
            **draw(seed=seed), tau=tau, loss=loss, clip=clip, log_ratio_clip=log_ratio_clip, reduction="none"
        )

    worst = torch.maximum(terms("value_clipped"), terms("ratio_clipped"))
    assert torch.equal(terms("double_clipped"), worst) and (worst >= terms("l2")).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_masked_entries_of_every_argument_are_ignored(loss, poison):
    """Loss and gradient equal those of the batch with the masked tokens removed."""
    batch, mask = draw(), draw()["mask"]
    dirty = {k: v.masked_fill(~mask, poison) if k != "mask" else v for k, v in batch.items()}
    kept = {k: v[mask] for k, v in batch.items()}
    grads = []
    for args in (dirty, kept):
        args["logprobs"].requires_grad_(), args["values"].requires_grad_()
        value = klq_loss(**args, tau=TAU, loss=loss, **THRESHOLDS)
        grads.append((value.detach(), *torch.autograd.grad(value, (args["logprobs"], args["values"]))))
    for with_mask, indexed in zip(*grads, strict=True):
        torch.testing.assert_close(with_mask[mask] if with_mask.dim() else with_mask, indexed)
        assert with_mask.dim() == 0 or (with_mask[~mask] == 0).all()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (0, 4)])
def test_nothing_unmasked_is_a_zero_loss_with_zero_gradients(loss, shape):
    batch = {name: torch.full(shape, float("nan"), dtype=F64) for name in TENSORS}
    leaves = batch["logprobs"].requires_grad_(), batch["values"].requires_grad_()
    value = klq_loss(**batch, mask=torch.zeros(shape, dtype=torch.bool), tau=TAU, loss=loss, **THRESHOLDS)
    value.backward()
    assert value == 0 and all((x.grad == 0).all() for x in leaves)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_gradient_to_reference_targets_or_old_quantities(loss):
    batch = draw()
    leaves = {name: batch[name].requires_grad_() for name in TENSORS}
    klq_loss(**batch, tau=TAU, loss=loss, **THRESHOLDS).backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == {"logprobs", "values"}


@pytest.mark.parametrize("dtype, want", [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)])
def test_the_result_is_float64_for_float64_else_float32(dtype, want):
    batch = {k: v.to(dtype) if k != "mask" else v for k, v in draw().items()}
    assert klq_loss(**batch, tau=TAU).dtype == want


MISSING = [
    ("huber", "delta"), ("value_clipped", "clip"), ("value_clipped", "old_values"), ("value_clipped", "old_logprobs"),
    ("ratio_clipped", "log_ratio_clip"), ("ratio_clipped", "old_logprobs"), ("double_clipped", "clip"),
    ("double_clipped", "log_ratio_clip"), ("double_clipped", "old_values"), ("double_clipped", "old_logprobs"),
]  # fmt: skip


@pytest.mark.parametrize("loss, name", MISSING)
def test_a_missing_quantity_is_named(loss, name):
    with pytest.raises(ValueError, match=f"needs {name}"):
        klq_loss(**(draw() | THRESHOLDS | {name: None}), tau=TAU, loss=loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_variant_asks_for_no_more_than_its_formula_reads(loss):
    """Thresholds and old quantities of other variants may be left out."""
    needed, extra = {name for x, name in MISSING if x == loss}, ("clip", "log_ratio_clip", "delta", *TENSORS[-2:])
    given = draw() | THRESHOLDS
    few = {name: x for name, x in given.items() if name not in extra or name in needed}
    torch.testing.assert_close(klq_loss(**few, tau=TAU, loss=loss), klq_loss(**given, tau=TAU, loss=loss))


@pytest.mark.parametrize("loss, name", [x for x in MISSING if x[1] in THRESHOLDS])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_threshold_that_is_not_positive_is_named(loss, name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        klq_loss(**(draw() | THRESHOLDS | {name: value}), tau=TAU, loss=loss)


@pytest.mark.parametrize("tau", [0.0, -0.1, float("nan"), float("inf")])
def test_tau_must_be_positive_and_finite(tau):
    with pytest.raises(ValueError, match="tau must be"):
        klq_loss(**draw(), tau=tau)


@pytest.mark.parametrize("change", [dict(loss="l1"), dict(reduction="sum")])
def test_an_unknown_choice_is_named(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} must be"):
        klq_loss(**draw(), tau=TAU, **change)


@pytest.mark.parametrize("name", [*TENSORS[1:], "mask"])
def test_a_tensor_of_another_shape_is_named(name):
    batch = draw()
    batch[name] = batch[name][:, :1]  # [B, 1] would broadcast silently
    with pytest.raises(ValueError, match=f"{name} must have the shape of logprobs"):
        klq_loss(**batch, tau=TAU, loss="value_clipped", **THRESHOLDS)


def test_a_float_mask_is_refused():
    batch = draw()
    with pytest.raises(TypeError, match="mask must be boolean"):
        klq_loss(**(batch | {"mask": batch["mask"].double()}), tau=TAU)
