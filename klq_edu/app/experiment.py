"""One experiment = one world, one configuration, one folder: reference samples, training, samples after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from klq_edu.files import read_json, write_json
from klq_edu.machine import resolve_device, threads
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import identity, reward_identity
from klq_edu.rlhf.loop import train
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.runs import Run, load_checkpoint
from klq_edu.worlds.registry import variant_of
from klq_edu.worlds.world import World

SAMPLES_PER_PROMPT = 2
SAMPLING_SEED = 20_250_823
SAMPLES_FILE = "test_samples.json"


@dataclass
class Result:
    """A finished experiment: settings, one row of metrics per update, and test samples before and after."""

    settings: dict
    rows: list[dict]
    before: pd.DataFrame
    after: pd.DataFrame

    @property
    def variant(self) -> str:
        """Name of the algorithm variant."""
        return variant_of(self.settings)

    def table(self) -> pd.DataFrame:
        """The metrics with columns that say which experiment they belong to."""
        labels = {"algorithm": self.variant, "seed": self.settings["seed"], "tau": self.settings["tau"]}
        return pd.DataFrame(self.rows).assign(**labels)


def run_experiment(
    world: World, config: TrainConfig, folder: str | Path, on_update: Callable[[dict], None] = lambda row: None
) -> Result:
    """Train in `world` with `config`, keeping everything in `folder`.

    A finished folder is read, an interrupted one is continued from its last update, another is started. Raises
    ValueError where the folder is in use or holds a run on other prompts, for another reward or from another model.
    """
    run = Run(folder, {"world": world.name, **config.to_dict()})
    with run.writing(), threads(world.threads):
        run.claim(identity(world.prompts, world.reward))
        if (finished := read_result(run)) is not None:
            run.say_finished(config.updates)
            return finished
        return _run(world, config, run, on_update)


def _run(world: World, config: TrainConfig, run: Run, on_update: Callable[[dict], None]) -> Result:
    policy = world.make_policy(config).to(resolve_device(config.device))
    before = held_out_samples(world, policy, config)
    run.claim({"reward": reward_identity(world.reward)}, again=True)
    centred = world.tree is not None  # an enumerable world's rewards have mean exactly 0 under its reference
    policy.start_value(0.0 if centred else before["reward"].mean())
    (run.folder / SAMPLES_FILE).unlink(missing_ok=True)  # of a shorter run, where `updates` was raised
    train(
        policy, world.tokenizer, world.prompts, world.reward, config, run=run, constraint=world.constraint,
        evaluate=world.evaluate and world.evaluate(config), on_update=on_update,
    )  # fmt: skip
    after = held_out_samples(world, policy, config)
    run.claim({"reward": reward_identity(world.reward)}, again=True)
    samples = {"before": before.to_dict("records"), "after": after.to_dict("records")}
    write_json(run.folder / SAMPLES_FILE, samples)
    return read_result(run)


def read_result(run: Run) -> Result | None:
    """The result in a finished run's folder; None if the run is not finished."""
    samples, rows = run.folder / SAMPLES_FILE, run.rows()
    if not samples.exists() or len(rows) < run.settings["updates"]:
        return None
    tables = {name: pd.DataFrame(rows) for name, rows in read_json(samples).items()}
    return Result(run.settings, rows, **tables)


def trained_policy(world: World, config: TrainConfig, folder: str | Path) -> ActorCritic:
    """The policy of a run, finished or not, with the parameters of its last checkpoint."""
    policy = world.make_policy(config)
    policy.load_state_dict(load_checkpoint(Path(folder) / "checkpoint.pt")["parameters"], strict=False)
    return policy


def held_out_samples(world: World, policy: ActorCritic, config: TrainConfig) -> pd.DataFrame:
    """Completions of the world's test prompts with their rewards and KL; the same random numbers on every call."""
    rows = world.test_prompts[list(range(len(world.test_prompts))) * SAMPLES_PER_PROMPT]
    rollout = collect(
        policy, world.tokenizer, rows.pop("prompt"), max_new_tokens=config.max_new_tokens,
        temperature=config.temperature, constraint=world.constraint,
        generator=torch.Generator().manual_seed(SAMPLING_SEED),
    )  # fmt: skip
    rewards = score(world.reward, rollout, **rows)
    columns = {"prompt": rollout.prompts, "completion": rollout.completions}
    columns |= {"reward": rewards.tolist(), "kl": rollout.kl.sum(1).tolist()}
    if world.judge:
        columns["judge"] = world.judge(rollout.prompts, rollout.completions, **rows)
    return pd.DataFrame(columns)


def last_quarter(rows: list[dict], name: str) -> float:
    """Mean of a metric over the last quarter of the updates in which it was measured."""
    values = [row[name] for row in rows if name in row]
    tail = values[-max(1, len(values) // 4) :]
    return sum(tail) / len(tail)


def summarise_results(results: list[Result]) -> pd.DataFrame:
    """One row per experiment: test reward before and after, reward and KL at the end of training, and its time."""
    rows = []
    for r in results:
        row = {"algorithm": r.variant, "tau": r.settings["tau"], "seed": r.settings["seed"]}
        row |= {"test_before": r.before["reward"].mean(), "test_after": r.after["reward"].mean()}
        if "judge" in r.after:
            row |= {"judge_before": r.before["judge"].mean(), "judge_after": r.after["judge"].mean()}
        row |= {"reward": last_quarter(r.rows, "reward"), "kl": last_quarter(r.rows, "kl")}
        row |= {"attained": r.rows[-1].get("attained", torch.nan), "seconds": sum(x["seconds"] for x in r.rows)}
        rows.append(row)
    return pd.DataFrame(rows)
