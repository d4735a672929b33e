"""World: something to train on, bundled so that demo, sweep, notebooks and tests ask for it by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from pandas import DataFrame

from klq_edu.core.tree import TokenTree
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import Reward
from klq_edu.rlhf.rollout import Constraint

SAMPLE = "sample of the reference policy"  # a kind of completion in the table "trials"


@dataclass
class World:
    """A task for a language model."""

    name: str  # what it is asked for by
    description: str  # what is trained on what: its module's docstring, with which the report begins
    prompts: Dataset  # with a column "prompt"; further columns go to the reward
    test_prompts: Dataset  # the same for comparing completions before and after
    tokenizer: Any
    reward: Reward  # the score of a completion
    make_policy: Callable[[TrainConfig], ActorCritic]  # settings -> a fresh policy at the reference
    constraint: Constraint | None = None  # restricts the tokens that may follow
    tree: TokenTree | None = None  # the same task where it can be enumerated: optimum and every objective are exact
    evaluate: Callable[[TrainConfig], Callable[[ActorCritic], dict]] | None = None  # settings -> policy -> metrics
    metrics: dict[str, str] = field(default_factory=dict)  # what those metrics mean
    judges: dict[str, Reward] = field(default_factory=dict)  # by name: other scores of completions, not maximised
    baselines: list[float] | None = None  # the reference's mean reward after each prompt, where it is known
    samples_per_prompt: int = 2  # of `test_prompts`
    tables: dict[str, DataFrame] = field(default_factory=dict)  # by stage: how the reference and the reward were made
    truth: TokenTree | None = None  # `tree` with the true rewards, where it and `reward` have a proxy's
    reference_samples: dict = field(default_factory=dict)  # what an experiment has sampled from the reference
    threads: int | None = None  # to train with on a CPU (None: torch's choice); tiny models are fastest on one
