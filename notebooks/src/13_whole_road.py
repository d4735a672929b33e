# %% [markdown]
# # 13 · The whole road on a laptop
#
# **What does it take to get from texts to a trained policy, and how sure are we that it got better?**
#
# *After this notebook you can* say what each stage of RLHF (reinforcement learning from human feedback) makes and costs; derive the loss
# of a reward model and what it cannot know; read its calibration, and say how often it *could* be right; tell reward from truth as a
# policy leaves its reference; compare two policies before judges that lean; and say how many prompts and seeds it takes to show a
# difference.
#
# *You need* notebooks 07 (KLQ, KL-regularised Q-learning, beside PPO, proximal policy optimisation) and 08 (the loop). *Time:* <!-- minutes --> minutes.
# *Symbols:* $R$ reward, $D$ Kullback–Leibler divergence (KL), $\sigma(x) = 1/(1+e^{-x})$, $\varepsilon$ share of wrong labels,
# $n$ completions or prompts, $S$ seeds, $d$ a win-rate less ½, $z_p$ quantile of the normal distribution.

# %%
from itertools import product
from statistics import NormalDist, pstdev
from types import SimpleNamespace

import pandas as pd
import torch
from IPython.display import Markdown, display

from klq_edu.app import comparison, report, study
from klq_edu.core.improvement import boltzmann
from klq_edu.core.tree import TokenTree
from klq_edu.course import explore, show, start
from klq_edu.course.chapters import c13_whole_road as c13  # this chapter's own
from klq_edu.figures import STYLES, gains_along_kl
from klq_edu.rlhf.judge import (
    bootstrap_interval,
    by_score,
    outcomes,
    preferred,
    win_rate_of_seeds,
)
from klq_edu.rlhf.power import pairs_needed, seeds_needed, t_quantile
from klq_edu.rlhf.preference import bradley_terry_loss, preference_pairs
from klq_edu.worlds import grammar, load
from klq_edu.worlds.gold import hacks, overlap
from klq_edu.worlds.road import PAIRS
from klq_kernels.reference import kl_divergence

check = start("13")
pd.set_option("display.max_colwidth", None)
WORLDS = ("tldr", "dialogue", "stories")

# %% [markdown]
# ## The road
#
# Five stages, each of which makes what the next one needs:
#
# 1. **data**: prompts and, for two of three tasks, reference answers;
# 2. **fine-tuning** on the references: the reference policy $\pi_b$;
# 3. **pairs**: samples of $\pi_b$ after the same prompt, labelled by whoever knows what is good (here: a program, the *gold*, with noise);
# 4. **reward model**: a score learnt from the pairs;
# 5. **reinforcement learning** on that score, by KLQ or PPO; and at the end, **judges**.
#
# This project walked the road with SmolLM2, a language model of 135 million parameters, on two processor cores. What came out lies in
# `results/compare`, and this notebook reads it: the figures redraw themselves in seconds, and say what is in the files *now*. More seeds may
# have been added since these words were written, so no number of a result stands in the text. First the amounts:

# %%
tables = {world: c13.made(world) for world in WORLDS}
runs = {world: pd.read_csv(c13.results() / world / study.RUNS) for world in WORLDS}
amounts = {}
for world in WORLDS:
    samples, one = tables[world]["samples"], runs[world].iloc[0]
    amounts[world] = {
        "prompts to train on": samples["prompt"].nunique(),
        "samples for pairs": len(samples),
        "pairs kept for testing": len(tables[world]["held_out_pairs"]),
        "completions in a run": one["rollouts"],
        "optimiser row-steps in a run": one["row_steps"],
        "runs so far": len(runs[world]),
    }
display(pd.DataFrame(amounts))

# %% [markdown]
# **Predict.** Sort four stages of `tldr` by their time: fine-tuning (sft) learns from the references; *pairs* samples the completions counted
# above, and the gold reads each; *reward* reads the pairs' completions and fits one layer; a run of KLQ samples its completions, reads them, and
# learns from them. And per completion: which costs more, pairs or a run?

# %%
costs = {}
for world in WORLDS:
    stages = tables[world]["stages"].set_index("stage")["seconds"]
    each = runs[world].groupby("algorithm")["seconds"].median()
    found = {f"{name}": seconds for name, seconds in stages.items()}
    found |= {f"one run of {name}": seconds for name, seconds in each.items()}
    costs[world] = {name: f"{seconds / 60:.1f} min" for name, seconds in found.items()}
display(pd.DataFrame(costs).fillna("–"))
print("measured with:", ", ".join(sorted(runs["tldr"]["machine"].unique())))
for world in WORLDS:
    stages = tables[world]["stages"].set_index("stage")["seconds"]
    pair = stages["pairs"] / len(tables[world]["samples"])
    one = (runs[world]["seconds"] / runs[world]["rollouts"]).median()
    print(f"{world}: {pair:.1f} s per completion for pairs, {one:.1f} s in a run")

# %% [markdown]
# **Explain.** Every stage that writes texts is slow, for a text is written token by token; to read one, or to learn from one that is there, takes a
# single pass (and a backward one). Pairs are dear by their number. A run makes fewer completions and pays more for each, since it also learns from
# them. But each stage is a mixture, and the machine did other work besides: the seconds of runs are not comparable with each other, and say
# nothing of KLQ against PPO. (A run's are medians. In the trials, gold, judges and reward model are tried on hacks: see below. Where a task has no
# references, fine-tuning falls away, and the reference is the model as it came.)
#
# ## 1 · The data
#
# Two small sets were written for this project, everyday posts with a summary and requests with an answer, and a list of beginnings of
# stories. They come with the package. Three rows of each:

# %%
tldr, dialogue = (
    pd.read_json(c13.DATA / f"{name}_train.jsonl", lines=True)
    for name in ("tldr", "dialogue")
)
display(tldr.head(3))
display(dialogue.head(3))
openers = (c13.DATA.parent / "openers.txt").read_text(encoding="utf-8").splitlines()
print("\n".join(openers[:3]))

