"""Token-level log-prob, KL, λ-return and KLQ-loss operations for RLHF.

This package needs torch only and knows nothing of `klq_edu`. `reference` holds the one definition of every formula.
"""

from klq_kernels.reference import LambdaReturns, TokenStats, lambda_returns, token_stats

__all__ = ["LambdaReturns", "TokenStats", "lambda_returns", "token_stats"]
