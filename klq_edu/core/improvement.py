"""Soft policy improvement: (π, V) <-> Q, the exact KLQ step, and the exact PPO-penalty step it equals.

Policies and action values are [..., V] tensors over the tokens of each state, values are [...]; nothing broadcasts.
"""

import torch
from torch import Tensor

from klq_kernels import checks
from klq_kernels.reference import cast, q_values


def kl_penalised_argmax(q: Tensor, *anchors: tuple[Tensor, float]) -> tuple[Tensor, Tensor]:
    """argmax_π E_π[q] − Σ_i c_i D(π ‖ p_i) for anchors (p_i, c_i), and the maximum.

    With C = Σ c_i the maximiser is π ∝ Π_i p_i^{c_i/C} exp(q/C) and the maximum C log of its normaliser: one anchor
    gives the Boltzmann policy, two give PPO-penalty. q and p_i [..., V] -> (π [..., V], maximum [...]).
    Raises ValueError unless every c_i ≥ 0 and C > 0, and for a p_i of another shape.

    >>> kl_penalised_argmax(torch.tensor([0.0, 1.0]), (torch.tensor([0.5, 0.5]), 1.0))[0]
    tensor([0.2689, 0.7311])
    """
    checks.alike(q=q, **{f"anchors[{i}]": p for i, (p, _) in enumerate(anchors)})
    checks.non_negative(**{f"the coefficient of anchors[{i}]": c for i, (_, c) in enumerate(anchors)})
    total = sum(c for _, c in anchors)
    checks.positive(total_penalty=total)
    q, *policies = cast(q, *(p for p, _ in anchors))
    weights = [c / total for _, c in anchors]
    score = q / total + sum(w * p.log() for p, w in zip(policies, weights, strict=True) if w > 0)
    log_normaliser = score.logsumexp(-1)
    return (score - log_normaliser.unsqueeze(-1)).exp(), total * log_normaliser


def boltzmann(q: Tensor, ref: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Boltzmann policy π_Q ∝ π_b exp(Q/τ) and its value V_Q = τ log Σ_a π_b exp(Q/τ): Q -> (π, V).

    q and ref [..., V] -> (policy [..., V], values [...]). The pair maximises E_π[Q] − τ D(π ‖ π_b); τ > 0.
    """
    checks.positive(tau=tau)
    checks.alike(q=q, ref=ref)
    return kl_penalised_argmax(q, (ref, tau))


def action_values(policy: Tensor, values: Tensor, ref: Tensor, tau: float) -> Tensor:
    """Q(s,a) = τ log(π/π_b) + V(s) for every token: (π, V) -> Q, the inverse of `boltzmann` (13).

    Where π_b = 0 the token is forbidden and its Q, which no formula uses, is set to V. [..., V], [...] -> [..., V].
    """
    checks.alike(policy=policy, ref=ref)
    checks.same_shape(policy.shape[:-1], "policy without its last axis", values=values)
    policy, ref, values = cast(policy, ref, values)
    allowed = ref > 0
    logp, logq = (torch.where(allowed, p, 1.0).log() for p in (policy, ref))
    return q_values(logp, logq, values.unsqueeze(-1).expand_as(policy), tau)


def klq_step(policy: Tensor, values: Tensor, advantages: Tensor, ref: Tensor, tau: float, alpha: float = 1.0):
    """The exact tabular KLQ step: the (π, V) whose Q equals the target Q_old + αΔ at *every* state and token.

    policy, advantages, ref [..., V]; values [...] -> (new policy, new values). It is the Boltzmann policy and value of
    the target, π ∝ π_old exp(αΔ/τ). Raises ValueError for τ ≤ 0 or α outside (0, 1]. As derived here from (7), (13).
    """
    checks.step_size(alpha)
    checks.alike(policy=policy, advantages=advantages, ref=ref)
    q, advantages, ref = cast(action_values(policy, values, ref, tau), advantages, ref)
    return boltzmann(q + alpha * advantages, ref, tau)


def penalty_coefficient(tau: float, alpha: float) -> float:
    """β = τ(1−α)/α, the weight of D(π ‖ π_old) beside τ D(π ‖ π_b) that makes PPO-penalty the KLQ step (18).

    With the bare advantage instead of Q_old + Δ the two anchors merge into one: its weight is τ + β = τ/α, not β.

    >>> penalty_coefficient(0.5, 0.5), penalty_coefficient(0.05, 1.0)
    (0.5, 0.0)
    """
    checks.positive(tau=tau)
    checks.step_size(alpha)
    return tau * (1 - alpha) / alpha


def ppo_penalty_step(policy: Tensor, action_value: Tensor, ref: Tensor, tau: float, beta: float) -> Tensor:
    """The exact PPO-penalty step: argmax_π E_π[Q] − τ D(π ‖ π_b) − β D(π ‖ π_old), with Q = Q_old + Δ.

    All [..., V]; τ > 0, β ≥ 0. The reverse KL, so the maximiser is closed-form: π ∝ (π_b^τ π_old^β e^Q)^{1/(τ+β)}.
    """
    checks.positive(tau=tau)
    checks.non_negative(beta=beta)
    checks.alike(policy=policy, action_value=action_value, ref=ref)
    return kl_penalised_argmax(action_value, (ref, tau), (policy, beta))[0]


def soft_policy_iteration(tree, tau: float, sweeps: int, gamma: float = 1.0) -> list[Tensor]:
    """Policies π_0 = π_b, π_1, …: evaluate Q_π exactly, then move to its Boltzmann policy.

    On a TokenTree of depth T the optimum is reached after T sweeps: each sweep makes one more level optimal.
    """
    checks.positive(tau=tau)
    checks.unit_interval(gamma=gamma)
    policies = [tree.ref]
    for _ in range(sweeps):
        q, _ = tree.evaluate(policies[-1], tau, gamma)
        policies.append(boltzmann(q, tree.ref, tau)[0])
    return policies
