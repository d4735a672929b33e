"""Chapter 13: the whole road on a laptop, from data to a verdict."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import FigureBase
from torch import Generator, Tensor
from torch.nn.functional import logsigmoid, softplus

import klq_edu
from klq_edu.core.tree import TokenTree
from klq_edu.course.chapters import Chapter, differentiate, float32
from klq_edu.course.display import Widget
from klq_edu.course.exercises import Exercise, Mistake
from klq_edu.figures import BLUE, GREEN, GREY, ORANGE, PINK, Picture, panels, plain_axes
from klq_edu.machine import threads
from klq_edu.rlhf.judge import Judge, bootstrap_interval, preferred, win_rate
from klq_edu.rlhf.loop import train
from klq_edu.rlhf.power import pairs_needed, t_quantile
from klq_edu.rlhf.preference import bradley_terry_loss
from klq_edu.rlhf.runs import Run
from klq_edu.worlds.world import World

DATA = Path(klq_edu.__file__).parent / "worlds" / "data"
QUANTILE = NormalDist().inv_cdf
BLIND, OVERPAID = "weeps alone", 5.0  # what a reward model overrates, and by how many standard deviations
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)  # of completions to choose the best from
FEW = 5  # seeds below which nothing is called shown: nobody can see whether so few scatter as Student's t supposes


def results() -> Path:
    """The folder results/compare of the repository; FileNotFoundError where the package was installed without it."""
    places = [Path(klq_edu.__file__).parents[1], Path.cwd(), *Path.cwd().parents]
    if found := [p / "results" / "compare" for p in places if (p / "results" / "compare").is_dir()]:
        return found[0]
    raise FileNotFoundError("results/compare is not here: run this notebook from a clone of the repository")


def made(world: str) -> dict[str, pd.DataFrame]:
    """The committed tables of how a world's reference and reward were made, by name."""
    return {p.stem.removeprefix("made_"): pd.read_csv(p) for p in sorted((results() / world).glob("made_*.csv"))}


def blind(world: World) -> World:
    """The same task for a reward model that is the truth, but for one rare pair of words that it overpays."""
    from klq_edu.worlds import grammar

    truth = world.truth
    bonus = [OVERPAID * (BLIND in " ".join(grammar.words_of(c))) for c in truth.completions()]
    tree = grammar.standardise(grammar.with_scores(truth, truth.rewards[truth.leaves] + torch.tensor(bonus).double()))
    return replace(world, tree=tree, reward=grammar.lexicon_reward(tree, f"{world.name}, blind to {BLIND}"))


def correlation(proxy: TokenTree, truth: TokenTree) -> float:
    """Of both rewards under the reference; both have mean 0 and standard deviation 1 there."""
    weights = truth.sequence_distribution(truth.ref)
    return (weights * proxy.rewards[proxy.leaves] * truth.rewards[truth.leaves]).sum().item()


def short_run(world: World, **changes) -> pd.DataFrame:
    """A KLQ run on the proxy: "kl", "proxy" and "truth" every few updates, all exact, from the reference on."""
    from klq_edu.worlds.grammar import policy_table
    from klq_edu.worlds.registry import preset

    config, found = preset(world.name, **changes), [measured(world.tree, world.truth, world.tree.ref)]

    def look(policy) -> dict[str, float]:
        found.append(measured(world.tree, world.truth, policy_table(world.tree, world.tokenizer, policy)))
        return {"truth": found[-1]["truth"]}

    with float32(), threads(world.threads), torch.random.fork_rng(devices=[]), TemporaryDirectory() as folder:
        torch.manual_seed(config.seed)
        run = Run(folder, {"world": world.name, **config.to_dict()})
        train(world.make_policy(config), world.tokenizer, world.prompts, world.reward, config, run=run,
              constraint=world.constraint, evaluate=look)  # fmt: skip
    return pd.DataFrame(found)


def measured(proxy: TokenTree, truth: TokenTree, policy: Tensor) -> dict[str, float]:
    """Exact KL to the reference, reward and true reward of a policy, a table [S, V]."""
    rewards = {"proxy": proxy.expected_reward(policy).item(), "truth": truth.expected_reward(policy).item()}
    return {"kl": proxy.sequence_kl(policy).item()} | rewards


