"""The operations as custom ops: what torch's opcheck asserts, and torch.compile without a graph break, equal to eager.

Backend "torch" throughout, compiled by "aot_eager": dynamo and AOT autograd are what can go wrong, not inductor.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from klq_kernels import (
    autograd,
    lambda_returns,
    linear_klq_loss,
    linear_token_stats,
    logits_klq_loss,
    token_stats,
    torch_logits,
)

N, V, H = 4, 9, 5
SHAPES = [(2, 3), (4, 5), (3, 7)]  # each with another number of tokens


def opcheck_cases():
    """name -> (op, arguments), with masked tokens, with and without a reference, biases and gradients."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=rng)

    tokens, mask = torch.randint(V, (N,), generator=rng), torch.tensor([True, True, False, True])
    logits, values = normal(N, V).requires_grad_(), normal(N).requires_grad_()
    policy = tuple(x.requires_grad_() for x in (normal(N, H), normal(V, H), normal(V)))
    ref_logits, ref = normal(N, V), (normal(N, H + 2), normal(V, H + 2), normal(V))
    logq, target, old_logp, old_v, a, c = normal(6, N).unbind()
    stats = list(torch_logits.logits_stats(logits.detach(), tokens, ref_logits, 0.7, mask))
    frozen = tuple(x.detach() for x in policy)
    returns = tuple(normal(2, 3) for _ in range(4))
    l2, double = (0.7, 0.5, "l2", None, None, None), (0.7, 0.5, "double_clipped", 0.2, 0.2, None)
    no_bias = (policy[0], policy[1], None)
    return {
        "token_stats": (autograd.token_stats, (logits, tokens, ref_logits, 0.7, mask, "torch")),
        "token_stats, no reference": (autograd.token_stats, (logits, tokens, None, 1.0, mask, "torch")),
        "token_stats_grad": (
            autograd.token_stats_grad,
            (logits.detach(), tokens, ref_logits, 0.7, mask, stats, a, None, c, "torch"),
        ),
        "linear_token_stats": (autograd.linear_token_stats, (*policy, tokens, *ref, 0.7, mask, 1000, "torch")),
        "linear_token_stats, no reference": (
            autograd.linear_token_stats,
            (*no_bias, tokens, None, None, None, 1.0, mask, 1000, "torch"),
        ),
        "linear_token_stats_grad": (
            autograd.linear_token_stats_grad,
            (*frozen, tokens, *ref, 0.7, mask, 1000, stats, a, None, c, [True, False, True], "torch"),
        ),
        "lambda_returns": (
            autograd.lambda_returns,
            (*returns, torch.ones(2, 3, dtype=torch.bool), None, 0.5, 1.0, 0.9, 1.0, "torch"),
        ),
        "logits_klq_loss": (
            autograd.logits_klq_loss_parts,
            (logits, tokens, values, logq, target, None, None, mask, *l2, True, "torch"),
        ),
        "linear_klq_loss, ref_logprobs": (
            autograd.linear_klq_loss,
            (*policy, tokens, values, logq, target, None, None, mask, None, None, None, *l2, [True] * 3, 1000, "torch"),
        ),
        "linear_klq_loss, ref_hidden": (
            autograd.linear_klq_loss,
            (*no_bias, tokens, values, None, target, old_logp, old_v, mask, *ref, *double, [False, True, False], 1000,
             "torch"),
        ),
    }  # fmt: skip


CASES = opcheck_cases()


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    op, args = CASES[name]
    torch.library.opcheck(
        op, args, test_utils=utils[:3] if "no reference" in name else utils
    )  # it indexes every result


def batch(shape):
    """hidden, weight, bias, tokens, mask, six tensors like tokens."""
    leaves = [torch.randn(*shape, H), torch.randn(V, H), torch.randn(V)]
    mask = torch.arange(shape[1])[None, :] < torch.randint(1, shape[1] + 1, (shape[0], 1))
    per_token = [torch.randn(shape) for _ in range(6)]
    return *(x.requires_grad_() for x in leaves), torch.randint(V, shape), mask, per_token


def weighted(stats, upstream):
    return (stats.logprob * upstream[0] + stats.entropy * upstream[1] + stats.kl * upstream[2]).sum()


