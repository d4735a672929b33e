"""The operations as `torch.library` custom ops: opaque to torch.compile, which needs only their shapes, and with
gradients. Their tensors are flat ([N] tokens) and go by name; options follow the tensors, those of a loss spelled out,
since a schema knows no named tuples. Without a weight the "hidden" states [N, H] are logits [..., V] themselves.
`backend` is "torch" or "triton".
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.library import custom_op

from klq_kernels import checks, torch_linear
from klq_kernels.loss import klq_terms
from klq_kernels.types import Head, LossInputs, LossSettings, Residuals, Upstream, result_dtype, zero_unless

Three = tuple[(Tensor,) * 3]
Nine = tuple[(Tensor,) * 9]  # `Residuals`, as a schema spells them


def kernels(backend: str, inputs: str) -> ModuleType:
    """The module of a backend ("torch", "triton") for inputs "logits" (`logits_stats`, `logits_grad`, `lambda_returns`)
    or "linear" (`linear_stats`, `chunk_stats`, `chunk_grad`): all take [N] tokens."""
    return importlib.import_module(f"klq_kernels.{backend}_{inputs}")


def exact(function: Callable) -> Callable:
    """The function without autocast, which would make its products of float32, logits [N, V] say, in 16 bits."""

    @functools.wraps(function)
    def without_autocast(*args, **given):
        kind = next(x.device.type for x in (*args, *given.values()) if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(kind):
            return function(*args, **given)
        with torch.autocast(kind, enabled=False):
            return function(*args, **given)

    return without_autocast


@custom_op("klq_kernels::token_stats", mutates_args=())
@exact
def token_stats(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, tokens: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, mask: Tensor, values: Tensor | None, *, tau: float,
    temperature: float, workspace: int, backend: str,
) -> Nine:  # fmt: skip
    """`Residuals` of every row; tokens, mask and values [N] (arXiv 2508.17000, eqs. (2), (13))."""
    checks.token_ids(tokens, mask, hidden.shape[-1] if weight is None else len(weight))
    if weight is None:
        given = (temperature, mask, values, tau)
        return tuple(kernels(backend, "logits").logits_stats(hidden, tokens, ref_hidden, *given))
    policy, ref = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    given = (temperature, mask, workspace, values, tau)
    return tuple(kernels(backend, "linear").linear_stats(policy, tokens, ref, *given))


@custom_op("klq_kernels::token_stats_grad", mutates_args=())
@exact
def token_stats_grad(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, tokens: Tensor, ref_hidden: Tensor | None,
    ref_weight: Tensor | None, ref_bias: Tensor | None, mask: Tensor, stats: Sequence[Tensor], a: Tensor | None,
    b: Tensor | None, c: Tensor | None, *, temperature: float, workspace: int, backend: str, needed: Sequence[bool],
) -> Three:  # fmt: skip
    """Gradients of hidden states (or logits), weight [V, H] and bias [V], empty where not needed, for upstream ones a,
    b, c [N] of log-prob, entropy and KL; logits and softmax are computed again (Wijmans et al. 2024)."""
    given, module = (temperature, mask, Residuals(*stats), Upstream(a, b, c)), kernels(backend, "logits")
    if weight is None:
        out, *nothing = _empty((hidden, weight, bias), needed)
        module.logits_grad(hidden, tokens, ref_hidden, *given, out.view(-1, hidden.shape[-1]))
        return out, *nothing
    policy, ref = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    grads = torch_linear.linear_grad(module, policy, tokens, ref, *given, tuple(needed), workspace)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@custom_op("klq_kernels::lambda_returns", mutates_args=())
@exact
def lambda_returns(
    rewards: Tensor, values: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, trace_weights: Tensor | None,
    *, tau: float, gamma: float, lam: float, alpha: float, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(Ĝ, Δ, δ), each [B, T] (arXiv 2508.17000, eqs. (7), (14))."""
    checks.right_padded(mask)
    given = (rewards, values, logprobs, ref_logprobs, mask, trace_weights)
    return tuple(kernels(backend, "logits").lambda_returns(*given, tau=tau, gamma=gamma, lam=lam, alpha=alpha))


