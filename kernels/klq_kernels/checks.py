"""Argument checks: every error names the argument, what was given, and the rule it breaks."""

import importlib.util
import math
import os

import torch

BACKENDS = ("reference", "torch", "triton")


def positive(**values: float) -> None:
    """Raise ValueError unless every value is a finite number > 0.

    >>> positive(tau=0.0)
    Traceback (most recent call last):
    ValueError: tau must be a finite number > 0, got 0.0
    """
    for name, value in values.items():
        if not (0 < value < math.inf):
            raise ValueError(f"{name} must be a finite number > 0, got {value}")


def unit_interval(**values: float) -> None:
    """Raise ValueError unless every value lies in [0, 1] (discounts, λ).

    >>> unit_interval(lam=1.5)
    Traceback (most recent call last):
    ValueError: lam must lie in [0, 1], got 1.5
    """
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {value}")


def step_size(alpha: float) -> None:
    """Raise ValueError unless 0 < alpha <= 1."""
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must lie in (0, 1], got {alpha}: it is the fraction of the way to the λ-return")


def pick_backend(backend: str | None, **tensors: torch.Tensor | None) -> str:
    """The backend to use: the one asked for, if it can do it, else the best for these tensors.

    None picks `reference` for float64, `triton` on a GPU where Triton is installed, `torch` elsewhere. Raises
    ValueError for an unknown name, TypeError for float64 or integer tensors that the backend can't take, RuntimeError
    where Triton can't run.

    >>> pick_backend(None, logits=torch.zeros(1)), pick_backend(None, logits=torch.zeros(1).double())
    ('torch', 'reference')
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")
    given = {name: x for name, x in tensors.items() if x is not None}
    for name, x in given.items():
        if not x.dtype.is_floating_point:
            raise TypeError(f"{name} must be a floating-point tensor, got dtype {x.dtype}")
    doubles = [name for name, x in given.items() if x.dtype == torch.float64]
    on_gpu = next(iter(given.values())).is_cuda
    if backend is None:
        return "reference" if doubles else "triton" if on_gpu and _has_triton() else "torch"
    if backend == "triton":
        if doubles:
            raise TypeError(f"backend 'triton' computes in float32, got float64 {doubles[0]}: use backend='reference'")
        if not _has_triton():
            raise RuntimeError("backend 'triton' needs the package triton, which is not installed: pip install triton")
        if not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
            raise RuntimeError(
                "backend 'triton' needs a GPU, got CPU tensors: use backend='torch', or set TRITON_INTERPRET=1 before "
                "Python starts to run the kernels in Triton's interpreter (slowly)"
            )
    return backend


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def common_device(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on the same device."""
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"all tensors must be on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )


def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, prefix: str) -> None:
    """Raise ValueError or TypeError unless hidden [..., H], weight [V, H] and bias [V] fit each other."""
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{prefix}weight must be [V, H] with H = {hidden.shape[-1]}, the last axis of {prefix}hidden, "
            f"got {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"{prefix}hidden and {prefix}weight must share a dtype, got {hidden.dtype} and {weight.dtype}")
    if hasattr(weight, "full_tensor"):
        raise TypeError(f"{prefix}weight is a sharded DTensor: gather it first (weight.full_tensor())")
    if bias is not None:
        same_shape(weight.shape[:1], f"{prefix}weight's rows", **{f"{prefix}bias": bias})


def same_shape(shape: torch.Size, of: str, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError unless every given tensor has `shape`, the shape of argument `of`; None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have the shape of {of}, {tuple(shape)}, got {tuple(tensor.shape)}")


def boolean_mask(mask: torch.Tensor) -> None:
    """Raise TypeError unless `mask` is boolean: 0/1 floats hide shifted masks and sentinels."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True on real tokens, got dtype {mask.dtype}: use mask.bool()")


def right_padded(mask: torch.Tensor) -> None:
    """Raise ValueError unless every row of `mask` is True…True False…False; on a GPU, assert it on the device."""
    holes = mask[:, 1:] > mask[:, :-1]
    if mask.is_cuda:
        torch._assert_async(~holes.any(), "mask must be right-padded (True up to the last real token, then False)")
    elif holes.any():
        row = int(holes.nonzero()[0, 0])
        raise ValueError(
            f"mask must be right-padded (True up to the last real token, then False); row {row} is "
            f"{mask[row].int().tolist()}: a hole would cut the λ-return in two"
        )


def integer_ids(tokens: torch.Tensor) -> None:
    """Raise TypeError unless tokens are integers."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must hold integer ids, got dtype {tokens.dtype}")


def token_ids(tokens: torch.Tensor, mask: torch.Tensor, vocab: int) -> None:
    """Raise TypeError unless tokens are integers, ValueError unless every unmasked one lies in [0, vocab).

    On a GPU the values are asserted on the device, so that the host never waits for them.
    """
    integer_ids(tokens)
    if tokens.is_cuda:
        fine = ((tokens >= 0) & (tokens < vocab)) | ~mask
        torch._assert_async(fine.all(), f"tokens must lie in [0, {vocab}), the size of the vocabulary, where unmasked")
        return
    real = tokens[mask]
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < vocab:
        raise ValueError(
            f"tokens must lie in [0, {vocab}), the size of the vocabulary, got ids from {int(real.min())} "
            f"to {int(real.max())} on unmasked positions"
        )


LOSSES = ("l2", "huber", "value_clipped", "ratio_clipped", "double_clipped")


def loss_variant(loss, tau, clip, log_ratio_clip, delta, old_logprobs, old_values) -> None:
    """Every variant gets the thresholds and old quantities it needs, or an error that names what is missing."""
    positive(tau=tau)
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {LOSSES}, got {loss!r}")
    values, ratios = loss in ("value_clipped", "double_clipped"), loss in ("ratio_clipped", "double_clipped")
    needed = {"delta": loss == "huber", "clip": values, "log_ratio_clip": ratios}
    needed |= {"old_values": values, "old_logprobs": values or ratios}
    given = dict(
        delta=delta, clip=clip, log_ratio_clip=log_ratio_clip, old_values=old_values, old_logprobs=old_logprobs
    )
    for name, value in given.items():
        if needed[name] and value is None:
            raise ValueError(f"loss={loss!r} needs {name}, got None")
        if name in ("delta", "clip", "log_ratio_clip") and value is not None:
            positive(**{name: value})
