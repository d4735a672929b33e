# %% [markdown]
# # 07 · KLQ is PPO in disguise (and where it is not)
#
# **In what sense is KL-regularised Q-learning the same algorithm as proximal policy optimisation, and where does that
# stop?**
#
# *After this notebook you can* state three exact claims of equivalence, prove each in a few lines, derive the penalty
# coefficient $\beta = \tau(1-\alpha)/\alpha$, and tell from a list of everyday tricks (clipping, whitening, several
# epochs, another value coefficient) which ones break which claim, and by how much.
#
# *You need* notebooks 01 (Boltzmann policies), 04 (the estimator $k_2$), 05 (λ-returns) and 06 (the loss of KLQ, KL-regularised
# Q-learning).
# *Time:* <!-- minutes --> minutes. *Symbols:* $\pi_b$ reference, $\pi_{old}$ the policy that sampled the batch, $\tau$ price of the
# Kullback–Leibler divergence (KL) $D$, $\alpha$ step size, $\delta$ temporal-difference error, $\Delta$ its λ-sum,
# $\hat A$ the advantage of PPO (proximal policy optimisation), $\rho = \pi/\pi_{old}$, $\beta$ PPO's penalty.

# %%
import torch

from klq_edu.core.improvement import (
    action_values,
    kl_penalised_argmax,
    klq_step,
    penalty_coefficient,
    ppo_penalty_step,
)
from klq_edu.core.objectives import (
    klq_loss,
    ppo_clip_loss,
    ppo_penalty_loss,
    value_loss,
)
from klq_edu.core.returns import gae, kl_shaped_rewards, lambda_returns, whiten
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters.c07_ppo_in_disguise import (
    ALONE,
    GAP,
    PLAIN,
    gap,
    grammar_batch,
)
from klq_edu.figures import exact_steps
from klq_kernels.reference import kl_divergence

check = start("07")

# %% [markdown]
# ## Two algorithms, side by side
#
# Both sample completions with the current policy $\pi_{old}$ and have a value head $V$. Then they part, or so it seems.
#
# PPO in five sentences. It makes actions with a positive advantage $\hat A$ more likely. It uses a batch for several passes
# (*epochs*), so after the first step the policy is not $\pi_{old}$ any more; the ratio $\rho = \pi/\pi_{old}$ corrects for that,
# $\mathbb{E}_{\pi_{old}}[\rho\hat A] = \mathbb{E}_\pi[\hat A]$, and this is called the *surrogate* objective. *Clipping* gives no further reward
# once $\rho$ has left $[0.8, 1.2]$ in the direction that $\hat A$ favours. *Whitening* replaces $\hat A$ by its difference from the
# batch's mean, divided by the standard deviation. The value head is fitted to $V_{old} + \hat A$, often as a second output of the
# same network (a shared *trunk*).
#
# | | PPO | KLQ |
# |---|---|---|
# | the KL to $\pi_b$ is | subtracted from the reward | inside $Q = \tau \log(\pi/\pi_b) + V$ |
# | what is estimated | an advantage $\hat A$ (GAE, generalised advantage estimation) | a target $\hat G = Q + \alpha\Delta$ |
# | the policy learns by | a policy gradient, $-\mathbb{E}[\rho\hat A]$ | a squared error, $\tfrac12(Q_\theta - \hat G)^2$ |
# | the step is kept small by | a clip, or a penalty on $D(\pi\|\pi_{old})$ | the step size $\alpha$ |
#
# **Predict.** One fits values by regression, the other climbs a surrogate objective. For which rows of this table would
# you bet that they are the same thing, written differently? (The table returns at the end.)
#
# We need something to compute with: a random token tree, an old policy that has already left the reference, values
# that are wrong (as they always are), and a batch of sampled completions.

# %%
tau, alpha, gamma, lam = 0.5, 0.3, 0.97, 0.9
tree = TokenTree.random(4, 3, eos=0, seed=1)
noise = torch.randn(tree.ref.shape)
old = torch.softmax(tree.ref.log() + noise, -1)
V = torch.randn(len(old))

batch = tree.rollout(old, 200, torch.Generator().manual_seed(0))
mask = batch.mask
logp = old[batch.states, batch.tokens].log()
logq = tree.ref[batch.states, batch.tokens].log()
values = torch.where(mask, V[batch.states], 0.0)
print(f"{len(mask)} completions of 1 to {mask.shape[1]} tokens in {len(old)} states")