# %% [markdown]
# Nobody's preferences are in there. What stands in for people is the gold: how many words of the reference a completion has, how natural
# a frozen model finds it, minus what a policy might try instead. The first part needs no model, so here it is for a real row:

# %%
row = tldr.iloc[0]
kinds = hacks(tldr["text"][:2].tolist(), tldr["summary"][:2].tolist())
heads = ["kind", "overlap with the reference", "text"]
tried = [(k, overlap(x[0], row["summary"]), x[0][:90]) for k, x in kinds.items()]
display(pd.DataFrame(tried, columns=heads).round(2))

# %% [markdown]
# Overlap alone is easily fooled: look at the reference twice, or shuffled. That is why a gold needs penalties, and why one tries hacks on
# it *before* a policy does. The committed table has all of it: the mean score of each kind, and how often it loses against the reference. Two
# columns are judges that come back at the end: MiniLM, a small model that says how near in meaning a text is to the reference, and SmolLM2, the
# untrained model, which says how probable it finds the text.
#
# **Predict.** The reward model saw samples of the reference policy and nothing else. Which of these kinds might it like better than a
# reference?

# %%
sections = {}
for world in WORLDS:
    shown = [{"prompt": "…"}] * tables[world]["samples"]["prompt"].nunique()
    of = SimpleNamespace(tables=tables[world], prompts=shown, test_prompts=[])
    sections[world] = {part.title: part for part in report.made_of(of)}
hacked = sections["tldr"].get("What gold, judges and reward model say of hacks")
if hacked:
    display(hacked.table.set_index("kind").rename_axis(columns=None))
    print(hacked.remark)
for world in WORLDS:
    if "trials" in tables[world]:
        tried = tables[world]["trials"].query("judge == 'reward model' and loses < 0.5")
        liked = ", ".join(kind for kind in tried["kind"] if kind != "reference")
        print(f"{world}: what the reward model mostly prefers to a reference: {liked}")

# %% [markdown]
# **Read it** by columns, each of which has a unit of its own. A scorer is only as good as its worst row: the kind that a policy will find. Compare
# the share in brackets: where the gold lets a kind lose and the reward model lets it win, they differ in *sign* (score less the reference's), and no
# pair has taught it better.
#
# ## 2 · Fine-tuning, and where its loss must stop
#
# SFT (supervised fine-tuning) minimises the mean of $-\log\pi(y)$ over reference texts. Can it reach 0? Add and subtract the logarithm of the
# distribution $p$ that the texts come from:
#
# $$-\mathbb{E}_{y\sim p}\left[\log\pi(y)\right] = H(p) + D(p\,\|\,\pi) \tag{13.1}$$
#
# The entropy $H(p)$ is what people could have written just as well, and no training removes it. The rest is a KL, in the *other*
# direction than that of the penalty: it punishes the policy for every text that it cannot write. On a tree, left side text by text:

# %%
tree = TokenTree.random(4, 3, eos=0, seed=1)
texts = torch.softmax(tree.ref.log() + torch.randn(tree.ref.shape), -1)  # the data
p, q = tree.sequence_distribution(texts), tree.sequence_distribution(tree.ref)
entropy = -(p * p.log()).sum()
check.equation("13.1", -(p * q.log()).sum(), entropy + tree.sequence_kl(texts))
check.equation("13.1", kl_divergence(p.log(), q.log()), tree.sequence_kl(texts))

# %%
for world in WORLDS:
    if part := sections[world].get("Fine-tuning"):
        print(f"{world}: {part.remark}")
        display(part.table)

# %% [markdown]
# Do not compare the two columns of a row. The loss on texts that are trained on is a mean *during* the epoch, while the policy still learns; the
# held-out one is measured *after* it, and only on those texts that the vocabulary can write. So the first can stand above the second. Read
# each column downwards: what the first still gains where the second gains no more is being learnt by heart, and there fine-tuning must stop.
#
# ## 3 · Pairs, and the loss of a reward model
#
# People are bad at giving marks and better at choosing between two. So the data are choices, and we need a likelihood. Bradley and Terry
# gave each side a strength $e^{R}$, and let it win in proportion to it:
#
# $$P(c \succ r) = \frac{e^{R(c)}}{e^{R(c)} + e^{R(r)}} = \sigma\left(R(c) - R(r)\right) \tag{13.2}$$
#
# The library draws its labels from just this. We check the function that learns, and then, roughly, the one that labels: the same two
# completions many times.

# %%
chosen, rejected = torch.randn(2, 50)
likelihood = torch.stack(
    [(-bradley_terry_loss(c[None], r[None])).exp() for c, r in zip(chosen, rejected)]
)
check.equation("13.2", likelihood, chosen.exp() / (chosen.exp() + rejected.exp()))

same = ["p"] * 4000, [["a", "b"]] * 4000, [[0.9, 0.2]] * 4000
labels = preference_pairs(*same, scale=1.5)
won = sum(text == "a" for text in labels["chosen"]) / 4000
check.equation("13.2", won, torch.tensor(1.5 * (0.9 - 0.2)).sigmoid().item(), tol=0.03)

# %% [markdown]
# The loss is the mean negative log-likelihood. Written with the difference $\Delta R = R(c) - R(r)$:
#
# $$L = -\frac{1}{n}\sum_i \log\sigma(\Delta R_i) = \frac{1}{n}\sum_i \log\left(1 + e^{-\Delta R_i}\right) \tag{13.3}$$
#
# **Predict.** Which pairs pull hardest: those it has right, those it has wrong, or those it cannot tell?

# %%
gap = chosen - rejected
typed = (1 + (-gap).exp()).log().mean()
check.equation("13.3", bradley_terry_loss(chosen, rejected), typed)

