"""`klq demo` and `klq train`: language models trained by KLQ and PPO, with progress, table and report."""

import time
import webbrowser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import ROAD, VARIANTS, WORLDS, named, preset

STAGES = (*ROAD, "rl", "judge")
ABOUT = "; ".join(
    f"{name}: {w.about} ({', '.join(w.demo)}; {w.settings.updates} updates, {w.quick_updates} with --quick)"
    for name, w in WORLDS.items()
)


@dataclass(frozen=True)
class DemoConfig:
    """Ctrl-C keeps what is done; running the same command again continues with what is missing."""

    world: Annotated[Literal[*WORLDS], tyro.conf.arg(help=ABOUT)] = "stories"
    algorithms: tuple[Literal[*VARIANTS], ...] = ()  # Algorithms to compare; none named: the world's.
    seeds: int = 1  # Seeds per algorithm: 0, 1, …
    quick: bool = False  # Fewer updates.
    updates: int | None = None  # Updates per run; not given: the world's.
    tau: float | None = None  # KL coefficient τ; not given: the world's.
    replay: int | None = None  # Earlier completions added to each batch; not given: the world's.
    tau_start: float | None = None  # τ falls from here at first (τ or less: it does not); not given: the world's.
    # Make this stage and all after it anew, once: to go on after an interrupt leave it out.
    remake: Annotated[Literal[*STAGES] | None, tyro.conf.arg(name="from")] = None
    out: Path = Path("runs/demo")  # Folder for runs and report.html.
    device: str = "auto"  # auto, cpu, cuda, mps …
    # Of forward passes (autocast; all else is float32); not given: the world's.
    dtype: Literal["float32", "bfloat16", "auto"] | None = None
    open: bool = False  # Open the report in a browser at the end.

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")
        stages = (*named("world", self.world, WORLDS).made, "rl", "judge")
        if self.remake and self.remake not in stages:
            raise ValueError(f"--from must be one of {stages} in the world {self.world}, got {self.remake!r}")

    def experiments(self) -> dict[str, TrainConfig]:
        """Folder name -> settings of everything this demo runs."""
        world = named("world", self.world, WORLDS)
        updates = world.quick_updates if self.quick and self.updates is None else self.updates
        given = {"tau": self.tau, "updates": updates, "replay": self.replay, "tau_start": self.tau_start}
        given |= {"dtype": self.dtype, "device": self.device}
        changes, names = {k: v for k, v in given.items() if v is not None}, self.algorithms or world.demo
        configs = [(n, preset(self.world, n, seed=seed, **changes)) for seed in range(self.seeds) for n in names]
        found = {}
        for n, c in configs:
            cooled = f"-from{c.tau_start:g}" if (c.tau_start or 0) > c.tau else ""
            batch = f"{c.batch_size}+{c.replay}" if c.replay else c.batch_size
            found[f"{n}-tau{c.tau:g}{cooled}-{c.updates}x{batch}-seed{c.seed}"] = c
        return found


@dataclass(frozen=True)
class TrainCommand:
    """One run of `klq train`: a world has a subcommand of its own, since it has its own defaults."""

    world: tyro.conf.Suppress[str]
    config: TrainConfig
    out: Path  # Folder of this run: settings, metrics, samples, checkpoint.
    save_model: Path | None = None  # Folder for the trained policy: a plain causal LM, with its value head beside it.


TRAIN = tyro.extras.subcommand_type_from_defaults(
    {name: TrainCommand(name, w.settings, Path("runs/train") / name) for name, w in WORLDS.items()},
    {name: f"Train {w.about}. Ctrl-C keeps what is done; the same command continues." for name, w in WORLDS.items()},
)


def run_demo(config: DemoConfig) -> None:
    """Train a language model by KLQ and by PPO from the same start and seed, and write a report."""
    from klq_edu.app.report import run_all, write_report
    from klq_edu.files import writable_folder

    folder, start = writable_folder(config.out / config.world), time.perf_counter()
    experiments = {folder / name: settings for name, settings in config.experiments().items()}
    page = write_report(folder / "report.html", *run_all(config.world, experiments, config.remake))
    print(f"\nreport: {page}   runs: {folder}   time: {(time.perf_counter() - start) / 60:.1f} min")
    if config.open:
        webbrowser.open(page.resolve().as_uri())


@dataclass(frozen=True)
class HubConfig:
    """Ctrl-C keeps what is done; the same command continues."""

    recipe: Positional[str]  # A YAML file, or the name of one that comes with the package: tldr_pythia, hh_pythia.
    model: str | None = None  # Policy at the start, a path or hub id; not given: the recipe's.
    reward_model: str | None = None  # Sequence-classification checkpoint, a path or hub id; not given: the recipe's.
    data: str | None = None  # Data set with splits train and test, a path or hub id; not given: the recipe's.
    algorithm: Literal[*VARIANTS] | None = None  # Algorithm variant; not given: the recipe's.
    updates: int | None = None  # Not given: the recipe's.
    seed: int | None = None  # Not given: the recipe's.
    device: str | None = None  # auto, cpu, cuda, mps …; not given: the recipe's.
    out: Path = Path("runs/hub")  # Folder for the run.


def run_hub(config: HubConfig) -> None:
    """Train a model from the hub (or a folder) by a recipe: the paper's tasks with its hyper-parameters."""
    from klq_edu.app.report import run_in
    from klq_edu.worlds.hub import load_recipe, read_recipe

    recipe = read_recipe(config.recipe, model=config.model, reward_model=config.reward_model, data=config.data)
    given = {"updates": config.updates, "seed": config.seed, "device": config.device}
    changes = {name: value for name, value in given.items() if value is not None}
    changes |= {"algorithm": "klq", "whiten": False} | VARIANTS[config.algorithm] if config.algorithm else {}
    settings = replace(recipe.train, **changes)
    run_in(load_recipe(recipe, settings.device), {config.out: settings})


def run_train(command: Annotated[TRAIN, tyro.conf.arg(name="")]) -> None:
    """Train once, in a world of your choice, with every setting at your disposal."""
    from klq_edu.app.experiment import trained_policy
    from klq_edu.app.report import run_all
    from klq_edu.files import writable_folder

    folder = command.save_model and writable_folder(command.save_model)
    world, _ = run_all(command.world, {command.out: command.config})
    if folder:
        trained_policy(world, command.config, command.out).save_pretrained(folder)
        world.tokenizer.save_pretrained(folder)
        print(f"model: {folder}")
