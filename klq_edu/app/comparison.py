"""What the CSV of `klq sweep` says, as Markdown tables: algorithms and schedules compared seed by seed."""

from itertools import combinations, product
from operator import sub
from pathlib import Path

import numpy as np
import pandas as pd

from klq_edu.figures import STYLES
from klq_edu.rlhf.judge import bootstrap_interval, preferred, win_rate_of_seeds
from klq_edu.rlhf.power import pairs_needed, seeds_needed, t_quantile

LABELS = {"on_policy": "on-policy", "equal": "cooled replay, equal compute", "replay": "cooled replay"}
SHOWN = ("attained", "attained_1280", "mode_mass", "mode_mass_optimum", "kl_optimum")
# columns of test samples that no judge has filled
SAMPLED = ("prompt", "completion", "kl", "length", "ended", "copied")
MARKS = {"longer": "length", "copied": "copied"}  # what judges may lean to: more of which column
SETTING = ["tau", "schedule", "algorithm", "learning_rate"]


def algorithms(csv: Path) -> str:
    """Over seeds, the share of the possible improvement (median [lowest, highest], mean, and the median after 1,280
    completions), the median mass of each prompt's best sentence beside the optimum's, KL(π‖π*) in nats, and that minus
    KLQ's of the same seed."""
    runs = pd.read_csv(csv)
    heads = ["τ", "completions", "algorithm", "lr", "attained", "mean", "early", "mode"]
    heads += ["KL(π‖π*) [nats]", "KL − KLQ's"]
    rows = []
    for (tau, used, name, rate), part in runs.groupby(SETTING, sort=False):
        share, early, mode, best, nats = (part[c] for c in SHOWN)
        cells = [f"{tau:g}", LABELS[used], STYLES[name]["label"], f"{rate:g}", spread(share), f"{share.mean():.3f}"]
        cells += [f"{early.median():.2f}", f"{mode.median():.2f} of {best.median():.2f}", spread(nats)]
        klq = runs[(runs["algorithm"] == "klq") & (runs["tau"] == tau) & (runs["schedule"] == used)]
        alone = name == "klq" or klq["learning_rate"].nunique() != 1
        rows.append([*cells, "" if alone else difference(part, klq, "kl_optimum")])
    return table(heads, rows)


def schedules(csv: Path, names: tuple[str, ...] = tuple(STYLES)) -> str:
    """The median share of the possible improvement by use of the completions, and how much is gained over on-policy
    training with the same seed; a last row has what it costs. Empty for one schedule, or for several learning rates.
    `names` are the algorithms to show."""
    runs = pd.read_csv(csv)
    runs = runs[runs["algorithm"].isin(names)]
    used = [name for name in LABELS if (runs["schedule"] == name).any()]
    if used[:1] != ["on_policy"] or len(used) == 1 or several_rates(runs):
        return ""
    heads = ["τ", "algorithm", *(LABELS[name] for name in used), *(f"gain, {LABELS[name]}" for name in used[1:])]
    rows = []
    for (tau, name), part in runs.groupby(["tau", "algorithm"], sort=False):
        plain, *others = parts = [part[part["schedule"] == u] for u in used]
        medians = [f"{p['attained'].median():.3f}" for p in parts]
        gains = [difference(p, plain, "attained") for p in others]
        rows.append([f"{tau:g}", STYLES[name]["label"], *medians, *gains])
    costs = runs.groupby("schedule")[["row_steps", "seconds"]].median().loc[used]
    rows.append(["", "row-steps (seconds)", *(f"{c.row_steps:,.0f} ({c.seconds:.0f})" for c in costs.itertuples())])
    return table(heads, [row + [""] * (len(heads) - len(row)) for row in rows])


def power(csv: Path, pairs: tuple[int, ...] = (64, 256, 1024)) -> str:
    """Win-rates against KLQ before the true reward, and how many seeds (with so many pairs of completions each) it
    takes to see, at a level of 95 % and with power 0.8, a difference as large as the one found. Where that is below two
    standard errors nothing was found, and no number is given. Empty without a rival to KLQ, several seeds and one rate.
    """
    runs = pd.read_csv(csv)
    rivals = runs[runs["algorithm"] != "klq"].dropna(subset=["wins_over_klq"])
    if rivals.empty or rivals["seed"].nunique() < 2 or several_rates(runs):
        return ""
    heads = ["τ", "completions", "algorithm", "wins over KLQ", "sd of a seed", "pairs, were it always the mean"]
    rows = []
    for (tau, used, name), part in rivals.groupby(["tau", "schedule", "algorithm"], sort=False):
        wins, effect, sd = part["wins_over_klq"], part["wins_over_klq"].mean() - 0.5, part["wins_over_klq"].std()
        error = sd / len(part) ** 0.5
        needed = [pairs_needed(effect), *(seeds_needed(effect, sd, n) for n in pairs)]
        counts = [f"{n:,.0f}" if abs(effect) >= 2 * error else "–" for n in needed]
        rows.append([f"{tau:g}", LABELS[used], STYLES[name]["label"], f"{wins.mean():.3f} ± {error:.3f}", f"{sd:.3f}"])
        rows[-1] += counts
    return table(heads + [f"seeds, {n} pairs each" for n in pairs], rows)


