"""What is measured by default. Standard library only, so that `--help` is instant."""

from typing import NamedTuple


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


MAIN = {
    "logits_stats": Size(4096, 32000, 512),  # H here and below: only the reference GEMM has it
    "linear_stats": Size(2048, 32000, 512),
    "klq_ref": Size(2048, 32000, 512),
    "klq": Size(2048, 32000, 512),
    "returns": Size(64 * 1024, None, None, 1024),
    "update": Size(1024, 32000, 256, 128),
}
"""Workload -> the size at which it is measured first."""

SWEEP = {"klq_ref": [Size(512, v, 512) for v in (8000, 32000, 64000)]}
"""Workload -> further sizes, for the figures over V and N."""

QUICK = {name: Size(64, 300, 32, size.t and 16) for name, size in MAIN.items()}
QUICK["returns"] = Size(64, None, None, 16)
"""Sizes that take seconds, to see that everything works; timings at these mean nothing."""
