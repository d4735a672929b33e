"""Experiments on the terminal: a progress bar each, with reward, KL and the time that remains, then their table."""

from pathlib import Path

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from klq_edu.app.experiment import Result, run_experiment
from klq_edu.app.report import results_table, samples_table, scale, seeds
from klq_edu.figures import STYLES
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds import load
from klq_edu.worlds.registry import variant_of
from klq_edu.worlds.world import World

COLUMNS = (
    bars.TextColumn("{task.description}"), bars.BarColumn(bar_width=10), bars.MofNCompleteColumn(),
    bars.TextColumn("{task.fields[note]}"), bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
)  # fmt: skip


def run_all(console: Console, name: str, experiments: dict[Path, TrainConfig]) -> tuple[World, list[Result]]:
    """The world of this name and the results of all experiments (folder -> settings): run what is missing, print."""
    with console.status(f"loading the world {name} (the first time takes up to half a minute longer)"):
        world = load(name)
    results, tasks = [], []
    with bars.Progress(*COLUMNS, console=console) as progress:
        for settings in experiments.values():
            what = f"{STYLES[variant_of(settings.to_dict())][0]} seed {settings.seed}"
            tasks.append(progress.add_task(what, total=settings.updates, note="", start=False))
        for task, (folder, settings) in zip(tasks, experiments.items()):

            def show_update(row: dict, task=task) -> None:
                gain = f"attained {row['attained']:.0%}" if "attained" in row else f"reward {row['reward']:+.2f}"
                progress.update(task, completed=row["update"] + 1, note=f"{gain}  KL {row['kl']:.2f}")

            progress.start_task(task)
            results.append(run_experiment(world, settings, folder, show_update))
            progress.update(task, completed=settings.updates)
    print_results(console, world, results)
    return world, results


def print_results(console: Console, world: World, results: list[Result]) -> None:
    """The results table and the completions, on the terminal."""
    data = results_table(results)
    caption = f"* mean over the last quarter of training. {seeds(results)}"
    numbers = (Column(escape(name), justify="right") for name in data.columns[1:])
    title = f"world {escape(world.name)}, {scale(results)}"
    table = Table(Column("algorithm", no_wrap=True), *numbers, title=title, caption=caption)
    for row in data.itertuples(index=False):
        table.add_row(*row)
    console.print(table)
    for prompt, lines in samples_table(results):
        console.print(f"\n[bold]{escape(prompt)}[/] …")
        for who, text, reward in lines:
            console.print(f"  {who:<12} {reward:+.2f}  {' '.join(text.split())}", markup=False, highlight=False)
