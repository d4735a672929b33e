"""Any causal LM, reward model and prompts, by path or hub id: the recipes with which the paper's tasks are trained.

A recipe is a YAML file; those of the paper lie in worlds/recipes/, commented.
"""

from dataclasses import dataclass, field
from pathlib import Path

import yaml
from datasets import Dataset, load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from klq_edu.machine import resolve_device
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import ClassifierReward
from klq_edu.rlhf.rollout import tokenise
from klq_edu.worlds.world import World

RECIPES = Path(__file__).parent / "recipes"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


@dataclass(frozen=True)
class Recipe:
    """What is trained on what; model, reward_model and data are paths or hub ids."""

    model: str
    reward_model: str
    data: str
    format: str = "prompt"  # one of FORMATS
    test_prompts: int = 256
    max_prompt_tokens: int = 512
    missing_eos_penalty: float = 0.0
    trainable_blocks: int | None = None  # None: all
    train: TrainConfig = field(default_factory=TrainConfig)


def read_recipe(path: str | Path, **changes) -> Recipe:
    """The recipe in this file (or of this name among RECIPES) with changes; ValueError that names what is wrong."""
    path = RECIPES / f"{path}.yaml" if not Path(path).suffix else Path(path)
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe must be a YAML file or one of {known}, got {path}")
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        settings = TrainConfig(
            **{k: float(v) if k == "learning_rate" else v for k, v in given.pop("train", {}).items()}
        )
        recipe = Recipe(**given | {k: v for k, v in changes.items() if v is not None}, train=settings)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"recipe {path} does not hold the fields of a Recipe: {error}") from error
    if recipe.format not in FORMATS:
        raise ValueError(f"recipe {path}: format must be one of {tuple(FORMATS)}, got {recipe.format!r}")
    return recipe


def single_turn(text: str) -> str | None:
    """The prompt of a conversation of one question and one answer; None for longer ones.

    >>> single_turn("\\n\\nHuman: Hi?\\n\\nAssistant: Hello!")
    '\\n\\nHuman: Hi?\\n\\nAssistant:'
    """
    return text[: text.index(ASSISTANT)] + ASSISTANT if text.count(HUMAN) == text.count(ASSISTANT) == 1 else None


FORMATS = {"prompt": ("prompt", lambda text: text), "single_turn": ("chosen", single_turn)}  # column, its prompt


def load_recipe(recipe: Recipe, device: str = "cpu") -> World:
    """The recipe as a world: prompts of the training split, and of the test split for comparing before and after. The
    reward model is put on `device`. ValueError for one without a trained head, and for data that do not fit."""
    tokenizer, judge = (AutoTokenizer.from_pretrained(name) for name in (recipe.model, recipe.reward_model))
    classifier, about = AutoModelForSequenceClassification.from_pretrained(
        recipe.reward_model, num_labels=1, output_loading_info=True
    )
    if absent := sorted(about["missing_keys"]):
        raise ValueError(f"reward_model {recipe.reward_model} must be a sequence classifier, it lacks {absent}")
    classifier.to(resolve_device(device))
    reward = ClassifierReward(classifier, judge, missing_eos_penalty=recipe.missing_eos_penalty)
    splits = load_dataset(recipe.data)
    if missing := {"train", "test"} - set(splits):
        raise ValueError(f"data must have the splits train and test, {recipe.data} lacks {', '.join(sorted(missing))}")
    test = prompts_of(splits["test"], recipe, tokenizer)
    name = f"{Path(recipe.model).name} on {Path(recipe.data).name}"
    return World(
        name, f"{recipe.model} on {recipe.data}, rewarded by {recipe.reward_model}.",
        prompts_of(splits["train"], recipe, tokenizer), test.select(range(min(recipe.test_prompts, len(test)))),
        tokenizer, reward, samples_per_prompt=1, make_policy=lambda config: ActorCritic.from_pretrained(
            recipe.model, trainable_blocks=recipe.trainable_blocks, critic=config.critic
        ),
    )  # fmt: skip


def prompts_of(rows: Dataset, recipe: Recipe, tokenizer) -> Dataset:
    """A column "prompt" with all of them that have the format and are short enough; ValueError if none is."""
    column, prompt_of = FORMATS[recipe.format]
    if column not in rows.column_names:
        raise ValueError(f"data {recipe.data} must have the column {column!r}, has {', '.join(rows.column_names)}")
    found = [p for p in map(prompt_of, rows[column]) if p]
    lengths = map(len, tokenise(tokenizer, found) if found else [])
    kept = [p for p, n in zip(found, lengths) if n <= recipe.max_prompt_tokens]
    if not kept:
        raise ValueError(
            f"data {recipe.data} must have prompts of format {recipe.format} and at most {recipe.max_prompt_tokens} "
            f"tokens, has none among {len(rows)} rows, {len(found)} of them of the format"
        )
    return Dataset.from_dict({"prompt": kept})