# %% [markdown]
# The derivative of $\log\sigma(x)$ is $1 - \sigma(x) = \sigma(-x)$, so
#
# $$\frac{\partial L}{\partial R(c_i)} = -\frac{1}{n}\,\sigma(-\Delta R_i) = -\frac{\partial L}{\partial R(r_i)} \tag{13.4}$$
#
# A pair pulls with the probability that the model gave to the *other* outcome. One that it gets right by far hardly counts; one that it gets
# wrong by far pulls with full strength, whether the model was wrong or the label.

# %%
c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
by_c, by_r = torch.autograd.grad(bradley_terry_loss(c, r), (c, r))
check.equation("13.4", by_c, -1 / (1 + gap.exp()) / len(gap))
check.equation("13.4", by_r, -by_c)

# %% [markdown]
# Now add any number $b(x)$ to all scores after the prompt $x$. Both completions of a pair get it, and it drops out:
#
# $$L\left[R + b\right] = L\left[R\right] \tag{13.5}$$
#
# So the reward model does not know where zero is, for any prompt. Does the policy need to? Its optimum after a prompt is $\pi_b e^{R/\tau}$,
# normalised, and $e^{b/\tau}$ cancels against the normaliser:
#
# $$\pi^*_{R+b}(y|x) = \frac{\pi_b(y|x)\,e^{R(x,y)/\tau}}{\sum_{y'}\pi_b(y'|x)\,e^{R(x,y')/\tau}} = \pi^*_R(y|x) \tag{13.6}$$
#
# Four prompts, ten completions each:

# %%
R, ref = torch.randn(4, 10), torch.softmax(torch.randn(4, 10), -1)
b, tau = 5 * torch.randn(4, 1), 0.5
good, bad = R[:, :5], R[:, 5:]
loss = bradley_terry_loss(good, bad)
check.equation("13.5", bradley_terry_loss(good + b, bad + b), loss)
typed = ref * (R / tau).exp()
typed = typed / typed.sum(-1, keepdim=True)
check.equation("13.6", boltzmann(R + b, ref, tau)[0], typed)

# %% [markdown]
# The optimum does not move, but a learner has to climb there: $V$ must first learn $b(x)$ for every prompt, and until then $\Delta$ is full of
# it. So runs on a learnt reward subtract from each score the mean that the *reference* gets after that prompt (`centre="prompt"`). That
# is another $b(x)$, and after it $V$ starts near 0 and is nearly right.
#
# > **People ask: this answer scored 1.3 and that one, to another prompt, 0.4. Is it better?**
# >
# > The loss cannot know, by (13.5). Below, the same reward model twice, with another offset per prompt: equal loss, equal policies, and
# > another order between prompts.

# %%
shifted = (R + b)[:, 0]
print("loss:", *(f"{bradley_terry_loss(x[:, :5], x[:, 5:]):.6f}" for x in (R, R + b)))
print("first answers, best prompt first:", R[:, 0].argsort(descending=True).tolist())
print("the same with other offsets:     ", shifted.argsort(descending=True).tolist())

# %% [markdown]
# ## Is it as sure as it should be?
#
# $\sigma(|\Delta R|)$ is how sure the reward model is of a pair. Of all pairs where it says 70 %, it should be right in 70 %: then it is *calibrated*.
# These are pairs after prompts that it was not fitted to.

# %%
show(sections["tldr"]["Pairs and reward model"].picture)
agreed = pd.concat([sections[w]["Pairs and reward model"].table for w in WORLDS])
display(agreed.set_axis(list(WORLDS)))
for world in WORLDS:
    print(f"{world}: {c13.confidence(tables[world]['held_out_pairs'])}")

# %% [markdown]
# The two averages alone prove little: a model that said the same of every pair could have them equal. Calibrated is what is so in every group. (The
# bars are as if pairs were independent; pairs of a prompt are not, so they are too short, and one group in twenty would miss by luck anyway.)
#
# Is the share of right labels low? Compared to what? The labels are wrong now and then, and nobody can predict a coin. Say that a reward
# model agrees with the gold in a share $a$ of pairs (a number; later $a$ and $b$ are two policies), and that a share $\varepsilon$ of the labels
# is turned round, whatever the reward model thinks. It agrees with a label if both are right, or both are wrong:
#
# $$P(\text{agrees with label}) = a(1-\varepsilon) + (1-a)\,\varepsilon = \varepsilon + (1-2\varepsilon)\,a \tag{13.7}$$

# %%
a, eps, table = 0.8, 0.25, []
for knows in (True, False):  # the four cases
    for turned in (True, False):
        weight = (a if knows else 1 - a) * (eps if turned else 1 - eps)
        table.append(weight * (knows != turned))
check.equation("13.7", sum(table), eps + (1 - 2 * eps) * a)

# %% [markdown]
# Even at $a = 1$ that is $1 - \varepsilon$. In our pairs the noise depends on the pair: the label is right with probability
# $1-\varepsilon_i = \sigma(\kappa\,|g_i|)$, where $g_i$ is the difference of golds. Whoever predicts the labels from the texts alone, in whichever way, is right on average
#
# $$P(\text{agrees with label}) \le \frac{1}{n}\sum_i \max(\varepsilon_i,\, 1 - \varepsilon_i) \tag{13.8}$$
#
# with equality for the gold itself. The check tries every predictor there is for ten pairs, all $2^{10}$.

# %%
wrong = torch.rand(10) / 2
says_gold = (torch.arange(2**10)[:, None] >> torch.arange(10)) % 2 == 1
agreement = torch.where(says_gold, 1 - wrong, wrong).mean(1)
ceiling = torch.maximum(wrong, 1 - wrong).mean()
check.inequality("13.8", agreement, ceiling.expand(2**10))
check.equation("13.8", agreement.max(), ceiling)

