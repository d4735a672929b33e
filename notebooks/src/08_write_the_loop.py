# %% [markdown]
# # 08 · Write the loop
#
# **How do the formulas become a training loop, how does that loop break, and why may it learn from old completions?**
#
# *After this notebook you can* write the loop of KLQ (KL-regularised Q-learning) from memory; name five ways to break
# it, the number that gives each away, and its repair; prove that one pair of policy and value fits every completion,
# whoever sampled it; and say what replay and cooling buy.
#
# *You need* notebooks 06 (target and loss) and 07 (what they share with PPO, proximal policy optimisation). *Time:* <!-- minutes -->
# minutes. *Symbols:* $\pi_b$ reference, $\tau$ price of the Kullback–Leibler divergence (KL) $D$, $J$ objective,
# $\delta$ temporal-difference error, $\Delta$ its λ-sum, $\hat G$ target, $\alpha$ step size; a star marks the
# optimum. Here $\gamma = 1$ throughout.

# %%
from dataclasses import replace
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from klq_edu.core.objectives import ppo_clip_loss, ppo_penalty_loss, value_loss
from klq_edu.core.returns import lambda_returns, whiten
from klq_edu.course import explore, show, source, start
from klq_edu.course.chapters import float32
from klq_edu.course.chapters.c08_write_the_loop import (
    SCHEDULES,
    curves,
    doubled,
    frame,
    on_a_table,
    sweep,
    yours,
)
from klq_edu.figures import optimum_curves, optimum_gaps
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.evaluate import score as read
from klq_edu.rlhf.loop import batch_rows, prepare, start_values, train
from klq_edu.rlhf.optim import clip_gradients
from klq_edu.rlhf.replay import Memory, join, refreshed
from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.runs import Run
from klq_edu.worlds import load
from klq_edu.worlds.grammar import prompt_of
from klq_kernels.reference import klq_loss

check = start("08")

# %% [markdown]
# ## A world whose best is known
#
# The model is a small transformer that has learnt a grammar: short sentences after sixteen prompts. A lexicon scores
# each sentence; under the reference these scores have mean 0 and standard deviation 1. There are few enough sentences
# to list them all, so nothing about a policy has to be estimated.

# %%
with float32():  # the precision that models are trained in; checks stay in float64
    world = load("grammar")
tree, tau = world.tree, 0.2
R, owner, prompts = tree.rewards[tree.leaves], prompt_of(tree), len(tree.roots)
print(f"{len(R):,} sentences after {prompts} prompts")


def sentence_probs(table):
    """π(y|x) of every sentence, from a table of next-token probabilities."""
    return prompts * tree.sequence_distribution(table)


b = sentence_probs(tree.ref)

# %% [markdown]
# What we climb is the objective of notebook 03, the paper's (4), a mean over prompts $x$:
#
# $$J(\pi) = \mathbb{E}_x \sum_y \pi(y|x)\left[R(x,y) - \tau\log\frac{\pi(y|x)}{\pi_b(y|x)}\right] \tag{8.1}$$
#
# The library gets it from the leaves up, by soft policy evaluation. We list the sentences, for a policy that is
# neither the reference nor the optimum.

# %%
other = tree.optimum(1.0)[2]
p = sentence_probs(other)
J_other = tree.objective(other, tau)
check.equation("8.1", J_other, (p * (R - tau * (p / b).log())).sum() / prompts)

# %% [markdown]
# Its maximum is known in closed form (notebook 02),
#
# $$J^* = \mathbb{E}_x\; \tau\log\sum_y \pi_b(y|x)\,e^{R(x,y)/\tau} \tag{8.2}$$
#
# and what a policy lacks of it *is* its distance from the best policy, in nats once divided by $\tau$:
#
# $$J^* - J(\pi) = \tau\,D(\pi\|\pi^*) \tag{8.3}$$
#
# (Insert $\pi^*(y|x) = \pi_b(y|x)\,e^{R/\tau}/Z(x)$ into $D(\pi\|\pi^*)$, and (8.1) and (8.2) fall out.) So one number
# says how well a run has gone, whatever it was made with.

# %%
J_star = tree.optimum(tau)[1][tree.roots].mean()
by_prompt = torch.stack(
    [(b * (R / tau).exp())[owner == x].sum() for x in range(prompts)]
)
check.equation("8.2", J_star, tau * by_prompt.log().mean())
star = b * (R / tau).exp() / by_prompt[owner]
check.equation("8.3", J_star - J_other, tau * (p * (p / star).log()).sum() / prompts)
J_ref = abs(tree.objective(tree.ref, tau).item())  # no more than rounding
print(f"J of the reference {J_ref:.2f}, J* = {J_star:.3f}")

# %% [markdown]
# ## One batch, by hand
#
# Rollout first: a prompt per row, one sampled sentence each. What comes back holds everything that the losses need,
# [B, T], index $t$ for the token that is chosen at $t$.

