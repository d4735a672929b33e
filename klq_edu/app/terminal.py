"""Experiments on the terminal: a progress bar each, with reward, KL and the time that remains, then their table."""

from functools import partial
from pathlib import Path

from rich import progress as bars
from rich.console import Console

from klq_edu.app.experiment import Result, run_experiment
from klq_edu.app.report import print_results
from klq_edu.figures import STYLES
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds import load
from klq_edu.worlds.registry import variant_of
from klq_edu.worlds.world import World


def run_all(console: Console, name: str, experiments: dict[Path, TrainConfig]) -> tuple[World, list[Result]]:
    """The world of this name and the results of all experiments (folder -> settings): run what is missing, print."""
    with console.status(f"loading the world {name} (the first time takes up to half a minute longer)"):
        world = load(name)
    results, tasks = [], []
    with progress_bars(console) as progress:
        for settings in experiments.values():
            what = f"{STYLES[variant_of(settings.to_dict())][0]} seed {settings.seed}"
            tasks.append(progress.add_task(what, total=settings.updates, note="", start=False))
        for task, (folder, settings) in zip(tasks, experiments.items()):
            progress.start_task(task)
            results.append(run_experiment(world, settings, folder, partial(show_update, progress, task)))
            progress.update(task, completed=settings.updates)
    print_results(console, world, results)
    return world, results


def show_update(progress: bars.Progress, task: bars.TaskID, row: dict) -> None:
    """Move one bar and write the latest metrics beside it."""
    gain = f"attained {row['attained']:.0%}" if "attained" in row else f"reward {row['reward']:+.2f}"
    progress.update(task, completed=row["update"] + 1, note=f"{gain}  KL {row['kl']:.2f}")


def progress_bars(console: Console) -> bars.Progress:
    """A progress display whose tasks have a `note`."""
    times = (bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),)
    name, note = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[note]}")
    return bars.Progress(name, bars.BarColumn(bar_width=10), bars.MofNCompleteColumn(), note, *times, console=console)