# %% [markdown]
# What is the ceiling for our pairs? The scale $\kappa$ is known, so it can be computed, and the labels' agreement with the gold should be near
# it. (Where two completions have the same gold, any label is a coin: such a tie counts half here, as it does in (13.8). The table above left
# ties out, and so do the rows that say so.) The reward model lives between a coin and that ceiling:

# %%
rows = {}
for world in WORLDS:
    pairs = tables[world]["held_out_pairs"]
    kappa = PAIRS["scale"] / pstdev(tables[world]["samples"]["gold"])
    bound = torch.tensor(kappa * pairs["gold"].abs().to_numpy()).sigmoid().mean().item()
    told = pairs[pairs["gold"] != 0]  # the gold has no opinion of the others
    right, same = (pairs["proxy"] > 0).mean(), told["proxy"] * told["gold"] > 0
    rows[world] = {
        "ceiling (13.8)": bound,
        "labels agree with the gold, ties half": preferred(pairs["gold"], 0).mean(),
        "labels agree with the gold, no ties": (told["gold"] > 0).mean(),
        "reward model agrees with labels": right,
        "share of the way from a coin": (right - 0.5) / (bound - 0.5),
        "reward model agrees with the gold, no ties": same.mean(),
        "share of ties": (pairs["gold"] == 0).mean(),
    }
display(pd.DataFrame(rows).round(3))

# %% [markdown]
# The ceiling is an expectation over coins, and these labels are one throw of them: a sample may lie a little above it. Without the ties labels agree
# more often, the more so the more ties there were.

# %% [markdown]
# ## 4 · Reward is not truth
#
# Now a policy maximises the score. That is no average over pairs any more: it looks for the completions that score *highest*, and among
# those are the ones that are overrated. To see what happens exactly, we leave the language model for the grammar of notebook 07, where
# every completion can be enumerated, the truth is known, and two reward models stand in for it:
#
# - **noisy**: the truth plus other tastes, small errors everywhere (the world `grammar_proxy`);
# - **blind spot**: the truth itself, but for sentences with one rare pair of words, which it overpays.

# %%
noisy = load("grammar_proxy")
holed, truth = c13.blind(noisy), noisy.truth
for name, world in {"noisy": noisy, "blind spot": holed}.items():
    print(
        f"{name}: correlation with the truth {c13.correlation(world.tree, truth):.2f}"
    )

# %% [markdown]
# **Predict.** By correlation, on samples of the reference, which one would you train on? Which one is safer? (The second pays five standard
# deviations too much for something that the reference hardly ever writes.)
#
# A yardstick first. The plainest way to use a reward model takes no training: draw $n$ completions and keep the best. How far from the
# reference is that? Sort the completions by score, and let $F(y)$ be the probability of one that scores at most as much as $y$. The best of $n$ is at
# most $y$ if all $n$ are, so
#
# $$P_n(y) = F(y)^n - F(y^-)^n \tag{13.9}$$
#
# with $F(y^-)$ that of scoring less. All draws of three from six:

# %%
p6, score6 = torch.softmax(torch.randn(6), -1), torch.randn(6)
draws = torch.cartesian_prod(*[torch.arange(6)] * 3)
winner = draws.gather(1, score6[draws].argmax(1, keepdim=True)).squeeze(1)
counted = torch.zeros(6).index_add(0, winner, p6[draws].prod(1))
check.equation("13.9", c13.best_of_n(p6, score6, 3), counted)

# %% [markdown]
# If scores are continuous, each completion has a rank $u = F(y)$, uniform on $[0, 1]$, and the best rank has the density $n u^{n-1}$. Its KL is
# $\mathbb{E}[\log n + (n-1)\log u]$, and $\mathbb{E}[\log u] = -\frac{1}{n}$. Where a completion can be drawn twice, choosing does less:
#
# $$D(P_n\,\|\,\pi_b) \le \log n - \frac{n-1}{n} \tag{13.10}$$
#
# The best of ten is 1.4 nats away, the best of a thousand 5.9: choosing is a slow way to get far.

# %%
n = torch.tensor([1.0, 2.0, 4.0, 10.0, 1000.0])
rank, uniform = torch.distributions.Beta(n, 1.0), torch.distributions.Beta(1.0, 1.0)
formula = n.log() - (n - 1) / n
check.equation("13.10", torch.distributions.kl_divergence(rank, uniform), formula)
print("nats for the best of 1, 2, 4, 10, 1000:", *(f"{x:.2f}" for x in formula))
several = torch.stack([c13.best_of_n(p6, score6, int(k)) for k in n[:-1]])
exact = kl_divergence(several.log(), p6.log().expand_as(several))
check.inequality("13.10", exact, formula[:-1])
ranked = torch.tensor(c13.chosen_best(noisy.tree, truth)["kl"].to_numpy())
counts = torch.tensor(c13.COUNTS, dtype=torch.float64)
check.inequality("13.10", ranked, counts.log() - (counts - 1) / counts)

# %% [markdown]
# Now both reward models, with three ways to use them: the best possible policy at each KL, the best of $n$, and a short KLQ run with a
# low price $\tau$. For all of them the reward that is maximised and the truth are exact, by enumeration.

# %% tags=["heavy"]
SHORT = {"updates": 12, "batch_size": 128, "replay": 0, "tau": 0.2, "eval_every": 3}
paths = {}
for name, world in {"noisy": noisy, "blind spot": holed}.items():
    both = world.tree, truth
    title = f"{name}, r = {c13.correlation(*both):.2f}"
    paths[title] = (
        c13.best_possible(*both),
        c13.chosen_best(*both),
        c13.short_run(world, **SHORT),
    )
show(c13.over_optimisation(paths))
for title, (best, _, run) in paths.items():
    print(f"{title}: {c13.ends(best, run)}")
    print("  the run's reward (truth), test by test:", c13.steps(run))

