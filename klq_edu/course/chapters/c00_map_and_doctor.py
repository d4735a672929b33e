"""Chapter 00: the map, notation, glossary, and how the checks work."""

from collections.abc import Iterable
from itertools import pairwise

import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor

from klq_edu.course.chapters import Chapter, load_all, on_any_padding
from klq_edu.course.checks import Progress
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREY, ORANGE, plain_axes

NOTATION = [  # symbol, meaning, name in PPO papers, name in training libraries, the notebook that brings it in
    ("m_t", "mask: whether position t holds a real token", "–", "mask", "00"),
    ("[B, T]; [N]; [A]", "shapes: batch and tokens; all tokens; actions", "–", "–", "00"),
    ("π, π_b", "policy; reference policy", "π_θ, π_ref", "policy, ref_policy", "01"),
    ("τ", "price of KL", "β (of the KL to the reference)", "kl_coef, beta", "01"),
    ("D(π‖π_b)(s)", "exact KL in a state (notebook 01 has one state only)", "KL", "–", "01"),
    ("V, Q", "value of a prefix; of a token after it", "V", "values", "01"),
    ("J(π)", "objective: expected reward, less τ times the KL", "J", "–", "01"),
    ("π_Q, V_Q", "Boltzmann policy of Q and its soft value", "–", "–", "01"),
    ("γ", "discount: a reward one step later counts γ times as much", "γ", "gamma", "02"),
    ("R(y), r", "score of a text, reward of a token", "reward", "score", "02"),
    ("V_π, Q_π; V*, Q*", "values of the policy π; of the best policy π*", "V^π, Q^π", "–", "02"),
    ("x, y", "prompt, completion", "–", "prompt, completion", "03"),
    ("s_t = (x, y_1..y_t), a_t = y_{t+1}", "state: prefix; action: next token", "s, a", "input_ids, labels", "03"),
    ("ℓ = log π/π_b", "log-ratio of an action that was sampled", "–", "logratio", "04"),
    ("λ", "how far the λ-return looks ahead", "λ", "lam", "05"),
    ("δ, Δ", "TD error, its λ-sum", "δ, Â", "delta, advantages", "05"),
    ("α", "step size of the target", "–", "–", "05"),
    ("Ĝ = Q + αΔ", "target of KLQ's regression", "–", "–", "05"),
    ("π_θ, π_old", "the policy in training; the policy that sampled the batch", "π_θ, π_old", "old_logprobs", "06"),
    ("ρ = π/π_old", "ratio", "r(θ)", "ratio", "07"),
    ("ε", "PPO's clip", "ε", "cliprange", "07"),
    ("β", "here always the weight of KL(π‖π_old), as in PPO with a penalty", "β", "adaptive kl", "07"),
    ("1/τ", "KLQ's value coefficient", "c_1", "vf_coef", "07"),
]
LATER = "05"  # the notebook from which on a symbol need not be known at the beginning
GLOSSARY = {
    "CPU": "central processing unit: what every computer has",
    "EOS": "end of sequence: the token that ends a text",
    "GAE": "generalised advantage estimation: PPO's λ-sum of TD errors",
    "GEMM": "general matrix multiplication: the product of two matrices",
    "GPU": "graphics processing unit: fast at many equal computations",
    "HTML": "hypertext markup language: pages for a browser",
    "JSON": "a text format for settings and records",
    "KL": "Kullback–Leibler divergence: how far one distribution is from another, in nats",
    "KLQ": "KL-regularised Q-learning: the algorithm of this course",
    "MDP": "Markov decision process: states, actions, rewards, transitions",
    "PAD": "padding: what fills short rows of a batch; never read",
    "PPO": "proximal policy optimisation: the usual algorithm for RLHF",
    "PTX": "parallel thread execution: portable assembly for GPUs of one maker",
    "RLHF": "reinforcement learning from human feedback",
    "SASS": "streaming assembler: the instructions of such a GPU itself",
    "SFT": "supervised fine-tuning: the training before RLHF; its result is the reference",
    "TD": "temporal difference: what we know one step later, minus what we guessed before",
    "TRL": "a widely used library for RLHF",
}


