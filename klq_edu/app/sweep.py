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
    """Run every algorithm variant over KL coefficients, learning rates and seeds in the grammar world.

    Finished runs are kept: Ctrl-C and the same command again continue with what is missing.
    """

    taus: tuple[float, ...] = (0.05, 0.2, 1.0)
    """KL coefficients τ."""
    learning_rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3)
    """Adam step sizes."""
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)
    """Algorithm variants."""
    critics: tuple[str, ...] = ("separate",)
    """separate, shared, or shared:FACTOR with this factor on the value gradient into the trunk."""
    seeds: int = 5
    """Seeds per setting."""
    updates: int = 80
    """Updates of 64 completions each."""
    jobs: int = 2
    """Runs at a time, one thread each."""
    name: str = "grammar_sweep"
    """Name of the CSV, and of the table (.md) and the provenance (.json) beside it."""
    out: Path = Path("runs")
    """Folder for these (the committed ones were made with --out results)."""
    runs: Path = Path("runs/sweep")
    """Folder for the runs themselves."""

    def __post_init__(self):
        for name in ("taus", "learning_rates", "variants", "critics", "seeds", "jobs"):
            if not getattr(self, name) or (isinstance(getattr(self, name), int) and getattr(self, name) < 1):
                raise ValueError(f"{name} must not be empty or below 1, got {getattr(self, name)}")

    def experiments(self) -> dict[str, TrainConfig]:
        """Folder name -> settings of every run."""
        common = {"updates": self.updates, "device": "cpu", "eval_every": 10, "checkpoint_every": self.updates}
        found = {}
        axes = (self.taus, self.variants, self.critics, self.learning_rates, range(self.seeds))
        for tau, variant, critic, rate, seed in product(*axes):
            kind, _, scale = critic.partition(":")
            changes = common | {"critic": kind, "value_grad_scale": float(scale) if scale else None}
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

    out = writable_folder(config.out)
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
    path = out / f"{config.name}.csv"
    pd.DataFrame([f.result() for f in futures]).to_csv(path, index=False)
    sweep = {name: str(value) for name, value in asdict(config).items()}
    first = next(iter(experiments.values())).to_dict()
    write_provenance(path, "cpu", sweep=sweep, **{"settings of the first run": first})
    path.with_suffix(".md").write_text(markdown(path) + "\n", encoding="utf-8")
    print(f"{markdown(path)}\n\n{path}")


def markdown(csv: Path) -> str:
    """The sweep as a Markdown table: improvement attained per τ, algorithm, critic and learning rate, best in bold."""
    import pandas as pd

    from klq_edu.figures import STYLES

    runs = pd.read_csv(csv)
    rates = sorted(runs["learning_rate"].unique())
    head = ["τ", "algorithm", "critic", *(f"lr {rate:g}" for rate in rates), "completions to 90%"]
    lines = [head, ["---"] * len(head)]
    for (tau, name, critic), part in runs.groupby(["tau", "algorithm", "critic"], sort=False):
        lines.append([f"{tau:g}", STYLES[name][0], critic, *_cells(part, rates)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(part, rates: list[float]) -> list[str]:
    """Median [lowest, highest] improvement attained per learning rate, and how soon the best one reached 90%."""
    attained = {rate: part.loc[part["learning_rate"] == rate, "attained"] for rate in rates}
    best = max(rates, key=lambda rate: attained[rate].median())
    shown = [f"{x.median():.3f} [{x.min():.3f}, {x.max():.3f}]" for x in attained.values()]
    shown[rates.index(best)] = f"**{shown[rates.index(best)]}**"
    reached = part.loc[part["learning_rate"] == best, f"rollouts_to_{MILESTONES[0]:g}"].fillna(math.inf).median()
    return [*shown, f"{reached:.0f}"]


def one_run(settings: TrainConfig, folder: Path) -> dict:
    """Run (or read) one experiment; its row of the CSV."""
    from klq_edu.app.experiment import run_experiment
    from klq_edu.worlds import load

    result = run_experiment(load("grammar"), settings, folder)
    scale = "" if settings.value_grad_scale is None else f":{settings.value_grad_scale:g}"
    row = {"algorithm": variant_of(result.settings), "critic": settings.critic + scale, "tau": settings.tau}
    row |= {"learning_rate": settings.learning_rate, "seed": settings.seed}
    row |= {k: result.rows[-1][k] for k in ("rollouts", "attained", "regret", "J", "exact_reward", "exact_kl")}
    for goal in MILESTONES:
        reached = (r["rollouts"] for r in result.rows if r.get("attained", -1) >= goal)
        row[f"rollouts_to_{goal:g}"] = next(reached, None)
    return row
