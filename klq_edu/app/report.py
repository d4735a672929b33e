"""What experiments show: progress, a table and completions on the terminal, and a self-contained page with figures."""

import base64
import shutil
from itertools import repeat
from pathlib import Path
from random import Random
from typing import NamedTuple

import pandas as pd
from jinja2 import Template
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from klq_edu import figures
from klq_edu.app import comparison
from klq_edu.app.experiment import SAMPLES_FILE, Result, run_experiment, summarise_results
from klq_edu.figures import STYLES, Picture
from klq_edu.files import write_provenance
from klq_edu.machine import facts
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.judge import bootstrap_interval
from klq_edu.rlhf.loop import METRICS
from klq_edu.worlds import load
from klq_edu.worlds.registry import variant_of
from klq_edu.worlds.world import World

PROMPTS_SHOWN = 3
LEANING = "Of the pairs that differ in it, the share where the judge prefers the longer, or more copied, one; ½: none."
WHO = {  # what has to be said of a judge
    "reward": "the reward is what was maximised",
    "gold": "the gold labelled the pairs that the reward was learnt from",
    "SmolLM2": "SmolLM2 is the frozen base model, with which gold and reward model read too",
    "MiniLM": "MiniLM had no part in anything",
    "TextBlob": "TextBlob had no part in anything",
}
TESTED = {"kl": "KL to the reference, in nats", "length": "tokens", "ended": "share that ended by itself"}
TESTED |= {"copied": "share of word triples from the prompt", "reward": "reward"}
TEST = {"J": "test reward − τ KL", "reward": "test reward", "kl": "test KL [nats]", "length": "tokens"}
TEST |= {"ended": "share ended", "copied": "share copied"}
LOGGED = {"reward*": "reward", "KL* [nats]": "kl", "attained": "attained", "time [s]": "seconds"}
DIGITS = {"attained": 3, "seconds": 0, "length_before": 1, "length_after": 1}
BARS = (
    bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=10), bars.MofNCompleteColumn(),
    bars.TextColumn("{task.fields[note]}"), bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
)  # fmt: skip


def run_all(
    name: str, experiments: dict[Path, TrainConfig], remake: str | None = None
) -> tuple[World, list[Result]]:  # fmt: skip
    """The world of this name and the results of all experiments (folder -> settings): run what is missing, and all from
    the stage `remake` on; print."""
    print(f"loading the world {name}; what it needs is made the first time", flush=True)
    world = load(name, remake)
    for folder in experiments if remake else ():
        forget(folder, judged_only=remake == "judge")
    return world, run_in(world, experiments)


def run_in(world: World, experiments: dict[Path, TrainConfig]) -> list[Result]:
    """The results of all experiments in this world (folder -> settings): run what is missing, print."""
    console = Console()
    results, tasks = [], []
    with bars.Progress(*BARS, console=console) as progress:
        for settings in experiments.values():
            what = f"{STYLES[variant_of(settings.to_dict())]['label']} seed {settings.seed}"
            tasks.append(progress.add_task(what, total=settings.updates, note="", start=False))
        for task, (folder, settings) in zip(tasks, experiments.items()):

            def show_update(row: dict, task=task) -> None:
                gain = f"attained {row['attained']:.0%}" if "attained" in row else f"reward {row['reward']:+.2f}"
                progress.update(task, completed=row["update"] + 1, note=f"{gain}  KL {row['kl']:.2f}")

            progress.start_task(task)
            results.append(run_experiment(world, settings, folder, show_update))
            progress.update(task, completed=settings.updates)
    print_results(console, world, results)
    return results


def forget(folder: Path, judged_only: bool) -> None:
    """Remove a run, or only its test samples and what judges said of them."""
    if judged_only:
        (folder / SAMPLES_FILE).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def print_results(console: Console, world: World, results: list[Result]) -> None:
    """The results table and the completions, on the terminal."""
    caption = f"* mean over the last quarter of training. {seeds(results)}"
    print_table(console, results_table(results), f"world {world.name}, {scale(results)}", caption)
    rates = comparison.verdicts(results) if world.judges else None
    for part in (*made_of(world), *judged(world, results, rates)):
        if part.table is not None:
            print_table(console, part.table, part.title, part.remark)
    for prompt, lines in samples_table(results):
        console.print(f"\n[bold]{escape(prompt)}[/] …")
        for who, text, reward in lines:
            console.print(f"  {who:<12} {reward:+.2f}  {' '.join(text.split())}", markup=False, highlight=False)


