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
    linear_token_q,
    linear_token_stats,
    logits_klq_loss,
    token_q,
    token_stats,
    torch_logits,
)
from klq_kernels.types import LossSettings

N, V, H = 4, 9, 5
SHAPES = [(2, 3), (4, 5), (3, 7)]  # each with another number of tokens


def opcheck_cases(dtype=torch.float32):
    """name -> (op, its arguments by name), with masked tokens, with and without a reference, biases and gradients."""
    rng = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=rng).to(dtype)

    tokens, mask = torch.randint(V, (N,), generator=rng), torch.tensor([True, True, False, True])
    rest, options = dict(tokens=tokens, mask=mask), dict(temperature=0.7, backend="torch")
    logits, ref_logits = normal(N, V).requires_grad_(), normal(N, V)
    policy = dict(hidden=normal(N, H), weight=normal(V, H), bias=normal(V))
    leaf = {name: x.clone().requires_grad_() for name, x in policy.items()}
    ref = dict(ref_hidden=normal(N, H + 2), ref_weight=normal(V, H + 2), ref_bias=normal(V))
    alone, no_bias = dict.fromkeys(ref), leaf | dict(bias=None)
    residuals = torch_logits.logits_stats(logits.detach(), tokens, ref_logits, 0.7, mask)
    upstream = dict(stats=list(residuals), a=normal(N), b=None, c=normal(N))
    loss = dict(values=normal(N).requires_grad_(), ref_logprobs=normal(N), targets=normal(N))
    old = dict(old_logprobs=normal(N), old_values=normal(N))
    l2, double = (x._asdict() for x in (LossSettings(0.5), LossSettings(0.5, "double_clipped", 0.2, 0.3)))
    returns = {name: normal(2, 3) for name in ("rewards", "values", "logprobs", "ref_logprobs")}
    returns |= dict(mask=torch.ones(2, 3, dtype=torch.bool), trace_weights=None)
    options |= dict(workspace=1000)
    q, no_q = dict(values=loss["values"], tau=0.5), dict(values=None, tau=0.0)
    no_head = dict(weight=None, bias=None, ref_weight=None, ref_bias=None)
    stats, grads = rest | options | no_head | dict(hidden=logits, ref_hidden=ref_logits), rest | options | upstream
    losses = rest | options | loss | dict.fromkeys(old) | l2
    return {
        "token_stats, no Q": (autograd.token_stats, stats | no_q),
        "token_stats, with Q": (autograd.token_stats, stats | q),
        "token_stats, no reference": (autograd.token_stats, stats | no_q | dict(ref_hidden=None)),
        "token_stats_grad": (
            autograd.token_stats_grad,
            grads | no_head | dict(hidden=logits.detach(), ref_hidden=ref_logits, needed=[True, False, False]),
        ),
        "linear_token_stats, no Q": (autograd.token_stats, rest | options | leaf | ref | no_q),
        "linear_token_stats, with Q": (autograd.token_stats, rest | options | leaf | ref | q),
        "linear_token_stats, no reference": (autograd.token_stats, rest | options | no_bias | alone | no_q),
        "linear_token_stats_grad": (
            autograd.token_stats_grad, grads | policy | ref | dict(needed=[True, False, True]),
        ),
        "lambda_returns": (
            autograd.lambda_returns,
            returns | dict(tau=0.5, gamma=1.0, lam=0.9, alpha=1.0, backend="torch"),
        ),
        "logits_klq_loss": (
            autograd.klq_loss, losses | no_head | dict(hidden=logits, ref_hidden=None, needed=[True, False, False]),
        ),
        "linear_klq_loss, ref_logprobs": (autograd.klq_loss, losses | leaf | alone | dict(needed=[True] * 3)),
        "linear_klq_loss, ref_hidden": (
            autograd.klq_loss,
            losses | no_bias | ref | old | double | dict(ref_logprobs=None, needed=[True, True, False]),
        ),
    }  # fmt: skip


CASES = opcheck_cases()
LOW = {dtype: opcheck_cases(dtype) for dtype in (torch.bfloat16, torch.float16)}


def opcheck(case, utils):
    """torch's checks of an op, its arguments put in the schema's order."""
    op, given = case
    arguments = op._opoverload._schema.arguments
    args = tuple(given[a.name] for a in arguments if not a.kwarg_only)
    options = {a.name: given[a.name] for a in arguments if a.kwarg_only}
    torch.library.opcheck(op, args, options, test_utils=utils)


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name):
    """Schema, fake implementation, autograd registration, and tracing with dynamic shapes."""
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    opcheck(CASES[name], utils[:3] if "no " in name else utils)  # the last indexes every result


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("name", [name for name in CASES if "returns" not in name and "grad" not in name])
def test_fakes_of_16_bit_inputs_have_float32_results(name, dtype):
    """… but for the gradients, which are like what they belong to; a fused loss keeps a float16 head's in float32."""
    opcheck(LOW[dtype][name], ["test_faketensor"])


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


def compiled_token_q(h, w, b, tokens, mask, x):
    stats, q = token_q(h @ w.t() + b, tokens, 2 * h @ w.t(), h.sum(-1), tau=0.5, mask=mask, backend="torch")
    return weighted(stats, x) + (q * x[3]).sum()


def compiled_linear_token_q(h, w, b, tokens, mask, x, tau=0.5):
    given = dict(tau=tau, bias=b, mask=mask, backend="torch")
    stats, q = linear_token_q(h, w, tokens, 2 * h, w, h.sum(-1), **given)
    return weighted(stats, x) + (q * x[3]).sum()


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
    compiled_token_stats, compiled_linear_token_stats, compiled_token_q, compiled_linear_token_q,
    compiled_lambda_returns, compiled_logits_klq_loss, compiled_linear_klq_loss,
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
