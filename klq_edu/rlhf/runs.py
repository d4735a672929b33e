"""A run's folder: settings, metrics, samples and the checkpoint from which it continues.

config.json     the settings; a folder with other settings is refused, never overwritten
metrics.jsonl   one line per update, written as it happens; metrics.csv is the same as a table
samples.jsonl   prompts and completions, one line per update (the first few of the batch)
checkpoint.pt   trainable parameters, optimiser, schedule and random state after the last saved update
"""

import copy
import json
import os
from pathlib import Path

import pandas as pd
import torch

from klq_edu.rlhf.rollout import Rollout

SAMPLES = 4


class Snapshot:
    """Everything that changes during training, copied after each finished update so that no interrupt can tear it."""

    def __init__(self, parameters, optimizer, schedule, generator):
        self.parameters, self.stateful, self.generator = parameters, (optimizer, schedule), generator
        self.state = None

    @property
    def updates(self) -> int:
        """Updates finished at the last copy."""
        return self.state["updates"] if self.state else 0

    def take(self) -> None:
        """Copy the present state as that after one more update."""
        self.state = _copy_to_cpu(
            {
                "updates": self.updates + 1,
                "parameters": {name: p.detach() for name, p in self.parameters.items()},
                "stateful": [s.state_dict() for s in self.stateful],
                "generator": self.generator.get_state(),
            }
        )

    def restore(self, state: dict) -> None:
        """Put a saved state back into the objects this snapshot watches."""
        self.state = state
        for name, p in self.parameters.items():
            p.data.copy_(state["parameters"][name])
        for s, saved in zip(self.stateful, copy.deepcopy(state["stateful"]), strict=True):
            s.load_state_dict(saved)  # keeps what it is given, and changes it in place: hence the copy
        self.generator.set_state(state["generator"])


def _copy_to_cpu(state):
    """A deep copy of nested dicts and lists whose tensors are on the CPU, so that a GPU need not hold them twice."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copy_to_cpu(value) for key, value in state.items()}
    return [_copy_to_cpu(x) for x in state] if isinstance(state, list) else copy.deepcopy(state)


class Run:
    """The folder of one run with these settings.

    Raises ValueError if the folder holds a run with other settings, and OSError, with advice, if it can't be written.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = writable_folder(folder), settings
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        self.checkpoint, config = self.folder / "checkpoint.pt", self.folder / "config.json"
        if config.exists() and (found := json.loads(config.read_text())) != settings:
            differ = {k: (found.get(k), settings.get(k)) for k in found | settings if found.get(k) != settings.get(k)}
            raise ValueError(f"{folder} holds other settings (there, here): {differ}; use another folder (--out)")
        replace_file(config, lambda path: path.write_text(json.dumps(settings, indent=1)))

    def resume(self, snapshot: Snapshot) -> list[dict]:
        """Restore the checkpoint, if there is one, and return the rows logged up to it; later lines are dropped."""
        if self.checkpoint.exists():
            snapshot.restore(torch.load(self.checkpoint, map_location="cpu", weights_only=True))
        for log in (self.metrics, self.samples):
            kept = log.read_text().splitlines(keepends=True)[: snapshot.updates] if log.exists() else []
            replace_file(log, lambda path, kept=kept: path.write_text("".join(kept)))
        if len(rows := self.rows()) != snapshot.updates:
            raise ValueError(f"{self.folder}: {len(rows)} logged updates but a checkpoint after {snapshot.updates}")
        return rows

    def rows(self) -> list[dict]:
        """The logged metrics, one dict per update."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def log(self, row: dict, rollout: Rollout) -> None:
        """Append one update's metrics and its first few completions."""
        pairs = list(zip(rollout.prompts, rollout.completions, strict=True))[:SAMPLES]
        for log, line in ((self.metrics, row), (self.samples, pairs)):
            with log.open("a") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def save(self, snapshot: Snapshot) -> None:
        """Write the checkpoint of the last finished update, and the metrics as a table (no update yet: do nothing)."""
        if snapshot.state is not None:
            replace_file(self.checkpoint, lambda path: torch.save(snapshot.state, path))
            replace_file(self.folder / "metrics.csv", lambda path: pd.DataFrame(self.rows()).to_csv(path, index=False))


def writable_folder(folder: str | Path) -> Path:
    """The folder, created if need be; OSError that says what to do if nothing can be written there."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to the output folder {folder} ({error}): choose another with --out") from error
    return folder


def replace_file(path: Path, write) -> None:
    """Write a file so that an interrupt leaves the old one or the new one, never half of either."""
    draft = path.with_name(path.name + ".new")
    write(draft)
    draft.replace(path)
