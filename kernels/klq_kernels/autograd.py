"""The operations as `torch.library` custom ops: opaque to torch.compile, which needs only their shapes, and with
gradients. Arguments are flat ([N] tokens); the last one names the backend, "torch" or "triton".
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from klq_kernels import checks, torch_linear, torch_logits
from klq_kernels.reference import result_dtype
from klq_kernels.torch_linear import Head
from klq_kernels.torch_logits import Statistics

Stats = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def module(backend: str, linear: bool = False):
    """The module with this backend's `logits_stats`, `logits_grad` and `lambda_returns`, or with its `linear_…`."""
    if backend == "torch":
        return torch_linear if linear else torch_logits
    from klq_kernels import triton_linear, triton_logits

    return triton_linear if linear else triton_logits


@custom_op("klq_kernels::token_stats", mutates_args=())
def token_stats(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor, backend: str
) -> Stats:
    """`Statistics` of every row."""
    checks.token_ids(tokens, mask, logits.shape[-1])
    return tuple(module(backend).logits_stats(logits, tokens, ref_logits, temperature, mask))


@token_stats.register_fake
def _(logits, tokens, ref_logits, *rest):
    return tuple(torch_logits.empty_statistics(tokens, result_dtype(logits, ref_logits), ref_logits is not None))


@custom_op("klq_kernels::token_stats_grad", mutates_args=())
def token_stats_grad(
    logits: Tensor, tokens: Tensor, ref_logits: Tensor | None, temperature: float, mask: Tensor,
    stats: Sequence[Tensor], a: Tensor | None, b: Tensor | None, c: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    """Gradient in the logits for upstream gradients a, b, c of log-prob, entropy and KL, in a tensor of its own."""
    out = torch.empty((len(tokens), logits.shape[-1]), dtype=logits.dtype, device=logits.device)
    step = module(backend).logits_grad
    return step(logits, tokens, ref_logits, temperature, mask, Statistics(*stats), (a, b, c), out).reshape(logits.shape)


@token_stats_grad.register_fake
def _(logits, *rest):
    return logits.new_empty(logits.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs), *output)
    ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.set_materialize_grads(False)


def _saved(ctx, *upstream: Tensor | None) -> tuple[list, str]:
    """What the gradient's op takes, but `needed`: forward arguments, results, upstream gradients; and the backend."""
    tensors = ctx.saved_tensors
    *inputs, backend = (x if t is None else t for t, x in zip(tensors, ctx.rest))
    contiguous = (None if g is None else g.contiguous() for g in upstream)
    return [*inputs, list(tensors[len(ctx.rest) :]), *contiguous], backend


def _token_stats_backward(ctx, a, b, _, c, *unused):
    args, backend = _saved(ctx, a, b, c)
    return token_stats_grad(*args, backend), *[None] * 5


token_stats.register_autograd(_token_stats_backward, setup_context=_save)


@custom_op("klq_kernels::linear_token_stats", mutates_args=())
def linear_token_stats(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, temperature: float, mask: Tensor, workspace: int, backend: str,
) -> Stats:  # fmt: skip
    """`Statistics` of every row of hidden [N, H]."""
    checks.token_ids(tokens, mask, len(weight))
    policy, ref = Head(hidden, weight, bias), head(ref_hidden, ref_weight, ref_bias)
    return tuple(module(backend, linear=True).linear_stats(policy, tokens, ref, temperature, mask, workspace))


@linear_token_stats.register_fake
def _(hidden, weight, bias, tokens, ref_hidden, ref_weight, *rest):
    return tuple(torch_logits.empty_statistics(tokens, result_dtype(weight, ref_weight), ref_hidden is not None))


