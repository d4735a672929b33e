"""What the files of `klq compare` say, as Markdown tables and figures.

Algorithms are paired by seed. Of few seeds the intervals hold the truth less often than in 95 % (notebook 13), so in
how many seeds a difference is positive stands beside them.
"""

from collections.abc import Iterable
from itertools import groupby, pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd

from klq_edu import figures
from klq_edu.app import comparison
from klq_edu.app.experiment import Result, scores
from klq_edu.figures import STYLES
from klq_edu.rlhf.judge import preferred
from klq_edu.rlhf.power import seeds_needed

RUNS = "runs.csv"  # of the folder of a world: a row per run
SETTING = ["tau", "changes"]
Z_POWER = 1.96 + 0.84  # standard errors that a difference has, if it is seen at 95 % with power 0.8
INDEPENDENT = ("MiniLM", "TextBlob")  # judges that had no part in making the reward
LEGEND = """Held-out prompts throughout. Brackets: 95 % intervals, of one seed over its prompts, of several over
seeds, then prompts; behind them, in how many seeds a difference is positive. A row has the seeds that both sides have,
so rows of different seeds do not add up. The reference is the policy that RL starts from. *At the same KL*: the run
that went further is taken where it had gone as far as the other in the end, linearly between its tests. *sd of a seed*:
the scatter beyond what prompts explain. *shown from*: the distance from ½ that so many seeds and prompts show at 95 %
with power 0.8. *Alone*: the win-rate before a judge who looks at nothing else and leans as this one does.

"""
HEADS = {"J": "J = reward − τ KL", "kl": "KL [nats]", "length": "tokens", "ended": "finished"}


def read(folder: Path) -> list[Result]:
    """All runs in the folder of a world, by τ, algorithm and seed. ValueError if reward models differ."""
    found = []
    runs = pd.read_csv(folder / RUNS, keep_default_na=False, dtype={"reward_model": str})
    runs = runs.sort_values([*SETTING, "algorithm", "seed"])
    check_reward(folder, runs["reward_model"])
    for run in runs.to_dict("records"):
        table = pd.read_csv(folder / f"{run['run']}.csv")
        tests = {n: part.drop(columns="update").reset_index(drop=True) for n, part in table.groupby("update")}
        settings = run | {"algorithm": run["algorithm"].removesuffix("_whitened")}
        found.append(Result(settings, [], tests))
    return found


def check_reward(folder: Path, digests: Iterable[str]) -> None:
    """ValueError if they are not all the same: scores of different reward models say nothing of each other."""
    if len(found := set(digests)) > 1:
        raise ValueError(f"{folder} must hold runs for one reward model, got {sorted(found)}: choose another --out")


def write(folder: Path) -> str:
    """Write all tables (.md) and figures (.svg) beside the folder; returns the tables."""
    results = read(folder)
    parts = {
        "KLQ and PPO-clip": summary({folder.name: results}),
        "Differences at the same τ": differences(results),
        "Differences at the same KL": matched(results),
        "Win-rates of KLQ": verdicts(results),
        "What a judge's leaning would have made of it": leanings(results),
    }
    text = LEGEND + "\n\n".join(f"#### {title}\n\n{table}" for title, table in parts.items() if table)
    folder.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    paths = figures.gains_along_kl(comparison.along(results))
    paths.figure.savefig(f"{folder}.svg", metadata={"Date": None})
    return text


def summary(worlds: dict[str, list[Result]]) -> str:
    """KLQ beside PPO-clip, by world and setting: what each gains of the objective over the reference, KLQ's objective,
    reward and KL less PPO-clip's, reward where both have gone equally far (see `matched`), and KLQ's win-rates before
    the gold and the judge that had no part."""
    rows = []
    for world, results in worlds.items():
        for setting, part in by_setting(results):
            found = {(name, rival): runs for name, rival, runs in comparison.opponents(part)}
            if runs := found.get(("klq", "ppo_clip")):
                judges = [judge for judge in comparison.judges_of(part) if judge in ("gold", *INDEPENDENT)]
                rows.append([world, setting, f"{len(runs)}", *_beside(runs, judges)])
    heads = ["world", "τ", "seeds", "J, KLQ − reference", "J, PPO-clip − reference", "J, KLQ − PPO-clip"]
    heads += ["Δ reward", "Δ KL [nats]", "Δ reward at the same KL", "KLQ wins, gold", "KLQ wins, MiniLM or TextBlob"]
    return comparison.table(heads, rows) if rows else ""


