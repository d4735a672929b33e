"""A run's folder: settings, identity, metrics, samples and the checkpoint from which it continues.

config.json     the settings; a folder with other settings is refused, never overwritten
run.json        digests of what was trained on what (see `identity`), and when `updates` was raised
metrics.jsonl   one line per update, written as it happens; metrics.csv is the same as a table
samples.jsonl   prompts and completions, one line per update (the first few of the batch)
checkpoint.pt   trainable parameters, optimiser and random state after some update, and a digest of all that
.lock           held by the process that trains here; the system frees it when that process ends, however it ends

Text is UTF-8 wherever the locale says otherwise.
"""

import hashlib
import json
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout

from klq_edu.files import complete_lines, damage, read_json, replace_file, sync, writable_folder, write_json, write_text
from klq_edu.rlhf.rollout import Rollout

SAMPLES = 4
DIGEST_BYTES = hashlib.sha256().digest_size
START = "initial weights"  # what a run without a checkpoint must start from again


class TrainState:
    """What training changes: trainable parameters, optimiser, memory, and the random state after the last finished
    update."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], optimizer, generator: torch.Generator, memory):
        self.parameters, self.optimizer, self.generator, self.memory = parameters, optimizer, generator, memory
        self.updates, self.random = 0, generator.get_state()

    def finish_update(self) -> None:
        """Count one more update; an update dropped before its first optimiser step changes only random numbers."""
        self.updates, self.random = self.updates + 1, self.generator.get_state()

    def to_dict(self) -> dict:
        """The state after the last finished update; valid unless an optimiser step has been taken since."""
        state = {"updates": self.updates, "optimizer": self.optimizer.state_dict(), "random": self.random}
        state["memory"] = self.memory.state_dict()
        return state | {"parameters": {name: p.detach() for name, p in self.parameters.items()}}

    def restore(self, saved: dict) -> None:
        """Put a saved state back into the objects this one watches."""
        for name, p in self.parameters.items():
            p.data.copy_(saved["parameters"][name])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.memory.load_state_dict(saved["memory"])
        self.updates, self.random = saved["updates"], saved["random"]
        self.generator.set_state(self.random)


class Run:
    """The folder of one run with these settings. `updates` alone may be raised later.

    Raises ValueError if the folder holds a run with other settings or a damaged config.json, and OSError, with advice,
    if it can't be written.
    """

    def __init__(self, folder: str | Path, settings: dict):
        self.folder, self.settings = writable_folder(folder), settings
        self.metrics, self.samples = self.folder / "metrics.jsonl", self.folder / "samples.jsonl"
        self.config, self.identity = self.folder / "config.json", self.folder / "run.json"
        self.checkpoint, self.lock = self.folder / "checkpoint.pt", FileLock(self.folder / ".lock", timeout=0)
        self._recorded_settings()
        if not self.config.exists():
            with damage(self.config):
                if self.checkpoint.exists():
                    raise ValueError("it is missing, but there is a checkpoint")
            write_json(self.config, settings)

    @contextmanager
    def writing(self):
        """Within this context no other process writes here (it may be nested). Raises ValueError where one does."""
        if (processes := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
            raise ValueError(f"this loop is one process, but WORLD_SIZE is {processes}: start it without torchrun")
        try:
            lock = self.lock.acquire()
        except Timeout:
            raise ValueError(f"{self.folder} is in use by another process: wait, or choose another (--out)") from None
        with lock:
            self._accept_raised_updates()  # looks again: another run may have begun here in the meantime
            yield

    def claim(self, identity: dict[str, str], again: bool = False) -> None:
        """Record these digests of what is trained on what. Raises ValueError naming those that were recorded otherwise.

        A reward may change by being called (it counts, or keeps a cache): with `again` a new digest counts as well.
        Other initial weights matter only while there is no checkpoint.
        """
        recorded, begun = read_json(self.identity), self.checkpoint.exists()
        known = {k: recorded.get(k, ["unknown"] if begun else [v]) for k, v in identity.items()}
        differ = {k: known[k] for k, v in identity.items() if not again and v not in known[k]}
        start_differs = differ.pop(START, None) and not begun
        if differ:
            shown = "; ".join(f"{k} (there {' or '.join(v)}, here {identity[k]})" for k, v in differ.items())
            way = "use another folder (--out) or train anew (klq demo --from rl)"
            way += "; a reward that changes by itself may have an attribute `identity`" if "reward" in differ else ""
            raise ValueError(f"{self.folder} holds another run, it differs in {shown}; {way}")
        if start_differs:
            why = "the policy no longer has the weights it began with there (was a call interrupted?)"
            way = "build it anew, or use another folder (--out)"
            raise ValueError(f"{self.folder} has no checkpoint yet, and {why}: {way}")
        more = {k: [*recorded.get(k, []), v] for k, v in identity.items() if v not in recorded.get(k, [])}
        write_json(self.identity, recorded | {k: v for k, v in more.items() if k != START or k not in recorded})

    def keep(self, name: str, value: str) -> str:
        """What this run has recorded under this name; the value given now where there is nothing yet."""
        recorded = {name: value} | read_json(self.identity)
        write_json(self.identity, recorded)
        return recorded[name]

    def resume(self, state: TrainState) -> list[dict]:
        """Restore the checkpoint, if there is one, and return the rows logged up to it; later lines are dropped.

        Raises ValueError if the checkpoint is damaged or the log is not one row per update.
        """
        if self.checkpoint.exists():
            state.restore(load_checkpoint(self.checkpoint))
        for log in (self.metrics, self.samples):
            write_text(log, "".join(f"{line}\n" for line in complete_lines(log)[: state.updates]))
        rows = self.rows()
        if [row.get("update") for row in rows] != list(range(state.updates)):
            what = f"the {state.updates} updates of the checkpoint, one row each and in order"
            way = "use another folder (--out), or empty this one to train from the start"
            raise ValueError(f"{self.metrics} does not hold {what}: {way}")
        return rows

    def rows(self) -> list[dict]:
        """The logged metrics, one dict per update. A last line that was cut off in writing is left out."""
        lines = complete_lines(self.metrics)
        with damage(self.metrics):
            return [json.loads(line) for line in lines]

    def log(self, row: dict, rollout: Rollout) -> None:
        """Append one update's metrics and its first few completions."""
        pairs = list(zip(rollout.prompts, rollout.completions, strict=True))[:SAMPLES]
        for log, line in ((self.metrics, row), (self.samples, pairs)):
            with log.open("a", encoding="utf-8", newline="\n") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def save(self, state: TrainState) -> None:
        """Write the checkpoint of the last finished update, and the metrics as a table (no update yet: do nothing)."""
        if state.updates:
            for log in (self.metrics, self.samples):  # never behind the checkpoint, whatever happens
                if log.exists():
                    sync(log)
            replace_file(self.checkpoint, lambda path: write_checkpoint(path, state.to_dict()))
            replace_file(self.folder / "metrics.csv", lambda path: pd.DataFrame(self.rows()).to_csv(path, index=False))

    def say_finished(self, updates: int) -> None:
        """Say that there is nothing to do, so that old results are not taken for new ones."""
        print(f"{self.folder}: finished, nothing to do ({updates} updates)")

    def _recorded_settings(self) -> dict:
        """The settings in the folder, none in a new one; ValueError if they are another run's."""
        found, given = read_json(self.config), self.settings
        differ = {k: (found.get(k), given.get(k)) for k in found | given if found.get(k) != given.get(k)}
        raised = differ.keys() == {"updates"} and None not in differ["updates"] and found["updates"] < given["updates"]
        if self.config.exists() and differ and not raised:
            rule = "updates may be raised, nothing else changed; use another folder (--out)"
            raise ValueError(f"{self.folder} holds other settings (there, here): {differ}; {rule}")
        return found

    def _accept_raised_updates(self) -> None:
        """Write a raised number of updates down: from there on this is not what one long run would have been."""
        found, recorded = self._recorded_settings(), read_json(self.identity)
        if found and found != self.settings:
            raised = {"after": len(self.rows()), "from": found["updates"], "to": self.settings["updates"]}
            write_json(self.identity, recorded | {"raised": [*recorded.get("raised", []), raised]})
            write_json(self.config, self.settings)
            print(f"{self.folder}: updates raised from {raised['from']} to {raised['to']}; the longer schedule applies")


def write_checkpoint(path: Path, state: dict) -> None:
    """Save a state with a digest behind it."""
    torch.save(state, path)
    with path.open("r+b") as file:
        file.write(hashlib.file_digest(file, "sha256").digest())


def load_checkpoint(path: Path) -> dict:
    """The state in a checkpoint; ValueError that names the file and the way out if a single byte is not as written."""
    with damage(path):
        data = np.memmap(path, mode="r")
        if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:].tobytes():
            raise ValueError("its digest does not match")
    return torch.load(path, map_location="cpu", weights_only=True)
