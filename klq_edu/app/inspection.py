"""`klq inspect`: what the compiler makes of every kernel on GPUs that are not there, and what a model makes of that.

Nothing here is a measurement: registers, memory accesses and instructions are read from machine code, times and shares
are the floor and the model of `klq_edu.bench.roofline`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from klq_edu.bench import roofline
from klq_edu.bench.roofline import DEVICES, KERNELS, LOSSES, SHAPE, SIZE

COMPILED = tuple(kernel for kernel in KERNELS if kernel not in LOSSES)
TARGETS = tuple(dict.fromkeys(device.target for device in DEVICES.values()))


@dataclass(frozen=True)
class InspectConfig:
    """What to compile, and the sizes that floors and predictions are for. A broken promise of a tile is exit status
    1; the promised shares are always for N = 8192, V = 128256, H = 4096 in bf16."""

    targets: tuple[Literal[*TARGETS], ...] = TARGETS  # Architectures: A100, H100/H200, B200, MI300X.
    dtypes: tuple[Literal[*SIZE], ...] = tuple(SIZE)  # Element types of logits, hidden states and weights.
    kernels: tuple[Literal[*COMPILED], ...] = COMPILED  # Kernels to compile, by name.
    json: Path | None = None  # Write everything to this file too.
    n: int = SHAPE[0]  # Tokens.
    v: int = SHAPE[1]  # Vocabulary.
    h: int = SHAPE[2]  # Hidden size.

    def __post_init__(self):
        if min(self.n, self.v, self.h) < 1:
            raise ValueError(f"n, v and h must be at least 1, got {self.n}, {self.v} and {self.h}")


def run_inspect(config: InspectConfig) -> bool:
    """Compile the Triton kernels for GPUs that are not there: what the machine code shows, what a model predicts."""
    from rich.console import Console
    from rich.progress import track

    from klq_edu.files import write_json

    console = Console()
    console = console if console.is_terminal else Console(width=max(console.width, 200))  # nothing cut off in a file
    total = len(config.kernels) * len(config.targets) * len(config.dtypes)
    found = everything(config, lambda x: track(x, "compiling", total=total, console=console, transient=True))
    kernels, losses = found["kernels"], found["losses"]
    console.print(_code(kernels), _model(kernels + losses), sep="\n\n")
    if config.json:
        write_json(config.json, found)
    console.print("\n".join(found["problems"]) or f"{len(kernels)} variants: every tile keeps its promises.")
    return not found["problems"]


def everything(config: InspectConfig, track=iter) -> dict:
    """All that is shown, as `--json` writes it: records of `klq_kernels.offline` and of the losses, with the
    model's `predictions` for each device of their target; and the promises that are broken."""
    loss = {"dtype": "bf16", "per_logit": 0, "problems": []}
    losses = [loss | {"kernel": kernel, "target": target} for kernel in LOSSES for target in config.targets]
    options = ["--targets", *config.targets, "--dtypes", *config.dtypes, "--kernels", *config.kernels]
    records, bad = list(map(json.loads, track(roofline.compiled(*options)))), []
    for record in records + losses:
        devices = [name for name, device in DEVICES.items() if device.target == record["target"]]
        record["predictions"] = [roofline.predict(record, d, config.n, config.v, config.h) for d in devices]
        record["problems"] = record["problems"] + roofline.shortfalls(record)
        if record["problems"]:
            bad.append("{kernel} on {target} in {dtype}: ".format_map(record) + "; ".join(record["problems"]))
    return {"note": roofline.__doc__, "kernels": records, "losses": losses, "problems": bad}


def _table(title: str, texts: str, numbers: str):
    """An empty table that can be pasted into Markdown."""
    from rich.box import MARKDOWN
    from rich.table import Column, Table

    columns = *texts.split(), *(Column(name, justify="right") for name in numbers.split())
    return Table(*columns, title=title, title_justify="left", box=MARKDOWN)


def _code(records: list[dict]):
    title = "What the machine code shows (compiled, not run); a thread's instructions per k-step and per logit"
    table = _table(title, "kernel target dtype tile dot matrix loads stores", "regs spill shared k-step logit")
    for r in records:
        counts = (" ".join(f"{n}×{kind}" for kind, n in r[what].items()) for what in ("matrix", "loads", "stores"))
        matrix, loads, stores = counts
        shared, step = f"{r['shared_bytes'] / 1024:.0f}/{r['shared_limit'] / 1024:.0f}K", r["work"]["step_instructions"]
        table.add_row(
            r["kernel"], r["target"], r["dtype"], r["tile"], r["precision"], matrix or "-", f"{loads} B", f"{stores} B",
            str(r["registers"]), str(r["spill_bytes"]), shared, f"{step:.0f}" if step else "-", f"{r['per_logit']:.1f}",
            style="red" if r["problems"] else None,
        )  # fmt: skip
    return table


def _model(records: list[dict]):
    title = "A model, not a measurement. Bytes per clock needed at full matrix rate, of what there is; a block's clocks"
    table = _table(title, "kernel dtype device bound", "blocks L2 shared k-loop outside floor\\[ms] ms share\\[%]")
    for r, p in [(record, p) for record in records for p in record["predictions"]]:
        block = ["-"] * 5
        if "clocks" in p:
            l2, shared = (f"{p[f'{what}_needed']:.0f} of {_range(p[f'{what}_delivered'])}" for what in ("l2", "shared"))
            clocks = (f"{p['clocks'][1][name]:.0f}" for name in ("k-loop", "outside"))
            block = [str(r["work"]["blocks"]), l2, shared, *clocks]
        times = f"{p['floor_ms']:.3g}", _range(p["ms"][::-1]), _range(round(100 * share) for share in p["share"])
        table.add_row(r["kernel"], r["dtype"], p["device"], "/".join(dict.fromkeys(p["bound"])), *block, *times)
    return table


def _range(numbers) -> str:
    return "–".join(dict.fromkeys(f"{x:.3g}" for x in numbers))
