"""`klq bench`: fused versus naive, with peers, as a table, a CSV with provenance, and figures."""

import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from statistics import median
from typing import Literal

from klq_edu.bench.sizes import MAIN, QUICK, SWEEP, Size

METHOD = (
    "Contenders take turns; every repetition lies between two products hidden[N, H] @ weight[V, H].T, and units are "
    "its time over their mean; what takes less than 20 ms is run until it has taken that long, and the mean counts. "
    "Medians over repetitions, with the lowest and highest. Peak memory: forward and "
    "backward pass in a fresh process, beyond the inputs. Errors: against float64, on 64 rows spread over the batch."
)
NOTE = (
    "fwd, bwd, both: median time [lowest, highest] of forward and backward pass in units of one N×H×V matrix product; "
    "limit: the products that cannot be avoided; ratio: time over naive's; MB: peak memory beyond the inputs; "
    "error: of the worst output/of the worst gradient, against float64."
)
HEADINGS = ("fwd", "bwd", "both", "limit", "ratio", "MB", "error")
KEYS = ["workload", "n", "v", "h", "t", "dtype"]
COLUMNS = [
    *KEYS, "contender", "stage", "computes", "reps", "units", "units_low", "units_high", "limit", "vs_naive",
    "seconds", "seconds_low", "seconds_high", "memory_mb",
]  # fmt: skip