@exact
def _logits_klq(
    grad: Tensor, logits: Tensor, tokens: Tensor, inputs: LossInputs, settings: LossSettings, temperature: float,
    backend: str,
) -> tuple[Tensor, Residuals, Tensor]:  # fmt: skip
    """(loss, residuals, gradient in the values); the gradient in the logits goes to `grad` unless empty."""
    mask, module, out = inputs.mask, kernels(backend, "logits"), grad.view(-1, logits.shape[-1])
    checks.token_ids(tokens, mask, logits.shape[-1])
    stats = module.logits_stats(logits, tokens, None, temperature, mask)
    count = mask.sum().clamp(min=1)
    total, a, dvalues = klq_terms(inputs._replace(logprobs=stats.logprob), settings)
    if out.numel():
        module.logits_grad(logits, tokens, None, temperature, mask, stats, Upstream(a / count), out)
    return total / count, stats, (dvalues / count).to(inputs.values.dtype)


@custom_op("klq_kernels::klq_loss", mutates_args=())
@exact
def klq_loss(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, values: Tensor, tokens: Tensor,
    ref_hidden: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None, ref_logprobs: Tensor | None,
    targets: Tensor, old_logprobs: Tensor | None, old_values: Tensor | None, mask: Tensor, *, temperature: float,
    tau: float, loss: str, clip: float | None, log_ratio_clip: float | None, delta: float | None,
    needed: Sequence[bool], workspace: int, backend: str,
) -> Nine:  # fmt: skip
    """Loss; log-prob, entropy, reference log-prob, KL [N]; gradients of hidden states (or logits), weight, bias (empty
    unless needed; those of float16 hidden states in float32) and values (arXiv 2508.17000, eqs. (2), (6))."""
    inputs = LossInputs(None, ref_logprobs, values, targets, mask, old_logprobs, old_values)
    settings = LossSettings(tau=tau, loss=loss, clip=clip, log_ratio_clip=log_ratio_clip, delta=delta)
    if weight is None:
        grads = _empty((hidden, weight, bias), needed)
        total, stats, dvalues = _logits_klq(grads[0], hidden, tokens, inputs, settings, temperature, backend)
        return total, *stats[:4], *grads, dvalues
    checks.token_ids(tokens, mask, len(weight))
    policy, ref = Head(hidden, weight, bias), _head(ref_hidden, ref_weight, ref_bias)
    total, stats, grads, dvalues = torch_linear.linear_klq(
        kernels(backend, "linear"), policy, tokens, ref, temperature, inputs, settings, tuple(needed), workspace
    )
    dense = (hidden.new_empty(0, dtype=torch_linear.kept_dtype(hidden.dtype)) if g is None else g for g in grads)
    return total, *stats[:4], *dense, dvalues.to(values.dtype)