# %% [markdown]
# ## Claim 1: the same estimator
#
# PPO for language models takes the reward with the KL penalty mixed in,
#
# $$\tilde r_{t+1} = r_{t+1} - \tau \log\frac{\pi_{old}(a_t|s_t)}{\pi_b(a_t|s_t)} \tag{7.1}$$

# %%
shaped = kl_shaped_rewards(batch.rewards, logp, logq, tau)
check.equation("7.1", shaped[mask], (batch.rewards - tau * (logp - logq))[mask])

# %% [markdown]
# and asks how much better than $V(s_t)$ it went. KLQ keeps the plain reward and asks how much better than
# $Q(s_t, a_t) = \tau \log\frac{\pi_{old}}{\pi_b} + V(s_t)$ it went, the paper's (14). Write both out, and the penalty
# has only moved to the other side of the minus sign:
#
# $$\delta_t = r_{t+1} + \gamma V(s_{t+1}) - \underbrace{\left(\tau \log\frac{\pi_{old}}{\pi_b} + V(s_t)\right)}_{Q(s_t,\,a_t)} = \tilde r_{t+1} + \gamma V(s_{t+1}) - V(s_t) \tag{7.2}$$
#
# The check takes KLQ's $\delta$ from the library, and PPO's from the formula on the right, typed for each token.

# %%
out = lambda_returns(
    batch.rewards, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam, alpha=alpha
)
ppo_delta = torch.zeros_like(values)
for i, t in mask.nonzero().tolist():
    is_last = t + 1 == mask.shape[1] or not mask[i, t + 1]
    next_value = 0.0 if is_last else values[i, t + 1]
    ppo_delta[i, t] = shaped[i, t] + gamma * next_value - values[i, t]
check.equation("7.2", out.td_errors, ppo_delta)

# %% [markdown]
# Both then sum the errors with the same weights, so both get the same number. **KLQ's $\Delta$ is PPO's advantage**,
# as long as nobody whitens it:
#
# $$\Delta_t = \sum_{k \ge 0} (\gamma\lambda)^k\,\delta_{t+k} = \hat A^{GAE}_t \tag{7.3}$$

# %%
advantages = gae(shaped, values, mask, gamma=gamma, lam=lam)
check.equation("7.3", out.advantages, advantages)

# %% [markdown]
# > **People ask: is the KL penalty applied twice?**
# >
# > In PPO it sits in the reward; KLQ has it in $Q$. If you also shape the reward for KLQ, you pay twice. Here is what
# > that does to the temporal-difference error: it is off by exactly one more penalty.

# %%
twice = lambda_returns(
    shaped, values, logp, logq, mask, tau=tau, gamma=gamma, lam=lam
).td_errors
extra = (twice - out.td_errors)[mask] / (tau * (logp - logq)[mask])
print(
    f"additional penalty, in units of τ log(π/π_b): {extra.min():.6f} to {extra.max():.6f}"
)

# %% [markdown]
# ## Claim 2: the same first gradient
#
# At the beginning of the first epoch $\theta = \theta_{old}$, so $Q_\theta - \hat G = -\alpha\Delta$. The gradient of a half
# square is the error times the gradient of $Q_\theta$:
#
# $$\nabla\,\tfrac12\,\mathbb{E}\big[(Q_\theta - \hat G)^2\big]\Big|_{\theta=\theta_{old}} = -\alpha\,\mathbb{E}\big[\Delta\,(\tau\,\nabla\log\pi_\theta + \nabla V_\theta)\big] \tag{7.4}$$
#
# The first part is the policy gradient, though nobody asked for one. We give every state its own logits and its own
# value, let autograd differentiate the library's loss, and type the right-hand side.

# %%
logits = old.log().clone().requires_grad_()
critic = V.clone().requires_grad_()


def at_batch():
    """Log-probs and values of the batch's tokens, differentiable."""
    log_policy = torch.log_softmax(logits, -1)
    return log_policy[batch.states, batch.tokens], critic[batch.states]


new_logp, new_values = at_batch()
loss = klq_loss(new_logp, logq, new_values, out.targets, mask, tau=tau)
klq_grad = torch.cat([g.flatten() for g in torch.autograd.grad(loss, (logits, critic))])

