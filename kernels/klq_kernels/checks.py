"""Argument checks: every error names the argument, what was given, and the rule it breaks."""

import importlib.util
import math
import numbers
import os
import reprlib
from collections.abc import Callable
from functools import partial

import torch

BACKENDS = ("reference", "torch", "triton")


def _within(rule: str, holds: Callable[[float], bool], /, **values: float) -> None:
    """Raise ValueError unless every value is a finite number for which the rule holds, TypeError if one is no number.

    >>> positive(tau=0.0)
    Traceback (most recent call last):
    ValueError: tau must be a finite number > 0, got 0.0
    """
    for name, x in values.items():
        if isinstance(x, torch.Tensor):
            number = x.dim() == 0 and x.dtype != torch.bool
        else:
            number = isinstance(x, numbers.Real) and not isinstance(x, bool)
        if not number or not holds(x):
            raise (ValueError if number else TypeError)(f"{name} must {rule}, got {x!r}")


# Called with the arguments by name. γ and λ of arXiv 2508.17000, eqs. (14) and (7), lie in the unit interval.
positive = partial(_within, "be a finite number > 0", lambda x: 0 < x < math.inf)
non_negative = partial(_within, "be a finite number >= 0", lambda x: 0 <= x < math.inf)
unit_interval = partial(_within, "lie in [0, 1]", lambda x: 0 <= x <= 1)


def step_size(alpha: float) -> None:
    """As `positive`, for 0 < alpha <= 1, the step towards the λ-return in arXiv 2508.17000, eq. (7)."""
    _within("lie in (0, 1] (the fraction of the way to the λ-return)", lambda x: 0 < x <= 1, alpha=alpha)


def tensors(**given: torch.Tensor) -> None:
    """Raise TypeError unless every argument is a tensor.

    >>> tensors(logprobs=[-1.0, -2.0])
    Traceback (most recent call last):
    TypeError: logprobs must be a torch.Tensor (torch.as_tensor makes one), got list: [-1.0, -2.0]
    """
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            got = f"{type(x).__name__}: {reprlib.repr(x)}"
            raise TypeError(f"{name} must be a torch.Tensor (torch.as_tensor makes one), got {got}")


def alike(**given: torch.Tensor) -> None:
    """Raise TypeError unless every argument is a tensor and `mask`, if there, boolean; ValueError unless all have the
    first one's shape: nothing broadcasts."""
    first = next(iter(given))
    tensors(**{first: given[first]})
    same_shape(given[first].shape, first, **given)
    if "mask" in given and given["mask"].dtype != torch.bool:  # 0/1 floats hide shifted masks and sentinels
        got = given["mask"].dtype
        raise TypeError(f"mask must be boolean, True on real tokens, got dtype {got}: use mask.bool()")


