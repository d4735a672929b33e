"""Estimators of KL(π ‖ π_b) from samples a ~ π, as functions of the log-ratio ℓ = log π(a) − log π_b(a).

As *values* k1 and k3 are unbiased, k2 is not. As *losses* (their gradient through log π at fixed samples):
k1 has zero expected gradient, k2 exactly ∇KL(π ‖ π_b), k3 exactly ∇KL(π_b ‖ π), the forward KL.
Names and forms: J. Schulman, "Approximating KL divergence" (2020).
"""

import torch
from torch import Tensor


def k1(log_ratio: Tensor) -> Tensor:
    """k1 = ℓ: unbiased, high variance, often negative for a single sample."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """k2 = ½ℓ²: biased, low variance, never negative; the KL penalty hidden in KLQ's square."""
    return 0.5 * log_ratio**2


def k3(log_ratio: Tensor) -> Tensor:
    """k3 = e^{−ℓ} − 1 + ℓ: unbiased, never negative; `expm1` keeps it exact for small ℓ.

    >>> k3(torch.tensor([0.0, -1.0]))
    tensor([0.0000, 0.7183])
    """
    return torch.expm1(-log_ratio) + log_ratio
