"""token_q and linear_token_q: Q_t = τ (log π − log π_b) + V beside the statistics, its value and its gradients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels import autograd, checks, linear_token_q, linear_token_stats, token_q, token_stats
from klq_kernels.loss import q_values

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of inf − inf
TRITON = pytest.mark.skipif(not checks._has_triton(), reason="Triton is not installed")
BACKENDS = ("torch", pytest.param("triton", marks=TRITON), "reference")
F32, F64, NAN, INF = torch.float32, torch.float64, float("nan"), float("inf")
OPS, STATS = (token_q, linear_token_q), {token_q: token_stats, linear_token_q: linear_token_stats}
PER_TOKEN = ("logits", "ref_logits", "hidden", "ref_hidden", "tokens", "values")
LEAVES = ("logits", "hidden", "weight", "bias", "values")
V, H, TAU = 33, 5, 0.3


@pytest.fixture(autouse=True)
def device(request):
    """What a test of the triton backend makes is on the GPU where there is one."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"):
        yield


def draw(op, shape=(2, 3), dtype=F32):
    """Inputs of either operation, all that it takes."""
    inputs = dict(tokens=torch.randint(V, shape), values=torch.randn(shape), tau=TAU, temperature=0.7)
    if op is token_q:
        inputs |= dict(logits=2 * torch.randn(*shape, V), ref_logits=2 * torch.randn(*shape, V))
    else:
        inputs |= dict(hidden=torch.randn(*shape, H), weight=torch.randn(V, H), bias=torch.randn(V))
        inputs |= dict(ref_hidden=torch.randn(*shape, H + 2), ref_weight=torch.randn(V, H + 2), ref_bias=torch.randn(V))
    return to(dtype, inputs)


def to(dtype, inputs):
    floats = {k for k, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    return {k: x.to(dtype) if k in floats else x for k, x in inputs.items()}


def poisoned(inputs, mask, poison):
    """Masked entries of every argument replaced by `poison`, those of the tokens by −100."""
    inputs = {k: x.clone() if k in PER_TOKEN else x for k, x in inputs.items()}
    for name in inputs.keys() & set(PER_TOKEN):
        inputs[name][~mask] = -100 if name == "tokens" else poison
    return inputs


def run(op, inputs, backend, upstream, **options):
    """(TokenStats, Q, {leaf: gradient of Σ u₀ Q + u₁ log-prob + u₂ entropy + u₃ KL})."""
    args = {k: x.detach() if torch.is_tensor(x) else x for k, x in inputs.items()}
    leaves = {k: args[k].requires_grad_() for k in LEAVES if k in args}
    stats, q = op(**args, **options, backend=backend)
    total = sum((u * x).sum() for u, x in zip(upstream, (q, stats.logprob, stats.entropy, stats.kl)))
    return stats.detached(), q.detach(), dict(zip(leaves, torch.autograd.grad(total, leaves.values())))


def assert_right(op, inputs, backend, upstream, mask=None, rtol=2e-5, atol=5e-6):
    """Values and gradients are those of the definition in float64, with masked tokens taken out."""
    stats, q, grads = run(op, inputs, backend, upstream, mask=mask)
    mask = torch.ones_like(inputs["tokens"], dtype=torch.bool) if mask is None else mask
    kept = to(F64, {k: x[mask] if k in PER_TOKEN else x for k, x in inputs.items()})
    args = {k: x.requires_grad_() if k in LEAVES else x for k, x in kept.items() if k not in ("tau", "values")}
    values = kept["values"].requires_grad_()
    want = STATS[op](**args, backend="reference")
    exact = TAU * (want.logprob - want.ref_logprob) + values
    u = [x[mask].double() for x in upstream]
    total = sum((x * y).sum() for x, y in zip(u, (exact, want.logprob, want.entropy, want.kl)))
    leaves = {k: values if k == "values" else args[k] for k in grads}
    near = dict(rtol=rtol, atol=atol, check_dtype=False)
    torch.testing.assert_close(q[mask].double(), exact.detach(), **near)
    assert (q[~mask] == 0).all() and q.shape == mask.shape and q.dtype == stats.logprob.dtype
    for name, exact_grad in zip(leaves, torch.autograd.grad(total, leaves.values())):
        got = grads[name]
        assert got.dtype == inputs[name].dtype
        if name in PER_TOKEN:
            assert (got[~mask] == 0).all()
            got = got[mask]
        torch.testing.assert_close(got.double(), exact_grad, **near)


def upstream_for(shape, only_q=False):
    return [torch.randn(shape) if i == 0 or not only_q else torch.zeros(shape) for i in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("only_q", [False, True])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,), (0, 3)])
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients(op, shape, only_q, backend):
    assert_right(op, draw(op, shape), backend, upstream_for(shape, only_q))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("op", OPS)
