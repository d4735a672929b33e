"""What travels between the modules, and the rule for dtypes and masked entries that every function keeps.

Results are float64 when every floating-point input is float64, else float32. Masked entries may be NaN, inf or any
integer: they are replaced before any arithmetic, so they reach neither a result nor a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from klq_kernels import checks

INF = float("inf")
SMALL_KL = 0.05  # below this Σ p log(p/q) loses digits, so that a backend sums p (e^(−d) − 1 + d)
Rows = slice | Tensor  # which of N rows: a slice, or indices [n]


class TokenStats(NamedTuple):
    """Per-token statistics, each of the shape of `tokens`; the last two are None without a reference model."""

    logprob: Tensor
    entropy: Tensor
    ref_logprob: Tensor | None
    kl: Tensor | None

    def detached(self) -> "TokenStats":
        """The same numbers without a graph."""
        return TokenStats(*(x if x is None else x.detach() for x in self))


class LambdaReturns(NamedTuple):
    """λ-return targets Ĝ, their advantages Δ and one-step TD errors δ, each [B, T], zero where masked."""

    targets: Tensor
    advantages: Tensor
    td_errors: Tensor


class Residuals(NamedTuple):
    """What a forward pass leaves, each [N], [0] for a reference or values (of q) that are not there.

    The gradient needs no second search for them: log p(v) = (z_v − shift)/temperature − lse, where the shift is near
    the largest logit and lse = log Σ_v exp((z_v − shift)/temperature).
    """

    logprob: Tensor
    entropy: Tensor
    ref_logprob: Tensor
    kl: Tensor
    shift: Tensor
    lse: Tensor
    ref_shift: Tensor
    ref_lse: Tensor
    q: Tensor

    @classmethod
    def zeros(cls, tokens: Tensor, dtype: torch.dtype, with_ref: bool, with_q: bool = False) -> "Residuals":
        """Zeros for each of the tokens [N]."""
        there = dict.fromkeys(("logprob", "entropy", "shift", "lse"), True) | dict(q=with_q)
        counts = (tokens.shape[0] if there.get(name, with_ref) else 0 for name in cls._fields)
        return cls(*(torch.zeros(n, dtype=dtype, device=tokens.device) for n in counts))

    def store(self, rows: Rows, part: "Residuals") -> None:
        """Write those of these rows into their places."""
        for whole, piece in zip(self, part, strict=True):
            if len(whole):
                whole[rows] = piece


class Upstream(NamedTuple):
    """Gradients [N] of a loss in three statistics; None where it does not depend on one."""

    logprob: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None


class Head(NamedTuple):
    """hidden [N, H], weight [V, H], bias [V] or None: logits = hidden weightᵀ + bias."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    def take(self, rows: Rows = slice(None), columns: slice = slice(None)) -> "Head":
        """The head of these rows for these columns of the vocabulary."""
        return Head(self.hidden[rows], self.weight[columns], None if self.bias is None else self.bias[columns])


class LossInputs(NamedTuple):
    """What the KLQ loss compares, all of one shape. In a fused pass the log-probs are None until the pass has them."""

    logprobs: Tensor | None
    ref_logprobs: Tensor | None
    values: Tensor
    targets: Tensor
    mask: Tensor
    old_logprobs: Tensor | None = None
    old_values: Tensor | None = None


class LossSettings(NamedTuple):
    """Variant of the KLQ loss (see `klq_kernels.loss.VARIANTS`) and its coefficients."""

    tau: float
    loss: str = "l2"
    clip: float | None = None
    log_ratio_clip: float | None = None
    delta: float | None = None


def select(group: tuple, rows: Rows) -> tuple:
    """The rows of each tensor [N] of a named tuple; what is None or empty stays so."""
    return type(group)(*(x if x is None or not len(x) else x[rows] for x in group))


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if every floating-point input is float64 (None is none), else float32. Tensors of any shape."""
    given = checks.optional(**{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    checks.tensors(**given)
    dtypes = {x.dtype for x in given.values() if x.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def cast(*tensors: Tensor) -> list[Tensor]:
    """The tensors, of any shape, in their result dtype."""
    dtype = result_dtype(*tensors)
    return [x.to(dtype) for x in tensors]


def narrow(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors, of any shape, float64 ones in float32 if the result is; 16-bit ones stay, since kernels read them
    as they are."""
    dtype = result_dtype(*tensors)
    return [x.to(dtype) if x is not None and x.dtype == torch.float64 else x for x in tensors]


def zero_unless(mask: Tensor, x: Tensor) -> Tensor:
    """x, in its own dtype, where mask, else an exact 0 that passes no gradient, even where x is NaN or inf.

    Shapes: [...], [...] -> [...]. To be used before the arithmetic that would overflow: a `where` behind it gives
    NaN gradients (source: JAX's FAQ, "gradients contain NaN where using where").
    """
    checks.alike(mask=mask, x=x)
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def clean(mask: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The tensors, all of the mask's shape [...], in their result dtype with masked entries replaced by 0."""
    checks.alike(mask=mask, **{f"tensors[{i}]": x for i, x in enumerate(tensors)})
    return [zero_unless(mask, x) for x in cast(*tensors)]