def notation(later: bool = False) -> pd.DataFrame:
    """The symbols that the first notebooks need, or those that come later, in the order in which they come in."""
    rows = [row for row in NOTATION if (row[-1] >= LATER) == later]
    return pd.DataFrame(rows, columns=["here", "meaning", "in PPO papers", "in libraries", "from notebook"])


def glossary() -> pd.DataFrame:
    """Every abbreviation of the course."""
    return pd.DataFrame(GLOSSARY.items(), columns=["short", "what it is"])


def progress() -> pd.DataFrame:
    """Which exercises have passed on this machine, by notebook."""
    done = Progress().read()
    rows = [(c.number, c.title, sum(n in done for n in c.exercises), len(c.exercises)) for c in load_all()]
    return pd.DataFrame(rows, columns=["notebook", "title", "passed", "exercises"])


def draw_map(figure: FigureBase, notebook: str | None) -> None:
    """The notebooks and what each needs; the chosen one, if any, all it needs, and all that needs it."""
    (axis,) = plain_axes(figure)
    chapters = {c.number: c for c in load_all()}
    before = _needed(notebook, chapters) if notebook else set()
    after = {number for number in chapters if notebook in _needed(number, chapters)}
    look = {"arrowstyle": "->", "color": GREY, "shrinkA": 17, "shrinkB": 17}
    for number, chapter in chapters.items():
        for need in chapter.needs:
            axis.annotate("", chapter.place, chapters[need].place, arrowprops=look, zorder=2)
        here, x, y = number == notebook, *chapter.place
        colour = BLUE if here else "#cfe3f3" if number in before else "#fbe3c8" if number in after else "white"
        edge = ORANGE if number in after else BLUE if here or number in before else GREY
        rim = {"boxstyle": "circle,pad=0.35", "fc": colour, "ec": edge, "ls": "--" if number in after else "-"}
        text = {"ha": "center", "url": f"{chapter.name}.html"}  # a link, where a page draws it as SVG
        axis.text(x, y, number, va="center", color="white" if here else "black", bbox=rim, **text)
        axis.text(x, y - 0.42, chapter.short, va="top", fontsize=8, bbox={"fc": "white", "lw": 0, "pad": 1}, **text)
    (left, right), (low, high) = _extent(chapters.values())
    limits = {"xlim": (left - 0.6, right + 0.6), "ylim": (low - 0.8, high + 0.6)}
    axis.set(**limits, title=f"notebook {notebook}: {chapters[notebook].short}" if notebook else "")
    axis.axis("off")


def _needed(notebook: str, chapters: dict[str, Chapter]) -> set[str]:
    needs = chapters[notebook].needs
    return set(needs).union(*(_needed(n, chapters) for n in needs))


def _extent(chapters: Iterable[Chapter]) -> list[tuple[float, float]]:
    return [(min(side), max(side)) for side in zip(*(c.place for c in chapters), strict=True)]