def test_masked_entries_reach_nothing(op, poison, backend):
    """… in any argument, nor do upstream gradients there."""
    mask = torch.tensor([[True, False, True], [False] * 3, [False, True, True]])
    upstream = [u.masked_fill(~mask, poison) for u in upstream_for((3, 3))]
    assert_right(op, poisoned(draw(op, (3, 3)), mask, poison), backend, upstream, mask)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_all_masked_gives_zeros(op, backend):
    mask = torch.zeros(2, 3, dtype=torch.bool)
    stats, q, grads = run(op, poisoned(draw(op), mask, NAN), backend, upstream_for((2, 3)), mask=mask)
    assert all((x == 0).all() for x in (*stats, q, *grads.values()))


@pytest.mark.parametrize("backend", ["torch", "reference", None])
@pytest.mark.parametrize("op", OPS)
def test_float64_inputs_have_float64_results(op, backend):
    inputs, upstream = draw(op, dtype=F64), [u.double() for u in upstream_for((2, 3))]
    assert_right(op, inputs, backend, upstream, rtol=1e-10, atol=1e-11)
    assert op(**inputs)[1].dtype == F64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model, values", [(F32, torch.bfloat16), (torch.bfloat16, F32), (F32, F64), (F64, F32)])
def test_mixed_dtypes_give_float32(model, values, backend):
    inputs = draw(token_q, dtype=model)
    inputs["values"] = inputs["values"].to(values)
    if backend == "triton" and F64 in (model, values):
        with pytest.raises(TypeError, match="'triton' computes in float32"):
            token_q(**inputs, backend=backend)
    else:
        _, q, grads = run(token_q, inputs, backend, upstream_for((2, 3)))
        assert q.dtype == F32 and {k: g.dtype for k, g in grads.items()} == {"logits": model, "values": values}
        assert_right(token_q, inputs, backend, upstream_for((2, 3)), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op):
    inputs, mask = draw(op, (3,), F64), torch.tensor([True, False, True])
    leaves = {k: inputs[k].requires_grad_() for k in LEAVES if k in inputs}

    def f(*args):
        stats, q = op(**(inputs | dict(zip(leaves, args))), mask=mask, backend="torch")
        return q, stats.logprob, stats.entropy, stats.kl

    assert torch.autograd.gradcheck(f, tuple(leaves.values()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_gradients_reach_the_policy_and_the_values_only(op, backend):
    inputs = draw(op)
    leaves = {k: x.requires_grad_() for k, x in inputs.items() if torch.is_tensor(x) and x.is_floating_point()}
    stats, q = op(**inputs, backend=backend)
    assert not stats.ref_logprob.requires_grad
    q.sum().backward()
    assert {k for k, x in leaves.items() if x.grad is not None} == set(LEAVES) & leaves.keys()


@pytest.mark.parametrize("op", OPS)
def test_a_frozen_model_costs_no_gradient(op, monkeypatch):
    monkeypatch.setattr(autograd, "token_stats_grad", None)
    inputs = draw(op)
    values = inputs["values"].requires_grad_()
    op(**inputs, backend="torch")[1].sum().backward()
    assert (values.grad == 1).all()


@given(
    seed=st.integers(0, 10**6), op=st.sampled_from(OPS), density=st.sampled_from([0.0, 0.5, 1.0]),
    tau=st.floats(0.01, 3), shape=st.one_of(st.tuples(st.integers(0, 7)), st.tuples(*[st.integers(0, 3)] * 2)),
    dtype=st.sampled_from([F32, torch.bfloat16]), backend=st.sampled_from(["torch", "reference"]),
)  # fmt: skip
def test_statistics_are_those_of_token_stats(seed, op, density, tau, shape, dtype, backend):
    """… bit for bit, and Q is q_values of them."""
    torch.manual_seed(seed)
    mask = torch.rand(shape) < density
    inputs = poisoned(draw(op, shape, dtype), mask, NAN) | dict(mask=mask, tau=tau, backend=backend)
    stats, q = op(**inputs)
    alone = STATS[op](**{k: x for k, x in inputs.items() if k not in ("values", "tau")})
    assert all(torch.equal(x, y) for x, y in zip(stats, alone, strict=True))
    want = q_values(stats.logprob, stats.ref_logprob, inputs["values"].masked_fill(~mask, 0.0), tau)
    torch.testing.assert_close(q, want, rtol=1e-6, atol=1e-6)


@TRITON
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("op", OPS)
def test_statistics_of_triton_are_those_of_token_stats(op, backend):
    inputs = draw(op)
    stats, q = op(**inputs, backend=backend)
    alone = STATS[op](**{k: x for k, x in inputs.items() if k not in ("values", "tau")}, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(stats, alone, strict=True))
    torch.testing.assert_close(q, q_values(stats.logprob, stats.ref_logprob, inputs["values"], TAU))
