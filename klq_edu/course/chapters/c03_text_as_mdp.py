"""Chapter 03: text generation is a Markov decision process."""

import functools

import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.core.tree import ENDS, TokenTree
from klq_edu.course.chapters import Chapter, on_any_padding
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes

WORDS = ("<eos>", "good", "bad")
EOS, DEPTH = 0, 3
SCORES = {"good": 1.0, "bad": -1.0}


@functools.cache
def small_tree() -> tuple[TokenTree, Tensor]:
    """A tree of up to three words (or an early end), and a policy that has left its reference."""
    rng = torch.Generator().manual_seed(2)

    def ref(_):
        return torch.softmax(0.8 * torch.randn(3, generator=rng, dtype=torch.float64), 0)

    def reward(text):
        return sum(SCORES.get(WORDS[token], 0.0) for token in text)

    tree = TokenTree.grow(3, DEPTH, ref, reward, eos=EOS)
    tilt = torch.randn(tree.ref.shape, generator=rng, dtype=torch.float64)
    return tree, torch.softmax(tree.ref.log() + 0.8 * tilt, -1)


def draw_path(figure: FigureBase, first: str, second: str, third: str) -> None:
    """The tree with a path through it, and the running sums of log π and of log π − log π_b along it."""
    tree, policy = small_tree()
    left, right = plain_axes(figure, 2)
    places = {(): 0.0}
    for prefix in sorted(tree.completions()) + list(tree.prefixes):
        for t in range(1, len(prefix) + 1):
            places[prefix[:t]] = places[prefix[: t - 1]] + (1 - prefix[t - 1]) * 3.0 ** -(t - 1)
    for prefix, height in places.items():
        if prefix:
            left.plot([len(prefix) - 1, len(prefix)], [places[prefix[:-1]], height], color=GREY, lw=0.6)
    state, path, logp, ratio = 0, (), [0.0], [0.0]
    for word in (first, second, third):
        token = WORDS.index(word)
        logp.append(logp[-1] + policy[state, token].log().item())
        ratio.append(ratio[-1] + (policy[state, token] / tree.ref[state, token]).log().item())
        left.plot([len(path), len(path) + 1], [places[path], places[(*path, token)]], color=BLUE, lw=2.5)
        path, state = (*path, token), tree.children[state, token].item()
        left.annotate(word, (len(path), places[path]), fontsize=8, xytext=(3, 3), textcoords="offset points")
        if state == ENDS:
            break
    left.set(xlabel="tokens written", yticks=[], xlim=(0, 3.6), title="a path through the tree")
    left.set_xticks(range(4))
    right.plot(logp, color=BLUE, marker="o", label="log π of the text so far")
    right.plot(ratio, color=ORANGE, marker="s", ls="--", label="log π/π_b of the text so far")
    right.set(
        xlabel="tokens written", ylabel="running sum [nats]", xlim=(0, 3.2), ylim=(-6.5, 2.5), title="running sums"
    )
    right.set_xticks(range(4))
    right.legend(frameon=False, fontsize=8)


PATH = Widget(
    "03-path", draw_path, {"first": ["good", "bad", "<eos>"], "second": ["good", "bad", "<eos>"],
                           "third": ["good", "bad", "<eos>"]},
    [
        {"first": "good", "second": "good", "third": "bad"},
        {"first": "bad", "second": "<eos>", "third": "good"},
    ],
    "Left: every text of up to three words is a path from the left; the blue one is chosen. Right: each token adds its "
    "log-probability (down) and its log-ratio to the reference (up or down). After the end nothing is added: the "
    "second path ends after two tokens, whatever is chosen as the third.",
    "For two texts, the tree of all texts with the path in blue, and running sums of the log-probability and of the "
    "log-ratio against the number of tokens.",
    size=(7.4, 3.0),
)  # fmt: skip


def place_scores(scores: Tensor, mask: Tensor) -> Tensor:
    """Exercise 3.1."""
    last = mask.sum(1, keepdim=True) - 1
    return torch.zeros(mask.shape, dtype=scores.dtype).scatter(1, last, scores[:, None])