new_logp, new_values = at_batch()
inner = (out.advantages * (tau * new_logp + new_values))[mask].mean()
by_hand = torch.autograd.grad(-alpha * inner, (logits, critic))
check.equation("7.4", klq_grad, torch.cat([g.flatten() for g in by_hand]))

# %% [markdown]
# **Which PPO has this gradient?** Its surrogate $-\mathbb{E}[\rho\hat A]$ has the gradient $-\mathbb{E}[\hat A\,\nabla\log\pi]$ at
# $\rho = 1$. Its value loss $\tfrac12\mathbb{E}(V - V_{old} - \hat A)^2$ has $-\mathbb{E}[\hat A\,\nabla V]$. To match (7.4) divided
# by $\alpha\tau$, the value loss needs the coefficient $1/\tau$:
#
# $$\nabla L_{KLQ} = \alpha\tau\,\nabla L_{PPO}, \qquad L_{PPO} = -\mathbb{E}[\rho\hat A] + \frac{1}{\tau}\cdot\tfrac12\,\mathbb{E}\big[(V - V_{old} - \hat A)^2\big] \tag{7.5}$$

# %%
new_logp, new_values = at_batch()
ppo = ppo_clip_loss(new_logp, logp, advantages, mask, clip=0.2)
ppo = ppo + value_loss(new_values, values + advantages, mask) / tau
ppo_grad = torch.cat([g.flatten() for g in torch.autograd.grad(ppo, (logits, critic))])
check.equation("7.5", klq_grad, alpha * tau * ppo_grad)

# %% [markdown]
# The clip is switched on in that check, and does nothing: no ratio has moved yet. But look at the coefficient. At the
# paper's $\tau = 0.05$ it is **20**, where PPO implementations use 0.1 to 1. On a trunk shared by policy and
# critic, that factor decides whose gradient wins; there this library's trainer multiplies the critic's share of the trunk's gradient
# by $\tau$, unless told otherwise. The common factor $\alpha\tau$, on the other hand, hardly matters: it is a learning rate, and
# Adam, which divides by the gradient's own size, nearly cancels it.
#
# ## Claim 3: the same finite step
#
# Now leave gradients and ask where the regression *ends*. With a table for $\pi$ and $V$ it can fit every target
# $Q_{old} + \alpha\Delta$ exactly. Then the new policy is the Boltzmann policy of the target (notebook 01), and since
# $\pi_b\,e^{Q_{old}/\tau} \propto \pi_{old}$, the reference drops out:
#
# $$\pi_{new} \propto \pi_b\,e^{(Q_{old} + \alpha\Delta)/\tau} \propto \pi_{old}\,e^{\alpha\Delta/\tau} \tag{7.6}$$
#
# In this section $\Delta$ is a table as well: one number for each state and token, the mean of $\Delta_t$ there at $\lambda = 1$.

# %%
Q_old = action_values(old, V, tree.ref, tau)
Delta = tree.evaluate(old, tau, gamma)[0] - Q_old
new, new_V = klq_step(old, V, Delta, tree.ref, tau, alpha)
typed = old * (alpha * Delta / tau).exp()
check.equation("7.6", new, typed / typed.sum(-1, keepdim=True))

# %% [markdown]
# Where does PPO's penalty version end, the one that subtracts $\beta D(\pi\|\pi_{old})$ instead of clipping? It
# maximises, in each state,
# $\;\mathbb{E}_\pi[Q_{old} + \Delta] - \tau D(\pi\|\pi_b) - \beta D(\pi\|\pi_{old})$: the value of the next choice with the KL to $\pi_b$ charged
# afresh for the new $\pi$, as notebook 02 charges it, and not frozen into the reward. Three moves show that it is the same policy.
#
# **First move.** $Q_{old}$ belongs to $\pi_{old}$, its soft value is $V_{old}$ (1.10), and equation (1.6) of notebook 01 says what any
# other policy gets from it:
#
# $$\mathbb{E}_\pi[Q_{old}] - \tau D(\pi\|\pi_b) = V_{old} - \tau D(\pi\|\pi_{old}) \tag{7.7}$$
#
# So a penalty against the reference *is* a penalty against the old policy, once $Q_{old}$ is there. We try a thousand
# random policies in the first state.