@dataclass(frozen=True)
class BenchConfig:
    """Measure time, peak memory and error of the fused operations, the naive ones and, where installed, peers.

    By default each workload at one size, and one of them over V; with --n, --v, --h or --t all combinations of what you
    give. Takes about five minutes on two idle cores. (To compare the algorithms rather than the kernels: klq sweep.)
    """

    workloads: tuple[Literal["logits_stats", "linear_stats", "klq_ref", "klq", "returns", "update"], ...] = tuple(MAIN)
    """What to compute."""
    n: tuple[int, ...] = ()
    """Numbers of tokens (a whole number of sequences where there is T)."""
    v: tuple[int, ...] = ()
    """Sizes of the vocabulary."""
    h: tuple[int, ...] = ()
    """Hidden sizes (from logits: of the reference GEMM only)."""
    t: tuple[int, ...] = ()
    """Tokens per sequence, for returns and update."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    """Precisions of the inputs. (Where a CPU is slow at half-precision products, so is the unit: ours, which multiplies
    in float32 there, can then be below the limit.)"""
    reps: int = 3
    """Repetitions, after one that warms up and is checked for its errors."""
    compile: bool = False
    """Also torch.compile(naive): takes tens of seconds per size, and needs a C++ compiler."""
    reference: bool = False
    """Also the accurate definition that everything is tested against: slower than naive, and hungry for memory."""
    memory: bool = True
    """Measure peak memory, each in a fresh process that takes seconds to start."""
    quick: bool = False
    """Tiny sizes, to see in seconds that everything works; the times mean nothing."""
    device: str = "auto"
    """auto, cpu, cuda, …"""
    seed: int = 0
    """Seed of the inputs."""
    out: Path = Path("runs/bench")
    """Folder of what is written."""
    name: str = "bench"
    """Name of the CSV, of the provenance (.json) beside it, and of the figures (.svg)."""

    def __post_init__(self):
        for name in ("workloads", "dtypes"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("n", "v", "h", "t", "reps"):
            values = getattr(self, name)
            if any(value < 1 for value in (values if isinstance(values, tuple) else (values,))):
                raise ValueError(f"{name} must be at least 1, got {values}")
        if "update" in self.workloads and any(h % 8 for h in self.h):
            raise ValueError(f"h must be a multiple of 8 for the update's model, got {self.h}")

    def points(self) -> list[tuple[str, Size]]:
        """All (workload, size) to be measured."""
        pairs = product(self.workloads, self.dtypes)
        return list(dict.fromkeys((name, size) for name, dtype in pairs for size in self.sizes(name, dtype)))

    def sizes(self, name: str, dtype: str) -> list[Size]:
        """The sizes of one workload: all combinations of what was given, else the defaults; whole sequences always."""
        base, given = (QUICK if self.quick else MAIN)[name], (self.n, self.v, self.h, self.t)
        dtype = dtype if base.h else base.dtype  # λ-returns are float32 whatever the model is
        axes = [values if values and default else (default,) for values, default in zip(given, base)]
        sweep = () if self.quick or any(given) else SWEEP.get(name, ())
        sizes = [Size(*size, dtype) for size in product(*axes)] + [size._replace(dtype=dtype) for size in sweep]
        return [s._replace(n=max(s.n // s.t, 1) * s.t) if s.t else s for s in sizes]


def run_bench(config: BenchConfig) -> Path:
    """Measure the fused operations against the naive ones and peers: time, peak memory, error."""
    from rich.console import Console
    from rich.progress import Progress

    from klq_edu.bench.contenders import absent_peers, contenders
    from klq_edu.files import writable_folder
    from klq_edu.machine import resolve_device

    console, device, rows, interrupted = Console(), str(resolve_device(config.device)), [], False
    path = writable_folder(config.out) / f"{config.name}.csv"
    if missing := absent_peers():
        console.print(f"peers that are not installed: {', '.join(missing)}", highlight=False)
    if config.compile:
        console.print("torch.compile(naive) takes tens of seconds per size before its time is taken")
    jobs = [(n, s, contenders(n, device, config.compile, config.reference)) for n, s in config.points()]
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(everyone) * (config.reps + 2) for *_, everyone in jobs))
        try:
            for name, size, everyone in jobs:
                progress.update(bar, description=f"{name} {size}")
                tick = partial(progress.advance, bar)
                rows += measure_point(name, size, everyone, config, device, progress.console.print, tick)
                write(path, rows, config, device)
        except KeyboardInterrupt:
            interrupted = True
    if rows:
        print_tables(console, path)
        draw(path)
    console.print(f"\n[bold]{path}[/]" if rows else "")
    if interrupted:
        console.print("Interrupted; what was measured by then is kept.")
        sys.exit(130)  # what shells report of Ctrl-C
    return path


def measure_point(name: str, size: Size, everyone: list, config: BenchConfig, device: str, say, tick) -> list[dict]:
    """The rows of one workload at one size: warm-up and errors, then interleaved times, then peak memory."""
    import torch

    from klq_edu.bench.measure import interleave, reference_gemm
    from klq_edu.bench.memory import peak_memory
    from klq_edu.bench.workloads import WORKLOADS, make_inputs

    x, rows = make_inputs(name, size, config.seed, device), []
    found = first_runs(everyone, x, lambda text: say(f"{name} {size}: {text}", markup=False), tick)
    everyone = [c for c in everyone if c.name in found]
    gemm = reference_gemm(size, device) if size.h else lambda: 1.0
    times = interleave(everyone, x, gemm, config.reps, tick)
    del x, gemm
    torch.cuda.empty_cache()  # leaves the GPU to the fresh processes; does nothing where there is none
    what = {"workload": name, "size": size, "seed": config.seed, "device": device}
    what |= {"compiled": config.compile, "reference": config.reference}
    for c in everyone:
        part = stage_rows(c, times, WORKLOADS[name].stages, bool(size.h))
        part[-1] |= found[c.name]
        if config.memory:
            part[-1]["memory_mb"] = peak = peak_memory(**what, contender=c.name)
            if math.isnan(peak):
                say(f"{name} {size}: {c.name} did not survive in the process that measures its memory")
        rows += [{"workload": name, **size._asdict(), **row, "computes": c.computes} for row in part]
        tick()
    return rows


def first_runs(everyone: list, x: dict, say, tick) -> dict[str, dict]:
    """Contender -> its errors in a run that also warms it up; a peer that cannot run here is named and left out."""
    from klq_edu.bench.measure import errors, run_once

    found = {}
    for c in everyone:
        try:
            found[c.name] = errors(c, x, run_once(c, x)[0])
        except Exception as error:
            if not c.optional:
                raise
            say(f"{c.name} does not run here: {error!r:.200}")
        tick()
    return found


def stage_rows(contender, times: dict[str, list], stages: tuple[str, ...], in_units: bool) -> list[dict]:
    """A contender's time in each stage: in seconds, against naive and, where there is a GEMM, in units of that."""
    rows, limit = [], dict(zip(("forward", "backward"), contender.gemms or ()))
    for stage in stages:
        seconds = sorted(getattr(r, stage) for r in times[contender.name])
        cost, naive = (sorted(getattr(r, stage) / r.gemm for r in times[who]) for who in (contender.name, "naive"))
        row = {"contender": contender.name, "stage": stage, "reps": len(cost), "vs_naive": median(cost) / median(naive)}
        row |= {"seconds": median(seconds), "seconds_low": seconds[0], "seconds_high": seconds[-1]}
        if in_units:
            row |= {"units": median(cost), "units_low": cost[0], "units_high": cost[-1]}
        rows.append(row | ({"limit": limit.get(stage, sum(limit.values()))} if limit else {}))
    return rows