@custom_op("klq_kernels::linear_token_stats_grad", mutates_args=())
def linear_token_stats_grad(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, temperature: float, mask: Tensor, workspace: int,
    stats: Sequence[Tensor], a: Tensor | None, b: Tensor | None, c: Tensor | None, needed: Sequence[bool], backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias; empty where not needed."""
    policy, ref = Head(hidden, weight, bias), head(ref_hidden, ref_weight, ref_bias)
    step = module(backend, linear=True).linear_grad
    grads = step(policy, tokens, ref, temperature, mask, Statistics(*stats), (a, b, c), tuple(needed), workspace)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@linear_token_stats_grad.register_fake
def _(hidden, weight, bias, *rest):
    return _empty_gradients((hidden, weight, bias), needed=rest[-2])


def _linear_backward(ctx, a, b, _, c, *unused):
    args, backend = _saved(ctx, a, b, c)
    needed = [bool(x) for x in ctx.needs_input_grad[:3]]
    return *_asked(linear_token_stats_grad(*args, needed, backend), needed), *[None] * 8


linear_token_stats.register_autograd(_linear_backward, setup_context=_save)


@custom_op("klq_kernels::lambda_returns", mutates_args=())
def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    tau: float, gamma: float, lam: float, alpha: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(Ĝ, Δ, δ), each [B, T]."""
    checks.right_padded(mask)
    step = module(backend).lambda_returns
    return tuple(step(rewards, values, logprobs, ref_logprobs, mask, trace_weights, tau, gamma, lam, alpha))


@lambda_returns.register_fake
def _(rewards, values, logprobs, ref_logprobs, mask, trace_weights, *rest):
    dtype = result_dtype(rewards, values, logprobs, ref_logprobs, trace_weights)
    return tuple(torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))


@custom_op("klq_kernels::logits_klq_loss", mutates_args=())
def logits_klq_loss_parts(
    logits: Tensor, tokens: Tensor, values: Tensor, ref_logprobs: Tensor, targets: Tensor, old_logprobs: Tensor | None,
    old_values: Tensor | None, mask: Tensor, temperature: float, tau: float, loss: str, clip: float | None,
    log_ratio_clip: float | None, delta: float | None, with_grad: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, log-prob, entropy, the loss's gradient in the logits or an empty tensor, its gradient in the values)."""
    grad = torch.empty(logits.shape if with_grad else 0, dtype=logits.dtype, device=logits.device)
    fixed, variant = (ref_logprobs, targets, old_logprobs, old_values), (tau, loss, clip, log_ratio_clip, delta)
    *results, dvalues = _logits_klq(grad, logits, tokens, values, *fixed, mask, temperature, *variant, backend)
    return *results, grad, dvalues


def _logits_klq(grad, logits, tokens, values, *settings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, log-prob, entropy, gradient in the values) for the op's arguments; the gradient in the logits goes to
    `grad` unless empty."""
    (*fixed, mask, temperature), (*variant, backend) = settings[:6], settings[6:]
    checks.token_ids(tokens, mask, logits.shape[-1])
    kernels, out = module(backend), grad.view(-1, logits.shape[-1])
    stats = kernels.logits_stats(logits, tokens, None, temperature, mask)
    count = mask.sum().clamp(min=1)
    total, a, dvalues = torch_linear.klq_terms(stats.logprob, values, mask, *fixed, *variant)
    if out.numel():
        kernels.logits_grad(logits, tokens, None, temperature, mask, stats, (a / count, None, None), out)
    return total / count, stats.logprob, stats.entropy, (dvalues / count).to(values.dtype)


@logits_klq_loss_parts.register_fake
def _(logits, tokens, values, *rest):
    dtype, with_grad = result_dtype(logits, values, *rest[:4]), rest[-2]
    stats, shape = torch_logits.empty_statistics(tokens, result_dtype(logits), False), logits.shape if with_grad else 0
    return logits.new_empty((), dtype=dtype), *stats[:2], logits.new_empty(shape), values.clone()


def _loss_backward(ctx, upstream, *unused):
    grad, dvalues = _hand_over(ctx, upstream)
    return grad, None, dvalues, *[None] * 13


def _save_loss(ctx, inputs, output):
    ctx.grads = [g.detach() for g in output[3:]]
    ctx.set_materialize_grads(False)


logits_klq_loss_parts.register_autograd(_loss_backward, setup_context=_save_loss)


def logits_klq_loss(logits: Tensor, *args) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, log-prob, entropy); only the loss may be differentiated, in logits and values."""
    with_grad = logits.requires_grad and torch.is_grad_enabled()
    return logits_klq_loss_parts(logits, *args[:-1], with_grad, args[-1])[:3]


class InplaceLoss(torch.autograd.Function):
    """`logits_klq_loss` whose forward pass overwrites the logits with their gradient."""

    @staticmethod
    def forward(ctx, logits, tokens, values, *settings):
        """As the custom op, in place."""
        grad = flat_view(logits.detach())
        *results, dvalues = _logits_klq(grad, grad, tokens, values.detach(), *settings)
        torch.autograd.graph.increment_version(grad)
        ctx.grads = grad.view(logits.shape), dvalues
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx, upstream, *unused):
        """What the forward pass has already computed, scaled by the upstream gradient."""
        grad, dvalues = _hand_over(ctx, upstream, inplace=True)
        return grad, None, dvalues, *[None] * 12


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@custom_op("klq_kernels::linear_klq_loss", mutates_args=())
def linear_klq_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, values: Tensor, ref_logprobs: Tensor | None,
    targets: Tensor, old_logprobs: Tensor | None, old_values: Tensor | None, mask: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, temperature: float, tau: float, loss: str, clip: float | None,
    log_ratio_clip: float | None, delta: float | None, needed: Sequence[bool], workspace: int, backend: str,
) -> Parts:  # fmt: skip
    """Loss; log-prob, entropy, reference log-prob, KL; gradients of hidden, weight, bias and values."""
    checks.token_ids(tokens, mask, len(weight))
    policy, ref = Head(hidden, weight, bias), head(ref_hidden, ref_weight, ref_bias)
    fixed, variant = (ref_logprobs, targets, old_logprobs, old_values), (tau, loss, clip, log_ratio_clip, delta)
    total, stats, grads, dvalues = torch_linear.linear_klq(
        module(backend), policy, tokens, ref, values, temperature, mask, fixed, variant, tuple(needed), workspace
    )
    dense = (hidden.new_empty(0) if g is None else g for g in grads)
    return total, *stats[:4], *dense, dvalues.to(values.dtype)


