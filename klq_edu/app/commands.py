"""`klq`: the command line. A command's implementation is imported only when it runs, so `--help` is instant."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from klq_edu.app.demo import DemoConfig
from klq_edu.app.inspection import InspectConfig
from klq_edu.app.sweep import SweepConfig
from klq_edu.bench.config import BenchConfig
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.presets import WORLDS


@dataclass(frozen=True)
class TrainCommand:
    """Train once in this world, with every setting at your disposal.

    Ctrl-C keeps what is done; running the same command again continues from there.
    """

    world: tyro.conf.Suppress[str]
    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    out: Path
    """Folder of this run: settings, metrics, samples, checkpoint."""
    save_model: Path | None = None
    """Write the trained policy here: a folder that loads as a plain causal LM, with its value head beside it."""


TRAIN = {w: TrainCommand(w, config, Path("runs/train") / w) for w, config in WORLDS.items()}
"""One subcommand per world, because each has its own defaults."""

app = tyro.extras.SubcommandApp()


@app.command(name="demo")
def demo(config: tyro.conf.OmitArgPrefixes[DemoConfig]) -> None:
    """Train a language model by KLQ and by PPO, and write a report."""
    from klq_edu.app.demo import run_demo

    run_demo(config)


@app.command(name="train")
def train(command: Annotated[tyro.extras.subcommand_type_from_defaults(TRAIN), tyro.conf.arg(name="")]) -> None:
    """Train once, in a world of your choice, with every setting at your disposal."""
    from klq_edu.app.demo import run_train

    run_train(command.world, command.config, command.out, command.save_model)


@app.command(name="sweep")
def sweep(config: tyro.conf.OmitArgPrefixes[SweepConfig]) -> None:
    """Compare algorithms over τ, learning rates and seeds in the grammar world, as one CSV."""
    from klq_edu.app.sweep import markdown, run_sweep

    path = run_sweep(config)
    print(f"{markdown(path)}\n\n{path}")


@app.command(name="inspect")
def inspect(config: tyro.conf.OmitArgPrefixes[InspectConfig]) -> None:
    """Compile the Triton kernels for GPUs that are not there, and say what the machine code shows."""
    from klq_edu.app.inspection import run_inspect

    sys.exit(0 if run_inspect(config) else 1)


@app.command(name="bench")
def bench(config: tyro.conf.OmitArgPrefixes[BenchConfig]) -> None:
    """Measure the fused operations against the naive ones and peers: time, peak memory, error."""
    from klq_edu.bench.run import run_bench

    run_bench(config)


@dataclass(frozen=True)
class CourseCommand:
    """Make the notebooks of the course from their sources in src/."""

    action: tyro.conf.Positional[Literal["build", "check"]]
    """build: write the full (executed), student and HTML editions and the map; check: say which are out of date."""
    notebooks: Path = Path("notebooks")
    """Folder of the course."""
    only: tuple[str, ...] = ()
    """Numbers of some notebooks, like 01 07; all by default."""


@app.command(name="course")
def course(command: tyro.conf.OmitArgPrefixes[CourseCommand]) -> None:
    """Build the notebooks from their sources, or check that they are up to date."""
    from klq_edu.course.build import build_all, stale

    if command.action == "build":
        build_all(command.notebooks, command.only)
    elif paths := stale(command.notebooks, command.only):
        sys.exit("out of date, run `klq course build`:\n" + "\n".join(map(str, paths)))


@app.command(name="doctor")
def doctor() -> None:
    """Say what this machine has, what is missing, and what to do about it."""
    from klq_edu.app.doctor import run_doctor

    sys.exit(0 if run_doctor() else 1)


def run() -> None:
    """Carry out the command that was typed."""
    app.cli(prog="klq", description=__doc__.split(". ")[0])
