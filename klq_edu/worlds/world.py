"""World: something to train on, bundled so that demo, sweep, notebooks and tests ask for it by name."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from klq_edu.core.tree import TokenTree
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import Reward
from klq_edu.rlhf.rollout import Constraint


@dataclass
class World:
    """A task for a language model.

    Attributes:
        name: what it is asked for by.
        description: what is trained on what: its module's docstring, with which the report begins.
        prompts: training prompts, a Dataset with a column "prompt" (further columns go to the reward).
        test_prompts: the same for comparing completions before and after.
        tokenizer: of the model.
        reward: the score of a completion.
        make_policy: settings -> a fresh ActorCritic at the reference.
        constraint: restriction of the tokens that may follow, or None.
        tree: the same task as an exact TokenTree, or None where it cannot be enumerated (`exact` says which).
        evaluate: settings -> a function of the policy with exact metrics, or None.
        metrics: what those metrics mean.
        judge: an independent opinion of completions, never trained on, or None; `judge_name` says what it is.
        threads: CPU threads to train with, or None for torch's choice. Tiny models are fastest on one.
    """

    name: str
    description: str
    prompts: Dataset
    test_prompts: Dataset
    tokenizer: Any
    reward: Reward
    make_policy: Callable[[TrainConfig], ActorCritic]
    constraint: Constraint | None = None
    tree: TokenTree | None = None
    evaluate: Callable[[TrainConfig], Callable[[ActorCritic], dict]] | None = None
    metrics: dict[str, str] = field(default_factory=dict)
    judge: Reward | None = None
    judge_name: str = ""
    threads: int | None = None

    @property
    def exact(self) -> bool:
        """Whether optimum, regret and every policy's objective are known, by enumeration."""
        return self.tree is not None
