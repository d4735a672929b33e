"""Token-level log-prob, KL, λ-return and KLQ-loss operations for RLHF.

This package needs torch (and Triton for its GPU kernels) only and knows nothing of `klq_edu`. `reference` holds the one
definition of every formula; README.md beside this folder explains the rest.
"""

from klq_kernels.ops import (
    lambda_returns,
    linear_klq_loss,
    linear_token_q,
    linear_token_stats,
    logits_klq_loss,
    token_q,
    token_stats,
)
from klq_kernels.types import LambdaReturns, TokenStats

__all__ = [
    "LambdaReturns", "TokenStats", "lambda_returns", "linear_klq_loss", "linear_token_q", "linear_token_stats",
    "logits_klq_loss", "token_q", "token_stats",
]  # fmt: skip
