"""`klq compare`: KLQ against PPO where the reward is learnt, over seeds and τ: a file per run, and what they say."""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import VARIANTS, WORLDS, preset, variant_of

LEARNT = tuple(name for name, world in WORLDS.items() if world.made)
GIVEN = ("tau", "seed", "whiten")  # what other options decide


@dataclass(frozen=True)
class CompareConfig:
    """A finished run is a file in OUT/WORLD and a line of runs.csv there: Ctrl-C, and the same command continues with
    what is missing, with those files on another machine too."""

    world: Literal[*LEARNT] = "tldr"  # What is trained.
    taus: tuple[float, ...] = ()  # KL coefficients τ; none named: the world's.
    variants: tuple[Literal[*VARIANTS], ...] = ("klq", "ppo_clip")  # Algorithm variants.
    seeds: int = 8  # Seeds of training (and of sampling) per setting …
    first_seed: int = 100  # … from this one on.
    # Other fields of TrainConfig that are numbers, for all runs: --changes learning_rate 2e-4 replay 0
    changes: dict[str, float] = field(default_factory=dict)
    jobs: int = 2  # Seeds at a time, one thread each.
    out: Path = Path("runs")  # Folder for the files (of those in the repository: results/compare).
    runs: Path = Path("runs/compare")  # Folder for the runs themselves.

    def __post_init__(self):
        for name in ("variants", "seeds", "jobs"):
            if not (value := getattr(self, name)) or (isinstance(value, int) and value < 1):
                raise ValueError(f"{name} must not be empty or below 1, got {value}")
        usual = WORLDS[self.world].settings
        for name, value in self.changes.items():
            known = getattr(usual, name, None)
            if name in GIVEN or not isinstance(known, int | float) or type(known)(value) != value:
                rule = f"numbers that these fields of TrainConfig can have, and not of {', '.join(GIVEN)}"
                raise ValueError(f"changes must be {rule}, got {name!r}: {value}")

    def changed(self) -> str:
        """The changes in words."""
        return ", ".join(f"{name} {value:g}" for name, value in sorted(self.changes.items()))

    def experiments(self) -> list[dict[str, TrainConfig]]:
        """For each τ and seed: name -> settings of the runs that start from the same samples."""
        usual = WORLDS[self.world].settings
        changes = {name: type(getattr(usual, name))(value) for name, value in self.changes.items()} | {"device": "cpu"}
        shown = "".join(f"-{change.replace(' ', '')}" for change in filter(None, self.changed().split(", ")))
        seeds = range(self.first_seed, self.first_seed + self.seeds)
        return [
            {
                f"{name}-tau{tau:g}{shown}-seed{seed}": preset(self.world, name, **changes | {"tau": tau, "seed": seed})
                for name in self.variants
            }
            for seed, tau in product(seeds, self.taus or (usual.tau,))
        ]


def run_compare(config: CompareConfig) -> None:
    """Compare algorithms over seeds in a world with a learnt reward, judged on held-out prompts along every run."""
    from klq_edu.app import study
    from klq_edu.app.sweep import in_parallel
    from klq_edu.files import writable_folder

    folder = writable_folder(config.out / config.world)
    parts = [{name: c for name, c in runs.items() if not done(folder, name, c)} for runs in config.experiments()]
    place = folder, config.runs / config.world
    calls = [(some_runs, config.world, config.changed(), runs, *place) for runs in filter(None, parts)]
    if calls:
        import pandas as pd

        from klq_edu.worlds import load

        tables = load(config.world).tables  # made once, before the workers start
        known = pd.read_csv(folder / study.RUNS, dtype=str)["reward_model"] if (folder / study.RUNS).exists() else []
        study.check_reward(folder, [*known, digest(tables["stages"])])
        for name, table in tables.items():
            without_texts(table).to_csv(folder / f"made_{name}.csv", index=False)
        in_parallel(calls, config.jobs, "seeds")
    print(study.write(folder))


def digest(stages) -> str:
    """What tells the reward model from others, from the table of the road's stages."""
    return stages.set_index("stage")["digest"]["reward"]


def without_texts(table):
    """The same with prompts as numbers and no completions, and other numbers to four digits."""
    table = table.drop(columns="completion", errors="ignore").round(4)
    codes = {"prompt": lambda t: t["prompt"].factorize()[0]} if "prompt" in table else {}
    return table.assign(**codes)


def done(folder: Path, name: str, config: TrainConfig) -> bool:
    """Whether this run's file is there, and of these settings (a field that did not exist then has its default)."""
    import pandas as pd

    from klq_edu.app.study import RUNS

    if not (folder / RUNS).exists() or not (folder / f"{name}.csv").exists():
        return False
    known = pd.read_csv(folder / RUNS, index_col="run")["settings"]
    return name in known and TrainConfig().to_dict() | json.loads(known[name]) == config.to_dict()


def some_runs(world: str, changes: str, experiments: dict[str, TrainConfig], folder: Path, runs: Path) -> None:
    """Run (or read) these experiments one after the other, and write what each has found out to `folder`."""
    from klq_edu.app.experiment import run_experiment
    from klq_edu.worlds import load

    made = load(world)
    for name, settings in experiments.items():
        result = run_experiment(made, settings, runs / name)
        record(folder, name, changes, settings, result, made.tables["stages"])


def record(folder: Path, name: str, changes: str, settings: TrainConfig, result, stages) -> None:
    """Write a run's test samples, a row each without its texts, to NAME.csv, and the run as a line of runs.csv."""
    import pandas as pd
    from filelock import FileLock

    from klq_edu.app.study import RUNS
    from klq_edu.files import replace_file
    from klq_edu.machine import facts

    tests = [without_texts(table).assign(update=n) for n, table in result.tests.items()]
    table = pd.concat(tests, ignore_index=True)
    table = table.assign(ended=table["ended"].astype(int))[["update", *table.columns.drop("update")]]
    replace_file(folder / f"{name}.csv", lambda draft: table.to_csv(draft, index=False))
    last = result.rows[-1]
    row = {"run": name, "algorithm": variant_of(result.settings), "changes": changes, "whiten": settings.whiten}
    row |= {key: result.settings[key] for key in ("tau", "seed", "updates")}
    row |= {key: last[key] for key in ("rollouts", "row_steps")}
    row["seconds"] = round(sum(r["seconds"] for r in result.rows))
    row |= {"settings": json.dumps(settings.to_dict()), "reward_model": digest(stages)}
    row |= {key: value for key, value in facts("cpu").items() if key in ("torch", "machine")}
    with FileLock(folder / ".lock"):
        path = folder / RUNS
        table = pd.DataFrame([row])
        if path.exists():
            known = pd.read_csv(path)
            table = pd.concat([known[known["run"] != name], table], ignore_index=True)
        replace_file(path, lambda draft: table.sort_values("run").to_csv(draft, index=False))
