"""`make gpu` on a machine without a GPU: the rehearsal goes through every step, and what goes wrong is seen."""

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BARE = """
from functools import partial
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {missing} else find(name, path, target)
PathFinder.find_spec = partial(find_spec)  # no method, whoever copies it
"""
NOT_NEEDED = {"rich", "tyro", "matplotlib", "pandas", "hypothesis", "psutil", "datasets", "accelerate", "jinja2"}


def make_gpu(tmp_path, args, missing=NOT_NEEDED):
    """`make gpu` by a Python that lacks these modules."""
    (tmp_path / "sitecustomize.py").write_text(BARE.format(missing=set(missing)))
    command = ["make", "gpu", f"PYTHON={sys.executable}", f"ARGS={args} --out {tmp_path / 'out'}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


@pytest.fixture
def runner(monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "tests" / "gpu" / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ask_facts", lambda dry: {"gpu": False, "device": "cpu"})
    return module


def rehearse(runner, monkeypatch, tmp_path, *plan):
    """Exit status and outcomes of a rehearsal with these steps: (name, Python code, more)."""
    made = [runner.Step(name, [sys.executable, "-c", code], 0, *more) for name, code, *more in plan]
    monkeypatch.setattr(runner, "steps", lambda folder, dry: made)
    code = runner.main(["--dry-run", "--out", str(tmp_path), "--minutes", "0.5"])
    (folder,) = tmp_path.iterdir()
    outcomes = json.loads((folder / "provenance.json").read_text())["outcomes"]
    assert all(f"- {name}: {outcome}" in (folder / "report.md").read_text() for name, outcome in outcomes.items())
    return code, outcomes


def test_the_rehearsal_goes_through_every_step_with_little_installed(tmp_path):
    """Only torch, triton, pytest and transformers may be needed, none of our own dependencies beyond."""
    out = make_gpu(tmp_path, "--dry-run")
    assert out.returncode == 0, out.stdout + out.stderr
    (folder,) = (tmp_path / "out").iterdir()
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["gpu"] is False and {"torch", "triton", "commit", "dirty", "date", "seed", "commands"} <= set(facts)
    assert re.search(r"^\d+ passed", facts["outcomes"]["tests"])
    assert "compute-sanitizer" in facts["outcomes"]["memcheck"] and "memcheck" in facts["commands"]["memcheck"]
    with (folder / "bench-small.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"logits_stats", "linear_stats", "klq_ref", "klq", "returns"} == {row["workload"] for row in rows}
    assert "V=128256 H=4096 bfloat16: naive, ours (torch), ours (triton)" in (folder / "bench-large.log").read_text()
    assert json.loads((folder / "model.json").read_text())[0]["floor_ms"] > 0
    assert (folder / "report.md").read_text().startswith("# Rehearsal: no number here was measured on a GPU")


def test_without_a_gpu_or_a_needed_module_it_says_so(tmp_path):
    for args, missing, message in (
        ("", (), "no GPU: torch .* sees none; a rehearsal without one: make gpu ARGS=--dry-run"),
        ("--dry-run", ("transformers", "triton"), "has no triton, transformers: choose another with make gpu PYTHON=…"),
        ("--dry-run", ("numpy",), "can't say what machine this is(.|\n)*numpy"),
    ):
        out = make_gpu(tmp_path, args, missing)
        assert out.returncode != 0 and re.search(message, out.stderr), out.stderr
        assert not (tmp_path / "out").exists()


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(runner, monkeypatch, tmp_path):
    plan = [
        ("bad", "raise SystemExit('boom')"), ("crashed", "import os; os.abort()"),
        ("empty", "print('0 passed')", r"[1-9]\d* passed"), ("good", "print('2 passed')", r"[1-9]\d* passed"),
        ("race", "print('=' * 9 + ' Error: Race reported')", "", "={9} Error.*"),
    ]  # fmt: skip
    code, outcomes = rehearse(runner, monkeypatch, tmp_path, *plan)
    assert code == 1 and outcomes == {
        "bad": "failed: exit status 1: boom (bad.log)",
        "crashed": "failed: exit status -6: (nothing yet) (crashed.log)",
        "empty": "failed: exit status 0: 0 passed (empty.log)",
        "good": "2 passed",
        "race": "failed: ========= Error: Race reported (race.log)",
    }


def test_what_takes_too_long_is_ended_with_all_that_it_started(runner, monkeypatch, tmp_path):
    mark = f"time.sleep.{os.getpid()}."
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep({os.getpid()})'])"
    monkeypatch.setattr(runner, "watch", lambda child, limit, tick: time.sleep(2))
    code, outcomes = rehearse(runner, monkeypatch, tmp_path, ("slow", child), ("good", "print('fine')"))
    assert code == 1 and re.search(r"failed: stopped after \d+ s \(slow.log\)", outcomes["slow"])
    assert subprocess.run(["pgrep", "-f", mark], capture_output=True).returncode == 1


def test_an_interrupt_leaves_what_is_done(runner, monkeypatch, tmp_path):
    watch = runner.watch

    def interrupted(child, *rest):
        if child.args[-1] == "2":
            raise KeyboardInterrupt
        return watch(child, *rest)

    monkeypatch.setattr(runner, "watch", interrupted)
    code, outcomes = rehearse(runner, monkeypatch, tmp_path, ("one", "1"), ("two", "2"), ("three", "3"))
    assert code == 1 and outcomes == {"one": "(nothing yet)", "two": "failed: interrupted"}


def test_a_sanitizer_is_left_out_where_it_is_not_and_may_be_cut_short(runner, monkeypatch, tmp_path):
    step = runner.Step(
        "memcheck", [sys.executable, "-c", "print('=' * 9 + ' Invalid read')"], 0, "", "={9} Invalid.*", True
    )
    given = (tmp_path, 9.0, False, print)
    assert "failed: ========= Invalid read" in runner.run(step, *given)
    assert "needs compute-sanitizer" in runner.run(step._replace(command=["compute-sanitizer-of-nobody"]), *given)
    monkeypatch.setattr(runner, "watch", lambda *_: time.sleep(1))
    assert "failed: ========= Invalid read" in runner.run(step, *given)
    assert "nothing found: stopped after 9 s" in runner.run(step._replace(unwanted="nothing"), *given)


def test_a_wrong_result_of_ours_is_a_fault_of_the_benchmark(runner):
    rows = [
        {"contender": who, "error_kl": x, "error_gradient": 0.01} for who, x in (("naive", 9.0), ("ours (triton)", 9.0))
    ]
    assert runner.wrong(rows) == ["ours (triton): error_kl 9.0e+00"]
    assert runner.wrong([{"contender": "ours (torch)", "error_gradient": float("nan")}])