# %% [markdown]
# **Explain.** Small errors everywhere cost a share of the gain. One hole can cost all of it, and the correlation on samples does not show it:
# the reference hardly goes there. That is *over-optimisation*: beyond some KL, what rises is the error. A run has to *find* the hole by
# sampling. This run was finding it by its first test already (reward above truth), and later the truth turns while the reward rises on. The best policy for a *wrong* reward buys
# the hole first; best of $n$, which cannot choose the hole, gets ordinary good sentences before it. Far out the truth of the best policy rises
# again a little: once the hole is filled, what is left to gain is the best sentence within it. Three things help. Do not go far ($\tau$); read
# what is written; and let somebody judge who had no part in making the reward.
#
# **Change it.** Set `"tau": 1.0` in `SHORT`. Before you run it, read from the curves where the blind run should end, and whether its truth will
# have turned.
#
# <details><summary>Compare</summary>
#
# The best policy at this price stands about where the green curve is highest: its truth has not turned yet. So look for the run at or before that
# place. The higher price has not closed the hole; it has made the walk too short for it to matter much.
#
# </details>
#
# Has it happened to SmolLM2? The gold labelled the pairs, so it knows more than the reward model learnt of it. The last panels are judges
# that labelled nothing; the sentence below each figure answers for the last test of all runs, KLQ and PPO together, with one that had no part in
# anything (MiniLM, or TextBlob, a list of words with moods). Over-optimised is what gains reward and loses by the others.

# %% tags=["heavy"]
read = {world: study.read(c13.results() / world) for world in WORLDS}
for world in WORLDS:
    print(world)
    tests = comparison.along(read[world])
    show(gains_along_kl(tests))
    (independent,) = set(study.INDEPENDENT) & set(tests)
    print(c13.happened(tests, independent))

# %% [markdown]
# ## 5 · Judges, and what they lean to
#
# A judge sees a prompt and two completions, and prefers one. Many lean: to the longer one, or to the one that comes first. Take a
# judge that likes $a$ better than $b$ by $m$, and likes the first place by $h$: it prefers the first with probability $\sigma(m + h)$ if $a$ is first, and $\sigma(-m + h)$
# if $b$ is. Asked in both orders,
#
# $$\sigma(m + h) > \sigma(-m + h) \iff m > 0 \tag{13.11}$$
#
# so the place cancels, for every $h$. The library counts a win for $a$ where the first is larger. (Here each "completion" is a
# number, its quality.)

# %%
quality = torch.randn(2, 200)
quality[1, :20] = quality[0, :20]  # ties
a, b = ([repr(x) for x in side] for side in quality.tolist())
better = (quality[0] > quality[1]).double() + 0.5 * (quality[0] == quality[1]).double()


def leaning_to_the_first(h):
    def judge(prompts, first, second):
        m = torch.tensor([float(x) - float(y) for x, y in zip(first, second)])
        return (m + h).sigmoid().tolist()

    return judge


for h in (0.0, 0.7, 3.0):
    found = outcomes([""] * 200, a, b, leaning_to_the_first(h))
    check.equation("13.11", torch.tensor(found), better)

# %% [markdown]
# A leaning to *length* goes with the completion wherever it stands. In numbers: a policy that has learnt nothing but to write more
# words, against the reference, in the grammar world. The truth is known, and so is the exact win-rate.
#
# **Predict** for each judge below what it says when $a$ always comes first, when $b$ does, and with both orders.

# %%
scores, words = truth.rewards[truth.leaves], [len(c) for c in truth.completions()]
extra = torch.tensor(words, dtype=torch.float64) - min(words)
longer = grammar.with_scores(truth, extra).optimum(0.25)[2]
prompts, long_texts = c13.drawn(truth, longer, 25, seed=1)
_, plain_texts = c13.drawn(truth, truth.ref, 25, seed=2)


def true_score(prompts, completions):
    return noisy.judges["true reward"](prompts, completions)


def likes_length(prompts, completions):
    scored = zip(true_score(prompts, completions), completions)
    return [s + len(text.split()) for s, text in scored]


def likes_the_first(prompts, first, second):
    scored = zip(true_score(prompts, first), true_score(prompts, second))
    return [torch.tensor(x - y + 1.0).sigmoid().item() for x, y in scored]


def only_says_first_or_second(prompts, first, second):
    return [float(x > 0.5) for x in likes_the_first(prompts, first, second)]


fair_rate = grammar.win_rate(truth, longer, truth.ref)
biased = grammar.with_scores(truth, scores + extra)
bias_rate = grammar.win_rate(biased, longer, truth.ref)
exact = [f"{rate:.3f}" for rate in (fair_rate, bias_rate, fair_rate)] + ["–"]
judges = {
    "fair": by_score(true_score),
    "leans to the longer": by_score(likes_length),
    "leans to the first": likes_the_first,
    "leans to the first, says only which": only_says_first_or_second,
}
found = c13.before_judges(judges, prompts, long_texts, plain_texts)
display(found.assign(exact=exact))

# %% [markdown]
# **Explain.** ($a$ is the policy that writes more; the last column is enumerated.) The swap takes the place out and leaves the length in: a
# longer completion is longer in both orders. The last judge shows the price of the swap. Where it says "the first" twice we get a tie, so
# a judge that leans strongly has little left to say, and what it says rests on the pairs that differ most.
#
# Against a leaning to length nothing helps but to measure it. The table says how often each real judge preferred the longer of two
# (and the one with more copied words), and what its win-rate would be if it looked at nothing else.

# %% tags=["heavy"]
for world in WORLDS:
    print(world)
    text = study.leanings(read[world])
    display(Markdown(text or "*No seed that both have run yet.*"))

