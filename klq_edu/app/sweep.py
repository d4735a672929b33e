"""`klq sweep`: every algorithm with the same completions where the optimum is known, over τ and seeds, as one CSV."""

import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import VARIANTS, preset, variant_of

EARLY = (640, 1280, 2560)  # completions after which the share attained is noted
SCHEDULES = {  # how 5,120 completions are used, for every algorithm alike
    "on_policy": {"replay": 0, "tau_start": None, "updates": 80, "batch_size": 64},
    "equal": {"replay": 32, "epochs": 2},
    "replay": {},  # the world's own settings: cooled, 96 earlier completions beside each 32 new ones, 4 epochs
}


@dataclass(frozen=True)
class SweepConfig:
    """Finished runs are kept: Ctrl-C and the same command again continues with what is missing."""

    world: Literal["grammar", "grammar_proxy"] = "grammar"  # With the reward, or with a proxy that the reward judges.
    taus: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)  # KL coefficients τ.
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)  # Algorithm variants.
    schedules: tuple[Literal[*SCHEDULES], ...] = tuple(SCHEDULES)  # How completions are used.
    learning_rates: tuple[float, ...] = ()  # Adam's step sizes; none named: the world's …
    tuned_by: Path | None = None  # … or the best of the sweep in this CSV, per schedule, algorithm and nearest τ.
    seeds: int = 10  # Seeds per setting …
    first_seed: int = 100  # … from this one on.
    updates: int | None = None  # Updates of each run, for a short try; not given: the schedule's.
    jobs: int = 2  # Runs at a time, one thread each.
    name: str | None = None  # Name of the CSV, tables (.md), figure (.svg) and provenance (.json); else WORLD_sweep.
    out: Path = Path("runs")  # Folder for these (of those in the repository: results).
    runs: Path = Path("runs/sweep")  # Folder for the runs themselves.

    def __post_init__(self):
        for name in ("taus", "variants", "schedules", "seeds", "jobs"):
            if not (value := getattr(self, name)) or (isinstance(value, int) and value < 1):
                raise ValueError(f"{name} must not be empty or below 1, got {value}")
        if self.tuned_by and self.learning_rates:
            raise ValueError(f"give learning_rates or tuned_by, got both: {self.learning_rates}, {self.tuned_by}")

    def experiments(self) -> dict[str, tuple[str, TrainConfig]]:
        """Folder name -> schedule and settings of every run."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        found, best = {}, self.tuned_by and tuned(self.tuned_by)
        for tau, schedule, variant, seed in product(self.taus, self.schedules, self.variants, seeds):
            usual = preset(self.world, variant, tau=tau).learning_rate
            for rate in self.learning_rates or (best(schedule, variant, tau) if best else usual,):
                changes = SCHEDULES[schedule] | ({} if self.updates is None else {"updates": self.updates})
                changes |= {"tau": tau, "learning_rate": rate, "seed": seed, "device": "cpu"}
                config = preset(self.world, variant, **changes)
                often = {"eval_every": max(1, EARLY[0] // config.batch_size), "checkpoint_every": config.updates}
                name = f"{self.world}-{variant}-{schedule}-tau{tau:g}-lr{rate:g}"
                found[f"{name}-{config.updates}-seed{seed}"] = schedule, replace(config, **often)
        return found


def tuned(csv: Path) -> Callable[[str, str, float], float]:
    """A function (schedule, algorithm, τ) -> the learning rate whose mean KL(π‖π*) was least in another sweep: at the
    nearest τ there (by ratio; of two as near, the smaller), with the same schedule or, if it has none of that, replay.
    """
    import pandas as pd

    runs = pd.read_csv(csv)
    if missing := {"schedule", "algorithm", "tau", "learning_rate", "kl_optimum"} - set(runs):
        raise ValueError(f"tuned_by: {csv} must be the CSV of a sweep, it has no column {', '.join(sorted(missing))}")

    def best(schedule: str, variant: str, tau: float) -> float:
        known = schedule if (runs["schedule"] == schedule).any() else "replay"
        part = runs[(runs["schedule"] == known) & (runs["algorithm"] == variant)]
        if part.empty:
            rule = f"must have runs of {variant} with schedule {schedule} or replay"
            raise ValueError(f"tuned_by: {csv} {rule}, has none")
        near = min(sorted(part["tau"].unique()), key=lambda t: round(abs(math.log(t / tau)), 6))
        return float(part[part["tau"] == near].groupby("learning_rate")["kl_optimum"].mean().idxmin())

    return best


def run_sweep(config: SweepConfig) -> None:
    """Compare algorithms over τ and seeds in the grammar world, as one CSV."""
    import pandas as pd

    from klq_edu.app import comparison
    from klq_edu.figures import optimum_gaps
    from klq_edu.files import writable_folder, write_provenance
    from klq_edu.worlds import load

    path = writable_folder(config.out) / f"{config.name or f'{config.world}_sweep'}.csv"
    experiments = config.experiments()
    world = load(config.world)  # train the shared reference once, before the workers start
    calls = [(one_run, config.world, *about, config.runs / name) for name, about in experiments.items()]
    rows = pd.DataFrame(in_parallel(calls, config.jobs))
    if world.truth:
        rows = rows.join(pd.DataFrame(win_rates(config.world, experiments, config.runs)))
    rows.to_csv(path, index=False)
    sweep = {name: str(value) for name, value in asdict(config).items()}
    first = next(iter(experiments.values()))[1].to_dict()
    write_provenance(path, "cpu", sweep=sweep, **{"settings of the first run": first})
    if not comparison.several_rates(rows):
        labels = {name: comparison.LABELS[name] for name in config.schedules}
        optimum_gaps(rows, labels).figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    tables = [comparison.algorithms(path), comparison.schedules(path), comparison.power(path) if world.truth else ""]
    shown = "\n\n".join(filter(None, tables))
    path.with_suffix(".md").write_text(shown + "\n", encoding="utf-8")
    print(f"{shown}\n\n{path}")


def in_parallel(calls: list[tuple[Callable, ...]], jobs: int, what: str = "sweep") -> list:
    """Results of all calls (function, arguments …) by so many processes of one thread each, with a progress bar."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    import torch
    from rich.progress import track

    spawn = multiprocessing.get_context("spawn")  # one thread each: fastest for small models, and reproducible
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(*call) for call in calls]
        try:
            for done in track(as_completed(futures), what, len(futures)):
                done.result()  # an error ends the sweep now, not after hours
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt) or getattr(error, "signum", None) == signal.SIGTERM:
                for child in multiprocessing.active_children():  # Ctrl-C in a terminal reaches them by itself
                    child.terminate()
            pool.shutdown(cancel_futures=True)
            raise
    return [f.result() for f in futures]