# %%
rivals = torch.softmax(2 * torch.randn(1000, 4), -1)
ref0, old0 = tree.ref[0].expand(1000, 4), old[0].expand(1000, 4)
to_ref = kl_divergence(rivals.log(), ref0.log())
to_old = kl_divergence(rivals.log(), old0.log())
check.equation("7.7", rivals @ Q_old[0] - tau * to_ref, V[0] - tau * to_old)

# %% [markdown]
# **Second move.** Put (7.7) into PPO's objective. Both penalties merge, and only the advantage is left of $Q$:
#
# $$\mathbb{E}_\pi[Q_{old} + \Delta] - \tau D(\pi\|\pi_b) - \beta D(\pi\|\pi_{old}) = V_{old} + \mathbb{E}_\pi[\Delta] - (\tau + \beta)\,D(\pi\|\pi_{old}) \tag{7.8}$$

# %%
beta = penalty_coefficient(tau, alpha)
left = rivals @ (Q_old + Delta)[0] - tau * to_ref - beta * to_old
check.equation("7.8", left, V[0] + rivals @ Delta[0] - (tau + beta) * to_old)

# %% [markdown]
# **Third move.** By notebook 01 the best policy of the right-hand side is $\pi_{old}\,e^{\Delta/(\tau+\beta)}$, normalised.
# Compare with (7.6): they agree when $\tau + \beta = \tau/\alpha$, that is, for the paper's (18),
#
# $$\beta = \frac{\tau\,(1-\alpha)}{\alpha} \tag{7.9}$$
#
# This is an equation about algorithms, so we check it on them: the library's PPO-penalty step against its KLQ step, in
# every state, for several $\alpha$, with this $\beta$ typed in.

# %%
for a in (0.1, 0.3, 0.7, 1.0):
    step = klq_step(old, V, Delta, tree.ref, tau, a)[0]
    penalty = ppo_penalty_step(old, Q_old + Delta, tree.ref, tau, tau * (1 - a) / a)
    check.equation("7.9", penalty, step)
check.equation("7.9", torch.tensor(beta), torch.tensor(tau * (1 - alpha) / alpha))

# %% [markdown]
# **Read it.** A small step size is a strong penalty: $\alpha = 0.1$ means $\beta = 9\tau$. At $\alpha = 1$ there is no
# proximal penalty at all, and KLQ takes the full soft policy improvement of notebook 02, held by the reference
# alone.
#
# **Which one do I set in a trainer?** A trainer keeps $\hat A = \Delta$, with the KL to $\pi_b$ frozen into it by (7.3), and adds a
# penalty $c\,D(\pi\|\pi_{old})$ to $-\mathbb{E}[\rho\hat A]$. Then $Q_{old}$ and the reference are gone from the objective, (7.8) has been
# used already, and the right coefficient is not $\beta$ but
#
# $$\tau + \beta = \frac{\tau}{\alpha}, \qquad \pi_{new} = \text{argmax}_\pi\; \mathbb{E}_\pi[\Delta] - \frac{\tau}{\alpha}\,D(\pi\|\pi_{old}) \tag{7.10}$$

# %%
bare, best = kl_penalised_argmax(Delta, (old, tau / alpha))
check.equation("7.10", bare, new)

# %% [markdown]
# Does a trainer that minimises the library's `ppo_penalty_loss` end there? Give it every token of every state. Its value at $\pi_{new}$ must
# be minus the maximum in (7.10), and no other policy may get below. (It takes a plain mean over tokens; the factor $4\,\pi_{old}$ makes of
# that a mean under $\pi_{old}$, since there are four tokens.)

# %%
everywhere = torch.ones_like(old, dtype=torch.bool)


def trainer_loss(policy):
    kl = kl_divergence(policy.log(), old.log())[:, None].expand_as(old)
    weighted, c = 4 * old * Delta, tau / alpha
    return ppo_penalty_loss(
        policy.log(), old.log(), weighted, everywhere, coef=c, kl=kl
    )


check.equation("7.10", trainer_loss(new), -best.mean())
others = torch.softmax(new.log() + 0.3 * torch.randn(100, *new.shape), -1)
losses = torch.stack([trainer_loss(other) for other in others])
check.inequality("7.10", -best.mean().expand(100), losses)

