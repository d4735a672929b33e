"""`klq sweep`: the same rollout budget and learning rates for every algorithm in the grammar world, as one CSV."""

import math
import signal
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import VARIANTS, preset, variant_of

MILESTONES = (0.9, 0.95, 0.98)


@dataclass(frozen=True)
class SweepConfig:
    """Finished runs are kept: Ctrl-C and the same command again continue with what is missing."""

    taus: tuple[float, ...] = (0.05, 0.2, 1.0)  # KL coefficients τ.
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)  # Adam's step sizes.
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)  # Algorithm variants.
    critics: tuple[str, ...] = ("separate",)  # Or shared, or shared:FACTOR on the value gradient into the trunk.
    seeds: int = 5  # Seeds per setting.
    updates: int = 80  # Updates of 64 completions each.
    jobs: int = 2  # Runs at a time, one thread each.
    name: str = "grammar_sweep"  # Name of the CSV, the table (.md) and the provenance (.json).
    out: Path = Path("runs")  # Folder for these (of those in the repository: results).
    runs: Path = Path("runs/sweep")  # Folder for the runs themselves.

    def __post_init__(self):
        for name in ("taus", "learning_rates", "variants", "critics", "seeds", "jobs"):
            if not (value := getattr(self, name)) or (isinstance(value, int) and value < 1):
                raise ValueError(f"{name} must not be empty or below 1, got {value}")

    def experiments(self) -> dict[str, TrainConfig]:
        """Folder name -> settings of every run."""
        axes = (self.taus, self.variants, self.critics, self.learning_rates, range(self.seeds))
        found, common = {}, {"updates": self.updates, "checkpoint_every": self.updates, "eval_every": 10}
        for tau, variant, critic, rate, seed in product(*axes):
            kind, _, scale = critic.partition(":")
            changes = common | {"device": "cpu", "critic": kind, "value_grad_scale": float(scale) if scale else None}
            name = f"{variant}-{critic.replace(':', '')}-tau{tau:g}-lr{rate:g}-{self.updates}-seed{seed}"
            found[name] = preset("grammar", variant, tau=tau, learning_rate=rate, seed=seed, **changes)
        return found


def run_sweep(config: SweepConfig) -> None:
    """Compare algorithms over τ, learning rates and seeds in the grammar world, as one CSV."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    import pandas as pd
    import torch
    from rich.progress import track

    from klq_edu.files import writable_folder, write_provenance
    from klq_edu.worlds import load

    path = writable_folder(config.out) / f"{config.name}.csv"
    load("grammar")  # train the shared reference once, before the workers start
    experiments = config.experiments()
    spawn = multiprocessing.get_context("spawn")  # one thread each: fastest for small models, and reproducible
    with ProcessPoolExecutor(config.jobs, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(one_run, settings, config.runs / name) for name, settings in experiments.items()]
        try:
            for done in track(as_completed(futures), "sweep", len(futures)):
                done.result()  # an error ends the sweep now, not after hours
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) or getattr(error, "signum", None) == signal.SIGTERM:
                for child in multiprocessing.active_children():  # Ctrl-C in a terminal reaches them by itself
                    child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    pd.DataFrame([f.result() for f in futures]).to_csv(path, index=False)
    sweep = {name: str(value) for name, value in asdict(config).items()}
    first = next(iter(experiments.values())).to_dict()
    write_provenance(path, "cpu", sweep=sweep, **{"settings of the first run": first})
    path.with_suffix(".md").write_text(markdown(path) + "\n", encoding="utf-8")
    print(f"{markdown(path)}\n\n{path}")


def markdown(csv: Path) -> str:
    """Improvement attained, median [lowest, highest], per τ, algorithm, critic and learning rate; the best in bold."""
    import pandas as pd

    from klq_edu.figures import STYLES

    runs = pd.read_csv(csv)
    rates = (f"lr {rate:g}" for rate in sorted(runs["learning_rate"].unique()))
    lines = [["τ", "algorithm", "critic", *rates, "completions to 90%"]]
    lines.append(["---"] * len(lines[0]))
    for (tau, name, critic), part in runs.groupby(["tau", "algorithm", "critic"], sort=False):
        attained = part.groupby("learning_rate")["attained"]
        cells = {rate: f"{x.median():.3f} [{x.min():.3f}, {x.max():.3f}]" for rate, x in attained}
        best = attained.median().idxmax()
        cells[best] = f"**{cells[best]}**"
        reached = part.loc[part["learning_rate"] == best, "rollouts_to_0.9"].fillna(math.inf).median()
        lines.append([f"{tau:g}", STYLES[name]["label"], critic, *cells.values(), f"{reached:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def one_run(settings: TrainConfig, folder: Path) -> dict:
    """Run (or read) one experiment; its row of the CSV."""
    from klq_edu.app.experiment import run_experiment
    from klq_edu.worlds import load

    result = run_experiment(load("grammar"), settings, folder)
    last, scale = result.rows[-1], "" if settings.value_grad_scale is None else f":{settings.value_grad_scale:g}"
    row = {"algorithm": variant_of(result.settings), "critic": settings.critic + scale}
    row |= {name: getattr(settings, name) for name in ("tau", "learning_rate", "seed")}
    row |= {name: last[name] for name in ("rollouts", "attained", "regret", "J", "exact_reward", "exact_kl")}
    for goal in MILESTONES:
        row[f"rollouts_to_{goal:g}"] = next((r["rollouts"] for r in result.rows if r.get("attained", -1) >= goal), None)
    return row