def map_widget() -> Widget:
    """The map of all chapters there are (a function, because this one is not yet complete while it is imported)."""
    chapters = load_all()
    numbers = [c.number for c in chapters]
    users = {n: [c.number for c in chapters if n in c.needs] for n in numbers}
    arrows = "; ".join(f"{n} to {', '.join(found)}" for n, found in users.items() if found)
    goals = " or ".join(n for n, found in users.items() if not found)
    late = [f"{n} until {users[n][0]}" for n, following in pairwise(numbers) if users[n] and following not in users[n]]
    wait = f" What can wait: {', '.join(late)}." if late else ""
    (left, right), (low, high) = _extent(chapters)
    return Widget(
        "00-map", draw_map, {"notebook": numbers}, [{"notebook": n} for n in numbers[-3::2]],
        f"An arrow means: needed for. Everything leads to {goals}.{wait} The chosen notebook is dark blue, what it "
        "needs light blue, and what needs it has a dashed orange rim.",
        f"Graph of the notebooks {numbers[0]} to {numbers[-1]} with arrows from each to those that need it: {arrows}.",
        size=(1 + right - left, round(1.2 + high - low, 2)),
    )  # fmt: skip


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Exercise 0.1."""
    return torch.where(mask, x, 0.0).sum() / mask.sum()


def next_values(values: Tensor, mask: Tensor) -> Tensor:
    """Exercise 0.2."""
    real = torch.where(mask, values, 0.0)
    return torch.where(mask, torch.nn.functional.pad(real, (0, 1))[:, 1:], 0.0)


def _padded(generator: Generator) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([5, 1, 3])[torch.randperm(3, generator=generator)]
    mask = torch.arange(5) < lengths[:, None]
    return torch.where(mask, torch.randn(3, 5, generator=generator, dtype=torch.float64) + 1, torch.nan), mask


def _rubbish(generator: Generator) -> tuple[Tensor, Tensor]:
    x, mask = _padded(generator)
    return torch.where(mask, x, 7.0 + torch.rand(3, 5, generator=generator, dtype=torch.float64)), mask


EXERCISES = {
    "0.1": Exercise(
        "0.1", "A mean without padding", 1, 4, token_mean, _padded,
        (
            Mistake("plain mean", lambda x, m: x.mean(),
                    "you averaged the padding too: a plain mean has no idea what is padding."),
            Mistake("times the mask", lambda x, m: (x * m).sum() / m.sum(),
                    "multiplying by the mask is not enough: NaN times 0 is NaN. Pick with torch.where."),
            Mistake("nanmean", lambda x, m: x.nanmean(),
                    "you skipped NaN, but padding may hold any leftovers; the mask says what is real."),
            Mistake("all positions", lambda x, m: torch.where(m, x, 0.0).mean(),
                    "padding is left out of the sum but counted in the denominator."),
            Mistake("mean of rows", lambda x, m: (torch.where(m, x, 0.0).sum(1) / m.sum(1)).mean(),
                    "that is the mean of the rows' means: tokens of short rows count more."),
            Mistake("sum", lambda x, m: torch.where(m, x, 0.0).sum(),
                    "that is the sum; divide by the number of real tokens."),
        ),
        ("`x * mask` does not help: NaN times 0 is NaN.", "`torch.where(mask, x, 0.0)` picks without multiplying.",
         "Its sum, divided by `mask.sum()`."),
        probe=on_any_padding,
    ),
    "0.2": Exercise(
        "0.2", "The value of the next state", 1, 6, next_values, _rubbish,
        (
            Mistake("roll", lambda v, m: torch.where(m, torch.where(m, v, 0.0).roll(-1, 1), 0.0),
                    "torch.roll wraps around: the last column got the first one's value."),
            Mistake("roll of everything", lambda v, m: torch.where(m, v.roll(-1, 1), 0.0),
                    "torch.roll brings padding, or the row's first value, after the last real token; there it is 0."),
            Mistake("wrong way", lambda v, m: torch.where(m, torch.nn.functional.pad(v, (1, 0))[:, :-1], 0.0),
                    "you shifted the wrong way: that is the value of the state before."),
            Mistake("padding leaks", lambda v, m: torch.where(m, torch.nn.functional.pad(v, (0, 1))[:, 1:], 0.0),
                    "after the last real token you read a padded value; after the end the value is 0."),
            Mistake("no shift", lambda v, m: torch.where(m, v, 0.0),
                    "these are the values of the states themselves, not of the next ones."),
        ),
        ("Set padding to 0 first; then what comes after the last token is right by itself.",
         "Drop the first column and append a column of zeros.",
         "`torch.nn.functional.pad(x, (0, 1))[:, 1:]` does both."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "00", "map_and_doctor", "Map, notation and doctor",
    "What is in this course, how do its checks work, and is my machine ready?",
    "theory", "all of it, from above",
    ("klq_edu.app.doctor.examine", "klq_edu.course"),
    needs=(), place=(0, 0), short="map", exercises=EXERCISES,
)  # fmt: skip
