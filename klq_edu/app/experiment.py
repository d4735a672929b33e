"""One experiment = one world, one configuration, one folder: reference samples, training, samples after."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from klq_edu.files import read_json, write_json
from klq_edu.machine import resolve_device, resolve_dtype, threads
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import fingerprint, identity, reward_identity
from klq_edu.rlhf.judge import copied
from klq_edu.rlhf.loop import train
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import Rollout, collect
from klq_edu.rlhf.runs import Run, load_checkpoint
from klq_edu.worlds.registry import variant_of
from klq_edu.worlds.world import World

SAMPLING_SEED = 20_250_823
SAMPLES_FILE = "test_samples.json"


@dataclass
class Result:
    """A finished experiment: settings, one row of metrics per update, and test samples after so many updates."""

    settings: dict
    rows: list[dict]
    tests: dict[int, pd.DataFrame]

    @property
    def before(self) -> pd.DataFrame:
        """The reference's test samples."""
        return self.tests[0]

    @property
    def after(self) -> pd.DataFrame:
        """The trained policy's test samples."""
        return self.tests[self.settings["updates"]]

    @property
    def labels(self) -> dict:
        """What tells the experiment from others in a table."""
        return {"algorithm": variant_of(self.settings), "tau": self.settings["tau"], "seed": self.settings["seed"]}


def run_experiment(world: World, config: TrainConfig, folder: str | Path, on_update=lambda row: None) -> Result:
    """Train in `world` with `config`, keeping everything in `folder`; `on_update` gets each new row of metrics.

    A finished folder is read, an interrupted one is continued from its last update, another is started. Raises
    ValueError where the folder is in use or holds a run on other prompts, for another reward or from another model.
    Where test prompts or judges have changed, the policies are judged anew.
    """
    run = Run(folder, {"world": world.name, **config.to_dict()})
    with run.writing(), threads(world.threads):
        run.claim(identity(world.prompts, world.reward))
        judged = judged_by(world)
        if result := read_result(run, judged):
            run.say_finished(config.updates)
            return result
        policy = world.make_policy(config).to(resolve_device(config.device))
        policy.dtype = resolve_dtype(config.dtype, policy.device)
        before = reference_samples(world, policy, config)
        keep_test(run, judged, 0, before)
        run.claim({"reward": reward_identity(world.reward)}, again=True)
        exact = world.tree and world.tree.expected_reward(world.tree.ref).item()
        if config.centre == "none":
            policy.start_value(before["reward"].mean() if exact is None else exact)

        def test(policy: ActorCritic) -> dict[str, float]:
            table = held_out_samples(world, policy, config)
            keep_test(run, judged, len(run.rows()) + 1, table)
            return table.mean(numeric_only=True).add_prefix("test_").to_dict()

        train(
            policy, world.tokenizer, world.prompts, world.reward, config, run=run, constraint=world.constraint,
            evaluate=world.evaluate(config) if world.evaluate else test, on_update=on_update,
            baselines=world.baselines if config.centre == "prompt" else None,
        )  # fmt: skip
        if (result := read_result(run, judged)) is None:
            keep_test(run, judged, config.updates, held_out_samples(world, policy, config))
        run.claim({"reward": reward_identity(world.reward)}, again=True)
        return result or read_result(run, judged)


def trained_policy(world: World, config: TrainConfig, folder: Path) -> ActorCritic:
    """The policy of a finished run, from its last checkpoint."""
    policy = world.make_policy(config)
    policy.load_state_dict(load_checkpoint(folder / "checkpoint.pt")["parameters"], strict=False)
    return policy


def judged_by(world: World) -> str:
    """A digest of the test prompts and of those who judge what is sampled after them."""
    judges = {name: reward_identity(judge) for name, judge in world.judges.items()}
    return fingerprint([world.test_prompts.to_dict(), world.samples_per_prompt, judges])