def compiled_token_stats(h, w, b, tokens, mask, x, **given):
    """Logits made in the graph, so that the gradient flows on to hidden, weight and bias."""
    logits, ref_logits = h @ w.t() + b, 2 * h @ w.t()
    return weighted(token_stats(logits, tokens, ref_logits, mask=mask, backend="torch", **given), x)


def compiled_linear_token_stats(h, w, b, tokens, mask, x):
    return weighted(linear_token_stats(h, w, tokens, 2 * h, w, bias=b, mask=mask, backend="torch"), x)


def compiled_lambda_returns(h, w, b, tokens, mask, x):
    out = lambda_returns(*x[:4], mask, tau=0.5, trace_weights=x[4].sigmoid(), backend="torch")
    return (out.targets * (h @ w.t() + b).mean(-1) + out.advantages + out.td_errors).sum()


def compiled_logits_klq_loss(h, w, b, tokens, mask, x, **given):
    values, variant = h.sum(-1), dict(loss="huber", delta=0.5)
    logits = h @ w.t() + b
    rest = dict(tau=0.5, return_stats=True, backend="torch", **variant, **given)
    loss, stats = logits_klq_loss(logits, tokens, x[0], values, x[1], mask, **rest)
    return 1.7 * loss + stats.logprob.sum() + stats.entropy.sum()


def compiled_linear_klq_loss(h, w, b, tokens, mask, x, tau=0.5, temperature=0.7):
    old = dict(loss="double_clipped", clip=0.3, log_ratio_clip=0.4, old_logprobs=x[3], old_values=x[4])
    loss, stats = linear_klq_loss(
        h, w, tokens, None, h.sum(-1), x[1], mask, tau=tau, temperature=temperature, bias=b, ref_hidden=2 * h,
        ref_weight=w, return_stats=True, backend="torch", **old,
    )  # fmt: skip
    return 1.7 * loss + stats.kl.sum() + stats.entropy.sum()


COMPILED = [
    compiled_token_stats, compiled_linear_token_stats, compiled_lambda_returns, compiled_logits_klq_loss,
    compiled_linear_klq_loss,
]  # fmt: skip


def assert_compiled_equals_eager(function, compiled, args, **given):
    results = []
    for f in (function, compiled):
        out = f(*args, **given)
        results.append((out.detach(), *torch.autograd.grad(out, args[:3])))
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("function", COMPILED)
def test_compiled_as_one_graph_for_all_shapes(function):
    """Forward and backward; the second shape makes sizes symbolic, the third compiles nothing."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for shape in SHAPES:
        assert_compiled_equals_eager(function, compiled, batch(shape))
    assert counter.frame_count <= 2


def test_compiled_for_dynamic_shapes_from_the_start():
    compiled = torch.compile(compiled_linear_klq_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in SHAPES[:2]:
        assert_compiled_equals_eager(compiled_linear_klq_loss, compiled, batch(shape))


def test_compiled_with_coefficients_that_change():
    """A schedule for τ or the temperature makes them symbolic floats (which custom ops compile for once per value)."""
    compiled = torch.compile(compiled_linear_klq_loss, fullgraph=True, backend="aot_eager")
    for tau, temperature in [(0.5, 1.0), (0.4, 0.9), (0.3, 0.8)]:
        assert_compiled_equals_eager(
            compiled_linear_klq_loss, compiled, batch((2, 3)), tau=tau, temperature=temperature
        )


def test_the_loss_in_place_is_right_under_compile():
    """It may break the graph, but gives the same result."""
    compiled = torch.compile(compiled_logits_klq_loss, backend="aot_eager")
    assert_compiled_equals_eager(compiled_logits_klq_loss, compiled, batch((2, 3)), inplace=True)


def test_compiled_without_gradients():
    compiled = torch.compile(compiled_linear_klq_loss, fullgraph=True, backend="aot_eager")
    args = batch((2, 3))
    with torch.no_grad():
        torch.testing.assert_close(compiled(*args), compiled_linear_klq_loss(*args))


def test_compiled_errors_name_the_argument():
    """The tokens are checked when the graph runs: an id outside the vocabulary is not read."""
    compiled = torch.compile(compiled_token_stats, fullgraph=True, backend="aot_eager")
    args = list(batch((2, 3)))
    args[3], args[4] = args[3] + V, torch.ones_like(args[4])
    with pytest.raises(ValueError, match="tokens must lie in"):
        compiled(*args)
