"""`klq sweep`: the same rollout budget and learning rates for every algorithm in the grammar world, as one CSV."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.presets import TITLES, VARIANTS, preset

MILESTONES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class SweepConfig:
    """Run every algorithm variant over KL coefficients, learning rates and seeds in the grammar world.

    Finished runs are kept: Ctrl-C and the same command again continue with what is missing.
    """

    taus: tuple[float, ...] = (0.05, 0.2, 1.0)
    """KL coefficients τ."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Adam step sizes."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Algorithm variants."""
    seeds: int = 5
    """Seeds per setting."""
    updates: int = 80
    """Updates of 64 completions each."""
    critic: Literal["shared", "separate"] = "separate"
    """Value head on the policy's trunk, or a critic network of its own."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    out: Path = Path("results")
    """Folder for grammar_sweep.csv and its provenance."""
    runs: Path = Path("runs/sweep")
    """Folder for the runs themselves."""

    def experiments(self) -> dict[str, TrainConfig]:
        """Folder name -> settings of every run."""
        grid = [
            (v, t, lr, s)
            for t in self.taus
            for v in self.variants
            for lr in self.learning_rates
            for s in range(self.seeds)
        ]
        changes = {
            "updates": self.updates,
            "critic": self.critic,
            "device": "cpu",
            "eval_every": 10,
            "checkpoint_every": self.updates,
        }
        return {
            f"{v}-{self.critic}-tau{t:g}-lr{lr:g}-{self.updates}-seed{s}": preset(
                "grammar", v, tau=t, learning_rate=lr, seed=s, **changes
            )
            for v, t, lr, s in grid
        }


def run_sweep(config: SweepConfig) -> Path:
    """Run what is missing, in parallel, and write the CSV with one row per run; returns its path."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    import pandas as pd
    from rich.console import Console
    from rich.progress import Progress

    from klq_edu.report import machine
    from klq_edu.rlhf.runs import writable_folder
    from klq_edu.worlds import load

    out = writable_folder(config.out)
    load("grammar")  # train the shared reference once, before the workers start
    experiments = config.experiments()
    with (
        Progress(console=Console()) as progress,
        ProcessPoolExecutor(config.jobs, multiprocessing.get_context("spawn"), initializer=one_thread) as pool,
    ):
        bar = progress.add_task("sweep", total=len(experiments))
        futures = [pool.submit(one_run, settings, config.runs / name) for name, settings in experiments.items()]
        try:
            for _ in as_completed(futures):
                progress.advance(bar)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    path = out / "grammar_sweep.csv"
    pd.DataFrame([f.result() for f in futures]).to_csv(path, index=False)
    provenance = {"command": "klq sweep", "settings": experiments[next(iter(experiments))].to_dict(), **machine()}
    path.with_suffix(".json").write_text(json.dumps(provenance, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(path) + "\n")
    return path


def markdown(csv: Path) -> str:
    """The sweep as a Markdown table: improvement attained per τ, algorithm and learning rate, and speed at the best."""
    import pandas as pd

    runs = pd.read_csv(csv)
    rates = sorted(runs["learning_rate"].unique())
    head = ["τ", "algorithm", *(f"lr {rate:g}" for rate in rates), "completions to 90%"]
    lines = [head, ["---"] * len(head)]
    for tau, at_tau in runs.groupby("tau"):
        for name in (v for v in TITLES if (at_tau["algorithm"] == v).any()):
            part = at_tau[at_tau["algorithm"] == name]
            cells = {rate: group["attained"] for rate, group in part.groupby("learning_rate")}
            best = max(cells, key=lambda rate: cells[rate].median())
            reached = (
                part.loc[part["learning_rate"] == best, f"rollouts_to_{MILESTONES[0]:g}"].fillna(float("inf")).median()
            )
            shown = [f"{c.median():.3f} [{c.min():.3f}, {c.max():.3f}]" for c in (cells[rate] for rate in rates)]
            shown[rates.index(best)] = f"**{shown[rates.index(best)]}**"
            lines.append([f"{tau:g}", TITLES[name], *shown, f"{reached:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_thread() -> None:
    """A worker's set-up: small models are fastest, and reproducible, on one thread."""
    import torch

    torch.set_num_threads(1)


def one_run(settings: TrainConfig, folder: Path) -> dict:
    """Run (or read) one experiment; its row of the CSV."""
    from klq_edu.experiment import run_experiment
    from klq_edu.worlds import load

    result = run_experiment(load("grammar"), settings, folder)
    last = result.rows[-1]
    row = {"algorithm": result.variant, "critic": settings.critic, "tau": settings.tau}
    row |= {"learning_rate": settings.learning_rate, "seed": settings.seed}
    row |= {name: last[name] for name in ("rollouts", "attained", "regret", "J", "exact_reward", "exact_kl")}
    for goal in MILESTONES:
        reached = (r["rollouts"] for r in result.rows if r.get("attained", -1) >= goal)
        row[f"rollouts_to_{goal:g}"] = next(reached, None)
    return row
