"""Progress bars for training runs: one line each, with reward, KL and the time that remains."""

from collections.abc import Callable

from rich import progress as bars
from rich.console import Console


def progress_bars(console: Console) -> bars.Progress:
    """A progress display whose tasks have a `note`."""
    times = (bars.TimeRemainingColumn(compact=True, elapsed_when_finished=True),)
    name, note = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[note]}")
    return bars.Progress(name, bars.BarColumn(bar_width=10), bars.MofNCompleteColumn(), note, *times, console=console)


def show_update(progress: bars.Progress, bar: bars.TaskID) -> Callable[[dict], None]:
    """A callback for `train` that moves one bar and writes the latest metrics beside it."""

    def show(row: dict) -> None:
        gain = f"attained {row['attained']:.0%}" if "attained" in row else f"reward {row['reward']:+.2f}"
        progress.update(bar, completed=row["update"] + 1, note=f"{gain}  KL {row['kl']:.2f}")

    return show
