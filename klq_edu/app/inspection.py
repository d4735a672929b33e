"""`klq inspect`: what the compiler makes of every kernel on GPUs that are not there, and the floor physics sets.

Nothing here is a measurement: registers, memory accesses and instructions are read from machine code; times are bytes
over bandwidth or operations over peak rate, whichever is longer, which no kernel can beat and few reach.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

KERNELS = {  # name -> bytes moved and floating-point operations, from the shapes; s is the element size
    "token_stats": lambda N, V, H, s: (2 * N * V * s, 0),
    "token_stats, merge": lambda N, V, H, s: (2 * N * V * s, 0),  # at most: rows with a small KL are read again
    "token_stats, gradient": lambda N, V, H, s: (3 * N * V * s, 0),
    "KLQ loss, gradient": lambda N, V, H, s: (2 * N * V * s, 0),
    "lambda_returns": lambda N, V, H, s: (29 * N, 0),
    "linear_token_stats": lambda N, V, H, s: (2 * (V + N) * H * s, 4 * N * V * H),
    "linear_token_stats, shared head": lambda N, V, H, s: ((V + 2 * N) * H * s, 4 * N * V * H),
    "linear_token_stats, gradient": lambda N, V, H, s: (2 * (V + N) * H * s + N * V * s, 4 * N * V * H),
}
DEVICES = {  # bytes/s; dense matrix operations/s in bf16 and in fp32 to fp32 accuracy (a third of TF32; AMD: fp32)
    "A100": (2.04e12, {"bf16": 312e12, "fp32": 156e12 / 3}),
    "H100": (3.35e12, {"bf16": 989e12, "fp32": 495e12 / 3}),
    "H200": (4.80e12, {"bf16": 989e12, "fp32": 495e12 / 3}),
    "MI300X": (5.30e12, {"bf16": 1307e12, "fp32": 163e12}),
}
SIZE = {"bf16": 2, "fp32": 4}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass(frozen=True)
class InspectConfig:
    """What to compile, and the sizes that the floors are for. A broken promise of a default tile is exit status 1."""

    targets: tuple[Literal[*TARGETS], ...] = tuple(TARGETS)  # Architectures: A100, H100/H200, B200, MI300X.
    dtypes: tuple[Literal[*SIZE], ...] = tuple(SIZE)  # Element types of logits, hidden states and weights.
    kernels: tuple[Literal[*KERNELS], ...] = tuple(KERNELS)  # Kernels to compile, by name.
    all_tiles: bool = False  # Candidate tile sizes too, not only the defaults.
    source: Literal["ptx", "sass", "amdgcn"] | None = None  # Print this form of the code, no table.
    n: int = 8192  # Tokens, for the floor.
    v: int = 151_936  # Vocabulary, for the floor.
    h: int = 4096  # Hidden size, for the floor.

    def __post_init__(self):
        if min(self.n, self.v, self.h) < 1:
            raise ValueError(f"n, v and h must be at least 1, got {self.n}, {self.v} and {self.h}")


def run_inspect(config: InspectConfig) -> bool:
    """Compile the Triton kernels for GPUs that are not there, and say what the machine code shows."""
    from rich.console import Console
    from rich.progress import track

    if config.source:
        sys.stdout.writelines(_compiler(config))
        return True
    console = Console()
    records = list(track(findings(config), description="compiling", console=console, transient=True))
    console.print(_table(records), _floors(config), sep="\n")
    bad = [f"{r['kernel']} on {r['target']} in {r['dtype']}: {'; '.join(p)}" for r in records if (p := r["problems"])]
    console.print("\n".join(bad) or f"{len(records)} variants: no default spills, overflows or loses its wide loads.")
    return not bad


def findings(config: InspectConfig) -> Iterator[dict]:
    """One record per compiled kernel (see `klq_kernels.offline.Finding`), as they come."""
    return map(json.loads, _compiler(config))


def _compiler(config: InspectConfig) -> Iterator[str]:
    """Lines printed by the compiling process, which needs Triton's interpreter switched off."""
    command = [sys.executable, "-m", "klq_kernels.offline", "--targets", *config.targets, "--dtypes", *config.dtypes]
    command += ["--kernels", *config.kernels, *(["--all-tiles"] if config.all_tiles else [])]
    command += ["--source", config.source] if config.source else []
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        yield from child.stdout
        error = child.stderr.read()
    if child.returncode:
        raise RuntimeError(f"compiling failed: {(error.strip().splitlines() or [child.returncode])[-1]}")


def _table(records: list[dict]):
    from rich.table import Column, Table

    numbers = (Column(name, justify="right") for name in ("regs", "spill", "shared"))
    columns = ("kernel", "target", "dtype", "tile", *numbers, "loads", "stores", "matrix", "dot")
    table = Table(*columns, title="What the machine code shows (compiled here, run nowhere)", title_justify="left")
    for r in records:
        counts = (" ".join(f"{n}×{kind}" for kind, n in r[what].items()) for what in ("loads", "stores", "matrix"))
        loads, stores, matrix = counts
        shared = f"{r['shared_bytes'] / 1024:.0f}/{r['shared_limit'] / 1024:.0f}K"
        table.add_row(
            r["kernel"], r["target"], r["dtype"], r["tile"], str(r["registers"]), str(r["spill_bytes"]), shared,
            f"{loads} B", f"{stores} B", matrix or "-", r["precision"],
            style="red" if r["problems"] else None if r["default"] else "dim",
        )  # fmt: skip
    return table


def floor_seconds(kernel: str, device: str, dtype: str, n: int, v: int, h: int) -> float:
    """The time below which no implementation of this kernel can come on this device (a roofline, not a measurement).

    >>> round(1e3 * floor_seconds("token_stats", "H100", "bf16", 8192, 151_936, 4096), 2)
    1.49
    """
    moved, operations = KERNELS[kernel](n, v, h, SIZE[dtype])
    bandwidth, rate = DEVICES[device]
    return max(moved / bandwidth, operations / rate[dtype])


def _floors(config: InspectConfig):
    from rich.table import Column, Table

    n, v, h = sizes = config.n, config.v, config.h
    numbers = ("bytes/element", "FLOP/element", *(f"{d} \\[ms]" for d in DEVICES))
    columns = ("kernel", "dtype", *(Column(name, justify="right") for name in numbers))
    table = Table(*columns, title=f"Floors, not measurements: N = {n}, V = {v}, H = {h}", title_justify="left")
    for kernel in config.kernels:
        dtypes, elements = (config.dtypes, n * v) if kernel != "lambda_returns" else (["fp32"], n)
        for dtype in dtypes:
            counts = (count / elements for count in KERNELS[kernel](*sizes, SIZE[dtype]))
            times = (1e3 * floor_seconds(kernel, device, dtype, *sizes) for device in DEVICES)
            table.add_row(kernel, dtype, *(f"{x:.3g}" for x in (*counts, *times)))
    return table