def opponents(results: list) -> list[tuple[str, str | None, list[tuple]]]:
    """(algorithm, rival or None for the reference, the runs of both for each seed): each algorithm beside the reference
    that it started from, and any two of the same seed, KLQ first."""
    by = {}
    for r in results:
        by.setdefault(r.labels["algorithm"], {})[r.labels["seed"]] = r
    found = [(name, None, [(r, None) for r in runs.values()]) for name, runs in by.items()]
    for name, rival in combinations(sorted(by, key=lambda name: name != "klq"), 2):
        pairs = [(r, by[rival][seed]) for seed, r in by[name].items() if seed in by[rival]]
        found += [(name, rival, pairs)] if pairs else []
    return found


def compared(results: list) -> list[tuple[str, str | None, list[tuple[pd.DataFrame, pd.DataFrame]]]]:
    """The same with the test samples of both."""
    return [
        (name, rival, [(a.after, a.before if b is None else b.after) for a, b in pairs])
        for name, rival, pairs in opponents(results)
    ]


def setting_of(run) -> str:
    """τ and what was changed of the world's settings, in words."""
    return f"{run.settings['tau']:g}" + (f", {changes}" if (changes := run.settings.get("changes")) else "")


def along(results: list) -> pd.DataFrame:
    """A row per test of each run: algorithm, setting, seed, update, KL, and how much more reward and judges gave than
    to the reference."""
    columns, rows = judges_of(results), []
    for run in results:
        for update, table in run.tests.items():
            about = {"setting": setting_of(run), "update": update, "kl": table["kl"].mean()}
            gains = (table[columns] - run.before[columns]).mean().to_dict()
            rows.append({name: run.labels[name] for name in ("algorithm", "seed")} | about | gains)
    return pd.DataFrame(rows)


def judges_of(results: list) -> list[str]:
    """What has scored the test samples of every run: the reward and the judges."""
    known = [set(table) for r in results for table in (r.before, r.after)]
    return [c for c in results[0].before if c not in SAMPLED and all(c in table for table in known)]


def verdicts(results: list) -> pd.DataFrame:
    """Before the reward and each judge, all that `compared` compares on held-out prompts. Columns a, b, judge; rate,
    low, high: the win-rate of a; gain, gain_low, gain_high: the mean score of a minus that of b; seeds, n (prompts).
    Intervals of 95 % are over prompts, of several seeds over seeds and prompts (`win_rate_of_seeds`)."""
    rows = []
    for judge, (name, rival, tables) in product(judges_of(results), compared(results)):
        wins, gains = (
            [change(a[judge], b[judge]).groupby(a["prompt"]).mean() for a, b in tables] for change in (preferred, sub)
        )
        about = {"a": STYLES[name]["label"], "b": "reference" if rival is None else STYLES[rival]["label"]}
        about |= {"judge": judge} | dict(zip(("rate", "low", "high"), np.clip(mean_interval(wins), 0, 1)))
        about |= dict(zip(("gain", "gain_low", "gain_high"), mean_interval(gains)))
        rows.append(about | {"seeds": len(wins), "n": len(wins[0])})
    return pd.DataFrame(rows)


def mean_interval(by_seed: list[pd.Series]) -> tuple[float, float, float]:
    """Mean and 95 % interval of values per prompt: over prompts of one seed, over seeds and prompts of several."""
    if len(by_seed) > 1:
        return win_rate_of_seeds(by_seed)
    return by_seed[0].mean(), *bootstrap_interval(by_seed[0])


def leanings(results: list) -> pd.DataFrame:
    """Which way the reward and each judge lean: of all pairs that `compared` compares and that differ in it, the share
    in which the judge prefers the "longer" completion (tokens), and that which has "copied" more word triples of its
    prompt; a tie counts half. ½ is no leaning; NaN where no pair differs."""
    pairs = [pair for *_, tables in compared(results) for pair in tables]
    more = {name: [preferred(a[mark], b[mark]) for a, b in pairs] for name, mark in MARKS.items()}
    rows = []
    for judge in judges_of(results):
        won = pd.concat([preferred(a[judge], b[judge]) for a, b in pairs])
        rows.append({"judge": judge} | {name: leaning(pd.concat(parts), won) for name, parts in more.items()})
    return pd.DataFrame(rows)


def leaning(more: pd.Series, won: pd.Series) -> float:
    """Of the pairs in which one has more of something (1: the first, 0: the second, ½: neither), how often it won."""
    return (1 - (more - won).abs())[more != 0.5].mean()


def several_rates(runs: pd.DataFrame) -> bool:
    """Whether some algorithm was run at several learning rates, which no comparison may pool."""
    return runs.groupby(SETTING[:3])["learning_rate"].nunique().max() > 1


def spread(x: pd.Series) -> str:
    """Median [lowest, highest]."""
    return f"{x.median():.3f} [{x.min():.3f}, {x.max():.3f}]"


def difference(part: pd.DataFrame, base: pd.DataFrame, column: str) -> str:
    """`part` minus `base` with the same seed: mean [95 % interval by Student's t], and in how many seeds it is above 0.
    Nothing for fewer than three seeds that both have."""
    pairs = base.merge(part, on="seed", suffixes=("_base", ""))
    x = pairs[column] - pairs[f"{column}_base"]
    if len(x) < 3:
        return ""
    reach = t_quantile(0.975, len(x) - 1) * x.std() / len(x) ** 0.5
    return f"{x.mean():+.3f} [{x.mean() - reach:+.3f}, {x.mean() + reach:+.3f}], {(x > 0).sum()}/{len(x)}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *rows))
