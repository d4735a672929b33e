"""Progress bars for training runs: one line each, with reward, KL and the time that remains."""

from collections.abc import Callable

from rich import progress as bars
from rich.console import Console


def progress_bars(console: Console) -> bars.Progress:
    """A progress display whose tasks have a `note`."""
    times = (bars.TimeElapsedColumn(), bars.TextColumn("left"), bars.TimeRemainingColumn(compact=True))
    name, note = bars.TextColumn("{task.description}"), bars.TextColumn("{task.fields[note]}")
    return bars.Progress(name, bars.BarColumn(bar_width=10), bars.MofNCompleteColumn(), note, *times, console=console)


def show_update(progress: bars.Progress, bar: bars.TaskID) -> Callable[[dict], None]:
    """A callback for `train` that moves one bar and writes the latest metrics beside it."""

    def show(row: dict) -> None:
        note = f"reward {row['reward']:+.2f}  KL {row['kl']:.2f}"
        if "attained" in row:
            note += f"  attained {row['attained']:.0%}"
        progress.update(bar, completed=row["update"] + 1, note=note)

    return show
