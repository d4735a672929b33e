"""`klq sweep`: every algorithm with the same completions where the optimum is known, over τ and seeds, as one CSV."""

import math
import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
SHOWN = ("attained", "attained_1280", "mode_mass", "mode_mass_optimum", "kl_optimum")
LABELS = {"on_policy": "on-policy", "equal": "cooled replay, equal compute", "replay": "cooled replay"}


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
    name: str = "grammar_sweep"  # Name of the CSV, the table (.md) and the provenance (.json).
    out: Path = Path("runs")  # Folder for these (of those in the repository: results).
    runs: Path = Path("runs/sweep")  # Folder for the runs themselves.

    def __post_init__(self):
        for name in ("taus", "variants", "schedules", "seeds", "jobs"):
            if not (value := getattr(self, name)) or (isinstance(value, int) and value < 1):
                raise ValueError(f"{name} must not be empty or below 1, got {value}")

    def experiments(self) -> dict[str, tuple[str, TrainConfig]]:
        """Folder name -> schedule and settings of every run."""
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        found, best = {}, self.tuned_by and tuned(self.tuned_by)
        for tau, schedule, variant, seed in product(self.taus, self.schedules, self.variants, seeds):
            usual = best(schedule, variant, tau) if best else preset(self.world).learning_rate
            for rate in self.learning_rates or (usual,):
                changes = SCHEDULES[schedule] | ({"updates": self.updates} if self.updates else {})
                changes |= {"tau": tau, "learning_rate": rate, "seed": seed, "device": "cpu"}
                config = preset(self.world, variant, **changes)
                often = {"eval_every": max(1, EARLY[0] // config.batch_size), "checkpoint_every": config.updates}
                name = f"{self.world}-{variant}-{schedule}-tau{tau:g}-lr{rate:g}"
                config = preset(self.world, variant, **changes, **often)
                found[f"{name}-{config.updates}-seed{seed}"] = schedule, config
        return found


def tuned(csv: Path) -> Callable[[str, str, float], float]:
    """A function (schedule, algorithm, τ) -> the learning rate whose mean KL(π‖π*) was least in another sweep, at the
    nearest τ there; of a schedule that it lacks, replay's."""
    import pandas as pd

    runs = pd.read_csv(csv)

    def best(schedule: str, variant: str, tau: float) -> float:
        known = schedule if (runs["schedule"] == schedule).any() else "replay"
        part = runs[(runs["schedule"] == known) & (runs["algorithm"] == variant)]
        near = min(part["tau"].unique(), key=lambda t: abs(math.log(t / tau)))
        return float(part[part["tau"] == near].groupby("learning_rate")["kl_optimum"].mean().idxmin())

    return best


def run_sweep(config: SweepConfig) -> None:
    """Compare algorithms over τ and seeds in the grammar world, as one CSV."""
    import pandas as pd

    from klq_edu.figures import optimum_gaps
    from klq_edu.files import writable_folder, write_provenance
    from klq_edu.worlds import load

    path = writable_folder(config.out) / f"{config.name}.csv"
    load(config.world)  # train the shared reference once, before the workers start
    experiments = config.experiments()
    calls = [(one_run, config.world, *about, config.runs / name) for name, about in experiments.items()]
    table = pd.DataFrame(in_parallel(calls, config.jobs))
    if load(config.world).truth:
        table = table.join(pd.DataFrame(win_rates(config.world, experiments, config.runs)))
    table.to_csv(path, index=False)
    sweep = {name: str(value) for name, value in asdict(config).items()}
    first = next(iter(experiments.values()))[1].to_dict()
    write_provenance(path, "cpu", sweep=sweep, **{"settings of the first run": first})
    shown = markdown(path) + (f"\n\n{power_table(path)}" if "wins_over_klq" in table and config.seeds > 1 else "")
    labels = {name: LABELS[name] for name in config.schedules}
    optimum_gaps(table, labels).figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    path.with_suffix(".md").write_text(shown + "\n", encoding="utf-8")
    print(f"{shown}\n\n{path}")


def in_parallel(calls: list[tuple[Callable, ...]], jobs: int) -> list:
    """Results of all calls (function, arguments …) by so many processes of one thread each, with a progress bar."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    import torch
    from rich.progress import track

    spawn = multiprocessing.get_context("spawn")  # one thread each: fastest for small models, and reproducible
    with ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(*call) for call in calls]
        try:
            for done in track(as_completed(futures), "sweep", len(futures)):
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


def markdown(csv: Path, schedule: str | None = None) -> str:
    """Over seeds, the share of the possible improvement (median [lowest, highest], mean, and the median after 1,280
    completions), the median mass of each prompt's best sentence beside the optimum's, KL(π‖π*) in nats, and by how much
    that is longer than KLQ's of the same seed (mean, and the 95 % interval of a bootstrap over seeds). Of one schedule,
    or of all."""
    import pandas as pd

    from klq_edu.figures import STYLES

    runs = pd.read_csv(csv)
    runs = runs if schedule is None else runs[runs["schedule"] == schedule]
    heads = ["τ", "completions", "algorithm", "lr", "attained", "mean", "early", "mode", "KL(π‖π*) [nats]"]
    heads.append("longer than KLQ's")
    lines = [heads[:1] + heads[1 + (schedule is not None) :]]
    lines.append(["---"] * len(lines[0]))
    for (tau, used, name, rate), part in runs.groupby(["tau", "schedule", "algorithm", "learning_rate"], sort=False):
        klq = runs[(runs["algorithm"] == "klq") & (runs["tau"] == tau) & (runs["schedule"] == used)]
        pairs = klq.merge(part, on="seed", suffixes=("_klq", ""))
        longer = difference(pairs["kl_optimum"] - pairs["kl_optimum_klq"])
        alone = name == "klq" or klq["learning_rate"].nunique() != 1
        share, early, mode, best, nats = (part[c] for c in SHOWN)
        cells = [f"{tau:g}", *([LABELS[used]] if schedule is None else []), STYLES[name]["label"], f"{rate:g}"]
        cells += [interval(share, 3), f"{share.mean():.3f}", f"{early.median():.2f}"]
        cells += [f"{mode.median():.2f} of {best.median():.2f}", interval(nats, 3)]
        lines.append([*cells, "" if alone else longer])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(x, digits: int) -> str:
    """Median [lowest, highest]."""
    return f"{x.median():.{digits}f} [{x.min():.{digits}f}, {x.max():.{digits}f}]"


def difference(x) -> str:
    """Mean [95 % interval of a percentile bootstrap]."""
    import numpy as np

    means = np.random.default_rng(0).choice(x.to_numpy(), (10_000, len(x))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{x.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def win_rates(world: str, experiments: dict, runs: Path) -> list[dict]:
    """What the true reward says of each run: its exact mean, and exact win-rates against the reference and against KLQ
    with the same seed. One row per run, in the order of the experiments."""
    from klq_edu.app.experiment import trained_policy
    from klq_edu.worlds import load
    from klq_edu.worlds.grammar import policy_table, win_rate

    world, tables = load(world), {}
    for name, (_, settings) in experiments.items():
        tables[name] = policy_table(world.tree, world.tokenizer, trained_policy(world, settings, runs / name)).float()
    place = {name: (used, s.tau, s.seed) for name, (used, s) in experiments.items()}
    klq = {place[name]: tables[name] for name, (_, s) in experiments.items() if s.algorithm == "klq"}
    rows = []
    for name, table in tables.items():
        row = {"true_reward": world.truth.expected_reward(table).item()}
        row["wins_over_reference"] = win_rate(world.truth, table, world.tree.ref)
        row["wins_over_klq"] = win_rate(world.truth, table, klq[place[name]]) if place[name] in klq else None
        rows.append(row)
    return rows


def power_table(csv: Path, pairs: tuple[int, ...] = (64, 256, 1024)) -> str:
    """How many seeds (with so many pairs of completions each) it would take to see, 19 times in 20 and with power 0.8,
    that the true win-rate against KLQ is not ½."""
    import pandas as pd

    from klq_edu.figures import STYLES
    from klq_edu.rlhf.judge import pairs_needed, seeds_needed

    runs = pd.read_csv(csv)
    lines = [["τ", "completions", "algorithm", "wins over KLQ", "sd of a seed", "pairs, of two fixed policies"]]
    lines[0] += [f"seeds, {n} pairs each" for n in pairs]
    lines.append(["---"] * len(lines[0]))
    others = runs[runs["algorithm"] != "klq"]
    for (tau, used, name), part in others.groupby(["tau", "schedule", "algorithm"], sort=False):
        rate, sd = part["wins_over_klq"].mean(), part["wins_over_klq"].std()
        counts = [pairs_needed(rate - 0.5), *(seeds_needed(rate - 0.5, sd, n) for n in pairs)]
        shown = [f"{tau:g}", LABELS[used], STYLES[name]["label"], interval(part["wins_over_klq"], 3), f"{sd:.3f}"]
        lines.append([*shown, *(f"{n:,.0f}" for n in counts)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