def optional(**given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The arguments that are not None, by name."""
    return {name: x for name, x in given.items() if x is not None}


def pick_backend(backend: str | None, **floats: torch.Tensor | None) -> str:
    """The backend to use: the one asked for, if it can do it, else the best for these tensors.

    None picks `reference` where every tensor is float64, else `triton` on a GPU where Triton is installed, else
    `torch`. Raises ValueError for an unknown name, TypeError for an integer tensor and where `triton` is asked for
    beside any float64 one, RuntimeError where Triton can't run.

    >>> pick_backend(None, logits=torch.zeros(1)), pick_backend(None, logits=torch.zeros(1).double())
    ('torch', 'reference')
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    given = optional(**floats)
    for name, x in given.items():
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got dtype {x.dtype}")
    doubles = [name for name, x in given.items() if x.dtype == torch.float64]
    on_gpu = next(iter(given.values())).is_cuda
    if backend is None:
        return "reference" if len(doubles) == len(given) else "triton" if on_gpu and _has_triton() else "torch"
    if backend == "triton":
        if doubles:
            raise TypeError(f"backend 'triton' computes in float32, got float64 {doubles[0]}: use backend='reference'")
        if not _has_triton():
            raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            use = "backend='torch' or, before Python starts, set TRITON_INTERPRET=1 to interpret the kernels (slowly)"
            raise RuntimeError(f"backend 'triton' needs a GPU, got CPU tensors: use {use}")
    return backend


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def common_device(**given: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on the same device."""
    devices = {name: x.device for name, x in optional(**given).items()}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"all tensors must be on one device, got {found}")


def logits(logits, tokens, mask, ref_logits=None) -> None:
    """Raise TypeError or ValueError unless logits [..., V], tokens [...] and, where given, the others fit."""
    tensors(logits=logits)
    _tokens(logits.shape[:-1], "logits", tokens, mask)
    same_shape(logits.shape, "logits", **optional(ref_logits=ref_logits))


def heads(hidden, weight, tokens, ref_hidden, ref_weight, bias, ref_bias, mask) -> None:
    """Raise TypeError or ValueError unless both models' hidden [..., H], weight [V, H] and bias [V], tokens and mask
    [...] fit each other."""
    tensors(hidden=hidden, weight=weight, **optional(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias))
    _tokens(hidden.shape[:-1], "hidden", tokens, mask)
    _head(hidden, weight, bias, "")
    if (ref_hidden is None) != (ref_weight is None):
        missing = "ref_weight" if ref_weight is None else "ref_hidden"
        raise ValueError(f"a reference needs both ref_hidden and ref_weight, got no {missing}")
    if ref_bias is not None and ref_weight is None:
        raise ValueError("ref_bias was given without ref_hidden and ref_weight")
    if ref_hidden is not None:
        same_shape(ref_hidden.shape[:-1], "ref_hidden without its last axis", tokens=tokens)
        _head(ref_hidden, ref_weight, ref_bias, "ref_")
        if len(ref_weight) != len(weight):
            raise ValueError(f"ref_weight must have weight's {len(weight)} rows (tokens), got {len(ref_weight)}")


def _tokens(shape: torch.Size, name: str, tokens, mask) -> None:
    given = dict(tokens=tokens, **optional(mask=mask))
    same_shape(shape, f"{name} without its last axis", **given)
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must hold integer ids, got dtype {tokens.dtype}")
    alike(**given)


def _head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str) -> None:
    """Raise ValueError or TypeError unless hidden [..., H], weight [V, H] and bias [V] fit each other."""
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        rule = f"[V, H] with H = {hidden.shape[-1]}, the last axis of {prefix}hidden"
        raise ValueError(f"{prefix}weight must be {rule}, got {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{prefix}hidden and {prefix}weight must share a dtype, got {hidden.dtype} and {weight.dtype}")
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"{prefix}weight is a sharded DTensor: gather it first (weight.full_tensor())")
    if bias is not None:
        same_shape(weight.shape[:1], f"{prefix}weight's rows", **{f"{prefix}bias": bias})


def same_shape(shape: torch.Size, of: str, **given: torch.Tensor) -> None:
    """Raise TypeError unless every argument is a tensor, ValueError unless it has this `shape`, that of `of`."""
    tensors(**given)
    for name, tensor in given.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of {of}, {tuple(shape)}, got {tuple(tensor.shape)}")


def right_padded(mask: torch.Tensor) -> None:
    """Raise ValueError unless every row of mask [B, T] is True…True False…False; on a GPU, assert it on the device."""
    rule = "mask must be right-padded (True up to the last real token, then False)"
    if mask.dim() != 2:
        raise ValueError(f"mask must be [B, T], got shape {tuple(mask.shape)}")
    holes = mask[:, 1:] > mask[:, :-1]
    if mask.is_cuda:
        torch._assert_async(~holes.any(), rule)
    elif holes.any():
        row = int(holes.nonzero()[0, 0])
        raise ValueError(f"{rule}; row {row} is {mask[row].int().tolist()}: a hole would cut the λ-return in two")


def token_ids(tokens: torch.Tensor, mask: torch.Tensor, vocab: int) -> None:
    """Raise ValueError unless every unmasked one of tokens [N] is in [0, vocab); on a GPU, assert it on the device."""
    rule = f"tokens must lie in [0, {vocab}), the size of the vocabulary"
    ids = tokens.long()  # in 8 bits the vocabulary's size would overflow
    wrong = (((ids < 0) | (ids >= vocab)) & mask).any()
    if tokens.is_cuda:
        torch._assert_async(~wrong, f"{rule}, where unmasked")
    elif wrong:
        low, high = ids[mask].aminmax()
        raise ValueError(f"{rule}, got ids from {int(low)} to {int(high)} on unmasked positions")


def returns(*, rewards, trace_weights, tau, gamma, lam, alpha, **tensors) -> None:
    """Raise TypeError or ValueError unless these tensors are [B, T] and the coefficients in the ranges of
    `lambda_returns` (holes in the mask apart). Source: arXiv 2508.17000, eqs. (7), (14)."""
    positive(tau=tau)
    unit_interval(gamma=gamma, lam=lam)
    step_size(alpha)
    alike(rewards=rewards, **tensors, **optional(trace_weights=trace_weights))
    if rewards.dim() != 2:
        raise ValueError(f"rewards must be [B, T], got shape {tuple(rewards.shape)}")
