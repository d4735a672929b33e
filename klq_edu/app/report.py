"""What an experiment shows: a terminal table, completions before and after, and one self-contained report page."""

import base64
from pathlib import Path

import pandas as pd
from jinja2 import Template
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from klq_edu import figures
from klq_edu.app.experiment import Result, summarise_results
from klq_edu.figures import STYLES, Picture
from klq_edu.machine import facts
from klq_edu.rlhf.loop import METRICS
from klq_edu.worlds.world import World

PROMPTS_SHOWN = 3
COLUMNS = {  # heading -> columns of `summarise_results`; two columns are shown as before → after
    "test reward": ("test_before", "test_after"),
    "second opinion": ("judge_before", "judge_after"),
    "reward*": ("reward",),
    "KL* [nats]": ("kl",),
    "attained": ("attained",),
    "time [s]": ("seconds",),
}
DIGITS = {"attained": 3, "seconds": 0}


def results_table(results: list[Result]) -> pd.DataFrame:
    """One row of text per algorithm: the median over seeds, with [lowest, highest] where there are several."""
    summary = summarise_results(results).dropna(axis=1)
    shown = {heading: names for heading, names in COLUMNS.items() if set(names) <= set(summary)}
    rows = []
    for name, part in figures.in_order(summary, "algorithm", STYLES):
        cells = {heading: " → ".join(_interval(part[n]) for n in names) for heading, names in shown.items()}
        rows.append({"algorithm": STYLES[name][0]} | cells)
    return pd.DataFrame(rows)


def _interval(values: pd.Series) -> str:
    digits = DIGITS.get(values.name, 2)
    middle = f"{values.median():.{digits}f}"
    if len(values) == 1 or values.name.endswith("_before"):
        return middle
    return f"{middle} [{values.min():.{digits}f}, {values.max():.{digits}f}]"


def samples_table(results: list[Result]) -> list[dict]:
    """The first few test prompts with their completions by the reference and by each algorithm's first seed."""
    firsts, shown = {}, []
    for result in results:
        firsts.setdefault(result.variant, result)
    for i in range(PROMPTS_SHOWN):
        before = results[0].before.iloc[i]
        rows = [("reference", before)] + [(STYLES[name][0], r.after.iloc[i]) for name, r in firsts.items()]
        lines = [{"who": who, "completion": row["completion"], "reward": row["reward"]} for who, row in rows]
        shown.append({"prompt": before["prompt"], "lines": lines})
    return shown


def print_results(console: Console, world: World, results: list[Result]) -> None:
    """The results table and the completions, on the terminal."""
    data = results_table(results)
    caption = f"* mean over the last quarter of training. {_seeds(results)}"
    numbers = (Column(name, justify="right") for name in data.columns[1:])
    title = f"world {escape(world.name)}, {_scale(results)}"
    table = Table(Column("algorithm", no_wrap=True), *numbers, title=title, caption=caption)
    for row in data.itertuples(index=False):
        table.add_row(*row)
    console.print(table)
    for sample in samples_table(results):
        console.print(f"\n[bold]{escape(sample['prompt'])}[/] …")
        for line in sample["lines"]:
            text = " ".join(line["completion"].split())
            console.print(f"  {line['who']:<12} {line['reward']:+.2f}  {text}", markup=False, highlight=False)


def pictures(world: World, results: list[Result]) -> dict[str, tuple[str, Picture]]:
    """The report's figures: name -> (heading, picture)."""
    runs = pd.concat([r.table() for r in results], ignore_index=True)
    tau, exact = results[0].settings["tau"], world.tree is not None
    smooth = 1 if exact and runs["seed"].nunique() > 1 else 5
    curves = {"reward": "reward per completion", "kl": "KL(π ‖ reference) [nats]"}
    rising = "A good run's reward rises while its KL, the distance from the reference, levels off."
    best = figures.frontier(world.tree) if exact else None
    shown = {
        "curves": ("Reward and KL over training", figures.learning_curves(runs, curves, rising, smooth)),
        "plane": ("Reward against KL", figures.reward_kl_plane(runs, best, 1 if exact else smooth)),
    }
    if exact:
        shown["regret"] = ("Regret to the exact optimum", figures.regret_curves(runs, tau))
    shown["theory"] = ("KLQ beside PPO-penalty: what the theory predicts", figures.exact_steps())
    if exact and {"klq", "ppo_penalty"} <= set(runs["algorithm"]):
        pair = runs[runs["algorithm"].isin(["klq", "ppo_penalty"])]
        panels = {"attained": "improvement attained (exact)", "kl_old": "KL(π_old ‖ π) per token and update [nats]"}
        parting = (
            "The exact steps of the two are equal. What lets training part: actions are sampled, each batch is used "
            "for several epochs, and PPO-penalty's value loss has its own coefficient."
        )
        shown["pair"] = ("KLQ beside PPO-penalty: in training", figures.learning_curves(pair, panels, parting))
    return shown


def write(path: str | Path, world: World, results: list[Result]) -> Path:
    """Write the self-contained report page (no scripts, no links to other hosts) and return its path.

    Beside it go its figures as SVG files (figures/) and its table of numbers, one row per run (results.csv).
    """
    path, shown = Path(path), []
    (path.parent / "figures").mkdir(exist_ok=True)
    for name, (title, picture) in pictures(world, results).items():
        svg = path.parent / "figures" / f"{name}.svg"
        picture.figure.savefig(svg, metadata={"Date": None})
        src = "data:image/svg+xml;base64," + base64.b64encode(svg.read_bytes()).decode()
        shown.append({"title": title, "src": src, "caption": picture.caption, "alt": picture.alt})
    summarise_results(results).to_csv(path.parent / "results.csv", index=False)
    template = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"), autoescape=True)
    metrics = {k: v for k, v in (METRICS | world.metrics).items() if k in results[0].rows[-1]}
    page = template.render(
        world=world.name, scale=_scale(results), seeds=_seeds(results), table=results_table(results),
        samples=samples_table(results), figures=shown, metrics=metrics, machine=facts(results[0].settings["device"]),
        settings=[(STYLES[r.variant][0], r.settings) for r in results if r.settings["seed"] == 0],
        judge=world.judge_name,
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")
    return path


def _scale(results: list[Result]) -> str:
    s = results[0].settings
    return f"τ = {s['tau']:g}, {s['updates']} updates of {s['batch_size']} completions, {s['epochs']} epochs each"


def _seeds(results: list[Result]) -> str:
    count = len({r.settings["seed"] for r in results})
    several = f"Median over {count} seeds [lowest, highest]"
    return several if count > 1 else "One seed: no error bars, so small differences mean nothing"
