"""The road from data to a learnt reward, for SmolLM2: the same stages for every task that has no exact reward.

    data -> SFT (where there are references) -> samples of that policy, labelled in pairs by the task's gold
         -> reward model -> RL (the loop) -> judges

Each stage up to the reward model is an artefact in the cache; what it was made of is part of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import pstdev
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from rich.progress import Progress, track
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from klq_edu.files import read_json, write_json
from klq_edu.machine import resolve_dtype
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import code_of, fingerprint, reward_identity
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.preference import RewardModel, margins, preference_pairs
from klq_edu.rlhf.reading import Reader
from klq_edu.rlhf.rewards import Reward
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.sft import finetune
from klq_edu.worlds.artefacts import MANIFEST, artefact, contents
from klq_edu.worlds.registry import ROAD
from klq_edu.worlds.weights import ABSENT, WEIGHTS_FILE, cached_folder, weights_folder
from klq_edu.worlds.world import SAMPLE, World

TRAINABLE_BLOCKS = 4  # of 30; the others are frozen and shared with the reference
SFT = {"epochs": 2, "batch_size": 16, "learning_rate": 3e-4, "seed": 0}
PAIRS = {"scale": 1.5, "seed": 1}  # scale: a label's odds are exp(scale · difference of golds in standard deviations)
LAYERS = (12, 20, 30)  # whose hidden states the reward model sees
RIDGE = 3.0
UNSEEN = 5  # every fifth prompt's pairs are for testing the reward model
TEST_SAMPLES = 256  # of the held-out prompts, at least
HACKED = 48  # training prompts, unseen by the reward model, on which gold and judges are tried


@dataclass(frozen=True)
class Task:
    """What one task differs in from another."""

    name: str  # of the world
    description: str
    data: Callable[[Any], dict[str, Dataset]]  # tokenizer -> "train" and "test": prompt, what gold and judges need, and
    # "completion", the reference, where the policy is to be fine-tuned first
    gold: Callable[[Reader], Reward]  # frozen base model -> what labels the pairs
    judges: Callable[[Reader], dict[str, Reward]]  # frozen base model -> by name, scorers that label nothing
    frequent_tokens: int  # that the policy may use; others only where references have them
    hacks: Callable[[Dataset], dict[str, list[str]]] | None = None  # completions by kind, "reference" first
    samples: int = 8  # of the reference policy after each prompt, of which pairs are made


class Road:
    """The stages of one task, each made when it is first asked for. `remake` names the stage from which on all is made
    anew."""

    def __init__(self, task: Task, base: Path, settings: TrainConfig, remake: str | None = None):
        self.task, self.base, self.settings = task, base, settings
        self.made: dict[str, Path] = {}  # stage -> its folder
        self.again = ROAD[ROAD.index(remake) :] if remake in ROAD else ()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.train, self.test = map(task.data(self.tokenizer).get, ("train", "test"))
        known = {i for text in self.train.to_dict().get("completion", []) for i in self.ids(text)}
        special = set(self.tokenizer.all_special_ids) - {self.tokenizer.eos_token_id}
        frequent = range(min(task.frequent_tokens, len(self.tokenizer)))  # ids are numbered by frequency
        self.vocab = torch.tensor(sorted((known | set(frequent)) - special))

    def ids(self, text: str) -> list[int]:
        """Its token ids."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def policy(self, folder: Path, critic: str = "shared") -> ActorCritic:
        """A fresh policy from this model."""
        return ActorCritic.from_pretrained(folder, trainable_blocks=TRAINABLE_BLOCKS, critic=critic, vocab=self.vocab)

    @cached_property
    def reader(self) -> Reader:
        """The frozen base model, for gold, reward model and judge."""
        dtype = resolve_dtype("auto", torch.device("cpu"))
        lm = AutoModelForCausalLM.from_pretrained(self.base, dtype=torch.float32)
        return Reader(lm, self.tokenizer, dtype=dtype, layers=LAYERS,
                      progress=lambda parts: track(parts, "reading", disable=len(parts) < 8))  # fmt: skip

    @cached_property
    def gold(self) -> Reward:
        """What labels the pairs."""
        return self.task.gold(self.reader)

    @cached_property
    def given(self) -> dict[str, str]:
        """Digests of the prompts, the base model and the vocabulary, and what is trained in which precision."""
        found = {"train": self.train.to_dict(), "vocabulary": self.vocab}
        found = {name: fingerprint(x) for name, x in found.items()} | {"base": self.reader.identity}
        return found | {"blocks": TRAINABLE_BLOCKS, "dtype": str(self.reader.dtype)}

    def stage(self, name: str, inputs: dict, make: Callable[[Path], None]) -> Path:
        """The folder of a stage; its settings and all that comes before go in."""
        folder = artefact(f"{self.task.name}/{name}", self.given | inputs, make, again=name in self.again)
        self.made[name] = folder
        return folder

    @cached_property
    def sft(self) -> Path:
        """The fine-tuned model, the reference π_b of all that follows; the base model where there are no references."""
        if "completion" not in self.train.column_names:
            return self.base

        def make(folder: Path) -> None:
            policy = self.policy(self.base)
            policy.dtype = self.reader.dtype
            with Progress() as bar:
                task = bar.add_task("fine-tuning")
                rows = finetune(policy, self.tokenizer, self.train, self.writable(), **SFT,
                                on_step=lambda done, total: bar.update(task, completed=done, total=total))  # fmt: skip
            pd.DataFrame(rows).to_csv(folder / "loss.csv", index=False)
            policy.lm.to(torch.bfloat16).save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

        about = {"test": fingerprint(self.test.to_dict()), "code": code_of(finetune)}
        return self.stage("sft", SFT | about, make)

    def writable(self) -> Dataset:
        """The held-out rows whose references the policy's vocabulary can write."""
        vocab = set(self.vocab.tolist())
        texts = self.test["completion"][:]
        return self.test.select([i for i, text in enumerate(texts) if vocab.issuperset(self.ids(text))])

    @cached_property
    def pairs(self) -> Path:
        """samples.jsonl: completions of each training prompt with their gold; pairs.jsonl: preferences among them."""

        def make(folder: Path) -> None:
            count = self.task.samples
            rows = self.train.select([i for i in range(len(self.train)) for _ in range(count)])
            texts = self.sampled(rows["prompt"][:], PAIRS["seed"])
            scores = self.gold(rows["prompt"][:], texts, **self.columns(rows))
            samples = {"prompt": rows["prompt"][:], "completion": texts, "gold": scores}
            Dataset.from_dict(samples).to_json(folder / "samples.jsonl")
            groups = ([x[i : i + count] for i in range(0, len(x), count)] for x in (texts, scores))
            noise = {"scale": PAIRS["scale"] / max(pstdev(scores), 1e-9), "seed": PAIRS["seed"] + 1}
            write_json(folder / "noise.json", noise)
            pairs = preference_pairs(self.train["prompt"][:], *groups, **noise)
            pairs.to_json(folder / "pairs.jsonl")

        about = {name: getattr(self.settings, name) for name in ("max_new_tokens", "temperature")}
        before = {"sft": contents(self.sft)} if self.sft != self.base else {}
        about |= {"samples": self.task.samples, "gold": reward_identity(self.gold)}
        about |= {"code": code_of(preference_pairs)}
        return self.stage("pairs", PAIRS | about | before, make)

    @cached_property
    def reward(self) -> RewardModel:
        """The reward model, with tables of held-out pairs and of all samples beside it."""
        model = RewardModel(self.reader)

        def make(folder: Path) -> None:
            with self.reader.remembering():
                learn(folder)

        def learn(folder: Path) -> None:
            pairs, samples = (Dataset.from_json(str(self.pairs / f"{name}.jsonl")) for name in ("pairs", "samples"))
            unseen = set(self.train["prompt"][::UNSEEN])
            print(f"fitting the reward model to pairs of {len(self.train) - len(unseen)} prompts", flush=True)
            model.fit(pairs.filter(lambda row: row["prompt"] not in unseen), ridge=RIDGE)
            held_out = pairs.filter(lambda row: row["prompt"] in unseen)
            table = pd.DataFrame({"prompt": held_out["prompt"][:], "gold": held_out["margin"][:]})
            table.assign(proxy=margins(model, held_out)).to_csv(folder / "held_out_pairs.csv", index=False)
            scores = model(samples["prompt"][:], samples["completion"][:])
            table = pd.DataFrame({"prompt": samples["prompt"][:], "gold": samples["gold"][:], "proxy": scores})
            table.to_csv(folder / "samples.csv", index=False)
            save_file(model.state_dict(), folder / "head.safetensors")

        about = {"ridge": RIDGE, "unseen": UNSEEN, "pairs": contents(self.pairs), "model": code_of(RewardModel)}
        made = self.stage("reward", about, make)
        model.load_state_dict(load_file(made / "head.safetensors"))
        return model

    def baselines(self) -> list[float]:
        """The reference's mean reward of each training prompt, from the samples that the pairs were made of."""
        table = pd.read_csv(self.made["reward"] / "samples.csv")
        return table.groupby("prompt", sort=False)["proxy"].mean().loc[self.train["prompt"][:]].tolist()

    def columns(self, rows: Dataset) -> dict[str, list]:
        """What gold and judges are given beside prompts and completions."""
        return {name: x for name, x in rows.to_dict().items() if name not in ("prompt", "completion")}

    def judges(self) -> dict[str, Reward]:
        """By name: the gold that labelled, and those that label nothing."""
        return {"gold": self.gold} | self.task.judges(self.reader)

    def trials(self) -> pd.DataFrame:
        """What gold, judges and reward model say of references, samples and hacks: mean scores, and in which share the
        reference is better. One row per kind and judge."""

        def make(folder: Path) -> None:
            rows, kinds = [], hacks | {SAMPLE: self.sampled(data["prompt"][:])}
            for name, judge in (judges | {"reward model": self.reward}).items():
                scores = {kind: judge(data["prompt"][:], texts, **self.columns(data))
                          for kind, texts in track(kinds.items(), f"what {name} says")}  # fmt: skip
                for kind, found in scores.items():
                    loses = sum(x < y for x, y in zip(found, scores["reference"])) / len(found)
                    rows.append({"judge": name, "kind": kind, "score": sum(found) / len(found), "loses": loses})
            pd.DataFrame(rows).to_csv(folder / "trials.csv", index=False)

        judges, unseen = self.judges(), range(0, len(self.train), UNSEEN)
        data = self.train.select(unseen[:HACKED])
        hacks = self.task.hacks(data)
        inputs = {f"judge {name}": reward_identity(judge) for name, judge in judges.items()}
        inputs |= {"hacks": fingerprint(hacks), "reward": contents(self.made["reward"])}
        made = self.stage("trials", inputs, make)
        return pd.read_csv(made / "trials.csv")

    def sampled(self, prompts: list[str], seed: int = 0) -> list[str]:
        """Completions of the fine-tuned model."""
        policy, generator, texts = self.policy(self.sft), torch.Generator().manual_seed(seed), []
        policy.dtype = self.reader.dtype
        settings = {"max_new_tokens": self.settings.max_new_tokens, "temperature": self.settings.temperature}
        for start in track(range(0, len(prompts), 32), "sampling"):
            part = prompts[start : start + 32]
            texts += collect(policy, self.tokenizer, part, generator=generator, **settings).completions
        return texts

    def world(self) -> World:
        """All of it as a world: the stages that are not there yet are made now."""
        reward = self.reward
        tables = {name: pd.read_csv(self.made["reward"] / f"{name}.csv") for name in ("held_out_pairs", "samples")}
        if self.sft != self.base:
            counts = {"held_out_texts": len(self.writable()), "of": len(self.test)}
            tables["loss"] = pd.read_csv(self.sft / "loss.csv").assign(**counts)
        if self.task.hacks:
            tables["trials"] = self.trials()
        stages = [(k, read_json(f / MANIFEST)["seconds"], contents(f)) for k, f in self.made.items()]
        tables["stages"] = pd.DataFrame(stages, columns=["stage", "seconds", "digest"])
        train, test = ({"prompt": data["prompt"][:]} | self.columns(data) for data in (self.train, self.test))
        return World(
            self.task.name, self.task.description, Dataset.from_dict(train),
            Dataset.from_dict(test), self.tokenizer, reward,
            lambda config: self.policy(self.sft, config.critic), judges=self.judges(), baselines=self.baselines(),
            samples_per_prompt=max(1, TEST_SAMPLES // len(self.test)), tables=tables,
        )  # fmt: skip


def model_folder() -> Path:
    """SmolLM2 as an ordinary model folder (safetensors, bfloat16) in the cache; made on first use, in half a minute."""

    def convert(folder: Path) -> None:
        if (source := weights_folder()) is None:
            raise FileNotFoundError(ABSENT)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS_FILE, dtype=torch.float32)
        config = quantised.config.to_dict()
        config.pop("quantization_config", None)  # transformers refuses to save a model that says it is quantised
        model = type(quantised)(type(quantised.config)(**config))
        model.load_state_dict(quantised.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS_FILE).save_pretrained(folder)

    return cached_folder("smollm2-135m-instruct-q4_1", convert)