def keep_test(run: Run, judged: str, updates: int, table: pd.DataFrame) -> None:
    """Write test samples after so many updates into the run's folder, beside those that the same judges judged."""
    known = read_json(run.folder / SAMPLES_FILE)
    kept = known if known.get("judged") == judged else {"judged": judged}
    write_json(run.folder / SAMPLES_FILE, kept | {str(updates): table.to_dict("records")})


def read_tests(folder: Path) -> tuple[str | None, dict[int, pd.DataFrame]]:
    """Who judged (`judged_by`), and the test samples after so many updates, of the run in a folder."""
    found = read_json(folder / SAMPLES_FILE)
    judged = found.pop("judged", None)
    return judged, {int(n): pd.DataFrame(found[n]) for n in sorted(found, key=int)}


def read_result(run: Run, judged: str) -> Result | None:
    """The result in a finished run's folder; None if it is not finished or was not judged by these (`judged_by`)."""
    known, tests = read_tests(run.folder)
    rows, updates = run.rows(), run.settings["updates"]
    if known != judged or not {0, updates} <= set(tests) or len(rows) < updates:
        return None
    return Result(run.settings, rows, tests)


def reference_samples(world: World, policy: ActorCritic, config: TrainConfig) -> pd.DataFrame:
    """`held_out_samples` of a policy that still is the reference; sampled once where several runs start from it."""
    key = config.batch_size, config.max_new_tokens, config.temperature, config.device, config.dtype, config.seed
    if key not in world.reference_samples:
        world.reference_samples[key] = held_out_samples(world, policy, config)
    return world.reference_samples[key]


def held_out_samples(world: World, policy: ActorCritic, config: TrainConfig) -> pd.DataFrame:
    """Completions of the world's test prompts with their rewards and KL; the same random numbers on every call
    with this seed."""
    index = list(range(len(world.test_prompts))) * world.samples_per_prompt
    generator, tables = torch.Generator().manual_seed(SAMPLING_SEED + config.seed), []
    for start in range(0, len(index), config.batch_size):
        rows = world.test_prompts[index[start : start + config.batch_size]]
        rollout = collect(
            policy, world.tokenizer, rows.pop("prompt"), max_new_tokens=config.max_new_tokens,
            temperature=config.temperature, constraint=world.constraint, generator=generator,
        )  # fmt: skip
        tables.append(judged(world, rollout, rows))
    return pd.concat(tables, ignore_index=True)


def judged(world: World, rollout: Rollout, rows: dict[str, list]) -> pd.DataFrame:
    """What the reward and each judge say of a rollout, a row per completion."""
    columns = {"prompt": rollout.prompts, "completion": rollout.completions}
    columns |= {"reward": score(world.reward, rollout, **rows).tolist(), "kl": rollout.kl.sum(1).tolist()}
    columns |= {"length": rollout.mask.sum(1).tolist(), "ended": rollout.ended.tolist()}
    columns["copied"] = list(map(copied, rollout.completions, rollout.prompts))
    columns |= {name: score(judge, rollout, **rows).tolist() for name, judge in world.judges.items()}
    return pd.DataFrame(columns)


def scores(table: pd.DataFrame, column: str, tau: float) -> pd.Series:
    """A column of test samples, or "J", what RL maximises: reward less τ KL."""
    return table["reward"] - tau * table["kl"] if column == "J" else table[column]


def summarise_results(results: list[Result]) -> pd.DataFrame:
    """One row per experiment: test scores and J before and after, the last quarter's reward and KL, and its time."""
    rows = []
    for r in results:
        tests = (table.assign(J=scores(table, "J", r.settings["tau"])) for table in (r.before, r.after))
        log, before, after = pd.DataFrame(r.rows), *(table.mean(numeric_only=True) for table in tests)
        row = before.add_suffix("_before").to_dict() | after.add_suffix("_after").to_dict()
        row |= log[["reward", "kl"]].tail(max(1, len(log) // 4)).mean().to_dict()
        row |= {"attained": r.rows[-1].get("attained", torch.nan), "seconds": log["seconds"].sum()}
        rows.append(r.labels | row)
    return pd.DataFrame(rows)