def print_table(console: Console, data: pd.DataFrame, title: str, caption: str) -> None:
    """A table of text, numbers to the right."""
    numbers = (Column(escape(name), justify="right") for name in data.columns[1:])
    table = Table(Column(data.columns[0], no_wrap=True), *numbers, title=escape(title), caption=escape(caption))
    for row in data.itertuples(index=False):
        table.add_row(*(escape(str(cell)) for cell in row))
    console.print(table)


def results_table(results: list[Result]) -> pd.DataFrame:
    """A column of text per algorithm: the median over seeds, with [lowest, highest] where there are several."""
    summary = summarise_results(results).dropna(axis=1)
    tested = [name.removesuffix("_after") for name in summary if name.endswith("_after")]
    tested = sorted(tested, key=lambda name: (name != "J", name in comparison.SAMPLED))  # scores first
    shown = {TEST.get(name, name): (f"{name}_before", f"{name}_after") for name in tested}
    shown |= {heading: (name,) for heading, name in LOGGED.items() if name in summary}
    table = {"": list(shown)}
    for name, part in figures.in_order(summary, "algorithm", STYLES):
        table[STYLES[name]["label"]] = [" → ".join(_interval(part[n]) for n in names) for names in shown.values()]
    return pd.DataFrame(table)


def _interval(values: pd.Series) -> str:
    middle, low, high = (f"{values.quantile(q):.{DIGITS.get(values.name, 2)}f}" for q in (0.5, 0, 1))
    return middle if len(values) == 1 or values.name.endswith("_before") else f"{middle} [{low}, {high}]"


def samples_table(results: list[Result]) -> list[tuple[str, list[tuple]]]:
    """(prompt, lines) of a few test prompts, drawn by lot: (who, completion, reward) of reference and first seeds."""
    tables = {"reference": results[0].before}
    for r in results:
        tables.setdefault(STYLES[r.labels["algorithm"]]["label"], r.after)
    prompts = results[0].before["prompt"]
    drawn = sorted(Random(0).sample(range(prompts.nunique()), min(PROMPTS_SHOWN, prompts.nunique())))
    columns = (zip(repeat(who), t["completion"][drawn], t["reward"][drawn]) for who, t in tables.items())
    return list(zip(prompts[drawn], zip(*columns)))


class Section(NamedTuple):
    """A part of the report: what to see in its table of text or its picture, or both."""

    title: str
    remark: str
    table: pd.DataFrame | None = None
    picture: Picture | None = None
    name: str = ""  # of the picture's file


def sections(world: World, results: list[Result], rates: pd.DataFrame | None) -> list[Section]:
    """The report in the order of what was done; `rates` are the verdicts, where the world has judges."""
    return [*made_of(world), *trained(world, results), *judged(world, results, rates), *theory(results)]


def made_of(world: World) -> list[Section]:
    """How reference and reward were made, where they were learnt."""
    tables, found = world.tables, []
    if "stages" in tables:
        samples, pairs = tables["samples"], tables["held_out_pairs"]
        each = len(samples) // samples["prompt"].nunique()
        counts = {"prompts to train on": len(world.prompts), "held out": len(world.test_prompts)}
        counts |= {"samples of each": each, "pairs to test the reward model on": len(pairs)}
        table = pd.DataFrame([counts]).astype(str).rename_axis("data")
        found.append(Section("The data", f"One of the prompts: “{world.prompts[0]['prompt'].strip()}”", table))
        remark = "Made once, kept in the cache with a manifest each; the digest is of what came out."
        found.append(Section("Stages before RL", remark, tables["stages"].astype(str)))
    if "loss" in tables:
        losses = tables["loss"][["epoch", "loss", "held_out"]].rename(columns={"held_out": "held-out loss"})
        losses = losses.map(lambda x: "" if pd.isna(x) else f"{x:.3f}" if x % 1 else f"{x:.0f}")
        remark = (
            "Loss of the reference completions in nats per token; those held out are never trained on, and are the "
            "{held_out_texts:.0f} of {of:.0f} that the policy's vocabulary can write."
        ).format(**tables["loss"].iloc[0])
        found.append(Section("Fine-tuning", remark, losses))
    if "held_out_pairs" in tables:
        pairs = tables["held_out_pairs"]
        remark = "The reward model on pairs of prompts that it was not fitted to; the interval is over prompts."
        picture = figures.calibration(pairs)
        found.append(Section("Pairs and reward model", remark, agreement(pairs), picture, "calibration"))
    if "trials" in tables:
        cells = tables["trials"]["score"].map("{:.2f}".format) + tables["trials"]["loses"].map(" ({:.0%})".format)
        table = tables["trials"].assign(cell=cells).pivot(index="kind", columns="judge", values="cell")
        table = table.loc[tables["trials"]["kind"].unique()].reset_index()
        remark = "Mean score of each kind of completion (share of prompts where it loses against the reference text)."
        found.append(Section("What gold, judges and reward model say of hacks", remark, table))
    return found