def _empty(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Room for the gradients of these tensors, none where not needed."""
    return tuple(x.new_empty(x.shape) if need else tensors[0].new_empty(0) for x, need in zip(tensors, needed))


def _head(hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Head | None:
    """A Head, or None without a reference."""
    return None if hidden is None else Head(hidden, weight, bias)


# Shapes and dtypes, for torch.compile


@lambda_returns.register_fake
def _(rewards, values, logprobs, ref_logprobs, mask, trace_weights, **options):
    dtype = result_dtype(rewards, values, logprobs, ref_logprobs, trace_weights)
    return tuple(torch.empty(mask.shape, dtype=dtype, device=mask.device) for _ in range(3))


@token_stats.register_fake
def _fake_stats(hidden, weight, bias, tokens, ref_hidden, ref_weight, ref_bias, mask, values, **options):
    dtype = result_dtype(hidden, ref_hidden)
    return tuple(Residuals.zeros(tokens, dtype, ref_hidden is not None, values is not None))


@token_stats_grad.register_fake
def _(hidden, weight, bias, *_, needed, **options):
    return _empty((hidden, weight, bias), needed)


@klq_loss.register_fake
def _(hidden, weight, bias, values, tokens, ref_hidden, ref_weight, ref_bias, *per_token, needed, **options):
    total = values.new_empty((), dtype=result_dtype(hidden, ref_hidden, values, *per_token))
    *grads, dvalues = _empty((hidden, weight, bias, values), [*needed, True])
    kept = hidden.dtype if weight is None else torch_linear.kept_dtype(hidden.dtype)
    stats = _fake_stats(hidden, weight, bias, tokens, ref_hidden, ref_weight, ref_bias, None, None)
    return total, *stats[:4], *(g.to(kept) for g in grads), dvalues


def _save(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.options = dict(keyword_only_inputs)
    ctx.tau = ctx.options.pop("tau")
    ctx.set_materialize_grads(False)


def _backward(ctx, a, b, _, c, *others):
    """The gradient op takes the forward op's tensors but for the values, its residuals, and the upstream gradients.
    Q = τ log π − τ log π_b + V: its own adds τ times itself to the log-prob's and is that of the values."""
    *model, mask, values = ctx.saved_tensors[:9]
    stats, g, dvalues = list(ctx.saved_tensors[9:]), others[-1], None
    if g is not None:
        dvalues = zero_unless(mask, g).to(values.dtype)
        a = ctx.tau * g if a is None else a + ctx.tau * g
    upstream = (None if x is None else x.contiguous() for x in (a, b, c))
    needed, grads = [bool(x) for x in ctx.needs_input_grad[:3]], [None] * 3
    if any(needed):
        grads = token_stats_grad(*model, mask, stats, *upstream, **ctx.options, needed=needed)
    return *(g if need else None for g, need in zip(grads, needed)), *[None] * 5, dvalues


def _save_loss(ctx, inputs, keyword_only_inputs, output):
    """A loss's last results are the gradients of its first arguments: of the logits or the head, and of the values."""
    ctx.grads = [g.detach() for g in output[5:]]
    ctx.set_materialize_grads(False)


def _loss_backward(ctx, upstream, *unused):
    grads = zip(_hand_over(ctx, upstream), ctx.needs_input_grad)
    return *(g if need else None for g, need in grads), *[None] * 9


token_stats.register_autograd(_backward, setup_context=_save)
klq_loss.register_autograd(_loss_backward, setup_context=_save_loss)


class InplaceLoss(torch.autograd.Function):
    """`klq_loss` of logits whose forward pass overwrites them with their gradient."""

    @staticmethod
    def forward(ctx, logits, values, tokens, given, settings, temperature, backend):
        """As the custom op, in place; `given` are the other per-token tensors."""
        try:
            grad = logits.detach().view(-1, logits.shape[-1])
        except RuntimeError as error:
            got = f"shape {tuple(logits.shape)} with strides {logits.stride()}"
            raise ValueError(f"in place needs logits that can be viewed as [N, V], got {got}") from error
        inputs = LossInputs(logprobs=None, values=values.detach(), **given)
        total, stats, dvalues = _logits_klq(grad, grad, tokens, inputs, settings, temperature, backend)
        torch.autograd.graph.increment_version(grad)
        ctx.grads = grad.view(logits.shape), dvalues
        ctx.mark_non_differentiable(stats.logprob, stats.entropy)
        return total, stats.logprob, stats.entropy

    @staticmethod
    def backward(ctx, upstream, *unused):
        """What the forward pass has already computed, scaled by the upstream gradient."""
        return *_hand_over(ctx, upstream, inplace=True), *[None] * 5


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
    if give_away and factor.device.type == "cpu" and factor.item() == 1:
        return grads
    return [(g * factor).to(g.dtype) for g in grads]