# %%
config = TrainConfig(
    tau=tau, updates=24, batch_size=64, epochs=2, learning_rate=4e-3,
    final_lr_fraction=1.0, max_new_tokens=4, eval_every=4, device="cpu",
)  # fmt: skip
with float32():
    policy = world.make_policy(config)
    rollout = collect(
        policy, world.tokenizer, world.prompts["prompt"][:] * 4, max_new_tokens=4,
        constraint=world.constraint, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    scores = score(world.reward, rollout)
for x, y, r in zip(rollout.prompts[:3], rollout.completions, scores):
    print(f"{x} … {y:<28} {r:+.2f}")

# %% [markdown]
# The score goes to the last token, a fresh value head starts at the mean score, and then $Q$, $\delta$, $\Delta$,
# $\hat G$ follow. **Predict:** $\pi = \pi_b$, and $V$ is one constant $v$. What then is $\delta$ of a token that is
# not the last, and what is $\Delta$ of a token that $k$ others follow?

# %%
batch = doubled(rollout.rewarded(scores))
mask, lam, alpha = batch.mask, config.lam, config.alpha
level = scores.mean().double()
sampled = (
    batch.rewards, torch.where(mask, level, 0.0), batch.logprobs, batch.ref_logprobs
)  # fmt: skip
out = lambda_returns(*sampled, mask, tau=tau, lam=lam, alpha=alpha)
print(f"R − v of the first sentence: {scores[0] - level:+.4f}")
print("δ of its tokens:", [f"{x:+.4f}" for x in out.td_errors[0][mask[0]].tolist()])
print("Δ of its tokens:", [f"{x:+.4f}" for x in out.advantages[0][mask[0]].tolist()])

# %% [markdown]
# **Explain.** $Q = V$, no reward has come yet, and $V$ is the same on both sides: $\delta = 0 + v - v = 0$. Only the
# last token has an error, $R - v$, and λ carries it back:
#
# $$\pi = \pi_b,\; V = v: \qquad \Delta_t = \lambda^{k_t}\,(R - v) \qquad (k_t \text{ tokens follow}) \tag{8.4}$$

# %%
after = mask.sum(1, keepdim=True) - 1 - torch.arange(mask.shape[1])  # k_t
typed = lam**after * (batch.rewards.sum(1, keepdim=True) - level)
check.equation("8.4", out.advantages[mask], typed[mask], tol=1e-6)  # a float32 model

# %% [markdown]
# Then the loss, $\tfrac12(Q_\theta - \hat G)^2$, divided by $\alpha\tau$: that makes its gradient in $\log\pi$ the
# policy gradient itself (7.5), so a norm to clip gradients at means the same for every $\tau$. Before the first step
# $Q_\theta - \hat G = -\alpha\Delta$:
#
# $$L(\theta_{old}) = \frac{1}{\alpha\tau}\cdot\frac{1}{N}\sum_t \tfrac12\,(Q_{old} - \hat G)_t^2 = \frac{\alpha}{2\tau}\cdot\frac{1}{N}\sum_t\Delta_t^2 \tag{8.5}$$
#
# ($N$ real tokens). Worth knowing when you stare at a log: the first loss of an update does not say
# how good the policy is. It says how much its values still disagree with what it saw. (Only if $\Delta$ were small on
# *every* path would it prove something: (8.14) says what.)

# %%
_, values, logp, logq = sampled
first = klq_loss(logp, logq, values, out.targets, mask, tau=tau) / (alpha * tau)
check.equation("8.5", first, alpha / (2 * tau) * (out.advantages[mask] ** 2).mean())

# %% [markdown]
# ## The heart
#
# ### Exercise 8.1 · The heart of the loop
#
# Now you type it. Write one update: make the targets, then in each epoch read the model, compute the loss, take a
# step.
#
# - `batch` has `rewards`, `values`, `logprobs`, `ref_logprobs` and `mask`, all [B, T], as they were when it was sampled;
# - `forward()` returns log-probs and values [B, T] of the model as it is *now*, differentiable;
# - `step(loss)` takes one optimiser step;
# - `config` has `tau`, `gamma`, `lam`, `alpha` and `epochs`.
#
# Use `lambda_returns` and `klq_loss` as above, and return the losses, one per epoch, detached and stacked. The check
# runs your update on small tables, with plain gradient descent, and looks at the losses and at what became of the
# tables. If it passes, the loops below are driven by it; until then by ours.
#
# <!-- hints 8.1 -->


# %%
def my_update(batch, forward, step, config):
    # BEGIN SOLUTION
    out = lambda_returns(
        batch.rewards, batch.values, batch.logprobs, batch.ref_logprobs, batch.mask,
        tau=config.tau, gamma=config.gamma, lam=config.lam, alpha=config.alpha,
    )  # fmt: skip
    losses = []
    for _ in range(config.epochs):
        logprobs, values = forward()
        loss = klq_loss(
            logprobs, batch.ref_logprobs, values, out.targets, batch.mask,
            tau=config.tau,
        ) / (config.alpha * config.tau)  # fmt: skip
        step(loss)
        losses.append(loss.detach())
    return torch.stack(losses)
    # END SOLUTION


check.exercise("8.1", my_update)

# %%
update = yours("8.1", my_update)

# %% [markdown]
# ## The loop
#
# Around the heart: sample, score, remember, take notes. It is all here. What you do not need yet has a default:
# `refresh` and `stop` (old completions), `offset` (a mistake). Read it once from top to bottom.


# %%
@float32()
def my_loop(config, update=update, refresh=refreshed, stop=None, offset=0.0):
    policy = world.make_policy(config)
    prepare(policy, world.prompts, config)  # checks the fit, hands on the settings
    optimizer = torch.optim.Adam(policy.trainable().values(), lr=config.learning_rate)
    dice = torch.Generator().manual_seed(config.seed)
    memory = Memory(40)  # the last 40 batches
    exact, rows = world.evaluate(config), []

    def forward():
        torch.randperm(len(batch), generator=dice)  # `train` shuffles here
        stats, values = read(policy, batch)
        return stats.logprob, values

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        clip_gradients(policy, config.max_grad_norm)
        optimizer.step()

    for u in range(config.updates):
        now, new, row = config.cooled(u), None, {"update": u}
        policy.value_grad_scale = now.trunk_scale  # τ: V's weight in a shared trunk
        if u < (stop or config.updates):  # roll out, and score
            asked = world.prompts[batch_rows(len(world.prompts), config, u)]["prompt"]
            new = collect(
                policy, world.tokenizer, asked, max_new_tokens=config.max_new_tokens,
                constraint=world.constraint, generator=dice,
            )  # fmt: skip
            scores = score(world.reward, new)
            if u == 0:  # a fresh value head starts at the mean score
                new = start_values(policy, new, scores.mean() + offset)
            new = new.rewarded(scores)
            row |= notes(new, config.tau)
        ready = u >= (stop or 0)  # with `stop`, old ones only from there on
        old = memory.draw(config.replay, dice) if ready else None
        batch = join(*filter(None, (new, old and refresh(policy, old))))
        row["loss"] = update(batch, forward, step, now).mean().item()
        if new:
            memory.add(new)
        if u % config.eval_every == config.eval_every - 1:
            row |= exact(policy)  # by enumeration: J, KL(π‖π*), KL(π‖π_b)
        rows.append(row)
    return rows


def notes(new, tau):
    row = {"reward": new.rewards.sum(1).mean().item()}
    row |= {
        "kl": new.kl.sum(1).mean().item(),
        "value": new.values[new.mask].mean().item(),
    }
    row["objective"] = row["reward"] - tau * row["kl"]
    return row | {"value_0": new.values[:, 0].mean().item()}  # V(s_0) should be J


# %% [markdown]
# **Predict.** The loop will sample 24 batches of 64 sentences, 1,536 of the many thousands that there are, and take 48
# steps. Which share of the way from $J(\pi_b) = 0$ to $J^*$ will it go: a tenth, a half, most of it?

# %%
runs = {"sound": my_loop(config)}


def say(name, update):
    row = runs[name][update - 1]
    print(f"{name:>22}, after {update:2} updates: J = {row['J']:+.2f}", end=", ")
    print(f"KL(π‖π*) = {row['kl_optimum']:.2f} nats, KL(π‖π_b) = {row['exact_kl']:.2f}")


for u in (8, 16, 24):
    say("sound", u)
print(f"{'the best there is':>22}: J* = {J_star:.2f}")
print(f"{'share of the way':>22}: {runs['sound'][-1]['attained']:.0%}")

# %% [markdown]
# ## Is it the library's loop?
#
# `klq_edu.rlhf.loop.train` does the same, and saves, resumes, logs and checks besides. With the same seed it must draw
# the same sentences and take the same steps. It takes its loss from a fused kernel, though, which never forms what you
# typed; so "the same" means up to the rounding of float32, which every further step passes on. For every metric $m$ of
# every update:
#
# $$|m_{yours} - m_{train}| \le 10^{-4} \tag{8.6}$$

# %%
twelve = replace(config, updates=12)
with float32(), TemporaryDirectory() as folder:
    theirs = train(
        world.make_policy(twelve), world.tokenizer, world.prompts, world.reward, twelve,
        run=Run(folder, twelve.to_dict()), constraint=world.constraint,
    )  # fmt: skip
names = ("reward", "kl", "objective", "value", "loss")
mine, library = (
    torch.tensor([[row[name] for name in names] for row in rows])
    for rows in (runs["sound"][:12], theirs)
)
check.inequality("8.6", (mine - library).abs(), torch.full_like(mine, 1e-4))
print(
    f"largest difference {(mine - library).abs().max():.1e} in {mine.numel()} numbers"
)

# %% [markdown]
# ## Break it
#
# A loop that runs is not a loop that works, and a broken one seldom crashes. Five breaks follow, each with a
# prediction before and the exact damage after.
#
# ### 1 · The level of V
#
# Scores of a reward model have an arbitrary level: add 10 to all of them and no text is better than before. Suppose a
# value head starts at 0 where the rewards have mean 10, or (the same thing) ten too low where they have mean 0. Shift
# $V$ by $c$ in all states, and inside a sentence nothing happens to $\delta$, since $c$ is on both sides. Only the
# last token pays:
#
# $$\Delta_t(V + c) = \Delta_t(V) - c\,\lambda^{k_t} \tag{8.7}$$
#
# **Predict.** $c = -10$: every token that is sampled looks nearly ten better than expected, whatever it is. Two things
# can give $Q = \tau\log\frac{\pi}{\pi_b} + V$ the missing ten: $V$, or the log-ratio, by $10/\tau = 50$ nats. A unit
# of $V$ and a unit of $\tau\log\frac{\pi}{\pi_b}$ move $Q$ alike. What happens to the policy meanwhile?

# %%
c = -10.0
shifted = batch.rewards, values + c, logp, logq
moved = lambda_returns(*shifted, mask, tau=tau, lam=lam, alpha=alpha)
check.equation("8.7", moved.advantages[mask], (out.advantages - c * lam**after)[mask])

# %% tags=["heavy"]
sixteen = replace(config, updates=16, eval_every=8)
runs["offset of V"] = my_loop(sixteen, offset=c)
for name in ("sound", "offset of V"):
    say(name, 8)
    say(name, 16)
for name in ("sound", "offset of V"):
    level_of_V = [f"{u}: {runs[name][u - 1]['value']:+.2f}" for u in (1, 8, 16)]
    print(f"{name:>22}, `value` after", ", ".join(level_of_V))

# %% [markdown]
# **Explain.** Until $V$ has found its level, whatever was sampled is pushed up because it was sampled. The policy
# drifts towards its own accidents and pays KL for them; from there it has to come back. The giveaway is the column
# `value` of the log: it runs towards the reward while $J$ lags. **Repair:** start $V$ at the mean score, as the loop
# does without `offset`, or centre the rewards: `TrainConfig(centre="batch")` subtracts the mean of the *first* batch
# from all, `"prompt"` a mean per prompt, where prompts differ in level. By (8.2) a constant per prompt moves $J^*$ and $J$ alike, so no policy's rank changes. Exercise 8.2 is this
# repair.
#
# ### 2 · Whitening
#
# PPO's habit: subtract the mean of $\Delta$, divide by its standard deviation. In the heart that is one line.
# **Predict:** which suffers, $J$, or $V$, or both? Here is a hint. Whitening does not see a constant:
#
# $$\mathrm{whiten}(\Delta + c) = \mathrm{whiten}(\Delta), \qquad \frac{1}{N}\sum_t \mathrm{whiten}(\Delta)_t^2 = 1 \tag{8.8}$$
#
# At $\lambda = 1$ the first half erases (8.7) altogether; at $\lambda < 1$ what is left of it is which tokens stand near
# the end. The second half says what happens near the optimum.

# %%
white, blind = whiten(out.advantages, mask), whiten(out.advantages + c, mask)
check.equation("8.8", blind[mask], white[mask])
check.equation("8.8", (white[mask] ** 2).mean(), 1.0, tol=1e-6)  # σ + 1e-8


def whitened_update(batch, forward, step, config):
    out = lambda_returns(
        batch.rewards, batch.values, batch.logprobs, batch.ref_logprobs, batch.mask,
        tau=config.tau, gamma=config.gamma, lam=config.lam, alpha=config.alpha,
    )  # fmt: skip
    gain = whiten(out.advantages, batch.mask) - out.advantages
    targets, losses = out.targets + config.alpha * gain, []
    for _ in range(config.epochs):
        logprobs, values = forward()
        loss = klq_loss(
            logprobs, batch.ref_logprobs, values, targets, batch.mask, tau=config.tau
        ) / (config.alpha * config.tau)  # fmt: skip
        step(loss)
        losses.append(loss.detach())
    return torch.stack(losses)


# %% tags=["heavy"]
runs["whitened"] = my_loop(sixteen, whitened_update)
for name in ("sound", "whitened"):
    say(name, 16)
    print(f"{'':>22}  mean V(s_0) in its last batch: {runs[name][15]['value_0']:.2f}")
small = TrainConfig(tau=0.5, alpha=0.3, epochs=2)
for name, heart in {"sound": update, "whitened": whitened_update}.items():
    nats = on_a_table(heart, small)  # after how many updates, how far from π*
    print(f"{name:>22}, on a table:", end=" ")
    print(", ".join(f"after {u} {x:.5f}" for u, x in nats.items()), "nats from π*")

# %% [markdown]
# **Explain.** In this run $J$ hardly notices, since the direction of a policy gradient survives a common factor, and a
# common constant about as well. $V$ notices: nothing pulls it to its level any more, so it stays near where it began
# while the policy climbs, and $Q_\theta$ is no action value of anything. Near the optimum the second half of (8.8)
# bites: $\Delta$ is small there, whitening blows it up to size 1, and the policy never comes to rest. On a language
# model noise hides that; a table that starts next to the optimum shows it. **Repair:** leave $\Delta$ alone.
#
# ### 3 · λ = 0
#
# **Predict** from (8.4) what the first update can teach the first word of a sentence if $\lambda = 0$. After how many
# updates can news of the reward have reached it?

# %% tags=["heavy"]
runs["λ = 0"] = my_loop(replace(sixteen, lam=0.0))
for name in ("sound", "λ = 0"):
    say(name, 16)
print(f"α = {config.alpha}")

# %% [markdown]
# **Explain.** With $\lambda = 0$ only the last token has an error. The token before it learns when $V$ of the state
# between them has learnt, the one before that later still: one token per update at best. The step size limits it too:
# each time news goes a part $\alpha = 0.2$ of the way, by a critic that must be right before the policy can be. **Repair:** $\lambda$ near 1 for short texts.
#
# ### 4 · No reference
#
# Let the reference be whoever sampled: $Q = \tau\log\frac{\pi}{\pi_{old}} + V$. Each update is then braked, but nothing
# pulls back. **Predict:** reward, KL and $J$, which goes up and which goes down? What pays most where KL is free is known
# without training: all probability on the best sentence $y_g$ of each prompt, for $-\log\pi_b(y_g|x)$ nats,
#
# $$J(\pi_{greedy}) = \mathbb{E}_x\big[\max_y R(x,y) + \tau\log\pi_b(y_g|x)\big] \tag{8.9}$$

# %%
greedy = tree.optimum(1e-7)[2]  # no price, no compromise
best = torch.tensor(
    [torch.where(owner == x, R, -torch.inf).argmax() for x in range(prompts)]
)
J_greedy = tree.objective(greedy, tau)
check.equation("8.9", J_greedy, (R[best] + tau * b[best].log()).mean(), tol=1e-6)
print(f"J(greedy) = {J_greedy:.2f} at τ = {tau}, of J* = {J_star:.2f}")


def unanchored_update(batch, forward, step, config):
    return update(replace(batch, ref_logprobs=batch.logprobs), forward, step, config)


# %% tags=["heavy"]
runs["no reference"] = my_loop(sixteen, unanchored_update)
for name in ("sound", "no reference"):
    for u in (8, 16):
        say(name, u)
        print(f"{'':>22}  exact mean reward: {runs[name][u - 1]['exact_reward']:.2f}")

# %% [markdown]
# **Explain.** A dashboard that shows the reward alone would call this run nearly as good as the sound one. But it pays
# more KL for less $J$: at update 16 $J$ is where it was at 8, while KL goes on growing. Even the greedy policy of (8.9)
# would have more; this run narrows onto sentences that are not the best. Sixteen
# updates do not show where it ends; but what it has once left, it samples no more, and nothing calls it back. The
# reference is what keeps a policy broad. **Repair:** the reference, in $Q$ once. (Twice is wrong too:
# notebook 07.)
#
# ### 5 · A stale batch
#
# Sampling is the expensive part. So stop it after four updates, and only then turn to old completions: draw 64 of the 256,
# with the log-probs, values and targets *they were stored with*. **Predict:** the loss is a square that is fitted
# again and again. Does $J$ go on rising, stay, or fall? And what if log-probs and values are first recomputed under
# the present policy, as `refreshed` does?

# %%
source(refreshed)

# %% [markdown]
# Tokens, rewards and $\pi_b$ stay, $\theta$ is today's:
#
# $$\hat G_t = Q_\theta(s_t, a_t) + \alpha\,\Delta_t, \qquad Q_\theta = \tau\log\frac{\pi_\theta(a_t|s_t)}{\pi_b(a_t|s_t)} + V_\theta(s_t) \tag{8.10}$$
#
# To check it, we jolt the model that sampled the batch above, and read log-probs and values from its plain forward
# pass.

# %%
with float32(), torch.no_grad():
    for weights in policy.trainable().values():
        weights.add_(0.02 * torch.randn(weights.shape))
    anew = doubled(refreshed(policy, rollout.rewarded(scores)))
    place = slice(-mask.shape[1], None)
    inputs = policy.encode(rollout.input_ids, rollout.attention_mask)
    logits, V_now = (x.double() for x in policy(inputs, place))
logp_now = logits.masked_fill(~rollout.allowed, -torch.inf).log_softmax(-1)
logp_now = logp_now.gather(-1, rollout.tokens[..., None]).squeeze(-1)
Q_now = tau * (logp_now - batch.ref_logprobs) + V_now
goals = torch.zeros_like(Q_now)
for i in range(len(mask)):  # typed, from the last token of a sentence to its first
    came, Delta = batch.rewards[i].sum(), 0.0
    for t in reversed(range(int(mask[i].sum()))):
        Delta = came - Q_now[i, t] + lam * Delta
        goals[i, t], came = Q_now[i, t] + alpha * Delta, V_now[i, t]
look = anew.rewards, anew.values, anew.logprobs, anew.ref_logprobs
out_now = lambda_returns(*look, mask, tau=tau, lam=lam, alpha=alpha)
check.equation("8.10", out_now.targets[mask], goals[mask], tol=1e-5)

# %% tags=["heavy"]
eight = replace(config, updates=8, replay=64)
runs["stale"] = my_loop(eight, refresh=lambda policy, old: old, stop=4)
runs["refreshed"] = my_loop(eight, stop=4)
for name in ("stale", "refreshed"):
    say(name, 4)
    say(name, 8)
say("sound", 8)

# %% [markdown]
# **Explain.** A stale target is $Q_{old} + \alpha\Delta_{old}$: where the policy *then* should have gone. Fitting it
# now drags the policy back. Refreshed, the same sentences say how they look from here, $\Delta$ asks only for what is
# still missing, and they go on teaching. Less than new ones would, which also show what the policy does now.
# **Repair:** recompute log-probs, values and targets; keep tokens, reward and reference.
#
# The widget shows all runs: pick one, and what to see of it.

# %% tags=["heavy"]
explore(curves(runs, J_star.item()))

# %% [markdown]
# > **People ask: my loss goes down. Is it learning?**
# >
# > Or: my loss goes up; is it broken? By (8.5) the loss measures surprise. It rises when the policy finds something
# > new and falls when values have caught up, also of a policy that is stuck. Look at $J$, or at its sample, reward
# > less $\tau$ times KL (`objective` in the log); at the KL; and at whether `value` follows.
#
# ## Why old completions may be used again
#
# PPO weighs old completions by the ratio $\pi/\pi_{old}$, and throws them away soon. The loop above weighed nothing.
# By what right? By this one: *at the optimum there is no error left, on any path, whoever walked it.* Take any pair
# $(\pi, V)$, and $\delta$ of its $Q = \tau\log\frac{\pi}{\pi_b} + V$, as a table:
#
# $$\delta(s,a) = r(s,a) + V(s') - \tau\log\frac{\pi(a|s)}{\pi_b(a|s)} - V(s) \tag{8.11}$$
#
# **Theorem** (as derived here, for $\pi > 0$ where $\pi_b > 0$): where rewards and transitions are deterministic, as they
# are for text, $\Delta = 0$ along every path if and only if $(\pi, V) = (\pi^*, V^*)$. (With a random reward no pair fits
# every path: $\Delta$ is then 0 only on average.)
#
# **There.** At the optimum $\pi^* = \pi_b\,e^{(Q^* - V^*)/\tau}$, so
# $\tau\log\frac{\pi^*}{\pi_b} + V^* = Q^* = r + V^*(s')$, and $\delta = 0$. We check the table, and then batches that
# three different policies have sampled.

# %%
Q_star, V_star, pi_star = tree.optimum(tau)
allowed = tree.ref > 0
noisy = torch.where(allowed, tree.ref.log() + torch.randn(tree.ref.shape), -torch.inf)
noisy, V = noisy.softmax(-1), torch.randn(len(tree.ref))


def td_table(pi, V):
    """(8.11), typed."""
    following = torch.cat([V, torch.zeros(1)])[tree.children]  # 0 after the end
    error = tree.rewards + following - tau * (pi / tree.ref).log() - V[:, None]
    return error[allowed]


check.equation("8.11", tree.td_errors(noisy, V, tau)[allowed], td_table(noisy, V))
check.equation("8.11", td_table(pi_star, V_star), torch.zeros(int(allowed.sum())))
for sampler in (tree.ref, noisy, pi_star):
    found = tree.rollout(sampler, 200)
    at = found.states, found.tokens
    seen = found.rewards, V_star[at[0]], pi_star[at].log(), tree.ref[at].log()
    deltas = lambda_returns(*seen, found.mask, tau=tau, lam=0.95).advantages
    check.equation("8.11", deltas[found.mask], torch.zeros(int(found.mask.sum())))

# %% [markdown]
# **And back.** Three lines.
#
# 1. If $\Delta = 0$ along every path, then $\delta_t = \Delta_t - \lambda\Delta_{t+1} = 0$ for every token.
# 2. Solve (8.11) for $e^{\delta/\tau}$ and take its mean under $\pi$. The policy cancels, whatever it is:
#
# $$\tau\log\sum_a \pi(a|s)\,e^{\delta(s,a)/\tau} = \tau\log\sum_a \pi_b(a|s)\,e^{(r(s,a) + V(s'))/\tau} - V(s) \tag{8.12}$$
#
# 3. With $\delta = 0$ the left side is 0, so $V(s) = \tau\log\sum_a \pi_b\,e^{(r + V(s'))/\tau}$: soft optimality (notebook 02).
#    After the end $V = 0$; so from the leaves up $V = V^*$, then $Q = r + V^*(s') = Q^*$, and $\pi = \pi^*$.

# %%
delta = tree.td_errors(noisy, V, tau)
following = torch.cat([V, torch.zeros(1)])[tree.children]
right = (tree.ref.log() + (tree.rewards + following) / tau).logsumexp(-1)
left = (noisy.log() + delta / tau).logsumexp(-1)
check.equation("8.12", tau * left, tau * right - V)
for name, pair in {
    "the optimum": (pi_star, V_star),
    "π*, V* + 0.1": (pi_star, V_star + 0.1),
    "π_b, V*": (tree.ref, V_star),
    "π*, V of the reference": (pi_star, tree.evaluate(tree.ref, tau)[1]),
}.items():
    print(f"{name:>22}: largest |δ| = {tree.td_errors(*pair, tau).abs().max():.2g}")

# %% [markdown]
# **How much error means how far?** Add $\delta$ up along a path. The values telescope, and what is left is path
# consistency (Nachum and others, 2017):
#
# $$\sum_t \delta_t = R(x,y) - \tau\log\frac{\pi(y|x)}{\pi_b(y|x)} - V(s_0) \tag{8.13}$$
#
# Take its mean over the paths of $\pi^*$, and subtract that over the paths of $\pi$. $V(s_0)$ drops out, and $J$ turns
# the rest into distances:
#
# $$\mathbb{E}_{\pi^*}\Big[\sum_t\delta_t\Big] - \mathbb{E}_{\pi}\Big[\sum_t\delta_t\Big] = \tau\,\big[D(\pi\|\pi^*) + D(\pi^*\|\pi)\big] \tag{8.14}$$
#
# So if no error is larger than $\varepsilon$ and no sentence longer than $T$, then
# $D(\pi\|\pi^*) \le 2T\varepsilon/\tau$. Small errors everywhere prove that the optimum is near.

# %%
found = tree.rollout(noisy, 500)
at = found.states, found.tokens
along = torch.where(found.mask, delta[at], 0.0).sum(1)
log_ratio = torch.where(found.mask, (noisy / tree.ref)[at].log(), 0.0).sum(1)
left = found.rewards.sum(1) - tau * log_ratio - V[found.states[:, 0]]
check.equation("8.13", along, left)


def mean_along(pi):
    return (tree.visits(pi)[:, None] * pi * delta).sum()


p = sentence_probs(noisy)
both_ways = ((p - star) * (p / star).log()).sum() / prompts
check.equation("8.14", mean_along(pi_star) - mean_along(noisy), tau * both_ways)
for share in (0.0, 0.9, 0.99, 1.0):  # of the way to the optimum
    mixed = torch.where(allowed, noisy ** (1 - share) * pi_star**share, 0.0)
    mixed = mixed / mixed.sum(-1, keepdim=True)
    errors = tree.td_errors(mixed, (1 - share) * V + share * V_star, tau).abs().max()
    distance = (J_star - tree.objective(mixed, tau)) / tau
    check.inequality("8.14", distance, 2 * len(tree.levels) * errors / tau)

# %% [markdown]
# That is the license. For a model that can represent the optimum, the loop's fixed point is $\Delta = 0$ on the
# completions that it sees, and the optimum is such a point whoever sampled them; seen from enough paths, it is the only
# one. No importance weight appears, because every path has to fit by itself, not on average. (A model that cannot fit
# every path finds a compromise, and then it matters whose completions are weighed.) What the license does *not* say: that away from the optimum an old
# completion is as good as a new one. There $\Delta_t$ follows the continuation that the *old* policy took
# (`TrainConfig(retrace=True)` cuts it short), and the old policy visits states that matter less by now. And it needs
# $\Delta$ as it is: whitened, its mean square is 1, however near the optimum is.
#
# ## Replay and cooling
#
# `TrainConfig(replay=128)` adds 128 earlier completions, refreshed, to each batch of 64 new ones. A second knob is
# $\tau$ itself: begin with more than the price you mean to pay, so that the policy stays broad while it knows little,
# and cool down over the first half of the $U$ updates:
#
# $$\tau_u = \tau\left(\frac{\tau_{start}}{\tau}\right)^{\max(0,\; 1 - 2u/U)} \tag{8.15}$$

# %%
cooling = replace(config, tau_start=0.5, replay=128, eval_every=24)
U = config.updates
check.equation(
    "8.15",
    [cooling.cooled(u).tau for u in range(U)],
    [tau * (0.5 / tau) ** max(0.0, 1 - 2 * u / U) for u in range(U)],
)

# %% [markdown]
# **Predict.** Three loops: the sound one, one with replay, and one with cooled replay, both together. After the same
# 1,536 new completions, which policy is nearest to $\pi^*$, in nats? And which after *eight* updates?

# %% tags=["heavy"]
runs["replay"] = my_loop(replace(cooling, tau_start=None, eval_every=8))
runs["cooled replay"] = my_loop(replace(cooling, eval_every=8))
for u in (8, 24):
    for name in ("sound", "replay", "cooled replay"):
        say(name, u)

# %% [markdown]
# **Explain.** No reward was asked more often; the gain is bought with compute, up to three times as many rows per step.
# After eight updates that has bought nothing yet: plain replay is slightly behind the sound loop. Cooled replay is
# further behind, since it climbs another hill, that of a higher $\tau$, and pays off once it has cooled. One seed proves
# little. The ten seeds below are of *cooled replay*, both together: they tell what the pair is worth, not what each half is.
#
# ## One race, and many
#
# The same loop with another heart is another algorithm. PPO needs the same $\Delta$ (7.3), and nothing else of the
# loop changes.


# %%
def ppo_update(surrogate):
    def update(batch, forward, step, config):
        out = lambda_returns(
            batch.rewards, batch.values, batch.logprobs, batch.ref_logprobs, batch.mask,
            tau=config.tau, gamma=config.gamma, lam=config.lam,
        )  # fmt: skip
        losses = []
        for _ in range(config.epochs):
            logprobs, values = forward()
            loss = surrogate(logprobs, batch.logprobs, out.advantages, batch.mask)
            returns = batch.values + out.advantages
            loss = loss + config.vf_coef * value_loss(values, returns, batch.mask)
            step(loss)
            losses.append(loss.detach())
        return torch.stack(losses)

    return update


def with_penalty(*arguments):
    return ppo_penalty_loss(*arguments, coef=config.tau / config.alpha)


# %% tags=["heavy"]
for name, surrogate in {
    "ppo_clip": ppo_clip_loss,
    "ppo_penalty": with_penalty,
}.items():
    settings = replace(config, updates=16, algorithm=name)
    runs[name] = my_loop(settings, ppo_update(surrogate))
race = {"klq": "sound", "ppo_clip": "ppo_clip", "ppo_penalty": "ppo_penalty"}
race = frame({name: runs[run][:16] for name, run in race.items()}, config.batch_size)
show(optimum_curves(race, tau))

# %% [markdown]
# One seed, one $\tau$, one learning rate that was chosen for none of them: a race like this shows that the loop is
# right, not which algorithm is better. For that, the repository holds many runs: five prices $\tau$, ten seeds, three
# ways to use the same number of completions, each algorithm with the learning rate that did best for it on other
# seeds. The command that made them is `klq sweep --tuned-by results/grammar_screening.csv --out results`.

# %%
many = sweep()
hours = many["seconds"].sum() / 3600
print(f"{len(many)} runs, {hours:.1f} hours of training on one core")
show(optimum_gaps(many, SCHEDULES))

# %% [markdown]
# Read it from left to right first, with the medians in numbers.

# %%
medians = many.groupby(["tau", "algorithm", "schedule"])["kl_optimum"].median()
medians = medians.unstack("schedule")[list(SCHEDULES)]
print(medians.round(3).to_string())
assert (medians["on_policy"] > medians["equal"]).all()
assert (medians["equal"] > medians["replay"]).all()
factor = (medians["on_policy"] / medians["replay"]).unstack("algorithm")
assert factor.loc[:0.1].min().min() > factor.loc[0.2:].max().max()

# %% [markdown]
# Every median falls from left to right: cooled replay helps *every* algorithm, by more where $\tau$ is small.
#
# Between algorithms one rule for all $\tau$: pair the runs by seed, and count in how many of the ten KLQ ends nearer to
# $\pi^*$. Two equal algorithms would give about five. **Predict** from notebook 07, claim 3: against which of PPO-clip and
# PPO-penalty will it be about five?

# %%
pairs = many.pivot_table("kl_optimum", ["tau", "seed"], ["schedule", "algorithm"])
nearer = {}
for schedule in SCHEDULES:
    ended = pairs[schedule]
    for rival in ("ppo_clip", "ppo_penalty"):
        won = (ended["klq"] < ended[rival]).groupby("tau").sum()
        nearer[schedule, rival] = won
print("seeds of ten in which KLQ is nearer than")
print(pd.DataFrame(nearer).to_string())
won, last = nearer["replay", "ppo_clip"], medians["replay"].unstack("algorithm")
assert (won.loc[0.2:] >= 9).all()
assert (won.loc[:0.1] >= 2).all() and (won.loc[:0.1] <= 8).all()
assert (last["ppo_clip"] < last["klq"]).loc[:0.1].all()
assert nearer["replay", "ppo_penalty"].between(2, 8).all()
assert (nearer["equal", "ppo_penalty"].loc[:0.1] == 0).all()
assert nearer["equal", "ppo_clip"].loc[0.05] <= 1

# %% [markdown]
# With cooled replay (the last two columns), against PPO-clip: for $\tau \ge 0.2$ KLQ is nearer in at least 9 of 10
# seeds; below that PPO-clip's median is nearer and no difference is shown. (By chance alone, 9 or more of 10 come up one
# time in a hundred, and so do 1 or fewer.) Against PPO-penalty no difference is shown at any $\tau$, as claim 3 would have
# it. That is no law: with equal compute PPO-penalty is nearer in all ten for $\tau \le 0.1$, and PPO-clip in at least
# nine for $\tau = 0.05$. (Thirty counts are read here; chance alone would put less than one of them so far from five.
# The whitened PPO-clip of the figure is break 2 in a loss that takes no $Q$: there it costs nothing clear.)
#
# ## Exercises
#
# (Exercise 8.1 is above, in front of the loop.)
#
# ### Exercise 8.2 · The repair of an offset
#
# `scores` [B] are those of a batch, completion $i$ answers prompt number `prompts[i]`, and `ref_scores` [P, n] are $n$
# scores of the reference's completions of each of the P prompts. Return the rewards to train on [B], such that $V = 0$
# is the right start in every prompt, and no policy's rank changes.
#
# <!-- hints 8.2 -->


# %%
def my_centred(scores, prompts, ref_scores):
    # BEGIN SOLUTION
    return scores - ref_scores.mean(1)[prompts]
    # END SOLUTION


check.exercise("8.2", my_centred)

# %% [markdown]
# ### Exercise 8.3 · An old batch, seen anew
#
# Completions from ten updates ago come out of the memory. Return their targets $\hat G$ [B, T] for the next update.
# You are given more than you need: what was stored (`rewards`, `ref_logprobs`, `mask`, `old_logprobs`, `old_values`)
# and what the present model says of the same tokens (`logprobs`, `values`). Padding may hold NaN (not a number) and
# is 0 in the result.
#
# <!-- hints 8.3 -->


# %%
def my_refreshed_targets(
    rewards, ref_logprobs, mask, old_logprobs, old_values, logprobs, values, tau, lam, alpha
):  # fmt: skip
    # BEGIN SOLUTION
    out = lambda_returns(
        rewards, values, logprobs, ref_logprobs, mask, tau=tau, lam=lam, alpha=alpha
    )
    return out.targets
    # END SOLUTION


check.exercise("8.3", my_refreshed_targets)

# %% [markdown]
# ### Exercise 8.4 · How far from the optimum?
#
# One prompt: `probs` and `ref_probs` [N] are $\pi(y)$ and $\pi_b(y)$ of all N completions, `rewards` [N] their scores.
# Return $D(\pi\|\pi^*)$ in nats, for a large $\tau$ and for one a thousandth of the rewards: mind overflow.
#
# <!-- hints 8.4 -->


# %%
def my_distance(probs, ref_probs, rewards, tau):
    # BEGIN SOLUTION
    best = tau * torch.logsumexp(ref_probs.log() + rewards / tau, -1)
    objective = (probs * (rewards - tau * (probs / ref_probs).log())).sum()
    return (best - objective) / tau
    # END SOLUTION


check.exercise("8.4", my_distance)

# %% [markdown]
# ### Open question
#
# A colleague's run on a real model looks like this after an hour: reward up steadily, `value` far below the reward and
# hardly moving, KL to the reference growing faster than in the paper, loss flat. There is no $J^*$ to compare with.
# Which of the five breaks could it be, what would you look at to tell them apart, and what do you change first?
#
# *What a good answer contains:* at least three suspects with the reason (3 points); for each, one number or one short
# experiment that would acquit it (3); why a flat loss says little (2); a first change, cheap and reversible (2).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# *Whitening*: (8.8) leaves $V$ where it began, and the loss flat near $\alpha/2\tau$, since the mean square is 1 in
# every batch. That fits all four signs; look at the settings, or at the root mean square of $\hat G - Q_{old}$, which
# would be $\alpha$ always. *An offset* that $V$ cannot learn (value head not trained, or with too small a step): then
# the mean of $\Delta$ is not near 0; print it, it should shrink. *No reference*, or one that moves: reward up and KL
# without end; compare `ref_logprobs` of one fixed text at two updates, they must be equal and differ from `logprobs`.
# *A stale batch* would hold the reward back, so it is unlikely, and $\lambda = 0$ would as well. The loss measures the
# surprise of the values (8.5), not the policy, so flat may be anything. First change: whitening off and rewards
# centred, from the same checkpoint for twenty updates, and see whether `value` follows `reward` less $\tau$ times KL.
#
# </details>

# %% [markdown]
# ## Remember
#
# Roll out, score, $\Delta$ once, then epochs of loss and step: the loop is forty lines, and equals the library's up to
# rounding (8.6). $J^* - J$ is the distance from $\pi^*$, in nats after division by $\tau$ (8.3). Start $V$ at the
# level of the rewards (8.7), leave $\Delta$ unwhitened (8.8), look ahead with $\lambda$ (8.4), keep the reference in
# $Q$ (8.9), refresh what is old. $\Delta = 0$ on every path only at the optimum (8.11, 8.12), and small errors
# everywhere mean that it is near (8.14): so old completions may teach again.
#
# *In the library:* `klq_edu.rlhf.loop.train` (the loop), `klq_edu.rlhf.algorithms` (the hearts), `klq_edu.rlhf.replay`
# (memory and refreshing), `klq_edu.core.tree.TokenTree.td_errors` (the theorem). *Next:* `klq demo --world stories`,
# the same loop on a language model that tells stories.

# %%
check.ledger()
