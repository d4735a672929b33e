"""Estimators of KL(π ‖ π_b) from samples a ~ π, as functions of the log-ratio ℓ = log π(a) − log π_b(a).

As *values* k1 and k3 are unbiased, k2 is not. As *losses* (their gradient through log π at fixed samples):
k1 has zero expected gradient, k2 exactly ∇KL(π ‖ π_b), k3 exactly ∇KL(π_b ‖ π), the forward KL.
Names and forms: J. Schulman, "Approximating KL divergence" (2020).
"""

import torch
from torch import Tensor

from klq_kernels import checks
from klq_kernels.reference import cast


def k1(log_ratio: Tensor) -> Tensor:
    """k1 = ℓ: unbiased, high variance, often negative for a single sample."""
    return _checked(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """k2 = ½ℓ²: biased, low variance, never negative; the KL penalty hidden in KLQ's square."""
    return 0.5 * _checked(log_ratio) ** 2


def k3(log_ratio: Tensor) -> Tensor:
    """k3 = e^{−ℓ} − 1 + ℓ: unbiased, never negative; `expm1` keeps it exact for small ℓ.

    >>> k3(torch.tensor([0.0, -1.0]))
    tensor([0.0000, 0.7183])
    """
    log_ratio = _checked(log_ratio)
    return torch.expm1(-log_ratio) + log_ratio


def _checked(log_ratio: Tensor) -> Tensor:
    """The log-ratio in its result dtype, or a TypeError."""
    checks.tensors(log_ratio=log_ratio)
    return cast(log_ratio)[0]