def best_possible(proxy: TokenTree, truth: TokenTree) -> pd.DataFrame:
    """`measured` of the policies that are best for the proxy, for a range of τ."""
    taus = np.geomspace(0.05, 20, 14).tolist()
    return pd.DataFrame([measured(proxy, truth, proxy.optimum(tau)[2]) for tau in taus])


def best_of_n(p: Tensor, scores: Tensor, n: int) -> Tensor:
    """Exercise 13.3: P(y) = F(y)^n − F(before y)^n in rising order of distinct scores; p, scores [M] -> [M]."""
    order = scores.argsort()
    below = torch.cat([p.new_zeros(1), p[order].cumsum(0)])
    return torch.empty_like(p).scatter(0, order, below[1:] ** n - below[:-1] ** n)


def chosen_best(proxy: TokenTree, truth: TokenTree) -> pd.DataFrame:
    """Exact "kl", "proxy" and "truth" of the best of n completions by the proxy, a row for each n of `COUNTS`."""
    from klq_edu.worlds.grammar import prompt_of

    owner, weights = prompt_of(proxy), proxy.sequence_distribution(proxy.ref)
    scores, true = (tree.rewards[tree.leaves] for tree in (proxy, truth))
    rows = []
    for n in COUNTS:
        share = torch.zeros_like(weights)
        for here in (owner == prompt for prompt in owner.unique()):
            total = weights[here].sum()
            share[here] = total * best_of_n(weights[here] / total, scores[here], n)
        kl = torch.special.xlogy(share, share / weights).sum()
        found = {"kl": kl, "proxy": (share * scores).sum(), "truth": (share * true).sum()}
        rows.append({"n": n} | {name: x.item() for name, x in found.items()})
    return pd.DataFrame(rows)


def over_optimisation(proxies: dict[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]]) -> Picture:
    """Reward and true reward against KL, a panel for each proxy: what is best possible, the best of n, and a run."""
    figure, axes = panels(len(proxies), width=5.2, height=4.0)
    for axis, (title, (best, chosen, run)) in zip(axes, proxies.items(), strict=True):
        axis.plot(best["kl"], best["proxy"], color=GREY, lw=1.4, label="best policy for it: its reward")
        axis.plot(best["kl"], best["truth"], color=GREEN, ls="--", lw=1.8, label="the same policy: true reward")
        axis.plot(chosen["kl"], chosen["truth"], "^", color=PINK, ms=6, label="best of n: true reward")
        axis.plot(run["kl"], run["proxy"], color=BLUE, marker="o", ms=4, label="KLQ run: its reward")
        axis.plot(run["kl"], run["truth"], color=ORANGE, marker="s", ms=4, ls=":", label="KLQ run: true reward")
        axis.axhline(0, color=GREY, lw=0.6)
        axis.set(xlabel="KL(π ‖ reference) per completion [nats]", ylabel="reward [sd under reference]", title=title)
    axes[0].legend(fontsize=8, frameon=False)
    caption = (
        "All numbers are exact. What is maximised (grey, blue) rises with the KL. On the left the truth (green, "
        "orange, pink) follows and stays behind; on the right the best policy's truth rises, turns, and falls below "
        "the reference's (to rise again far out), and so does that of the best of n."
    )
    alt = f"Reward and true reward against KL for {' and '.join(proxies)}: policies, best of n, and a training run."
    return Picture(figure, caption, alt)


def ends(best: pd.DataFrame, run: pd.DataFrame) -> str:
    """Where the best policies' truth is highest, where it is lowest beyond that, and where a run ends; in words."""
    top, far, last = best.loc[best["truth"].idxmax()], best.loc[best["kl"].idxmax()], run.iloc[-1]
    said = f"the best policy's truth rises to the end, {top['truth']:.2f} at {top['kl']:.1f} nats"
    if top["kl"] < far["kl"]:
        low = best.loc[best.loc[best["kl"] >= top["kl"], "truth"].idxmin()]
        said = f"the best policy's truth is highest ({top['truth']:.2f}) at {top['kl']:.1f} nats, "
        said += f"then as low as {low['truth']:.2f} at {low['kl']:.1f}, and {far['truth']:.2f} at {far['kl']:.1f}"
    return said + f"; the run ends at {last['kl']:.1f} nats, reward {last['proxy']:.2f}, truth {last['truth']:.2f}"