def _beside(runs: list[tuple[Result, Result]], judges: list[str]) -> list[str]:
    """The cells of `summary` for runs of both with the same seeds."""
    tau, pairs = runs[0][0].settings["tau"], [(a.after, b.after) for a, b in runs]
    cells = [_difference([(run.after, run.before) for run in side], "J", tau) for side in zip(*runs)]
    cells += [_difference(pairs, column, tau) for column in ("J", "reward", "kl")]
    rates = (np.clip(comparison.mean_interval(_won(pairs, judge)), 0, 1) for judge in judges)
    return [*cells, _difference(_meeting(runs), "reward"), *("{:.3f} [{:.3f}, {:.3f}]".format(*r) for r in rates)]


def by_setting(results: list[Result]) -> list[tuple[str, list[Result]]]:
    """The runs of each τ and whatever else was changed."""
    return [(setting, list(part)) for setting, part in groupby(results, comparison.setting_of)]


def differences(results: list[Result]) -> str:
    """Each algorithm less the reference it started from, any two of the same seeds: what they maximised, KL,
    scores, length, finishing."""
    columns = ["J", "kl", *comparison.judges_of(results), "length", "ended"]
    rows = []
    for setting, part in by_setting(results):
        for name, rival, pairs in comparison.compared(part):
            cells = [_difference(pairs, column, part[0].settings["tau"]) for column in columns]
            rows.append([setting, _label(name), _label(rival), f"{len(pairs)}", *cells])
    heads = ["τ", "policy", "minus", "seeds", *(HEADS.get(c, c) for c in columns)]
    return comparison.table(heads, rows)


def matched(results: list[Result]) -> str:
    """Any two algorithms where both have gone equally far from the reference: in each seed, as far as the one that
    went less far in the end. The other is taken earlier in its training (`at_kl`), so this compares paths, not what
    came out at the end."""
    columns, rows = comparison.judges_of(results), []
    for setting, part in by_setting(results):
        for name, rival, runs in comparison.opponents(part):
            if rival is None:
                continue
            pairs = _meeting(runs)
            reach = np.mean([min(x["kl"].mean() for x in pair) for pair in pairs])
            cells = [_difference(pairs, column) for column in columns]
            rows.append([setting, _label(name), _label(rival), f"{len(pairs)}", f"{reach:.2f}", *cells])
    return comparison.table(["τ", "policy", "minus", "seeds", "at a KL of", *columns], rows) if rows else ""


