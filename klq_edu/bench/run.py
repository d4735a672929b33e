"""`klq bench`: fused versus naive, with a peer, as a table, a CSV with provenance, and a figure."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console
from rich.progress import Progress

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
SHOWN = {  # columns of the CSV -> their headings
    "contender": "", "stage": "stage", "seconds": "s", "units": "units", "units_low": "low", "units_high": "high",
    "limit": "limit", "vs_naive": "ratio", "memory_mb": "MB", "error": "error", "error_gradient": "gradient",
}  # fmt: skip
NOTE = (
    "Medians over repetitions. units: time in N×H×V matrix products, with the lowest and highest; limit: the products "
    "that can't be avoided; ratio: time over naive's; MB: peak memory beyond the inputs; error, gradient: the worst "
    "output's and gradient's, against float64."
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
            print_tables(path)
            draw(path)
    return path


def write(path: Path, rows: list[dict], config: BenchConfig, device: str) -> None:
    """The CSV, one row per workload, size, contender and stage, and the JSON that says where it comes from."""
    pd.DataFrame(rows).to_csv(path, index=False)
    about = {"settings": {name: str(value) for name, value in asdict(config).items()}, "method": METHOD}
    write_provenance(path, device, **about, threads=torch.get_num_threads())


def print_tables(path: Path) -> None:
    """One table per workload and size, a line per contender and stage; under it, who does not compute the same."""
    rows = pd.read_csv(path)
    rows["error"] = rows.filter(like="error_").drop(columns="error_gradient", errors="ignore").max(axis=1)
    for (workload, *axes, dtype), part in rows.groupby(["workload", *Size._fields], sort=False, dropna=False):
        size = Size(*(int(value) if value > 0 else None for value in axes), dtype)
        print(f"\n{workload}: {WORKLOADS[workload].title}\n{size}")
        table = part.reindex(columns=SHOWN).rename(columns=SHOWN).dropna(axis=1, how="all")
        print(table.to_string(index=False, na_rep="", float_format="{:.4g}".format))
        for row in part[part["computes"] != "the same"].drop_duplicates("contender").itertuples():
            print(f"{row.contender} computes {row.computes}")
    print(f"\n{NOTE}\n\n{path}")


def draw(path: Path) -> None:
    """The figures beside the CSV, as SVG files that carry their captions."""
    rows = pd.read_csv(path)
    rows = rows[rows["stage"] == "both"]
    pictures = {"times": figures.bench_times(rows)} if len(rows) else {}
    for (workload, dtype), part in rows.groupby(["workload", "dtype"], sort=False):
        for axis, rest in (("v", ["n", "h"]), ("n", ["v", "h"])):
            longest = max((p for _, p in part.groupby(rest)), key=lambda p: p[axis].nunique())
            if longest[axis].nunique() > 1:
                pictures[f"{workload}-{dtype}-{axis}"] = figures.bench_scaling(longest, axis)
    for name, picture in pictures.items():
        metadata = {"Date": None, "Title": picture.alt, "Description": picture.caption}
        picture.figure.savefig(path.with_name(f"{path.stem}-{name}.svg"), metadata=metadata)