def steps(run: pd.DataFrame) -> str:
    """Reward and truth of a run, test by test, in words."""
    return ", ".join(f"{row.proxy:.2f} ({row.truth:.2f})" for row in (run.round(2) + 0.0).itertuples())


def confidence(pairs: pd.DataFrame, bins: int = 6) -> str:
    """How sure a reward model is of held-out pairs, and how often it is right: on average, and in the groups that
    `calibration` draws."""
    sure, right = 1 / (1 + np.exp(-pairs["proxy"].abs())), pairs["proxy"] > 0
    groups = pd.qcut(sure, bins, labels=False, duplicates="drop")
    (says, found), count = (x.groupby(groups).mean() for x in (sure, right)), right.groupby(groups).size()
    bar, gap = 1.96 * (found * (1 - found) / count) ** 0.5, (found - says).abs()
    far = gap.idxmax()
    said = f"on average says {sure.mean():.3f} and is right in {right.mean():.3f}; furthest off where it says "
    said += f"{says[far]:.2f} and is right in {found[far]:.2f} ± {bar[far]:.2f}; "
    return said + f"the bar misses the line in {(gap > bar).sum()} of {len(gap)} groups"


def happened(tests: pd.DataFrame, independent: str) -> str:
    """What was gained over the reference at the end of the runs in `tests` (of `comparison.along`), in words."""
    last = tests.loc[tests.groupby(["setting", "algorithm", "seed"])["update"].idxmax()]
    gains = {name: last[name] for name in ("reward", "gold", independent)}
    said = [f"{name} {x.mean():+.3f} (up in {(x > 0).sum()} of {len(x)} runs)" for name, x in gains.items()]
    behind = [name for name, x in gains.items() if name != "reward" and x.mean() <= 0]
    verdict = f"on average {' and '.join(behind)} did not rise with it" if behind else "on average both others rose too"
    return f"{last['kl'].mean():.1f} nats out, {', '.join(said)}: {verdict}"


def interval_of(by_seed: list) -> tuple[float, float, float]:
    """Mean and 95 % interval of values per prompt: of one seed by a bootstrap over its prompts; of several by Student's
    t over their means, for the prompts that there are."""
    if len(by_seed) == 1:
        return np.mean(by_seed[0]), *bootstrap_interval(by_seed[0])
    means = np.array([np.mean(x) for x in by_seed])
    mean, reach = means.mean(), t_quantile(0.975, len(means) - 1) * means.std(ddof=1) / len(means) ** 0.5
    return mean, mean - reach, mean + reach


def before_judges(judges: dict[str, Judge], prompts: list[str], a: list[str], b: list[str]) -> pd.DataFrame:
    """Win-rates of a, in text, for each judge: asked once with a first, once with b first, and in both orders."""
    rows = []
    for name, judge in judges.items():
        first, second = np.array(judge(prompts, a, b)), 1 - np.array(judge(prompts, b, a))
        once = [f"{preferred(x, 0.5).mean():.3f}" for x in (first, second)]
        both = win_rate(prompts, a, b, judge)
        rows.append([name, *once, f"{both.rate:.3f} [{both.low:.3f}, {both.high:.3f}]", both.ties])
    return pd.DataFrame(rows, columns=["judge", "asked once, a first", "asked once, b first", "both orders", "ties"])


def drawn(tree: TokenTree, policy: Tensor, each: int, seed: int) -> tuple[list[str], list[str]]:
    """(prompts, completions) of a policy of the grammar, as texts: so many of each prompt."""
    from klq_edu.worlds.grammar import PROMPTS, prompt_of, words_of

    owner, weights, generator = prompt_of(tree), tree.sequence_distribution(policy), torch.Generator().manual_seed(seed)
    texts, prompts, found = tree.completions(), [], []
    for i, prompt in enumerate(PROMPTS):
        here = (owner == i).nonzero().flatten()
        picked = here[torch.multinomial(weights[here], each, replacement=True, generator=generator)]
        found += [" ".join(words_of(texts[j]))[len(prompt) + 1 :] for j in picked.tolist()]
        prompts += [prompt] * each
    return prompts, found


