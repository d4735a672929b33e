"""`klq judge`: held-out completions of finished runs before a language model behind an endpoint."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(frozen=True)
class JudgeConfig:
    """Each pair is judged in both orders: two requests per completion. A key is read from $OPENAI_API_KEY."""

    run: Positional[Path]  # Folder of a finished run.
    model: str  # Name of the model that judges, as the endpoint knows it.
    rival: Path | None = None  # Folder of another finished run; not given: the reference that the run started from.
    url: str = "http://localhost:8000/v1"  # Of an OpenAI-compatible endpoint.


def run_judge(config: JudgeConfig) -> None:
    """Ask a language model behind an endpoint which held-out completions are better: those of a run or its rival's."""
    import pandas as pd
    from rich.progress import track

    from klq_edu.app.comparison import leaning, mean_interval
    from klq_edu.rlhf.endpoint import endpoint_judge
    from klq_edu.rlhf.judge import outcomes, preferred

    a = samples_of(config.run, "after")
    b = samples_of(config.rival, "after") if config.rival else samples_of(config.run, "before")
    if a["prompt"].tolist() != b["prompt"].tolist():
        raise ValueError(f"run and rival must have the same held-out prompts, {config.run} and {config.rival} differ")
    judge = endpoint_judge(
        config.url, config.model, key=os.environ.get("OPENAI_API_KEY", ""),
        progress=lambda answers: track(answers, "judging", total=len(a)),
    )  # fmt: skip
    won = pd.Series(outcomes(*(x.tolist() for x in (a["prompt"], a["completion"], b["completion"])), judge))
    rate, low, high = mean_interval([by_prompt := won.groupby(a["prompt"]).mean()])
    lean = leaning(preferred(a["length"], b["length"]), won)
    print(f"{config.run.name} against {config.rival.name if config.rival else 'its reference'}, before {config.model}:")
    print(f"win-rate {rate:.3f} [{low:.3f}, {high:.3f}] (95 %, over {len(by_prompt)} prompts)")
    print(f"wins {(won == 1).sum()}, ties {(won == 0.5).sum()}, losses {(won == 0).sum()}")
    if not math.isnan(lean):  # of no two lengths that differ
        print(f"where lengths differ it prefers the longer in {lean:.2f} of the pairs")


def samples_of(folder: Path, when: str):
    """A finished run's test samples, "before" or "after" training, as a table; ValueError where there are none."""
    from klq_edu.app.experiment import SAMPLES_FILE, read_tests
    from klq_edu.files import read_json

    _, tests = read_tests(folder)
    updates = read_json(folder / "config.json").get("updates")
    if not {0, updates} <= set(tests):  # an unfinished run may have been tested along the way
        raise ValueError(f"run and rival must be folders of finished runs, {folder} has no {SAMPLES_FILE} of one")
    return tests[0 if when == "before" else updates]