def text_logprob(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Exercise 3.2."""
    return torch.where(mask, logprobs, 0.0).sum(1)


def _at_end(scores: Tensor, mask: Tensor) -> Tensor:
    out = torch.zeros(mask.shape, dtype=scores.dtype)
    out[:, -1] = scores
    return out


def _one_late(scores: Tensor, mask: Tensor) -> Tensor:
    late = mask.sum(1, keepdim=True).clamp(max=mask.shape[1] - 1)
    return torch.zeros(mask.shape, dtype=scores.dtype).scatter(1, late, scores[:, None])


def _without_last(logprobs: Tensor, mask: Tensor) -> Tensor:
    index = torch.arange(mask.shape[1])
    return torch.where(mask & (index < mask.sum(1, keepdim=True) - 1), logprobs, 0.0).sum(1)


def _mask(generator: Generator) -> Tensor:
    lengths = torch.tensor([6, 1, 4])[torch.randperm(3, generator=generator)]
    return torch.arange(6) < lengths[:, None]


EXERCISES = {
    "3.1": Exercise(
        "3.1", "Where does the reward go?", 1, 8, place_scores,
        lambda g: (torch.randn(3, generator=g, dtype=torch.float64), _mask(g)),
        (
            Mistake("on the padding", _at_end,
                    "the score is in the last column, which is padding for shorter texts: nobody reads it there."),
            Mistake("one late", _one_late,
                    "one position too late: index t holds the reward *for* token t, it goes to the last real one."),
            Mistake("everywhere", lambda s, m: torch.where(m, s[:, None], 0.0),
                    "every token got the full score: a long text would earn it many times over."),
            Mistake("shared out", lambda s, m: torch.where(m, s[:, None] / m.sum(1, keepdim=True), 0.0),
                    "you shared the score out over the tokens; it is known, and paid, at the end."),
            Mistake("first token", lambda s, m: torch.nn.functional.pad(s[:, None], (0, m.shape[1] - 1)),
                    "the score is on the first token, before anything has been earned."),
        ),
        ("Rows are padded on the right. What is the index of the last True in a row?",
         "`mask.sum(1) - 1`.", "Start from zeros and use `scatter`, or an index pair (arange(B), last)."),
    ),
    "3.2": Exercise(
        "3.2", "How likely is the text?", 1, 6, text_logprob,
        lambda g: ((m := _mask(g)), torch.where(m, -torch.rand(3, 6, generator=g).double(), torch.nan))[::-1],
        (
            Mistake("mean", lambda p, m: text_logprob(p, m) / m.sum(1),
                    "that is the mean per token; the text's log-probability is the sum."),
            Mistake("times the mask", lambda p, m: (p * m).sum(1),
                    "NaN times 0 is NaN: multiplying by the mask lets padding poison the sum. Use torch.where."),
            Mistake("no mask", lambda p, m: p.sum(1), "you summed over the padding too: the mask says what is real."),
            Mistake("nansum", lambda p, m: p.nansum(1),
                    "you skipped NaN, but padding may hold any leftovers; the mask says what is real."),
            Mistake("without EOS", _without_last,
                    "the last real token is missing: ending the text there was a decision too, with a probability."),
            Mistake("one number", lambda p, m: torch.where(m, p, 0.0).sum(),
                    "one number per text is expected, you summed over the whole batch."),
        ),
        ("The chain rule turns a product of probabilities into a sum of logarithms.",
         "Padding may be NaN; `torch.where(mask, logprobs, 0.0)` never looks at it.",
         "Then sum over the last axis."),
        probe=on_any_padding,
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "03", "text_as_mdp", "Text generation is an MDP",
    "What are the states, actions and rewards of a language model?",
    "theory", "§2, the KL-regularised MDP, (4)",
    ("klq_edu.core.tree.TokenTree", "klq_kernels.reference.masked_mean"),
    needs=("02",), place=(3, 0.6), short="text as MDP", exercises=EXERCISES,
)  # fmt: skip