def _meeting(runs: list[tuple[Result, Result]]) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Test samples of both where they have gone as far as the one that went less far in the end."""
    reach = [min(a.after["kl"].mean(), b.after["kl"].mean()) for a, b in runs]
    return [(at_kl(a, kl), at_kl(b, kl)) for (a, b), kl in zip(runs, reach)]


def at_kl(run: Result, kl: float) -> pd.DataFrame:
    """A run's test samples where its mean KL passed this value last: between two tests, the mixture of both that has
    this mean (what a policy gets that follows the one or the other, drawn anew for each prompt)."""
    tests = list(run.tests.values())
    means = [table["kl"].mean() for table in tests]
    passed = [i for i, (x, y) in enumerate(pairwise(means)) if min(x, y) <= kl <= max(x, y) and x != y]
    if not passed:
        return tests[-1]
    early, late = tests[passed[-1]], tests[passed[-1] + 1]
    share = (kl - early["kl"].mean()) / (late["kl"].mean() - early["kl"].mean())
    parts = (table.drop(columns="prompt").astype(float) * w for table, w in ((early, 1 - share), (late, share)))
    return sum(parts).assign(prompt=late["prompt"])


def verdicts(results: list[Result]) -> str:
    """KLQ's win-rates against its rivals before reward and judges, how much single seeds scatter beyond their prompts,
    the smallest difference from ½ that so many seeds and prompts show with power 0.8, and the seeds it would take to
    show the one found."""
    rows = []
    for setting, part in by_setting(results):
        found = comparison.verdicts(part)
        for (name, rival, pairs), judge in product(comparison.compared(part), comparison.judges_of(part)):
            if name != "klq" or rival is None or len(pairs) < 2:
                continue
            won = _won(pairs, judge)
            one = found[(found["judge"] == judge) & (found["a"] == "KLQ") & (found["b"] == _label(rival))].iloc[0]
            noise = np.mean([w.var() / len(w) for w in won])
            sd = max(0.0, np.var([w.mean() for w in won], ddof=1) - noise) ** 0.5
            seen = Z_POWER * (one["high"] - one["low"]) / 2 / 1.96
            needed = seeds_needed(one["rate"] - 0.5, sd, len(won[0]))
            cells = [f"{one['rate']:.3f} [{one['low']:.3f}, {one['high']:.3f}]", f"{sd:.3f}", f"±{seen:.3f}"]
            cells += [f"{needed:,.0f}" if needed < 1e6 else "–"]
            rows.append([setting, _label(rival), judge, f"{len(pairs)}", *cells])
    heads = ["τ", "against", "judge", "seeds", "win-rate", "sd of a seed", "shown from", "seeds for the one found"]
    return comparison.table(heads, rows) if rows else ""


def leanings(results: list[Result]) -> str:
    """KLQ's win-rate against PPO-clip as found, and as a judge would give it who looks at nothing but length (or at
    what is copied) and leans to it as much as this one does."""
    rows = []
    for setting, part in by_setting(results):
        pairs = [p for name, rival, found in comparison.compared(part) if rival == "ppo_clip" for p in found]
        if not pairs:
            continue
        leaning = comparison.leanings(part).set_index("judge")
        for judge in comparison.judges_of(part):
            rate = np.mean([preferred(a[judge], b[judge]).mean() for a, b in pairs])
            cells = [f"{rate:.3f}"]
            for name, column in comparison.MARKS.items():
                lean, more = (
                    leaning.loc[judge, name],
                    np.mean([preferred(a[column], b[column]).mean() for a, b in pairs]),
                )
                found = [f"{lean:.2f}", f"{0.5 + (2 * lean - 1) * (more - 0.5):.3f}"]
                cells += ["–", "–"] if np.isnan(lean) else found
            rows.append([setting, judge, *cells])
    heads = ["τ", "judge", "win-rate", "leans to the longer", "length alone", "to the more copied", "copying alone"]
    return comparison.table(heads, rows) if rows else ""


def _difference(pairs: list[tuple[pd.DataFrame, pd.DataFrame]], column: str, tau: float = 0.0) -> str:
    """The first minus the second, by seed: mean [95 % interval], and of several seeds in how many it is positive."""
    found = [(scores(a, column, tau) - scores(b, column, tau)).groupby(a["prompt"]).mean() for a, b in pairs]
    positive = f", {sum(x.mean() > 0 for x in found)}/{len(found)}" if len(found) > 1 else ""
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*comparison.mean_interval(found)) + positive


def _won(pairs: list[tuple[pd.DataFrame, pd.DataFrame]], judge: str) -> list[pd.Series]:
    """How often the first wins before this judge, by seed: a value per prompt."""
    return [preferred(a[judge], b[judge]).groupby(a["prompt"]).mean() for a, b in pairs]


def _label(name: str | None) -> str:
    return "reference" if name is None else STYLES[name]["label"]
