"""Argument checks: every error names the argument, what was given, and the rule it breaks."""

import math

import torch

BACKENDS = ("reference",)


def positive(**values: float) -> None:
    """Raise ValueError unless every value is a finite number > 0.

    >>> positive(tau=0.0)
    Traceback (most recent call last):
    ValueError: tau must be a finite number > 0, got 0.0
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
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


def backend_name(backend: str | None) -> None:
    """Raise ValueError unless `backend` is None (pick one) or names a backend that exists."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, got {backend!r}")


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
    """Raise ValueError unless every row of `mask` is True…True False…False."""
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(dim=1)
    if holes.any():
        row = int(holes.nonzero()[0])
        raise ValueError(
            f"mask must be right-padded (True up to the last real token, then False); row {row} is "
            f"{mask[row].int().tolist()}: a hole would cut the λ-return in two"
        )


def token_ids(tokens: torch.Tensor, mask: torch.Tensor, vocab: int) -> None:
    """Raise TypeError unless tokens are integers, ValueError unless every unmasked one lies in [0, vocab)."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must hold integer ids, got dtype {tokens.dtype}")
    real = tokens[mask]
    if real.numel() and not 0 <= int(real.min()) <= int(real.max()) < vocab:
        raise ValueError(
            f"tokens must lie in [0, {vocab}), the size of the vocabulary, got ids from {int(real.min())} "
            f"to {int(real.max())} on unmasked positions"
        )
