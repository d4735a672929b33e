"""`klq bench`: fused versus naive, with a peer, as a table, a CSV with provenance, and a figure."""

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from klq_edu import figures
from klq_edu.bench.config import BenchConfig, Size
from klq_edu.bench.measure import measure_point
from klq_edu.bench.workloads import WORKLOADS, contenders
from klq_edu.files import writable_folder, write_provenance
from klq_edu.machine import resolve_device

METHOD = (
    "Contenders take turns; every repetition lies between two products hidden[N, H] @ weight[V, H].T, and units are "
    "its time over their mean; what takes less than 20 ms is run until it has taken that long, and the mean counts. "
    "Medians over repetitions, with the lowest and highest. Peak memory: forward and backward pass beyond the inputs, "
    "on a GPU by torch's allocator, else in a fresh process. Errors: against float64, on 64 rows spread over the batch."
)
NOTE = (
    "fwd, bwd, both: median time [lowest, highest] of forward and backward pass in units of one N×H×V matrix product; "
    "limit: the products that cannot be avoided; ratio: time over naive's; MB: peak memory beyond the inputs; "
    "error: of the worst output/of the worst gradient, against float64."
)


def run_bench(config: BenchConfig) -> Path:
    """Measure everything and write it; returns the CSV's path. Ctrl-C or an error loses nothing measured."""
    console, device, rows = Console(), str(resolve_device(config.device)), []
    path = writable_folder(config.out) / f"{config.name}.csv"
    jobs = [(n, s, contenders(n, device, config.compile)) for n, s in config.points()]
    try:
        with Progress(console=console, transient=True) as progress:
            say = partial(progress.console.print, markup=False)
            bar = progress.add_task("", total=sum(len(everyone) * (config.reps + 2) for *_, everyone in jobs))
            for name, size, everyone in jobs:
                progress.update(bar, description=f"{name} {size}")
                tick = partial(progress.advance, bar)
                rows += measure_point(name, size, everyone, config, device, say, tick)
                write(path, rows, config, device)
    finally:
        if rows:
            print_tables(console, path)
            draw(path)
            console.print(f"\n[bold]{path}[/]")
    return path


def write(path: Path, rows: list[dict], config: BenchConfig, device: str) -> None:
    """The CSV, one row per workload, size, contender and stage, and the JSON that says where it comes from."""
    pd.DataFrame(rows).to_csv(path, index=False)
    about = {"settings": {name: str(value) for name, value in asdict(config).items()}, "method": METHOD}
    write_provenance(path, device, **about, threads=torch.get_num_threads())


def print_tables(console: Console, path: Path) -> None:
    """One table per workload and size, one line per contender; under it, what those compute that don't do the same."""
    look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    headings = ("fwd", "bwd", "both", "limit", "ratio", "MB", "error")
    points = pd.read_csv(path).groupby(["workload", *Size._fields], sort=False, dropna=False)
    for (workload, *axes, dtype), part in points:
        size = Size(*(int(value) if value > 0 else None for value in axes), dtype)
        others = part[part["computes"] != "the same"].drop_duplicates("contender")
        caption = "\n".join(f"{row.contender} computes {row.computes}" for row in others.itertuples())
        columns = Column("contender", overflow="fold"), *(Column(h, justify="right", no_wrap=True) for h in headings)
        table = Table(*columns, title=f"{workload}: {WORKLOADS[workload].title}\n{size}", caption=caption, **look)
        for name, stages in part.groupby("contender", sort=False):
            table.add_row(name, *cells(stages.set_index("stage")))
        console.print(table)
    console.print(NOTE, markup=False, highlight=False)


def cells(stages: pd.DataFrame) -> list[str]:
    """The numbers of one contender as text, from its rows of the CSV (index: stage; the last one is the whole)."""
    whole, several = stages.iloc[-1], len(stages) > 1
    what, scale, unit = ("seconds", 1000, " ms") if math.isnan(whole["units"]) else ("units", 1, "")
    parts = [_text(stages["units"][stage], ".2f") if several else "" for stage in ("forward", "backward")]
    middle, low, high = (scale * whole[what + end] for end in ("", "_low", "_high"))
    wrong = whole.filter(like="error_").drop("error_gradient", errors="ignore").max(), whole.get("error_gradient")
    rest = [_text(whole[key], form) for key, form in (("limit", ".0f"), ("vs_naive", ".2f"), ("memory_mb", ",.0f"))]
    both = f"{middle:.3g} [{low:.3g}, {high:.3g}]{unit}"
    return [*parts, both, *rest, "/".join(_text(x, ".0e") for x in wrong if pd.notna(x))]


def _text(x: float, form: str) -> str:
    return "" if math.isnan(x) else format(x, form)


def draw(path: Path) -> None:
    """The figure beside the CSV, an SVG that carries its caption; none without a whole pass."""
    rows = pd.read_csv(path).query("stage == 'both'")
    if len(rows):
        picture = figures.bench_times(rows)
        metadata = {"Date": None, "Title": picture.alt, "Description": picture.caption}
        picture.figure.savefig(path.with_name(f"{path.stem}-times.svg"), metadata=metadata)