# %% [markdown]
# ## How sure? Prompts
#
# Other prompts would have given another win-rate. The bootstrap draws the $n$ prompts anew from those that there are, with replacement,
# again and again, and looks how the mean scatters. For a mean one knows what will come out: each draw has the variance of the
# sample, and $n$ of them are averaged,
#
# $$\mathrm{Var}^*\left[\bar x^*\right] = \frac{1}{n^2}\sum_i (x_i - \bar x)^2 \tag{13.12}$$
#
# All $5^5$ ways to draw five prompts anew; then the library's interval for 400 outcomes, as a multiple of what (13.12) says.

# %%
x = torch.tensor([1.0, 0.0, 0.5, 1.0, 1.0])
means = x[torch.cartesian_prod(*[torch.arange(5)] * 5)].mean(1)
check.equation("13.12", means.var(correction=0), ((x - x.mean()) ** 2).sum() / 25)

wins = (torch.rand(400) < 0.6).double()
low, high = bootstrap_interval(wins.tolist())
typed = 1.96 * ((wins - wins.mean()) ** 2).sum().sqrt() / 400
check.equation("13.12", (high - low) / 2 / typed.item(), 1.0, tol=0.05)

# %% [markdown]
# How many pairs, then? A win-rate of ½ has the standard error $\tfrac12/\sqrt n$. To see a rate of ½ + d at 95 % in 80 of 100 experiments, $d$ must be
# $z_{0.975} + z_{0.8} = 2.8$ of these: the first to be beyond the interval, the second to be so in most experiments. Solve for $n$:
#
# $$n = \frac{(z_{0.975} + z_{0.8})^2}{4\,d^2} \tag{13.13}$$
#
# We check the formula against the library, and both against what they promise: the power of that test, summed over all outcomes of $n$
# pairs.

# %%
z = NormalDist().inv_cdf
together, effects, powers = z(0.975) + z(0.8), (0.02, 0.05, 0.1, 0.15), []
needed = torch.tensor([pairs_needed(d) for d in effects])
check.equation("13.13", needed, together**2 / (4 * torch.tensor(effects) ** 2))
for d, n in zip(effects, needed.round().int().tolist()):
    won = torch.arange(n + 1.0)
    seen = (won - n / 2).abs() > z(0.975) * n**0.5 / 2
    true = torch.distributions.Binomial(n, torch.tensor(0.5 + d))
    powers.append(true.log_prob(won[seen]).exp().sum())
    print(f"win-rate {0.5 + d:.2f}: {n:,} pairs, power {powers[-1]:.3f}")
check.equation("13.13", torch.stack(powers), torch.full((4,), 0.8), tol=0.04)
print(f"z for 95 % and power 0.8, together: {together:.1f}")

# %% [markdown]
# > **People ask: our policy wins 55 % on a hundred prompts. Is it better?**
# >
# > The cell above says how many it takes to see 55 %. With a hundred, one expects an interval that holds ½. And if it does not, ask how many
# > things were tried.
#
# ## How sure? Seeds
#
# All that is about two given *policies*. A claim about *algorithms* has to hold for another seed of training as well. The win-rates of seeds
# scatter with a standard deviation $\sigma_s$ of their own, and each is known only from $n$ prompts. So $S$ seeds have the standard error
# $\sqrt{(\sigma_s^2 + \frac{1}{4n})/S}$, and by the same argument, with a correction for few seeds, where the scatter has to be estimated too,
#
# $$S = \frac{(z_{0.975} + z_{0.8})^2}{d^2}\left(\sigma_s^2 + \frac{1}{4n}\right) + \frac{z_{0.975}^2}{2} \tag{13.14}$$
#
# More prompts make $\frac{1}{4n}$ small and leave $\sigma_s$ as it is. The check repeats 4,000 experiments of so many seeds, with a $t$-test each.
# Below about eight seeds the correction is too small: the last three lines take the difference that the formula gives for 3, 5 and 8.

# %%
generator, least, powers = torch.Generator().manual_seed(0), [], []
cases = [(0.05, 0.05, 200), (0.05, 0.02, 64), (0.1, 0.08, 64)]
for d, sd, n in cases:
    S = seeds_needed(d, sd, n)
    exact = (together / d) ** 2 * (sd**2 + 1 / (4 * n)) + z(0.975) ** 2 / 2
    least.append((S - 1, exact, S, c13.shown_from(sd, n, exact)))
    true = (0.5 + d + sd * torch.randn(4000, S, generator=generator)).clamp(0, 1)
    rate = torch.binomial(torch.full_like(true, n), true, generator=generator) / n
    t = (rate.mean(1) - 0.5) / (rate.std(1) / S**0.5)
    powers.append((t.abs() > t_quantile(0.975, S - 1)).double().mean())
    print(f"½ + {d}, seeds scatter by {sd}, {n} prompts:", end=" ")
    print(f"{S} seeds, power {powers[-1]:.3f}")
below, exact, whole, effect = torch.tensor(least).T.double()
check.inequality("13.14", below, exact)  # S is a whole number, the next above
check.inequality("13.14", exact, whole)
check.equation("13.14", effect, torch.tensor([d for d, *_ in cases]))
check.equation("13.14", torch.stack(powers), torch.full((3,), 0.8), tol=0.06)
for S in (3, 5, 8):
    true = 0.5 + c13.shown_from(0.05, 200, S) + 0.05 * torch.randn(4000, S)
    rate = torch.binomial(torch.full_like(true, 200), true.clamp(0, 1)) / 200
    t = (rate.mean(1) - 0.5) / (rate.std(1) / S**0.5)
    power = (t.abs() > t_quantile(0.975, S - 1)).double().mean()
    print(f"{S} seeds, power {power:.2f} where the formula says 0.80")

# %%
explore(c13.POWER)
alike = 1 / (4 * 0.05**2)
print(f"{alike:.0f} prompts scatter as much as seeds with a standard deviation of 0.05")