# %% [markdown]
# It is a trap that has caught many readers: $c = \tau/\alpha$ beside the bare advantage, $\beta = \tau/\alpha - \tau$ beside $Q_{old} + \Delta$ and
# the reference. (PPO as published penalises $D(\pi_{old}\|\pi)$, the other direction, for which the best step has no such closed
# form. Near $\pi_{old}$ the two hardly differ.)
#
# And the *values*? Claim 3 is about policies. Fitted exactly, PPO's critic ends at $V_{old} + \mathbb{E}_{\pi_{old}}[\Delta]$, a plain mean;
# KLQ's ends, by (6.7), at a soft mean, $V_{old} + \tau\log\mathbb{E}_{\pi_{old}}[e^{\alpha\Delta/\tau}]$, which goes about $\alpha$ of the way. They differ
# even at $\alpha = 1$:

# %%
ppo_V = V + (old * Delta).sum(-1)
for a in (0.1, 0.3, 1.0):
    klq_V = klq_step(old, V, Delta, tree.ref, tau, a)[1]
    moved = (klq_V - V).norm() / (ppo_V - V).norm()
    print(f"α = {a}: KLQ's values move {moved:.2f} times as far", end=", ")
    print(f"largest difference {(klq_V - ppo_V).abs().max():.2f}")

# %% [markdown]
# The figure shows both, the right way and the trap. Each dot is one token in one state.

# %%
show(exact_steps())

# %% [markdown]
# The library takes both steps with one function; here they are.

# %%
source(klq_step)
source(ppo_penalty_step)

# %% [markdown]
# ## The penalty hidden in the square
#
# Claim 3 speaks of tables and exact fits. What does KLQ do to a *sampled* token? Hold $V$ at $V_{old}$ and write
# $\ell = \log\frac{\pi}{\pi_{old}}$, a log-ratio to the *old* policy now. Then $Q_\theta - \hat G = \tau\ell - \alpha\Delta$, and the square has three terms:
#
# $$\tfrac12(\tau\ell - \alpha\Delta)^2 = \alpha\tau\left[-\Delta\,\ell + \frac{\tau}{\alpha}\cdot\tfrac12\,\ell^2\right] + \tfrac12\alpha^2\Delta^2 \tag{7.11}$$
#
# The first is PPO's surrogate with $\log\rho$ in place of $\rho$. The second is the estimator $k_2 = \tfrac12\ell^2$ of notebook
# 04, a sampled penalty on $D(\pi\|\pi_{old})$ with just the coefficient $\tau/\alpha$ of (7.10), right to second order in $\ell$, since the
# samples come from $\pi_{old}$ and not from $\pi$. The third does not depend on $\theta$. So one
# square holds PPO's gain *and* PPO's brake.

# %%
ell = 0.3 * torch.randn(mask.shape)
square = klq_loss(
    logp + ell, logq, values, out.targets, mask, tau=tau, reduction="none"
)
D = out.advantages
parts = alpha * tau * (-D * ell + tau / alpha * 0.5 * ell**2) + 0.5 * (alpha * D) ** 2
check.equation("7.11", square[mask], parts[mask])

# %% [markdown]
# ## Where it stops
#
# All three claims assume things that PPO in practice does not do. So we leave the tree and take a real model: a
# small transformer that has learnt a little grammar, trained by three KLQ updates, and the batch it samples next. On
# this batch we compute both gradients, in all its parameters, and switch PPO's habits on.
#
# **Predict**, for the policy's parameters and for the critic's: which of these drive the gradients apart? Clipping; a value
# coefficient of 1; a second epoch; whitening the advantages. We measure, in each group of parameters,
# gap $= \|g_{PPO} - g\|/\|g\|$ with $g = \nabla L_{KLQ}/(\alpha\tau)$, which by (7.5) is 0 for plain PPO.

# %%
policy, rollout, config = grammar_batch()
print(f"τ = {config.tau}, so KLQ's value coefficient is {1 / config.tau:g}")
print(rollout.completions[:3])
explore(GAP)

# %% [markdown]
# **Explain.** With nothing switched on, the gap is the rounding of float32: claim 2 holds on a neural network just as on
# a table, since it never used the table. Each habit then does what the derivation says.

# %%
for name, change in ALONE.items():
    sizes = gap(**PLAIN | change)
    print(f"{name:>20}: policy {sizes['policy']:.1e}, critic {sizes['critic']:.1e}")