@linear_klq_loss.register_fake
def _(hidden, weight, bias, tokens, values, ref_logprobs, targets, old_logprobs, old_values, mask, ref_hidden,
      ref_weight, *rest):  # fmt: skip
    stats = torch_logits.empty_statistics(tokens, result_dtype(weight, ref_weight), ref_hidden is not None)
    dtype = result_dtype(weight, ref_weight, values, ref_logprobs, targets, old_logprobs, old_values)
    grads = _empty_gradients((hidden, weight, bias), rest[-3])
    return hidden.new_empty((), dtype=dtype), *stats[:4], *grads, torch.empty_like(values)


def _save_linear_loss(ctx, inputs, output):
    ctx.grads = [g.detach() for g in output[5:]]
    ctx.needed = inputs[-3]
    ctx.set_materialize_grads(False)


def _linear_loss_backward(ctx, upstream, *unused):
    *grads, dvalues = _hand_over(ctx, upstream)
    return *_asked(grads, ctx.needed), None, dvalues, *[None] * 17


linear_klq_loss.register_autograd(_linear_loss_backward, setup_context=_save_linear_loss)


def head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Head | None:
    """A Head, or None without a reference."""
    return None if hidden is None else Head(hidden, weight, bias)


def flat_view(x: Tensor) -> Tensor:
    """x as [N, V] in the same memory; an in-place gradient can't be written into a strided tensor's copy."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError as error:
        got = f"shape {tuple(x.shape)} with strides {x.stride()}"
        raise ValueError(f"in place needs logits that can be viewed as [N, V], got {got}") from error


def _empty_gradients(tensors, needed) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if need else tensors[0].new_empty(0) for x, need in zip(tensors, needed))


def _asked(grads, needed) -> list[Tensor | None]:
    return [g if need else None for g, need in zip(grads, needed)]


def _hand_over(ctx, factor: Tensor | None, inplace: bool = False) -> list[Tensor | None]:
    """The gradients that the forward pass left in ctx, times the upstream gradient (None: nothing depends on the loss).

    Unless the graph is kept they are given away, not copied: autograd then makes them `.grad` as they are. On a CPU the
    usual factor 1 costs nothing; on a GPU asking for it would make the host wait.
    """
    grads = ctx.grads
    if grads is None:
        raise RuntimeError("backward through this loss a second time: give retain_graph=True to the first pass")
    if factor is None:
        return [None] * len(grads)
    tracing = torch.compiler.is_compiling() or type(factor) is not Tensor
    give_away = not tracing and not torch._C._autograd._get_current_graph_task_keep_graph()
    ctx.grads = None if give_away else grads
    if give_away and inplace:
        return [g.mul_(factor) for g in grads]
    if tracing or factor.device.type != "cpu" or factor.item() != 1:
        return [(g * factor).to(g.dtype) for g in grads]
    return grads
