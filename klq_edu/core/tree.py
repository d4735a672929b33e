"""TokenTree: a finite token MDP, small enough to enumerate, so that every quantity of the theory is exact.

States are prefixes, actions are next tokens, transitions append the token (theory: "text generation is an MDP").
Everything is float64 and computed level by level, leaves first; there is no sampling except in `rollout`.
"""

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from klq_edu.core.improvement import action_values, boltzmann
from klq_kernels import checks
from klq_kernels.reference import kl_divergence

ENDS = -1  # child index of a token that ends the completion; see `_backup` for why it is −1


class Episodes(NamedTuple):
    """Sampled completions: state visited, token taken and reward paid at each step, all [n, T], with their mask."""

    states: Tensor
    tokens: Tensor
    rewards: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TokenTree:
    """A token MDP with S non-terminal states over a vocabulary of V tokens.

    Attributes:
        prefixes: the tokens that lead to each state, S tuples, shorter ones first.
        children: [S, V] next state, or −1 where the token ends the completion (or is forbidden).
        ref: [S, V] reference policy π_b; 0 forbids a token.
        rewards: [S, V] reward r_{t+1} for taking a token; 0 except where a completion ends.
        roots: [R] initial states (one per prompt), drawn uniformly.
    """

    prefixes: tuple[tuple[int, ...], ...]
    children: Tensor
    ref: Tensor
    rewards: Tensor
    roots: Tensor

    @classmethod
    def grow(
        cls, vocab: int, depth: int, ref: Callable[[tuple[int, ...]], Tensor],
        reward: Callable[[tuple[int, ...]], float], eos: int | Collection[int] | None = None,
        prompts: tuple[tuple[int, ...], ...] = ((),),
    ) -> "TokenTree":  # fmt: skip
        """Enumerate every completion of up to `depth` tokens; `eos` (or any of several) ends one early, `depth` anyway.

        `ref` maps a prefix (prompt included) to V probabilities, `reward` a whole completion to its score R(x, y).
        Tokens of probability 0 are not followed. Raises ValueError for sizes < 1, an eos outside the vocabulary or
        probabilities that do not sum to 1.

        >>> coin = TokenTree.grow(2, 3, lambda s: torch.tensor([0.5, 0.5]), lambda y: float(sum(y)))
        >>> coin.children.shape, coin.expected_reward(coin.ref).item()
        (torch.Size([7, 2]), 1.5)
        """
        if vocab < 1 or depth < 1 or not prompts:
            raise ValueError(f"need vocab, depth >= 1 and a prompt, got {vocab=}, {depth=}, {prompts=}")
        several = () if eos is None else (eos,) if hasattr(eos, "__index__") and not getattr(eos, "ndim", 0) else eos
        ends = set(map(operator.index, several))
        if not all(0 <= end < vocab for end in ends):
            raise ValueError(f"eos must lie in [0, {vocab}), got {eos}")
        prefixes, starts = list(prompts), [len(p) for p in prompts]
        children, probs, rewards = [], [], []
        for state, prefix in enumerate(prefixes):  # grows while it is read: breadth first
            p = torch.as_tensor(ref(prefix), dtype=torch.float64)
            if p.shape != (vocab,) or not (p >= 0).all() or abs(p.sum().item() - 1) > 1e-6:
                raise ValueError(f"ref{prefix} must be {vocab} probabilities that sum to 1, got {p.tolist()}")
            probs.append(p / p.sum())
            children.append([ENDS] * vocab)
            rewards.append([0.0] * vocab)
            for token in probs[-1].nonzero().flatten().tolist():
                longer = (*prefix, token)
                if token in ends or len(longer) == starts[state] + depth:
                    rewards[state][token] = float(reward(longer))
                else:
                    children[state][token] = len(prefixes)
                    prefixes.append(longer)
                    starts.append(starts[state])
        tables = torch.tensor(children), torch.stack(probs), torch.tensor(rewards, dtype=torch.float64)
        return cls(tuple(prefixes), *tables, torch.arange(len(prompts)))

    @classmethod
    def random(cls, vocab: int, depth: int, *, eos: int | None = None, seed: int = 0) -> "TokenTree":
        """A tree with Dirichlet(1) reference probabilities and standard normal terminal rewards."""
        rng = torch.Generator().manual_seed(seed)

        def ref(_):
            weights = -torch.rand(vocab, generator=rng, dtype=torch.float64).log()
            return weights / weights.sum()

        return cls.grow(vocab, depth, ref, lambda _: torch.randn((), generator=rng, dtype=torch.float64), eos)

    def with_ref(self, ref: Tensor) -> "TokenTree":
        """The same tree under another reference [S, V]; ValueError unless rows are distributions over its tokens."""
        ref = self._distribution(ref=ref)
        return replace(self, ref=ref / ref.sum(1, keepdim=True))

    def _table(self, **policy: Tensor) -> Tensor:
        """The named policy in float64; TypeError unless it is a tensor, ValueError unless it is [S, V]."""
        checks.same_shape(self.ref.shape, "the tree's states x tokens", **policy)
        return next(iter(policy.values())).to(torch.float64)

    def _distribution(self, **policy: Tensor) -> Tensor:
        """`_table`, and a ValueError unless it is a distribution over the tree's own tokens in every state."""
        table, (name,) = self._table(**policy), policy
        worst = (table.sum(1) - 1).abs().max().item()
        if not worst <= 1e-6 or (table < 0).any() or (table[self.ref == 0] > 0).any():
            raise ValueError(f"{name} must be probabilities of the tree's own tokens; a sum is {worst:.2g} off 1")
        return table

    @cached_property
    def levels(self) -> list[Tensor]:
        """State indices grouped by the number of tokens generated, roots first."""
        groups, level = [], self.roots
        while len(level):
            groups.append(level)
            below = self.children[level]
            level = below[below != ENDS]
        return groups

    @cached_property
    def leaves(self) -> tuple[Tensor, Tensor]:
        """(states, tokens) of every step that ends a completion."""
        return torch.nonzero((self.children == ENDS) & (self.ref > 0), as_tuple=True)

    def completions(self) -> list[tuple[int, ...]]:
        """Every completion (prompt included), in the order of `leaves`."""
        return [(*self.prefixes[s], a) for s, a in zip(*(x.tolist() for x in self.leaves), strict=True)]

    def evaluate(self, policy: Tensor, tau: float, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
        """Soft policy evaluation: Q_π(s,a) = r + γ V_π(s'),  V_π(s) = Σ_a π Q_π − τ D(π ‖ π_b)(s).

        policy [S, V] -> (Q [S, V], V [S]). Raises ValueError for τ ≤ 0, γ outside [0, 1] or a policy of another shape.
        """
        policy = self._distribution(policy=policy)
        kl = self.state_kl(policy)
        return self._backup(lambda s, q: (policy[s] * q).sum(-1) - tau * kl[s], tau, gamma)

    def optimum(self, tau: float, gamma: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """Soft optimality: V*(s) = τ log Σ_a π_b(a|s) exp(Q*(s,a)/τ) and its Boltzmann policy.

        Returns (Q* [S, V], V* [S], π* [S, V]). For γ = 1, π*(y|x) ∝ π_b(y|x) exp(R/τ).
        """
        q, v = self._backup(lambda s, q: boltzmann(q, self.ref[s], tau)[1], tau, gamma)
        return q, v, boltzmann(q, self.ref, tau)[0]

    def td_errors(self, policy: Tensor, values: Tensor, tau: float, gamma: float = 1.0) -> Tensor:
        """δ(s,a) = r + γ V(s') − Q(s,a) of Q = τ log π/π_b + V at every token (14); 0 where π_b forbids it.

        policy [S, V], values [S] -> [S, V]. Theorem, as derived here, for π > 0 where π_b > 0: Δ = 0 along every path
        if and only if (π, V) = (π*, V*). For Δ = 0 everywhere is δ = 0 everywhere, since δ_t = Δ_t − γλ Δ_{t+1}; and
        δ = 0 in a state is π = π_b e^{(r + γV(s') − V(s))/τ}, whose sum is 1 for V(s) = τ log Σ π_b e^{(r + γV(s'))/τ}
        alone: soft optimality, from the leaves up. (At γ = 1 the errors along a path to y add up to
        R − τ log π(y|s)/π_b(y|s) − V(s): path consistency, Nachum et al. 2017.) So the optimum is the fixed point
        whoever samples, and its targets Ĝ = Q* + αΔ do not vary. Noise ε in the reward that ends a path reaches the
        target k tokens before it as α (γλ)^k ε.
        """
        checks.positive(tau=tau)
        checks.unit_interval(gamma=gamma)
        policy = self._distribution(policy=policy)
        checks.same_shape(self.ref.shape[:1], "the tree's states", values=values)
        values = values.to(torch.float64)
        q = action_values(policy, values, self.ref, tau)
        later = torch.cat([values, values.new_zeros(1)])[self.children]  # ENDS is the last
        return torch.where(self.ref > 0, self.rewards + gamma * later - q, 0.0)

    def _backup(self, state_value: Callable[[Tensor, Tensor], Tensor], tau: float, gamma: float):
        """Q = r + γ V(next) from the leaves up, with V at each level from `state_value(states, Q[states])`."""
        checks.positive(tau=tau)
        checks.unit_interval(gamma=gamma)
        q = torch.zeros_like(self.rewards)
        v = self.rewards.new_zeros(len(self.rewards) + 1)  # v[−1] = 0 is the value after the end
        for level in reversed(self.levels):
            q[level] = self.rewards[level] + gamma * v[self.children[level]]
            v[level] = state_value(level, q[level])
        return q, v[:-1]

    def objective(self, policy: Tensor, tau: float, gamma: float = 1.0) -> Tensor:
        """J(π) = E[V_π(s_0)]; for γ = 1 it is E[R] − τ KL(π ‖ π_b) over completions (4)."""
        return self.evaluate(policy, tau, gamma)[1][self.roots].mean()

    def attained(self, policy: Tensor, tau: float) -> float:
        """Fraction of the attainable improvement, (J(π) − J(π_b)) / (J* − J(π_b)): 0 at π_b, 1 at the optimum.

        NaN where nothing can be improved (constant rewards).
        """
        start, best = self.objective(self.ref, tau), self.optimum(tau)[1][self.roots].mean()
        return ((self.objective(policy, tau) - start) / (best - start)).item()

    def state_kl(self, policy: Tensor) -> Tensor:
        """Exact D(π ‖ π_b)(s) for every state, [S], in nats (2)."""
        return kl_divergence(self._table(policy=policy).log(), self.ref.log())

    def visits(self, policy: Tensor) -> Tensor:
        """Probability of passing through each state, [S]."""
        policy = self._table(policy=policy)
        visits = torch.zeros(len(self.ref), dtype=torch.float64)
        visits[self.roots] = 1 / len(self.roots)
        for level in self.levels:
            below = self.children[level]
            flow = visits[level, None] * policy[level]
            visits[below[below != ENDS]] = flow[below != ENDS]
        return visits

    def expected_reward(self, policy: Tensor) -> Tensor:
        """E[R(x, y)] under the policy."""
        return (self.visits(policy)[:, None] * policy * self.rewards).sum()

    def sequence_kl(self, policy: Tensor) -> Tensor:
        """KL(π ‖ π_b) between distributions over completions = Σ_s Pr(s) D(π ‖ π_b)(s), in nats."""
        visits = self.visits(policy)
        return (visits * torch.where(visits > 0, self.state_kl(policy), 0.0)).sum()

    def sequence_distribution(self, policy: Tensor) -> Tensor:
        """Probability of every completion, in the order of `leaves` and `completions()`; sums to 1."""
        states, tokens = self.leaves
        return self.visits(policy)[states] * policy[states, tokens]

    def rollout(self, policy: Tensor, n: int, generator: torch.Generator | None = None) -> Episodes:
        """Sample n completions; steps after the end are masked, with state, token and reward 0."""
        policy, steps = self._table(policy=policy), []
        state = self.roots[torch.randint(len(self.roots), (n,), generator=generator)]
        for _ in self.levels:
            alive = state != ENDS
            action = torch.multinomial(policy[state], 1, generator=generator).squeeze(1)
            steps.append((state * alive, action * alive, self.rewards[state, action] * alive, alive))
            state = torch.where(alive, self.children[state, action], ENDS)
        return Episodes(*(torch.stack(column, 1) for column in zip(*steps, strict=True)))