# %% [markdown]
# **Read it.** The dotted line is what prompts alone would do. The other lines leave it where $\frac{1}{4n}$ is as small as $\sigma_s^2$; beyond that,
# more prompts say ever more exactly what these few seeds did.
#
# How can one make an interval over seeds? One way, that of the tables of `klq compare`: seeds are drawn anew, then prompts
# (`win_rate_of_seeds`), and the result is widened by $\sqrt{S/(S-1)}$, by which such a bootstrap is too narrow. Is that enough for *two* seeds?
# Drawn anew they give both, or one of them twice, so the interval reaches
# from one to the other, widened by $\sqrt2$. It holds the truth if $|\bar x - \mu| \le \sqrt2\,|x_1 - x_2|/2$. That ratio is a $t$ with one degree of freedom:
#
# $$P(\text{the interval of two seeds holds } \mu) = \frac{2}{\pi}\arctan\sqrt2 \approx 0.61 \tag{13.15}$$
#
# ($\pi$ is the number here.) Not 95 %, and more seeds mend it slowly: with five it is still below 90 %. The other way is Student's $t$ over the means of the
# seeds, which supposes that they scatter normally, and then keeps its promise with few of them. It holds for these prompts only. The check draws
# experiments again and again, and makes both intervals of each.

# %%
theory = 2 / torch.pi * torch.tensor(2.0).sqrt().arctan().item()
check.equation("13.15", theory, 0.61, tol=0.005)
for S in (2, 3, 5, 8):
    draws = torch.randn(2000, S, 1, generator=generator).tolist()
    boot, student = (
        [low <= 0.0 <= high for _, low, high in map(interval, some)]
        for interval, some in (
            (win_rate_of_seeds, draws[:600]),
            (c13.interval_of, draws),
        )
    )
    held, by_t = sum(boot) / len(boot), sum(student) / len(student)
    if S == 2:
        check.equation("13.15", held, theory, tol=0.06)
    else:
        check.equation("13.15", by_t, 0.95, tol=0.02)  # the rival keeps its promise
    print(f"{S} seeds: the 95 % interval holds the truth in {held:.0%}", end=" ")
    print(f"by bootstrap, in {by_t:.0%} by Student's t")

# %% [markdown]
# ## 6 · Did KLQ do better than PPO?
#
# Everything is in place. All differences are KLQ minus PPO: the same seed, the same reference samples, the same random numbers,
# held-out prompts. First a row per task and setting, with bootstrap intervals: what KLQ and PPO-clip each gain over the reference of $J$, which both
# maximise (reward less $\tau$ KL), and then KLQ less PPO-clip at the same price $\tau$, and once at the same KL. There the one that went further is taken
# where it had gone as far as the other in the end; that is earlier in its training, and between two of its tests, so it is a mixture of both, not a policy that was ever there:

# %% tags=["heavy"]
text = study.summary(read)
display(Markdown(text or "*No seed that both have run yet.*"))

# %% [markdown]
# Then what a reviewer would accept, by rule from the interval and not by taste. The interval is now Student's $t$ over the means of the seeds (of
# one seed, a bootstrap over its prompts). *Shown* means that the 95 % interval, of at least five seeds, does not hold 0: with fewer nobody can see
# whether they scatter as $t$ supposes. Otherwise the sentence says from which difference on we would probably have seen it. The judge that had no part
# in anything comes last.


# %% tags=["heavy"]
def meeting(runs, same):
    """Test samples of both runs of each seed, at the same τ or at the same KL."""
    if same == "τ":
        return [(a.after, b.after) for a, b in runs]
    reach = [min(x.after["kl"].mean() for x in both) for both in runs]
    return [[study.at_kl(x, kl) for x in both] for both, kl in zip(runs, reach)]


said = []
for world in WORLDS:
    for setting, part in study.by_setting(read[world]):
        tau = part[0].settings["tau"]
        duels = {x[:2]: x[2] for x in comparison.opponents(part)}
        if ("klq", "ppo_clip") not in duels:
            print(f"{world}, τ = {setting}: no seed that both have run yet")
        known = [
            c for c in part[0].after if c in ("reward", "gold", *study.INDEPENDENT)
        ]
        rows = [("J", "τ"), *product(known, ("τ", "KL"))]
        for rival, (column, same) in product(("ppo_clip", "ppo_penalty"), rows):
            if not (seeds := duels.get(("klq", rival))):
                continue
            less = [
                (study.scores(a, column, tau) - study.scores(b, column, tau))
                .groupby(a["prompt"])
                .mean()
                for a, b in meeting(seeds, same)
            ]
            mean, low, high = c13.interval_of(less)
            about = (
                f"{world}, τ = {setting}",
                STYLES[rival]["label"],
                column,
                f"same {same}",
            )
            interval = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
            said.append(
                (*about, len(seeds), interval, c13.claim(len(seeds), low, high))
            )
heads = ["task", "KLQ minus", "in", "at the", "seeds", "mean [95 %]", "may be said"]
verdicts = pd.DataFrame(said, columns=heads)
display(verdicts.set_index("task"))
able = verdicts[verdicts["seeds"] >= c13.FEW]["may be said"]
if able.empty:
    print(f"No row has {c13.FEW} seeds yet, so none can show anything.")
else:
    shown = able.str.contains(": shown").sum()
    print(f"{shown} of the {len(able)} rows of {c13.FEW} seeds or more show something.")
    print(f"With nothing to find, 5 % of them would by luck: {len(able) / 20:.1f}.")