def trained(world: World, results: list[Result]) -> list[Section]:
    """What happened in training."""
    runs = pd.concat([pd.DataFrame(r.rows).assign(**r.labels) for r in results], ignore_index=True)
    smooth = 1 if world.tree and runs["seed"].nunique() > 1 else 5
    curves = {"reward": "reward per completion", "kl": "KL(π ‖ reference) [nats]"}
    rising = "A good run's reward rises while its KL, the distance from the reference, levels off."
    plane = (figures.frontier(world.tree), 1) if world.tree else (None, smooth)
    shown = {
        "curves": ("Reward and KL over training", figures.learning_curves(runs, curves, rising, smooth)),
        "plane": ("Reward against KL", figures.reward_kl_plane(runs, *plane)),
    }
    if world.tree:
        picture = figures.optimum_curves(runs, results[0].settings["tau"])
        shown["optimum"] = ("Distance to the exact optimum", picture)
    return [Section(title, "", None, picture, name) for name, (title, picture) in shown.items()]


def judged(world: World, results: list[Result], rates: pd.DataFrame | None) -> list[Section]:
    """What reward and judges say of held-out completions."""
    if rates is None:
        return []
    paths = figures.gains_along_kl(comparison.along(results))
    wins, gains = by_judge(rates, "rate", "low", "high"), by_judge(rates, "gain", "gain_low", "gain_high")
    remark = (
        "Share of held-out prompts where the first is better, ties counting half, both drawn with the same random "
        f"numbers. {spread_of(rates)} {judged_by(rates)}"
    )
    leanings = comparison.leanings(results).set_index("judge").map("{:.2f}".format).replace("nan", "–").reset_index()
    differences = f"Mean score of the first minus that of the second, in each judge's own unit. {spread_of(rates)}"
    return [
        Section("Reward and judges against KL, on held-out prompts", "", None, paths, "gains"),
        Section("Win-rates", remark, wins, figures.win_rates(rates), "judges"),
        Section("Differences in score", differences, gains),
        Section("What judges lean to", LEANING, leanings),
    ]


def theory(results: list[Result]) -> list[Section]:
    """KLQ beside PPO-penalty, exactly, and as both were trained where they were."""
    found = [Section("KLQ beside PPO-penalty: what the theory predicts", "", None, figures.exact_steps(), "theory")]
    runs = pd.concat([pd.DataFrame(r.rows).assign(**r.labels) for r in results], ignore_index=True)
    pair = runs[runs["algorithm"].isin(["klq", "ppo_penalty"])]
    if "attained" in pair and pair["algorithm"].nunique() == 2:
        panels = {"attained": "improvement attained (exact)", "kl_old": "KL(π_old ‖ π) per token and update [nats]"}
        parting = (
            "The exact steps of the two are equal. What lets training part: actions are sampled, some by earlier "
            "policies, each batch is used for several epochs, and PPO-penalty's value loss has its own coefficient."
        )
        picture = figures.learning_curves(pair, panels, parting)
        found.append(Section("KLQ beside PPO-penalty: in training", "", None, picture, "pair"))
    return found