def shown_from(seed_sd: float, pairs: int, seeds: int, *, level: float = 0.95, power: float = 0.8) -> float:
    """The smallest difference from ½ that so many seeds show: `seeds_needed` solved for the effect; needs seeds > 1."""
    critical = QUANTILE((1 + level) / 2)
    variance = seed_sd**2 + 1 / (4 * pairs)
    return (critical + QUANTILE(power)) * (variance / (seeds - critical**2 / 2)) ** 0.5


def draw_power(figure: FigureBase, seeds: int, power: float) -> None:
    """The smallest difference from a win-rate of ½ that is shown, against prompts, for several scatters of seeds."""
    (axis,) = plain_axes(figure)
    pairs = 2 ** np.arange(4, 13)
    looks = {0.0: (GREY, ":", "v"), 0.02: (BLUE, "-", "o"), 0.05: (ORANGE, "--", "s"), 0.1: (GREEN, "-.", "^")}
    for sd, (colour, line, marker) in looks.items():
        least = [shown_from(sd, n, seeds, power=power) for n in pairs]
        axis.plot(pairs, least, color=colour, ls=line, marker=marker, ms=4, label=f"sd of a seed {sd:g}")
    axis.set(xscale="log", ylim=(0, 0.5), xlabel="prompts judged, per seed", ylabel="win-rate − ½ that is shown")
    axis.set_xticks(pairs[::2], [f"{n}" for n in pairs[::2]])
    axis.set_title(f"{seeds} seeds, power {power:g}", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


POWER = Widget(
    "13-power", draw_power, {"seeds": [3, 5, 8, 16, 32], "power": [0.5, 0.8, 0.95]},
    [{"seeds": 3, "power": 0.8}, {"seeds": 8, "power": 0.8}, {"seeds": 32, "power": 0.8}],
    "The smallest difference from ½ that is shown at 95 %. More prompts help until the curve is flat: from there on "
    "seeds differ more than their prompts do, and only more seeds help."
    " (Three seeds have somewhat less power than the title says.)",
    "For 3, 8 and 32 seeds, curves of the smallest win-rate difference that is shown, against prompts per seed; each "
    "falls and flattens, the higher the more the seeds scatter.",
    size=(4.4, 3.4),
)  # fmt: skip


def claim(seeds: int, low: float, high: float) -> str:
    """What may be said of a difference between KLQ and another, by rule from its 95 % interval (`interval_of`).

    >>> claim(8, 0.01, 0.05)
    'KLQ is higher: shown, on this task'
    >>> claim(1, 0.01, 0.05)
    'KLQ is higher for these two policies; one seed says nothing of the algorithms'
    >>> claim(3, 0.01, 0.05)
    'KLQ is higher in these 3 seeds; too few to call it shown'
    >>> claim(8, -0.02, 0.04)
    'not shown either way; a difference would probably have been seen from ±0.041 on'
    """
    side = "higher" if low > 0 else "lower" if high < 0 else ""
    if seeds == 1:
        said = f"KLQ is {side} for these two policies" if side else "not shown even for these two policies"
        return f"{said}; one seed says nothing of the algorithms"
    if side:
        few = f" in these {seeds} seeds; too few to call it shown"
        return f"KLQ is {side}" + (few if seeds < FEW else ": shown, on this task")
    least = (high - low) / 2 * (1 + t_quantile(0.8, seeds - 1) / t_quantile(0.975, seeds - 1))
    return f"not shown either way; a difference would probably have been seen from ±{least:.3f} on"


def _loss_and_gradients(answer, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    """An answer's loss and its gradients in both scores."""
    c, r = chosen.requires_grad_(), rejected.requires_grad_()
    parts = (loss := answer(c, r), *differentiate(loss, c, r, finite=False))
    return dict(zip(("the loss: ", "its gradient in chosen: ", "its gradient in rejected: "), parts))


def _scores(generator: Generator) -> tuple[Tensor, Tensor]:
    """Scores of six pairs, of which one is in the wrong order by far, and one in the right order by far."""
    chosen, rejected = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    chosen[:2] += torch.tensor([-1000.0, 900.0])
    return chosen, rejected


def _cut_off() -> dict[str, Callable]:
    """Losses that do not overflow because something is cut off, by how people do it."""
    found = {}
    for e in (1e-6, 1e-8, 1e-10, 1e-12):
        found[f"kept σ from 0 by {e:g}"] = lambda c, r, e=e: -(c - r).sigmoid().clamp(min=e).log().mean()
    for most in (20, 30, 50, 100, 500):
        found[f"cut the differences off at ±{most}"] = lambda c, r, m=most: -logsigmoid((c - r).clamp(-m, m)).mean()
    return found


def swapped_rate(a_first: Tensor, b_first: Tensor) -> float:
    """Exercise 13.2."""
    return preferred(a_first.numpy(), b_first.numpy()).mean().item()


def _asked_twice(generator: Generator) -> tuple[Tensor, Tensor]:
    """Preferences of a judge who leans to what stands first; some pairs are ties, of which sums of rounded numbers make
    something else."""
    better = torch.randn(23, generator=generator, dtype=torch.float64) + 0.4
    a_first, b_first = (better + 0.7).sigmoid(), (0.7 - better).sigmoid()
    tied = torch.randperm(23, generator=generator)[:6]
    a_first[tied] = b_first[tied] = torch.tensor([0.13, 0.13, 0.13010847436299786, 0.67, 0.67, 0.8]).double()
    return a_first, b_first


def _some_scored(generator: Generator) -> tuple[Tensor, Tensor, int]:
    p = torch.rand(6, generator=generator, dtype=torch.float64) + 0.1
    scores = torch.randn(6, generator=generator, dtype=torch.float64)
    return p / p.sum(), scores, int(torch.randint(2, 6, (1,), generator=generator))


def _best(p: Tensor, scores: Tensor, n: int, share: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`share(F before y, F(y))` of each completion: what mistakes make of the right probabilities."""
    order = scores.argsort()
    below = torch.cat([p.new_zeros(1), p[order].cumsum(0)])
    return torch.empty_like(p).scatter(0, order, share(below[:-1], below[1:]))


def pairs_for(effects: Tensor, power: float) -> Tensor:
    """Exercise 13.4."""
    return torch.tensor([pairs_needed(d, power=power) for d in effects.tolist()], dtype=torch.float64)


def _wrong_pairs(effects: Tensor, power: float, *, z=lambda power: QUANTILE(0.975) + QUANTILE(power), variance=0.25):
    return z(power) ** 2 * variance / effects**2


def _effects(generator: Generator) -> tuple[Tensor, float]:
    effects = 0.02 + 0.2 * torch.rand(3, generator=generator, dtype=torch.float64)
    return effects, 0.6 + 0.35 * torch.rand((), generator=generator, dtype=torch.float64).item()


EXERCISES = {
    "13.1": Exercise(
        "13.1", "Bradley and Terry's loss", 1, 8, bradley_terry_loss, _scores,
        (
            Mistake("overflow", lambda c, r: -(c - r).sigmoid().log().mean(),
                    "the formula is right, but it overflows: σ of a large negative number is 0, and its logarithm is "
                    "−∞. Use logsigmoid or softplus."),
            Mistake("swapped", lambda c, r: -logsigmoid(r - c).mean(),
                    "chosen and rejected are swapped: your loss falls as the rejected one scores higher."),
            Mistake("no minus", lambda c, r: logsigmoid(c - r).mean(),
                    "the minus is missing: a loss is minimised, so it is the *negative* log-likelihood."),
            Mistake("sum", lambda c, r: -logsigmoid(c - r).sum(),
                    "you took the sum over pairs; the mean is asked for."),
            Mistake("mean inside", lambda c, r: -logsigmoid((c - r).mean()),
                    "you averaged the differences before the logarithm: each pair has a likelihood of its own."),
            Mistake("no logarithm", lambda c, r: -(c - r).sigmoid().mean(),
                    "the logarithm is missing: that is minus the mean probability, which hardly cares about a pair "
                    "that is far wrong."),
            *(Mistake(how, cut, f"you {how}: nothing overflows, but the worst pair has no gradient left, and it should "
                      "pull hardest. Use logsigmoid or softplus.") for how, cut in _cut_off().items()),
            Mistake("hinge", lambda c, r: (1 - (c - r)).clamp(min=0).mean(),
                    "that is a hinge loss: it has the right direction, but no probability behind it."),
            Mistake("each alone", lambda c, r: (softplus(-c) + softplus(r)).mean(),
                    "you scored each completion alone; only the difference of the two has a likelihood."),
        ),
        ("The loss of one pair is −log P(chosen beats rejected).",
         "−log σ(d) = log(1 + e^{−d}) with d = chosen − rejected. What is e^{1000}?",
         "`-torch.nn.functional.logsigmoid(chosen - rejected).mean()`."),
        probe=_loss_and_gradients,
    ),
    "13.2": Exercise(
        "13.2", "A win-rate with the swap", 2, 10, swapped_rate, _asked_twice,
        (
            Mistake("asked once", lambda a, b: swapped_rate(a, torch.full_like(a, 0.5)),
                    "you used the first order only: the judge's leaning to what stands first is still in it."),
            Mistake("mean preference", lambda a, b: ((a + 1 - b) / 2).mean(),
                    "you averaged preferences; a win-rate counts wins, however close."),
            Mistake("ties lost", lambda a, b: (a > b).double().mean(),
                    "ties count as losses in yours; each is half a win."),
            Mistake("ties won", lambda a, b: (a >= b).double().mean(),
                    "ties count as wins in yours; each is half a win."),
            Mistake("ties left out", lambda a, b: (a > b).sum() / (a != b).sum(),
                    "you left out the ties; each is half a win of one comparison, and n counts them all."),
            Mistake("not turned round", lambda a, b: swapped_rate(a + b, torch.ones_like(a)),
                    "`b_first` is the preference for *b*; turn it round before you average it with `a_first`."),
            Mistake("votes", lambda a, b: swapped_rate((a > 0.5).double(), (b > 0.5).double()),
                    "you counted the vote of each order and called \"first, first\" a tie; a judge that leans strongly "
                    "says so of nearly all pairs. Compare how much it preferred each."),
            Mistake("rounded sum", lambda a, b: swapped_rate((a + 1 - b) / 2, torch.full_like(a, 0.5)),
                    "you compare sums of rounded numbers: (a_first + 1 − b_first)/2 is not exactly ½ for every tie. "
                    "Compare a_first with b_first."),
            Mistake("rounded complement", lambda a, b: swapped_rate(a, 1 - (1 - b)),
                    "1 − (1 − b_first) is rounded, and not exactly b_first. Compare a_first with b_first."),
            Mistake("the other one's", lambda a, b: swapped_rate(b, a),
                    "that is the win-rate of b."),
        ),
        ("The preference for a when it stands second is 1 − b_first.",
         "The mean of both orders is (a_first + 1 − b_first)/2. When is it above ½?",
         "a wins where a_first > b_first, ties where they are equal: `(wins + ties / 2) / n`."),
    ),
    "13.3": Exercise(
        "13.3", "The best of n", 2, 12, best_of_n, _some_scored,
        (
            Mistake("not sorted", lambda p, s, n: best_of_n(p, torch.arange(6.0), n),
                    "you added up probabilities in the order they came in; F(y) adds those of all that score at "
                    "most as much as y."),
            Mistake("density", lambda p, s, n: _best(p, s, n, lambda before, upto: (
                        n * (upto - before) * upto ** (n - 1))),
                    "n p F^{n−1} is the formula for a continuous score; here the same completion may be drawn twice, "
                    "and yours sums to more than 1."),
            Mistake("at most", lambda p, s, n: _best(p, s, n, lambda before, upto: upto**n),
                    "that is the probability that the best scores *at most* as much as y; take away that it scores "
                    "less."),
            Mistake("left in order", lambda p, s, n: best_of_n(p, s, n)[s.argsort()],
                    "the numbers are right but stand in the wrong places: they are still in the order of the scores; "
                    "put each back where its completion stands in p."),
            Mistake("sorted twice", lambda p, s, n: best_of_n(p, s, n)[s.argsort()][s.argsort()],
                    "the numbers are right but stand in the wrong places: d[order] sorts once more. To undo a sorting, "
                    "assign `out[order] = d`, or index with order.argsort()."),
            Mistake("worst", lambda p, s, n: best_of_n(p, -s, n),
                    "that is the worst of n."),
            Mistake("one too few", lambda p, s, n: best_of_n(p, s, n - 1),
                    "that is the best of n − 1."),
            Mistake("drawn at all", lambda p, s, n: 1 - (1 - p) ** n,
                    "that is the probability that y is drawn at least once; it must be the best of the draw as well."),
            Mistake("sharpened", lambda p, s, n: p**n / (p**n).sum(),
                    "you sharpened p; the scores must come in."),
        ),
        ("When does the best of n score at most as much as y? All n must.",
         "P(best scores at most as y) = F(y)^n, with F(y) = Σ p over all that score at most as y.",
         "Sort by score; c = cumsum of p in that order; the probability is c^n minus the c^n before it, and is put "
         "back in the old order."),
    ),
    "13.4": Exercise(
        "13.4", "How many pairs?", 2, 8, pairs_for, _effects,
        (
            Mistake("no power", partial(_wrong_pairs, z=lambda power: QUANTILE(0.975)),
                    "you forgot the power: with these pairs a difference of this size is missed half of the time."),
            Mistake("one-sided", partial(_wrong_pairs, z=lambda power: QUANTILE(0.95) + QUANTILE(power)),
                    "that is a one-sided test: at 95 %, two-sided, the quantile is that of 0.975."),
            Mistake("power fixed", lambda d, power: pairs_for(d, 0.8),
                    "you took 0.8 for the power; it is an argument."),
            Mistake("rounded", lambda d, power: pairs_for(d, power).round(),
                    "you rounded; the number is asked for as it is."),
            Mistake("rounded up", lambda d, power: pairs_for(d, power).ceil(),
                    "you rounded up; the number is asked for as it is."),
            Mistake("variance one", partial(_wrong_pairs, variance=1.0),
                    "you forgot the variance: a fair coin's is ¼, not 1."),
            Mistake("deviation for variance", partial(_wrong_pairs, variance=0.5),
                    "½ is the standard deviation of a fair coin; its variance is ¼."),
            Mistake("not squared", lambda d, power: (QUANTILE(0.975) + QUANTILE(power)) / (2 * d),
                    "you forgot the square: half the difference takes four times the pairs."),
            Mistake("twice the difference", partial(_wrong_pairs, variance=0.0625),
                    "you took the difference between two win-rates, 2d; the effect is that of one from ½."),
            Mistake("two-sided power", partial(_wrong_pairs, z=lambda power: (
                        QUANTILE(0.975) + QUANTILE((1 + power) / 2))),
                    "the power is one-sided: the quantile is that of `power` itself."),
        ),
        ("How many standard errors from ½ must the true rate be, to be seen so often?",
         "z = z_{0.975} + z_{power}; the standard error of n fair pairs is ½/√n.",
         "d = z · ½/√n, so n = z²/(4 d²); `NormalDist().inv_cdf` gives the quantiles."),
    ),
}  # fmt: skip

CHAPTER = Chapter(
    "13", "whole_road", "The whole road on a laptop",
    "What does it take to get from texts to a trained policy, and how sure are we that it got better?",
    "practice", "§5 and Figures 1 and 3, on a laptop",
    ("klq_edu.rlhf.preference", "klq_edu.rlhf.judge", "klq_edu.rlhf.power", "klq_edu.app.study"),
    needs=("07", "08"), place=(8, 0.6), short="whole road", exercises=EXERCISES,
)  # fmt: skip