# %% [markdown]
# - *Clipping* is a rule about ratios that have moved. At the first step none has, so it changes nothing; later it stops
#   the gradient of some tokens, where KLQ's square pulls them back.
# - *The value coefficient* rescales the critic's part of (7.4) and leaves the policy's alone.
# - *A second epoch* starts away from $\theta_{old}$. There KLQ's error contains $\tau\ell$, the brake of (7.11), which plain
#   PPO lacks, and PPO has a ratio $\rho$, which KLQ lacks. The gap grows with the step.
# - *Whitening* subtracts the mean of $\Delta$ and divides by its spread, for the policy's part. That is another
#   estimator, and claim 1 is gone before any gradient is taken. For KLQ it is worse than for PPO: a constant taken from every
#   $\Delta$ is a constant taken from every target, and $V$ learns the wrong level.
#
# Two of them in formulas. PPO-clip maximises the mean of the smaller one of $\rho\hat A$ and $\mathrm{clamp}(\rho, 1\pm\varepsilon)\,\hat A$.
# Which is smaller? That depends on the sign of $\hat A$:
#
# $$\min\left(\rho\hat A,\; \mathrm{clamp}(\rho, 1\pm\varepsilon)\,\hat A\right) = \min(\rho,\, 1+\varepsilon)\,\hat A \;\text{ if } \hat A \ge 0, \quad \max(\rho,\, 1-\varepsilon)\,\hat A \;\text{ if } \hat A < 0 \tag{7.12}$$
#
# A good token earns nothing beyond $1+\varepsilon$, a bad one nothing below $1-\varepsilon$. The other two sides stay open, so a step in the wrong
# direction can be taken back. (With a maximum instead it would be the other way round.) The clip never promises more than $\rho\hat A$.

# %%
rho, eps = ell.exp(), 0.2
capped = torch.where(D >= 0, rho.clamp(max=1 + eps), rho.clamp(min=1 - eps)) * D
surrogate = -ppo_clip_loss(logp + ell, logp, D, mask, clip=eps)
check.equation("7.12", surrogate, capped[mask].mean())
check.inequality("7.12", surrogate, (rho * D)[mask].mean())

# %% [markdown]
# Whitening, with the mean $\bar\Delta$ and the standard deviation $\sigma$ of all $\Delta$ in the batch:
#
# $$\hat A^{white}_t = \frac{\Delta_t - \bar\Delta}{\sigma} \tag{7.13}$$
#
# Dividing is another step size. Subtracting is worse, for it moves the zero. Here the mean is negative, so tokens that went worse than
# expected, but not as badly as the average token, are now made *more* likely.

# %%
real, white = D[mask], whiten(D, mask)[mask]
sigma = real.std(correction=0)
check.equation("7.13", white, (real - real.mean()) / (sigma + 1e-8))  # σ may be 0
turned = (white.sign() != real.sign()).double().mean()
print(f"mean {real.mean():.2f}, σ {sigma:.2f}: {turned:.0%} of the signs change")

# %% [markdown]
# > **People ask: so is KLQ just PPO?**
# >
# > One exact step is, and one gradient is. Training is many steps with sampled tokens and shared weights, and there
# > KLQ is a PPO with five choices made for you: $\log\rho$ for $\rho$, a squared-log-ratio brake of weight $\tau/\alpha$
# > instead of a clip, the value coefficient $1/\tau$, a value that goes $\alpha$ of the way, and no whitening. Whether that is better is
# > for experiments to say: `klq demo` runs one.
#
# So how did your bets on the four rows come out?
#
# | row | same thing? | needs | ends with |
# |---|---|---|---|
# | the KL to $\pi_b$ | yes, moved across a minus sign (7.2) | nothing | a KL added to the reward of KLQ |
# | $\Delta$ and $\hat A$ | yes, the same number (7.3) | equal $\gamma$, $\lambda$, $V$ | whitening |
# | square and surrogate | same gradient up to $\alpha\tau$ (7.5) | $\theta = \theta_{old}$, value coefficient $1/\tau$ | the second epoch |
# | $\alpha$ and penalty | same policy (7.9), other values | a table, all tokens, exact fits | sampled tokens, shared weights, the clip |
#
# ## Exercises
#
# ### Exercise 7.1 · From step size to penalty
#
# A colleague wants to take KLQ's step with a PPO that has a penalty $c\,D(\pi\|\pi_{old})$. Return the pair of coefficients: the first
# beside $Q_{old} + \Delta$ and $\tau D(\pi\|\pi_b)$, the second beside the bare advantage. (And what happens to both as $\alpha \to 0$?)
#
# <!-- hints 7.1 -->


