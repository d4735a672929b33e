"""Chapter 02: soft Bellman equations."""

import functools

import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.improvement import soft_policy_iteration
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes


@functools.cache
def maze() -> TokenTree:
    """Two tokens, four steps; the best ending hides behind a first step that the reference dislikes."""

    def ref(prefix):
        return torch.tensor([0.8, 0.2] if not prefix else [0.5, 0.5], dtype=torch.float64)

    def reward(text):
        return 3.0 if text == (1, 1, 1, 1) else 0.5 * sum(1 - t for t in text) / 2

    return TokenTree.grow(2, 4, ref, reward)


def draw_values(figure: FigureBase, tau: float, gamma: float) -> None:
    """Left: soft optimal value of every prefix; right: the objective of soft policy iteration, sweep by sweep."""
    tree = maze()
    _, values, best = tree.optimum(tau, gamma)
    left, right = plain_axes(figure, 2)
    places = {(): 0.0}
    for prefix in tree.prefixes[1:]:
        places[prefix] = places[prefix[:-1]] + (prefix[-1] - 0.5) * 2.0 ** -(len(prefix) - 1)
        shift = best[tree.prefixes.index(prefix[:-1]), prefix[-1]].item()
        left.plot([len(prefix) - 1, len(prefix)], [places[prefix[:-1]], places[prefix]], color=BLUE, lw=0.4 + 4 * shift)
        if len(prefix) == 1:
            left.annotate(f"token {prefix[0]}", (0.5, places[prefix] / 2), fontsize=8, ha="right",
                          xytext=(-6, 8 if prefix[0] else -12), textcoords="offset points")  # fmt: skip
    for prefix, value in zip(tree.prefixes, values.tolist()):
        left.scatter(len(prefix), places[prefix], c=[value], cmap="cividis", vmin=0, vmax=3, s=90, zorder=3)
        left.annotate(f"{value:.1f}", (len(prefix), places[prefix]), fontsize=7, ha="center",
                      xytext=(0, 8), textcoords="offset points")  # fmt: skip
    left.set(xlabel="tokens written", yticks=[], title=f"V* at τ = {tau:g}, γ = {gamma:g}", xlim=(-0.3, 3.3))
    left.set_xticks(range(4))
    policies = soft_policy_iteration(tree, tau, 5, gamma)
    right.plot([tree.objective(p, tau, gamma).item() for p in policies], color=ORANGE, marker="o")
    right.axhline(values[0].item(), color=GREY, ls="--", label="optimum")
    right.set(xlabel="sweeps of soft policy iteration", ylabel="objective J [reward]", title="improvement")
    right.legend(frameon=False, fontsize=8)


VALUES = Widget(
    "02-values", draw_values, {"tau": [0.05, 0.1, 0.3, 1.0, 3.0], "gamma": [0.5, 0.8, 0.9, 1.0]},
    [{"tau": 0.1, "gamma": 1.0}, {"tau": 1.0, "gamma": 1.0}],
    "Left of each pair: every prefix with its soft optimal value (colour and number); token 1 is always the branch "
    "upwards, token 0 the one downwards; thick lines are what the best policy does. With a low price τ the value of "
    "the prize at the end reaches the start and the policy goes there; with a high price it stays with the reference. "
    "Right: each sweep improves, and by the time there have been as many sweeps as a text has tokens the optimum is "
    "reached.",
    "For two τ, a tree of prefixes (token 1 upwards, 0 downwards) with their values and the optimal "
    "policy as thick lines, and the objective rising "
    "to the optimum within four sweeps.",
    size=(7.4, 3.0),
)  # fmt: skip


def backup(rewards: Tensor, next_values: Tensor, ref: Tensor, tau: float, gamma: float) -> Tensor:
    """Exercise 2.1."""
    return tau * torch.logsumexp(ref.log() + (rewards + gamma * next_values) / tau, -1)