# %% [markdown]
# **How to read it.** A reward that is shown to be higher, with a gold that is shown to be lower, was learnt from the reward model's mistakes; a gold that
# is merely not shown to differ leaves it open. A win at the same $\tau$ that goes away at
# the same KL was a longer walk, not a better one. "Not shown" is not "equal": the width of the interval says how
# blind the experiment was. The rows are not independent (judges agree, and the same runs stand in several), so luck comes in clumps: mostly no
# row, now and then several. PPO-penalty shares KLQ's proximal weight $\tau/\alpha$, which PPO-clip lacks; where it comes out like KLQ, that fits the theory, and is no proof. And whatever is shown is shown for these prompts, a small model, three small tasks, settings that both
# algorithms share (a learning rate that suits one may be too high for the other: that is why the stories stand here at two), and offline judges. The paper's own claim, win-rates that are consistently higher over several $\tau$, needs a judge that reads as
# people do, and more seeds than it reports.
#
# How many seeds would settle it? The library answers from the scatter that was found, for the task with most seeds, where these are two at least.
# (Its intervals are bootstraps: with few seeds *shown from* is too hopeful.)

# %% tags=["heavy"]
both = {"klq", "ppo_clip"}
pairs = {w: [r for r in read[w] if r.labels["algorithm"] in both] for w in WORLDS}
most = max(WORLDS, key=lambda world: len(pairs[world]))
print(most)
text = study.verdicts(pairs[most])
display(Markdown(text or "*Fewer than two seeds so far: their scatter is unknown.*"))

# %% [markdown]
# ## Exercises
#
# ### Exercise 13.1 · Bradley and Terry's loss
#
# `chosen` and `rejected` are scores of shape [n]. Return (13.3), without overflow: one pair is wrong by a thousand. The check
# differentiates your loss.
#
# <!-- hints 13.1 -->


# %%
def my_preference_loss(chosen, rejected):
    # BEGIN SOLUTION
    return torch.nn.functional.softplus(rejected - chosen).mean()
    # END SOLUTION


check.exercise("13.1", my_preference_loss)

# %% [markdown]
# ### Exercise 13.2 · A win-rate with the swap
#
# A judge was asked twice for each of $n$ pairs: `a_first` [n] is its preference for $a$ when $a$ stood first, `b_first` [n] its preference for $b$ when $b$ stood
# first, in [0, 1]. Return the win-rate of $a$: a win where its mean preference over both orders is above ½, half a win where it is ½.
# (Compare the two numbers with each other; sums of rounded numbers are not safe.)
#
# <!-- hints 13.2 -->


# %%
def my_win_rate(a_first, b_first):
    # BEGIN SOLUTION
    won = (a_first > b_first).double()
    tied = (a_first == b_first).double()
    return (won + tied / 2).mean()
    # END SOLUTION


check.exercise("13.2", my_win_rate)

# %% [markdown]
# ### Exercise 13.3 · The best of n
#
# Given probabilities `p` [M] of completions and their scores [M], all different, return the probability [M] that each of them is the
# best of `n` independent draws, (13.9), in the order of `p`.
#
# <!-- hints 13.3 -->


# %%
def my_best_of_n(p, scores, n):
    # BEGIN SOLUTION
    at_most = (p * (scores[None, :] <= scores[:, None])).sum(1)
    less = (p * (scores[None, :] < scores[:, None])).sum(1)
    return at_most**n - less**n
    # END SOLUTION


check.exercise("13.3", my_best_of_n)

# %% [markdown]
# ### Exercise 13.4 · How many pairs?
#
# For each effect in `effects` [k] (a win-rate less ½) return the number of pairs with which it is seen at 95 %, two-sided, with the given
# `power`: (13.13) with another power. Do not round. `NormalDist().inv_cdf(p)` is $z_p$.
#
# <!-- hints 13.4 -->


# %%
def my_pairs(effects, power):
    # BEGIN SOLUTION
    deviations = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)
    return (deviations / (2 * effects)) ** 2
    # END SOLUTION


check.exercise("13.4", my_pairs)

# %% [markdown]
# ### Open question
#
# A report says: "After training, our policy wins 58 % against the reference before a large language model as judge, on 200 prompts (one
# seed, each pair asked once, ours first). The mean reward rose from 0.1 to 1.9. Completions are a third longer." What can be concluded? Which
# three measurements would you ask for, in which order, and why?
#
# *What a good answer contains:* place and length as two leanings of which the swap cancels only one (3 points); prompts and seeds as two
# sources of doubt, with a number for at least one (3); reward is no evidence, and KL is missing (2); an order by cost (2).

# %% [markdown] tags=["solution"]
# <details><summary>A sample answer</summary>
#
# Little. 58 % of 200 has a standard error of 3.5 points, so the interval just misses ½; but the policy stood first each time, and a judge that leans to
# the first by a few points would give as much. And it is longer, which judges like. The reward is what was maximised, so its rise says that
# training works, not that texts are better; without the KL we do not know how far the policy went. First (cheap): ask again with the orders swapped. Second
# (free): among pairs of about equal length, who wins? Or report the judge's leaning and what length alone would have given. Third (dear):
# more seeds. One seed is a statement about one policy; if seeds scatter by 0.05, then by (13.14) with these 200 prompts it takes 14 to show 0.05.
#
# </details>

# %% [markdown]
# ## Remember
#
# The loss of a fine-tuned model stops at the entropy of the data (13.1). A reward model learns differences within a prompt and nothing
# else (13.5), so centre it. It cannot agree with labels more often than the noise allows (13.8). Agreement on samples says little about where
# a policy will go: small errors cost a share, one hole costs everything, and the KL says how far one is out (13.10). The swap
# cancels the place, not the length (13.11). Prompts tell of policies, seeds of algorithms (13.13, 13.14); with a few seeds a
# bootstrap interval of 95 % is none (13.15), and Student's $t$ is one.
#
# *In the library:* `klq_edu.rlhf.preference`, `klq_edu.rlhf.judge`, `klq_edu.rlhf.power`; the stages in `klq_edu.worlds.road`; `klq compare` and
# `klq_edu.app.study` for all that was read here. *Next:* `klq compare --help`: add a seed, and run this notebook again.

# %%
check.ledger()