def one_run(world: str, schedule: str, settings: TrainConfig, folder: Path) -> dict:
    """Run (or read) one experiment; its row of the CSV."""
    from klq_edu.app.experiment import run_experiment
    from klq_edu.worlds import load
    from klq_edu.worlds.grammar import modes

    world = load(world)
    result = run_experiment(world, settings, folder)
    last = result.rows[-1]
    row = {"schedule": schedule, "algorithm": variant_of(result.settings)}
    row |= {name: getattr(settings, name) for name in ("tau", "learning_rate", "seed")}
    row |= {name: last[name] for name in ("rollouts", "row_steps")}
    row["seconds"] = round(sum(r["seconds"] for r in result.rows), 1)
    row |= {name: last[name] for name in ("attained", "kl_optimum", "mode_mass", "J", "exact_reward", "exact_kl")}
    best = world.tree.sequence_distribution(world.tree.optimum(settings.tau)[2])
    row["mode_mass_optimum"] = best[modes(world.tree, settings.tau)].sum().item()
    shares = {r["rollouts"]: r["attained"] for r in result.rows if "attained" in r}
    return row | {f"attained_{n}": shares.get(n) for n in EARLY}


def win_rates(world: str, experiments: dict, runs: Path) -> list[dict]:
    """What the true reward says of each run: its exact mean, and exact win-rates against the reference and against KLQ
    with the same seed and schedule (of the first learning rate). One row per run, in the order of the experiments."""
    from rich.progress import track

    from klq_edu.app.experiment import trained_policy
    from klq_edu.worlds import load
    from klq_edu.worlds.grammar import policy_table, win_rate

    world = load(world)
    tables, klq, rows = {}, {}, []
    for name, (used, settings) in track(experiments.items(), "policies"):
        tables[name] = policy_table(world.tree, world.tokenizer, trained_policy(world, settings, runs / name))
        if settings.algorithm == "klq":
            klq.setdefault((used, settings.tau, settings.seed), tables[name])
    for name, (used, settings) in track(experiments.items(), "win-rates"):
        table, rival = tables[name], klq.get((used, settings.tau, settings.seed))
        row = {"true_reward": world.truth.expected_reward(table).item()}
        row["wins_over_reference"] = win_rate(world.truth, table, world.tree.ref)
        rows.append(row | {"wins_over_klq": None if rival is None else win_rate(world.truth, table, rival)})
    return rows