def best_texts(scores: Tensor, ref: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Exercise 2.2."""
    weights = ref.log() + scores / tau
    return weights.softmax(-1), tau * weights.logsumexp(-1)


def _state(generator: Generator) -> tuple:
    r, v, b = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    tau, gamma = (0.2 + 0.7 * torch.rand(2, generator=generator, dtype=torch.float64)).tolist()
    return r, v, b.softmax(0), tau, gamma


def _texts(generator: Generator) -> tuple:
    scores, b = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    return scores, b.softmax(0), 0.2 + 0.6 * torch.rand((), generator=generator, dtype=torch.float64).item()


EXERCISES = {
    "2.1": Exercise(
        "2.1", "One soft backup", 2, 8, backup, _state,
        (
            Mistake("no γ", lambda r, v, b, tau, g: backup(r, v, b, tau, 1.0),
                    "you forgot γ: the next value is discounted."),
            Mistake("discounted reward", lambda r, v, b, tau, g: backup(g * r, v, b, tau, g),
                    "you discounted the reward as well: r arrives with the step itself, only V comes later."),
            Mistake("hard maximum", lambda r, v, b, tau, g: (r + g * v).amax(-1),
                    "that is the hard maximum, Bellman's own; the KL makes it soft."),
            Mistake("mean", lambda r, v, b, tau, g: (b * (r + g * v)).sum(-1),
                    "that is the value of following the reference; the best policy leaves it where that pays."),
            Mistake("no τ in front", lambda r, v, b, tau, g: backup(r, v, b, tau, g) / tau,
                    "you forgot the τ in front of the logarithm: V is in units of reward."),
            Mistake("no reference", lambda r, v, b, tau, g: backup(r, v, torch.ones_like(b), tau, g),
                    "π_b is missing under the logarithm."),
        ),
        ("First Q = r + γ V(next) for each token, then notebook 01.",
         "The soft value of a state is τ log Σ π_b e^{Q/τ}.", "`tau * torch.logsumexp(ref.log() + Q / tau, -1)`."),
    ),
    "2.2": Exercise(
        "2.2", "The best distribution over texts", 2, 8, best_texts, _texts,
        (
            Mistake("no reference", lambda s, b, tau: best_texts(s, torch.full_like(b, 1 / len(b)), tau),
                    "you forgot π_b: texts that the reference rarely writes need a high score to become common."),
            Mistake("times τ", lambda s, b, tau: ((b.log() + s * tau).softmax(-1), best_texts(s, b, tau)[1]),
                    "the score is multiplied by τ instead of divided."),
            Mistake("times τ in both", lambda s, b, tau: (
                        (b.log() + s * tau).softmax(-1), tau * (b.log() + s * tau).logsumexp(-1)),
                    "the score is multiplied by τ instead of divided, in the distribution and in the value."),
            Mistake("no reference at all", lambda s, b, tau: ((s / tau).softmax(-1), tau * (s / tau).logsumexp(-1)),
                    "π_b is missing in both: write log π_b + R/τ once and use it twice."),
            Mistake("value without τ", lambda s, b, tau: (best_texts(s, b, tau)[0], best_texts(s, b, tau)[1] / tau),
                    "the distribution is right, but the value lacks its factor τ."),
            Mistake("mean score", lambda s, b, tau: (best_texts(s, b, tau)[0], (best_texts(s, b, tau)[0] * s).sum()),
                    "the distribution is right, but you returned its mean score; the value also pays for the KL."),
        ),
        ("A text is one action of a bandit with as many arms as there are texts.",
         "So notebook 01 applies as it stands: π* ∝ π_b e^{R/τ}.",
         "A softmax of log π_b + R/τ, and τ times the logsumexp of the same."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "02", "soft_bellman", "Soft Bellman equations",
    "What is the best policy when each choice decides which choices come next?",
    "theory", "§2, the KL-regularised MDP, (1) and (2)",
    ("klq_edu.core.tree.TokenTree", "klq_edu.core.improvement.soft_policy_iteration"),
    needs=("01",), place=(2, 0.6), short="soft Bellman", exercises=EXERCISES,
)  # fmt: skip