def write(path: Path, rows: list[dict], config: BenchConfig, device: str) -> None:
    """The CSV, one row per workload, size, contender and stage, and the JSON that says where it comes from."""
    import pandas as pd
    import torch

    from klq_edu.bench.contenders import PACKAGES
    from klq_edu.files import write_provenance

    columns = [*COLUMNS, *dict.fromkeys(name for row in rows for name in row if name.startswith("error_"))]
    pd.DataFrame(rows).reindex(columns=columns).to_csv(path, index=False)
    installed = {package: version(package) for module, package in PACKAGES.items() if find_spec(module)}
    settings = {name: str(value) for name, value in asdict(config).items()}
    threads = torch.get_num_threads()
    write_provenance(path, device, settings=settings, method=METHOD, **installed, threads=threads)


def print_tables(console, path: Path) -> None:
    """One table per workload and size, one line per contender; under it, what those compute that don't do the same."""
    import pandas as pd
    from rich import box
    from rich.table import Column, Table

    from klq_edu.bench.workloads import WORKLOADS

    for _, part in pd.read_csv(path).groupby(KEYS, sort=False, dropna=False):
        first = part.iloc[0]
        size = " ".join(f"{axis.upper()}={first[axis]:.0f}" for axis in "nvht" if first[axis] > 0)
        title = f"{first['workload']}: {WORKLOADS[first['workload']].title}\n{size} {first['dtype']}"
        others = part[part["computes"] != "the same"].drop_duplicates("contender")
        caption = "\n".join(f"{row.contender} computes {row.computes}" for row in others.itertuples())
        columns = Column("contender", overflow="fold"), *(Column(h, justify="right", no_wrap=True) for h in HEADINGS)
        look = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
        table = Table(*columns, title=title, caption=caption, **look)
        for name, stages in part.groupby("contender", sort=False):
            table.add_row(name, *cells(stages.set_index("stage")))
        console.print(table)
    console.print(NOTE, markup=False, highlight=False)


def cells(stages) -> list[str]:
    """The numbers of one contender as text, from its rows of the CSV (index: stage; the last one is the whole)."""
    whole = stages.iloc[-1]
    what, scale, unit = ("seconds", 1000, " ms") if math.isnan(whole["units"]) else ("units", 1, "")
    parts = [f"{stages['units'][stage]:.2f}" if len(stages) > 1 else "" for stage in ("forward", "backward")]
    middle, low, high = (scale * whole[what + end] for end in ("", "_low", "_high"))
    outputs = whole[[name for name in whole.index if name.startswith("error_") and name != "error_gradient"]].max()
    wrong = [_text(x, ".0e") for x in (outputs, whole.get("error_gradient", math.nan))]
    rest = [(whole["limit"], ".0f"), (whole["vs_naive"], ".2f"), (whole["memory_mb"], ",.0f")]
    both = f"{middle:.3g} [{low:.3g}, {high:.3g}]{unit}"
    return [*parts, both, *(_text(x, form) for x, form in rest), "/".join(filter(None, wrong))]


def _text(x: float, form: str) -> str:
    return "" if math.isnan(x) else format(x, form)


def draw(path: Path) -> None:
    """The figures beside the CSV, as SVG files that carry their captions."""
    import pandas as pd

    from klq_edu import figures

    rows = pd.read_csv(path)
    rows = rows[rows["stage"] == "both"]
    pictures = {"times": figures.bench_times(rows)} if len(rows) else {}
    for (workload, dtype), part in rows.groupby(["workload", "dtype"], sort=False):
        for axis, rest in (("v", ["n", "h"]), ("n", ["v", "h"])):
            groups = (p for _, p in part.groupby(rest))
            longest = max(groups, key=lambda p: p[axis].nunique(), default=part[:0])
            if longest[axis].nunique() > 1:
                pictures[f"{workload}-{dtype}-{axis}"] = figures.bench_scaling(longest, axis)
    for name, picture in pictures.items():
        metadata = {"Date": None, "Title": picture.alt, "Description": picture.caption}
        picture.figure.savefig(path.with_name(f"{path.stem}-{name}.svg"), metadata=metadata)
