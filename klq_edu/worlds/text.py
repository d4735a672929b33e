"""Text tasks with references: the road from data to a learnt reward. How tasks differ is in files of their own.

    data -> SFT -> samples of that policy, labelled in pairs by the gold -> reward model -> RL (the loop) -> judges

Each stage up to the reward model is an artefact in the cache; what it was made of is part of it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from datasets import Dataset
from rich.progress import Progress, track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klq_edu.machine import resolve_dtype
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.preference import RewardModel, margins, preference_pairs
from klq_edu.rlhf.reading import Reader
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.sft import finetune
from klq_edu.worlds.artefacts import MANIFEST, artefact, digest
from klq_edu.worlds.gold import Gold, hacks
from klq_edu.worlds.judges import EmbeddingJudge, ReferenceJudge
from klq_edu.worlds.registry import ROAD, WORLDS
from klq_edu.worlds.stories import TRAINABLE_BLOCKS, model_folder
from klq_edu.worlds.weights import minilm_folder
from klq_edu.worlds.world import World

DATA = Path(__file__).parent / "data"
FREQUENT_TOKENS = 32_000  # the others only where the data have them
SFT = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-4, "seed": 0}
PAIRS = {
    "samples": 4,
    "scale": 10.0,
    "seed": 1,
}  # of each prompt; scale: of Bradley and Terry's noise, per unit of gold
REWARD = {"layers": [12, 20, 30], "ridge": 0.1}
UNSEEN = 5  # every fifth prompt's pairs are for testing the reward model
TEST_PROMPTS = 128  # of the 256 held-out ones, for the demo
HACKED = 48  # held-out prompts on which gold and judges are tried


@dataclass(frozen=True)
class Task:
    """What one task differs in from another."""

    name: str  # of the world and of its data: data/<name>_train.jsonl and data/<name>_test.jsonl
    description: str
    columns: tuple[str, str]  # of the data: the source that a prompt is made of, and the reference
    prompt: Callable[..., str]  # (tokenizer, source) -> prompt
    lead: str  # what a completion begins with
    words: int  # of the longest reference

    def read(self, tokenizer, part: str) -> Dataset:
        """Columns prompt, completion (the reference as the model would say it), source and reference."""
        path = DATA / f"{self.name}_{part}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        source, reference = ([row[name] for row in rows] for name in self.columns)
        prompts = [self.prompt(tokenizer, s) for s in source]
        columns = {"prompt": prompts, "completion": [self.lead + r for r in reference]}
        return Dataset.from_dict(columns | {"source": source, "reference": reference})


class Road:
    """The stages of one task, each made when it is first asked for. `remake` names the stage from which on all is made
    anew."""

    def __init__(self, task: Task, base: Path, settings: TrainConfig, remake: str | None = None):
        self.task, self.base, self.settings = task, base, settings
        self.again = ROAD[ROAD.index(remake) :] if remake in ROAD else ()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.train, self.test = task.read(self.tokenizer, "train"), task.read(self.tokenizer, "test")
        texts = [t for data in (self.train, self.test) for t in data["completion"]]
        known = {i for row in self.tokenizer(texts, add_special_tokens=False)["input_ids"] for i in row}
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.eos_token_id}
        frequent = range(min(FREQUENT_TOKENS, len(self.tokenizer)))
        self.vocab = torch.tensor(sorted((known | set(frequent)) - special))

    def policy(self, folder: Path, critic: str = "shared") -> ActorCritic:
        """A fresh policy from this model."""
        return ActorCritic.from_pretrained(folder, trainable_blocks=TRAINABLE_BLOCKS, critic=critic, vocab=self.vocab)

    @cached_property
    def reader(self) -> Reader:
        """The frozen base model, for gold, reward model and judge."""
        dtype = resolve_dtype("auto", torch.device("cpu"))
        return Reader(AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32), self.tokenizer, dtype=dtype)

    @cached_property
    def gold(self) -> Gold:
        """The task's gold."""
        return Gold(self.reader, self.task.words)

    @cached_property
    def data(self) -> dict[str, str]:
        """Digests of the data and the base model."""
        names = [f"{self.task.name}_{part}" for part in ("train", "test")]
        found = {name: digest(DATA / f"{name}.jsonl") for name in names}
        return found | {"base": digest(next(iter(sorted(self.base.glob("*.safetensors")))))}

    def stage(self, name: str, inputs: dict, make: Callable[[Path], None]) -> Path:
        """The folder of a stage; its settings and all that comes before go in."""
        return artefact(f"{self.task.name}/{name}", self.data | inputs, make, again=name in self.again)

    @cached_property
    def sft(self) -> Path:
        """The fine-tuned model: the reference π_b of all that follows."""

        def make(folder: Path) -> None:
            policy = self.policy(self.base)
            policy.dtype = resolve_dtype("auto", policy.device)
            with Progress() as bar:
                task = bar.add_task("fine-tuning")
                rows = finetune(policy, self.tokenizer, self.train, self.test, **SFT,
                                on_step=lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
            pd.DataFrame(rows).to_csv(folder / "loss.csv", index=False)
            policy.lm.to(torch.bfloat16).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        return self.stage("sft", SFT, make)

    @cached_property
    def pairs(self) -> Path:
        """samples.jsonl: completions of each training prompt with their gold; pairs.jsonl: preferences among them."""

        def make(folder: Path) -> None:
            count = PAIRS["samples"]
            rows = self.train.select([i for i in range(len(self.train)) for _ in range(count)])
            texts = self.sampled(rows["prompt"][:], PAIRS["seed"])
            scores = self.gold(rows["prompt"][:], texts, source=rows["source"][:], reference=rows["reference"][:])
            samples = {"prompt": rows["prompt"][:], "completion": texts, "gold": scores}
            Dataset.from_dict(samples).to_json(folder / "samples.jsonl")
            groups = ([x[i : i + count] for i in range(0, len(x), count)] for x in (texts, scores))
            pairs = preference_pairs(self.train["prompt"][:], *groups, scale=PAIRS["scale"], seed=PAIRS["seed"])
            pairs.to_json(folder / "pairs.jsonl")

        about = {name: getattr(self.settings, name) for name in ("max_new_tokens", "temperature")}
        return self.stage("pairs", PAIRS | about | {"sft": digest(self.sft / MANIFEST)}, make)

    @cached_property
    def reward(self) -> RewardModel:
        """The reward model, with the table of its held-out pairs beside it (agreement.csv)."""
        model = RewardModel(self.reader, REWARD["layers"])

        def make(folder: Path) -> None:
            pairs, samples = (Dataset.from_json(str(self.pairs / f"{name}.jsonl")) for name in ("pairs", "samples"))
            unseen = set(self.train["prompt"][::UNSEEN])
            print(f"fitting the reward model to pairs of {len(self.train) - len(unseen)} prompts", flush=True)
            model.fit(pairs.filter(lambda row: row["prompt"] not in unseen), ridge=REWARD["ridge"])
            held_out = pairs.filter(lambda row: row["prompt"] in unseen)
            columns = {
                "prompt": held_out["prompt"][:],
                "gold": held_out["margin"][:],
                "proxy": margins(model, held_out),
            }
            pd.DataFrame(columns).to_csv(folder / "held_out_pairs.csv", index=False)
            scores = model(samples["prompt"][:], samples["completion"][:])
            table = pd.DataFrame({"prompt": samples["prompt"][:], "gold": samples["gold"][:], "proxy": scores})
            table.to_csv(folder / "samples.csv", index=False)
            save_file(model.state_dict(), folder / "head.safetensors")

        made = self.reward_folder = self.stage("reward", REWARD | {"pairs": digest(self.pairs / MANIFEST)}, make)
        model.load_state_dict(load_file(made / "head.safetensors"))
        return model

    def baselines(self) -> list[float]:
        """The reference's mean reward of each training prompt, from the samples that the pairs were made of."""
        table = pd.read_csv(self.reward_folder / "samples.csv")
        return table.groupby("prompt", sort=False)["proxy"].mean().loc[self.train["prompt"][:]].tolist()

    def judges(self) -> dict[str, Callable]:
        """By name: the gold that labelled, and two that label nothing."""
        folder = minilm_folder()
        independent = {"MiniLM": EmbeddingJudge(folder)} if folder else {}
        return {"gold": self.gold} | independent | {"SmolLM2": ReferenceJudge(self.reader)}

    def trials(self) -> pd.DataFrame:
        """What gold, judges and reward model say of references, samples and hacks: mean scores, and in which share the
        reference is better. One row per kind and judge."""

        def make(folder: Path) -> None:
            data, rows = self.test.select(range(HACKED)), []
            prompts, source, reference = (data[name][:] for name in ("prompt", "source", "reference"))
            kinds = hacks(source, reference, self.task.lead) | {"sample of the reference policy": self.sampled(prompts)}
            for name, judge in (self.judges() | {"reward model": self.reward}).items():
                scores = {kind: judge(prompts, texts, source=source, reference=reference)
                          for kind, texts in track(kinds.items(), f"what {name} says")}  # fmt: skip
                for kind, found in scores.items():
                    loses = sum(x < y for x, y in zip(found, scores["reference"])) / len(found)
                    rows.append({"judge": name, "kind": kind, "score": sum(found) / len(found), "loses": loses})
            pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)

        made = self.stage("trials", {"n": HACKED, "reward": digest(self.reward_folder / MANIFEST)}, make)
        return pd.read_csv(made / "trials.csv")

    def sampled(self, prompts: list[str], seed: int = 0) -> list[str]:
        """Completions of the fine-tuned model."""
        policy, generator, texts = self.policy(self.sft), torch.Generator().manual_seed(seed), []
        policy.dtype = resolve_dtype("auto", policy.device)
        settings = {"max_new_tokens": self.settings.max_new_tokens, "temperature": self.settings.temperature}
        for start in track(range(0, len(prompts), 32), "sampling"):
            part = prompts[start : start + 32]
            texts += collect(policy, self.tokenizer, part, generator=generator, **settings).completions
        return texts

    def world(self) -> World:
        """All of it as a world: the stages that are not there yet are made now."""
        reward, wanted = self.reward, ["prompt", "source", "reference"]
        tables = {"loss": pd.read_csv(self.sft / "loss.csv"), "trials": self.trials()}
        tables |= {name: pd.read_csv(self.reward_folder / f"{name}.csv") for name in ("held_out_pairs", "samples")}
        return World(
            self.task.name, self.task.description, self.train.select_columns(wanted),
            self.test.select(range(TEST_PROMPTS)).select_columns(wanted), self.tokenizer, reward,
            lambda config: self.policy(self.sft, config.critic), judges=self.judges(), baselines=self.baselines(),
            samples_per_prompt=1, tables=tables,
        )  # fmt: skip


def load_task(task: Task, remake: str | None = None) -> World:
    """The world of a text task for SmolLM2, with its default settings; see `Road` for `remake`."""
    return Road(task, model_folder(), WORLDS[task.name].settings, remake).world()
