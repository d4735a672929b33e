"""What is measured: sizes, and what can be asked for. Standard library only, so that `--help` is instant."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, NamedTuple


class Size(NamedTuple):
    """N tokens, V vocabulary, H hidden units, and T tokens per sequence; None where a workload has no such axis."""

    n: int
    v: int | None
    h: int | None
    t: int | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        axes = [f"{name}={value}" for name, value in zip("NVHT", self, strict=False) if value is not None]
        return " ".join([*axes, self.dtype])


MAIN = {  # workload -> the size at which it is measured first
    "logits_stats": Size(4096, 32000, 512),  # H here and below: only the reference GEMM has it
    "linear_stats": Size(2048, 32000, 512),
    "klq_ref": Size(2048, 32000, 512),
    "klq": Size(2048, 32000, 512),
    "returns": Size(64 * 1024, None, None, 1024),
    "update": Size(1024, 32000, 256, 128),
}
SWEEP = {"klq_ref": [Size(512, v, 512) for v in (8000, 32000, 64000)]}  # further sizes, for the figures over V and N
QUICK = {name: Size(64, size.v and 300, size.h and 32, size.t and 16) for name, size in MAIN.items()}  # takes seconds


@dataclass(frozen=True)
class BenchConfig:
    """Measure time, peak memory and error of the fused operations, the naive ones and a peer.

    By default each workload at one size, and one of them over V; with --n, --v, --h or --t all combinations of what you
    give. Takes about five minutes on two idle cores. (To compare the algorithms rather than the kernels: klq sweep.)
    """

    # What to compute.
    workloads: tuple[Literal["logits_stats", "linear_stats", "klq_ref", "klq", "returns", "update"], ...] = tuple(MAIN)
    n: tuple[int, ...] = ()  # Numbers of tokens (a whole number of sequences where there is T).
    v: tuple[int, ...] = ()  # Sizes of the vocabulary.
    h: tuple[int, ...] = ()  # Hidden sizes (from logits: of the reference GEMM only).
    t: tuple[int, ...] = ()  # Tokens per sequence, for returns and update.
    # Precisions of the inputs. (Where a CPU is slow at half-precision products, so is the unit: ours, which multiplies
    # in float32 there, can then be below the limit.)
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ("float32",)
    reps: int = 3  # Repetitions, after one that warms up and is checked for its errors.
    compile: bool = False  # Also torch.compile(naive): takes tens of seconds per size, and needs a C++ compiler.
    memory: bool = True  # Measure peak memory, each in a fresh process that takes seconds to start.
    quick: bool = False  # Tiny sizes, to see in seconds that everything works; the times mean nothing.
    device: str = "auto"  # auto, cpu, cuda, …
    seed: int = 0  # Seed of the inputs.
    out: Path = Path("runs/bench")  # Folder of what is written.
    name: str = "bench"  # Name of the CSV, of the provenance (.json) beside it, and of the figures (.svg).

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