def write_report(path: Path, world: World, results: list[Result]) -> Path:
    """Write the self-contained report page (no scripts, no links to other hosts) and return its path; its figures
    (SVG), its numbers (results.csv, one row per run, and a file per table) and where they come from go beside it."""
    folder, images, first = path.parent / "figures", {}, results[0].settings
    folder.mkdir(exist_ok=True)
    rates = comparison.verdicts(results) if world.judges else None
    parts = sections(world, results, rates)
    for name, picture in ((part.name, part.picture) for part in parts if part.picture):
        picture.figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        images[name] = base64.b64encode((folder / f"{name}.svg").read_bytes()).decode()
    verdicts = {} if rates is None else {"win_rates": rates, "leanings": comparison.leanings(results)}
    for name, made in ({"results": summarise_results(results)} | world.tables | verdicts).items():
        made.to_csv(path.parent / f"{name}.csv", index=False)
    write_provenance(path.parent / "results.csv", first["device"], **{"settings of the first run": first})
    tested = TESTED | {name: f"score before the judge {name}" for name in world.judges}
    tested = {f"test_{k}": f"mean over held-out completions: {v}" for k, v in tested.items()}
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"), autoescape=True)
    page = template.render(
        world=world, scale=scale(results), seeds=seeds(results), table=results_table(results), sections=parts,
        samples=samples_table(results), images=images, machine=facts(first["device"]),
        metrics={k: v for k, v in (METRICS | world.metrics | tested).items() if k in results[0].rows[-1]},
        settings=[(STYLES[r.labels["algorithm"]]['label'], r.settings) for r in results if r.labels["seed"] == 0],
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")
    return path


def spread_of(rates: pd.DataFrame) -> str:
    """What the intervals of verdicts are about."""
    one = "95 % intervals are over prompts: they are about these policies, not about the algorithms."
    return one if rates["seeds"].max() == 1 else "95 % intervals are over seeds of training and prompts."


def judged_by(rates: pd.DataFrame) -> str:
    """Who the judges are, in a sentence."""
    said = "; ".join(WHO[name] for name in rates["judge"].unique() if name in WHO)
    return f"{said[:1].upper()}{said[1:]}."


def agreement(pairs: pd.DataFrame) -> pd.DataFrame:
    """How often the reward model, the labels and the gold agree about pairs; one row of text."""
    agrees = (pairs["proxy"] > 0).groupby(pairs["prompt"]).mean()
    low, high = bootstrap_interval(agrees)
    row = {"pairs": len(pairs), "prompts": len(agrees), "agrees with labels": f"{agrees.mean():.2f}"}
    row |= {"95 % interval": f"[{low:.2f}, {high:.2f}]"}
    told = pairs[pairs["gold"] != 0]  # the gold has no opinion of the others
    row |= {"with the gold": f"{((told['proxy'] > 0) == (told['gold'] > 0)).mean():.2f}"}
    return pd.DataFrame([row | {"labels with the gold": f"{(told['gold'] > 0).mean():.2f}"}])


def by_judge(rates: pd.DataFrame, middle: str, low: str, high: str) -> pd.DataFrame:
    """A row of text per comparison, a column per judge: middle [low, high]."""
    cells = rates.apply(lambda r: f"{r[middle]:.2f} [{r[low]:.2f}, {r[high]:.2f}]", axis=1)
    table = rates.assign(cell=cells, pair=rates["a"] + " against " + rates["b"])
    table = table.pivot(index="pair", columns="judge", values="cell").loc[table["pair"].unique()]
    return table[rates["judge"].unique()].reset_index()


def scale(results: list[Result]) -> str:
    """How much was trained, and at which τ."""
    s = results[0].settings
    tau = f"τ = {s['tau']:g}" + (f" (cooled from {s['tau_start']:g})" if (s["tau_start"] or 0) > s["tau"] else "")
    batch = f"{s['batch_size']} completions" + (f" and {s['replay']} earlier ones" if s["replay"] else "")
    return f"{tau}, {s['updates']} updates of {batch}, {s['epochs']} epochs each"


def seeds(results: list[Result]) -> str:
    """What the numbers are medians of, or that they are not."""
    count = len({r.labels["seed"] for r in results})
    several = f"Median over {count} seeds [lowest, highest]"
    return several if count > 1 else "One seed: no error bars over seeds, so small differences mean nothing"