# %%
def my_coefficients(tau, alpha):
    # BEGIN SOLUTION
    return tau * (1 - alpha) / alpha, tau / alpha
    # END SOLUTION


check.exercise("7.1", my_coefficients)

# %% [markdown]
# ### Exercise 7.2 · One step, two anchors
#
# Return $\text{argmax}_\pi\, \mathbb{E}_\pi[q] - \tau D(\pi\|\pi_b) - \beta D(\pi\|\pi_{old})$ for one state: `old` and `ref` are
# probabilities, and they and `q` have shape [A].
#
# <!-- hints 7.2 -->


# %%
def my_penalty_step(old, ref, q, tau, beta):
    # BEGIN SOLUTION
    return torch.softmax((q + tau * ref.log() + beta * old.log()) / (tau + beta), -1)
    # END SOLUTION


check.exercise("7.2", my_penalty_step)

# %% [markdown]
# ### Exercise 7.3 · The PPO that takes KLQ's first step
#
# Write PPO's loss (without clip, a plain mean over tokens) so that its gradient at $\theta_{old}$ is KLQ's, divided by
# $\alpha\tau$. All tensors have shape [N]; the check differentiates your loss in `logprobs` and `values`, at the old ones and away from
# them. So KLQ's own square won't do: it has the same gradient at $\theta_{old}$ and parts from PPO there.
#
# <!-- hints 7.3 -->


# %%
def my_matching_ppo(logprobs, old_logprobs, values, old_values, advantages, tau):
    # BEGIN SOLUTION
    ratio = (logprobs - old_logprobs).exp()
    value_error = values - (old_values + advantages)
    return -(ratio * advantages).mean() + 0.5 * (value_error**2).mean() / tau
    # END SOLUTION


check.exercise("7.3", my_matching_ppo)

# %% [markdown]
# ### Open question
#
# Which of these survive into the second epoch on the same batch, and why: (a) $\Delta$ equals the GAE advantage; (b)
# KLQ's gradient is $\alpha\tau$ times PPO's; (c) the exact minimiser of KLQ's regression is the PPO-penalty step; (d) the
# square contains a KL penalty of weight $\tau/\alpha$?
#
# *What a good answer contains:* a verdict for each (4 points), the reason (4), and for the one that fails, the term that
# makes it fail (2).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# (a) survives: $\Delta$ was computed before the first step and does not change. (b) fails: away from $\theta_{old}$ KLQ's
# error is $\tau\ell - \alpha\Delta + (V - V_{old})$ instead of $-\alpha\Delta$. The new terms are the brake $\tau\ell$ and a
# coupling between critic and policy, and on PPO's side the ratio $\rho$ appears. (c) survives: where the minimum lies does not
# depend on how far we are on the way. It needs a table and all tokens, in every epoch. (d) survives as a term: now
# that $V$ has moved, the square gains a cross term $\tau\ell\,(V - V_{old})$ and terms without $\ell$, but $\tfrac12\tau^2\ell^2$ stands. Read as an
# *estimate* of $D(\pi\|\pi_{old})$ it is good to second order only, since the samples come from $\pi_{old}$.
#
# </details>

# %% [markdown]
# ## Remember
#
# The penalty moves from the reward into $Q$: same $\delta$, same $\Delta$ (7.2, 7.3). The first gradient is PPO's with value
# coefficient $1/\tau$ (7.5). The exact step is PPO-penalty with $\beta = \tau(1-\alpha)/\alpha$ beside $\tau D(\pi\|\pi_b)$ (7.9),
# or $\tau/\alpha$ beside the bare advantage (7.10). It stops at whitening, at clipping once ratios have moved, at a second
# epoch, and at every other value coefficient.
#
# *In the library:* `klq_edu.core.improvement` (`klq_step`, `ppo_penalty_step`, `penalty_coefficient`),
# `klq_edu.core.returns` (`gae`, `lambda_returns`), and `klq_edu.rlhf.algorithms`, where both algorithms stand on one
# page. *Next:* `make demo` lets the two race on a language model.

# %%
check.ledger()
