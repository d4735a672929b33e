"""`klq demo` and `klq train`: language models trained by KLQ and PPO, with progress, table and report."""

import time
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.presets import DEMO, QUICK_UPDATES, preset, variant_of


@dataclass(frozen=True)
class DemoConfig:
    """Train a language model by KLQ and by PPO from the same start and seed, and write a report.

    Ctrl-C keeps what is done; running the same command again continues with what is missing.
    """

    world: Literal["stories", "grammar"] = "stories"
    """stories: SmolLM2-135M, a real language model. grammar: a tiny one whose exact optimum is known."""
    algorithms: tuple[Literal["klq", "ppo_clip", "ppo_clip_whitened", "ppo_penalty"], ...] = ()
    """Algorithms to compare; none named: klq and ppo_clip, and ppo_penalty too in grammar."""
    seeds: int = 1
    """Seeds per algorithm: 0, 1, …"""
    quick: bool = False
    """Fewer updates: 10 in stories, 30 in grammar."""
    updates: int | None = None
    """Updates per run; not given: the world's."""
    tau: float | None = None
    """KL coefficient τ; not given: the world's."""
    out: Path = Path("runs/demo")
    """Folder for runs and report.html."""
    device: str = "auto"
    """auto, cpu, cuda, mps …"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward passes (autocast); parameters, optimiser, statistics and losses are always float32."""
    open: bool = False
    """Open the report in a browser at the end."""

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}")

    def experiments(self) -> dict[str, TrainConfig]:
        """Folder name -> settings of everything this demo runs."""
        updates = QUICK_UPDATES[self.world] if self.quick and self.updates is None else self.updates
        optional = {"tau": self.tau, "updates": updates}
        changes = {"device": self.device, "dtype": self.dtype} | {k: v for k, v in optional.items() if v is not None}
        names = self.algorithms or DEMO[self.world]
        configs = [(n, preset(self.world, n, seed=seed, **changes)) for seed in range(self.seeds) for n in names]
        return {f"{n}-tau{c.tau:g}-{c.updates}x{c.batch_size}-seed{c.seed}": c for n, c in configs}


def run_all(console, name: str, experiments: dict[Path, TrainConfig]):
    """The world of this name and the results of all experiments (folder -> settings): run what is missing, print."""
    from klq_edu.app.experiment import run_experiment
    from klq_edu.app.report import print_results
    from klq_edu.app.terminal import progress_bars, show_update
    from klq_edu.figures import STYLES
    from klq_edu.worlds import load

    with console.status(f"loading the world {name} (the first time takes up to half a minute longer)"):
        world = load(name)
    bars, results = [], []
    with progress_bars(console) as progress:
        for settings in experiments.values():
            what = f"{STYLES[variant_of(settings.to_dict())][0]} seed {settings.seed}"
            bars.append(progress.add_task(what, total=settings.updates, note="", start=False))
        for bar, (folder, settings) in zip(bars, experiments.items()):
            progress.start_task(bar)
            results.append(run_experiment(world, settings, folder, show_update(progress, bar)))
            progress.update(bar, completed=settings.updates)
    print_results(console, world, results)
    return world, results


def run_demo(config: DemoConfig) -> Path:
    """Run what is missing, print the table and samples, and write the report; returns its path."""
    from rich.console import Console
    from rich.markup import escape

    from klq_edu.app import report
    from klq_edu.files import writable_folder

    console, start = Console(), time.perf_counter()
    folder = writable_folder(config.out / config.world)
    experiments = {folder / name: settings for name, settings in config.experiments().items()}
    page = report.write(folder / "report.html", *run_all(console, config.world, experiments))
    minutes = (time.perf_counter() - start) / 60
    console.print(f"\nreport: [bold]{escape(str(page))}[/]   runs: {escape(str(folder))}   time: {minutes:.1f} min")
    if config.open:
        webbrowser.open(page.resolve().as_uri())
    return page


def run_train(name: str, config: TrainConfig, out: Path, save_model: Path | None) -> None:
    """`klq train`: one experiment with a progress bar, and the trained model as a folder if wanted."""
    from rich.console import Console
    from rich.markup import escape

    from klq_edu.app.experiment import trained_policy
    from klq_edu.files import writable_folder

    console = Console()
    if save_model:
        writable_folder(save_model)
    world, _ = run_all(console, name, {out: config})
    if save_model:
        trained_policy(world, config, out).save_pretrained(save_model)
        world.tokenizer.save_pretrained(save_model)
        console.print(f"model: [bold]{escape(str(save_model))}[/]")
