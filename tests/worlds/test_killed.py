"""kill -9 in three stages of each road, on the real model and a few rows of the real data: what is rerun finishes with
the numbers of a walk that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from klq_edu.worlds import weights

WALK = """
import os, signal, sys
from dataclasses import replace
from importlib import import_module

import klq_edu.rlhf.runs
from klq_edu.app.cli import main
from klq_edu.worlds import road
from klq_edu.worlds.registry import WORLDS

name, out, where = sys.argv[1:]
module, entry = import_module(f"klq_edu.worlds.{name}"), WORLDS[name]
task, count = module.TASK, {"train": 24, "test": 8}
few = lambda tokenizer: {part: rows.select(range(count[part])) for part, rows in task.data(tokenizer).items()}
module.TASK = replace(task, data=few, samples=4)
WORLDS[name] = entry._replace(settings=replace(entry.settings, batch_size=8, replay=8, checkpoint_every=1))
road.TEST_SAMPLES = 16


def killed(f):
    def call(*args, **kwargs):
        kept = f(*args, **kwargs)
        if f is not log or args[1]["update"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept

    return call


log = klq_edu.rlhf.runs.Run.log
if where == "pairs":
    road.write_json = killed(road.write_json)
if where == "reward":
    road.save_file = killed(road.save_file)
if where == "rl":
    klq_edu.rlhf.runs.Run.log = killed(log)
sys.argv[1:] = ["demo", "--world", name, "--updates", "3", "--out", out]
main()
"""


def walk(world: str, cache: Path, out: Path, killed_in: str = "") -> str:
    """Walk the road in this cache, to its end or until it is killed; what it printed."""
    cache.mkdir(exist_ok=True)
    if not any(cache.iterdir()) and (models := weights.cache_root()).exists():  # it has the converted model
        (cache / "smollm2-135m-instruct-q4_1").symlink_to(models / "smollm2-135m-instruct-q4_1")
    about = os.environ | {"KLQ_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "random"}
    command = [sys.executable, "-c", WALK, world, str(out), killed_in]
    done = subprocess.run(command, env=about, capture_output=True, text=True)
    assert done.returncode == (-9 if killed_in else 0), done.stderr[-2000:]
    return done.stdout


def numbers(cache: Path, out: Path) -> dict:
    """All that a walk has found out, but for the seconds it took."""
    found = {f.parent.name: json.loads(f.read_text())["files"] for f in cache.glob("*/*/manifest.json")}
    for f in [*out.rglob("metrics.csv"), *out.glob("*/*.csv")]:
        table = pd.read_csv(f)
        found[f.relative_to(out)] = table.drop(columns=["seconds"], errors="ignore").to_csv()
    return found | {f.relative_to(out): f.read_text() for f in out.rglob("test_samples.json")}


@pytest.mark.rare
@pytest.mark.weights
@pytest.mark.skipif(weights.weights_folder() is None, reason="SmolLM2 weights absent: see klq doctor")
@pytest.mark.parametrize("world", ["stories", "tldr", "dialogue"])
def test_a_walk_that_is_killed_finishes_with_the_same_numbers(world, tmp_path):
    whole, parts = ((tmp_path / name, tmp_path / f"{name}-runs") for name in ("whole", "parts"))
    walk(world, *whole)
    for stage in ("pairs", "reward", "rl"):
        walk(world, *parts, killed_in=stage)
    said = walk(world, *parts)
    assert "not there yet" not in said, "the last walk took up what was whole"
    expected, found = numbers(*whole), numbers(*parts)
    assert len(expected) > 9 and {"pairs", "reward"} < set(expected)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
