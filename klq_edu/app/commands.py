"""`klq`: the command line. What a command needs is imported only when it runs, so `--help` is instant.

A command is a function, its docstring the first line of its help; the dataclass that it takes is its options.
"""

import sys
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from klq_edu.app.compare import run_compare
from klq_edu.app.demo import run_demo, run_hub, run_train
from klq_edu.app.doctor import run_doctor
from klq_edu.app.inspection import run_inspect
from klq_edu.app.judging import run_judge
from klq_edu.app.sweep import run_sweep
from klq_edu.bench.config import BenchConfig


def bench(config: BenchConfig) -> None:
    """Measure the fused operations against the naive ones and a peer: time, peak memory, error."""
    from klq_edu.bench.run import run_bench

    run_bench(config)


def course(
    action: Positional[Literal["build", "check"]], notebooks: Path = Path("notebooks"), only: tuple[str, ...] = ()
) -> None:
    """Build the notebooks from their sources in src/, or check that they are up to date.

    Args:
        action: build the full (executed), student and HTML editions and the map; or check: name what is out of date.
        notebooks: Folder of the course.
        only: Numbers of some notebooks, like 01 07; all by default.
    """
    from klq_edu.course.build import build_all, chosen, drift

    if action == "build":
        build_all(notebooks, only)
    elif paths := [path for chapter in chosen(only) for path in drift(notebooks, chapter)]:
        sys.exit("out of date, run `klq course build`:\n" + "\n".join(map(str, paths)))


COMMANDS = {
    "demo": run_demo, "train": run_train, "hub": run_hub, "judge": run_judge, "sweep": run_sweep,
    "compare": run_compare, "inspect": run_inspect, "bench": bench, "course": course, "doctor": run_doctor,
}  # fmt: skip


def run() -> None:
    """Carry out the command that was typed; one that returns False ends with status 1."""
    options = {"prog": "klq", "description": "KL-regularised Q-learning (KLQ) for RLHF", "config": (OmitArgPrefixes,)}
    if tyro.extras.subcommand_cli_from_dict(COMMANDS, **options) is False:
        sys.exit(1)
