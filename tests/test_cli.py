"""The commands as a user types them: instant help, clear errors, a demo that resumes and a report that stands alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from rich.console import Console

from klq_edu.app import doctor
from klq_edu.app.cli import main
from klq_edu.app.experiment import Result
from klq_edu.app.report import print_results
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.runs import load_checkpoint


def klq(*args, **environment):
    """Run the command line in a fresh process."""
    env = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-m", "klq_edu.app.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@pytest.fixture
def here(monkeypatch, capsys):
    """`klq` in this process, without five seconds of imports; what `main` does not catch is raised."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["klq", *map(str, args)])
        capsys.readouterr()
        try:
            status = main()
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(args, status or 0, *capsys.readouterr())

    return run


WATCHED = """
import sys
from klq_edu.app.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "pandas", "matplotlib"} & set(sys.modules)
    assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "command",
    [(), ("demo",), ("train", "grammar"), ("sweep",), ("compare",), ("inspect",), ("bench",), ("course",), ("doctor",)],
)
def test_help_is_instant_because_nothing_heavy_is_imported(command):
    out = subprocess.run([sys.executable, "-c", WATCHED, *command, "--help"], capture_output=True, text=True)
    assert out.returncode == 0 and "usage: " in out.stdout, out.stderr


@pytest.mark.parametrize(
    "args, message",
    [
        (("train", "grammar", "--tau", "0"), "tau must be a finite number > 0, got 0"),
        (("train", "grammar", "--alpha", "2"), "alpha must lie in (0, 1], got 2"),
        (("demo", "--world", "grammar", "--seeds", "0"), "seeds must be >= 1, got 0"),
        (("demo", "--dtype", "float16"), "invalid choice"),
        (("demo", "--world", "grammar", "--updates", "0"), "updates must be an integer >= 1, got 0"),
        (("sweep", "--seeds", "0"), "seeds must not be empty or below 1, got 0"),
        (("bench", "--reps", "0"), "reps must be at least 1, got 0"),
        (("bench", "--workloads", "nothing"), "invalid choice"),
        (("inspect", "--kernels", "softmax"), "invalid choice 'softmax'"),
        (("inspect", "--n", "0"), "n, v and h must be at least 1, got 0, 128256 and 4096"),
        (("sweep", "--variants", "ppo"), "invalid choice"),
        (("train", "grammar", "--temperature", "0.5", "--out"), "temperature must be 1 in the grammar world, got 0.5"),
        (("train", "grammar", "--max-new-tokens", "2", "--out"), "max_new_tokens must be >= 4 in the grammar world"),
        (("demo", "--world", "grammar", "--out", "/dev/null/here"), "cannot write to the output folder"),
        (("train", "grammar", "--device", "cuda:99", "--out"), "device 'cuda:99' is not usable here"),
    ],
)
def test_bad_values_are_one_clear_line(args, message, tmp_path, here):
    args = (*args, tmp_path) if args[-1] == "--out" else args
    out = here(*args)
    text = re.sub(r"[\s│]+", " ", out.stdout + out.stderr)
    assert out.returncode in (1, 2) and message in text and "Traceback" not in text


def test_a_bad_value_is_one_clear_line_in_a_fresh_process_too():
    out = klq("train", "grammar", "--tau", "0")
    text = re.sub(r"[\s│]+", " ", out.stdout + out.stderr)
    assert out.returncode == 2 and "tau must be a finite number > 0, got 0" in text and "Traceback" not in text


SIGNALLED = """
import builtins, os, signal, sys
from klq_edu.app.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits "ignore"
load, (where, name, wrapped) = builtins.__import__, sys.argv[1:4]
def interrupted(module, *args, **kwargs):
    if module == where and module not in sys.modules:
        try:
            os.kill(os.getpid(), getattr(signal, name))
        except KeyboardInterrupt:
            raise (ImportError("failed to import") if wrapped == "wrapped" else KeyboardInterrupt)
    return load(module, *args, **kwargs)
builtins.__import__ = interrupted
sys.argv = ["klq", *sys.argv[4:]]
main()
"""


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("where, wrapped", [("tyro", "plain"), ("torch", "plain"), ("numpy", "wrapped")])
def test_a_signal_during_imports_leaves_no_traceback(where, wrapped, name, status, tmp_path):
    """… even where an extension module turns it into an ImportError."""
    command = [sys.executable, "-c", SIGNALLED, where, name, wrapped, "train", "grammar"]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == status and "Traceback" not in out.stderr and "Interrupted" in out.stderr, out.stderr


@pytest.mark.parametrize(
    "command", ["demo", "train", "hub", "sweep", "compare", "bench", "judge", "inspect", "course", "doctor"]
)
def test_only_a_command_that_continues_is_said_to(command, tmp_path):
    command = [sys.executable, "-c", SIGNALLED, "tyro", "SIGINT", "plain", command]
    out = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "\nInterrupted" in out.stderr
    assert ("The same command continues" in out.stderr) is (command[-1] in ("demo", "train", "hub", "sweep", "compare"))


def test_texts_with_markup_are_shown_as_they_are(capsys):
    prompts = [f"[/] w5 [red]{i}" for i in range(3)]
    samples = pd.DataFrame({"prompt": prompts, "completion": ["[/b] τ"] * 3, "reward": 1.0, "kl": 0.0})
    rows = [{"update": 0, "reward": 1.0, "kl": 0.1, "seconds": 1.0}]
    settings = {"world": "mine", **TrainConfig().to_dict()}
    result = Result(settings, rows, {0: samples, settings["updates"]: samples})
    print_results(Console(), SimpleNamespace(name="[/]", tables={}, judges={}), [result])
    assert capsys.readouterr().out.count("[/] w5 [red]") == 3


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The arguments of a demo, what a fresh process said that ran it, and its folder."""
    folder = tmp_path_factory.mktemp("demo")
    args = ("demo", "--world", "grammar", "--updates", "3", "--out", folder)
    return args, klq(*args), folder / "grammar"


def test_the_demo_runs_reports_and_does_not_repeat_itself(demo, here):
    args, first, folder = demo
    assert first.returncode == 0, first.stderr
    for word in ("KLQ", "PPO-clip", "PPO-penalty", "attained", "reference", "32 completions and 96 earlier ones"):
        assert word in " ".join(first.stdout.split())
    logs = sorted(folder.glob("*/metrics.jsonl"))
    assert len(logs) == 3 and all(len(log.read_text().splitlines()) == 3 for log in logs)
    before = [log.read_text() for log in logs]
    assert here(*args).returncode == 0  # another process: it recognises world, model and reward
    assert [log.read_text() for log in logs] == before


def test_signals_keep_what_is_done_and_the_same_command_continues(tmp_path, here):
    args = ("train", "grammar", "--updates", "30", "--out")
    assert here(*args, tmp_path / "whole").returncode == 0
    command = [sys.executable, "-m", "klq_edu.app.cli", *args, str(tmp_path / "cut")]
    logs = {name: tmp_path / name / "metrics.jsonl" for name in ("whole", "cut")}
    done = []
    for signum, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which background jobs ignore
        )  # fmt: skip
        while process.poll() is None and not (logs["cut"].exists() and rows(logs["cut"]) > len(done) + 3):
            time.sleep(0.02)
        process.send_signal(signum)
        assert process.wait(60) == status and "what is done is kept" in process.stderr.read()
        before, done = done, logs["cut"].read_text().splitlines()
        assert len(before) + 3 < len(done) < 30 and done[: len(before)] == before  # nothing was trained twice
    assert here(*args, tmp_path / "cut").returncode == 0
    assert logs["cut"].read_text().splitlines()[: len(done)] == done
    finals = [json.loads(log.read_text().splitlines()[-1])["attained"] for log in logs.values()]
    assert finals[0] == finals[1]


def rows(log):
    return log.read_text().count("\n")


def test_the_report_stands_alone(demo):
    """One file: no script, no link or image from elsewhere, every figure with a text alternative."""
    *_, folder = demo
    page = (folder / "report.html").read_text()
    assert not re.search(r"<script|<link|(src|href)=[\"']?(https?:)?//", page)
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) == 5 and all(
        "data:image/svg+xml;base64," in i and re.search(r'alt="[^"]{10,}"', i) for i in images
    )


def test_train_saves_a_model_that_loads_anywhere(tmp_path, here):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = here("train", "grammar", "--updates", "2", "--out", tmp_path / "run", "--save-model", tmp_path / "model")
    assert out.returncode == 0, out.stderr
    model, tokenizer = (c.from_pretrained(tmp_path / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    assert model(**tokenizer("at dawn the", return_tensors="pt", return_token_type_ids=False)).logits.shape[-1] == 65
    assert json.loads((tmp_path / "run" / "config.json").read_text())["world"] == "grammar"
    trained = {
        k.removeprefix("lm."): x for k, x in load_checkpoint(tmp_path / "run" / "checkpoint.pt")["parameters"].items()
    }
    saved = model.state_dict()
    assert trained.keys() & saved and all(torch.equal(saved[k], trained[k]) for k in trained.keys() & saved)


def test_the_sweep_writes_one_row_per_run_with_provenance(tmp_path, here):
    """Behind a proxy, so that the true reward judges too; a second call reads what the first has trained."""
    settings = "--world grammar_proxy --name judged --taus 0.2 --schedules on_policy equal --variants klq ppo_clip"
    where = ("--out", tmp_path, "--runs", tmp_path / "runs", "--jobs", "1", "--updates", "2", "--seeds", "1")
    out = here("sweep", *settings.split(), *where)
    assert out.returncode == 0, out.stderr
    rows = pd.read_csv(tmp_path / "judged.csv")
    assert rows["schedule"].tolist() == ["on_policy"] * 2 + ["equal"] * 2 and rows["seed"].unique().tolist() == [100]
    assert rows["algorithm"].tolist() == ["klq", "ppo_clip"] * 2 and rows["rollouts"].tolist() == [128] * 2 + [64] * 2
    assert rows["row_steps"].tolist() == [512] * 2 + [192] * 2 and (rows["seconds"] > 0).all()
    assert rows["wins_over_klq"][::2].tolist() == pytest.approx([0.5] * 2) and (rows["wins_over_reference"] > 0.5).all()
    assert ((rows["wins_over_klq"][1::2] - 0.5).abs() > 1e-4).all() and rows["true_reward"].nunique() == 4
    assert out.stdout.count("| 0.2 | ") == (tmp_path / "judged.md").read_text().count("| 0.2 | ") == 6
    assert {"command", "sweep", "torch", "machine"} <= set(json.loads((tmp_path / "judged.json").read_text()))
    assert (tmp_path / "judged.svg").exists()


def test_the_benchmark_measures_time_memory_and_error(tmp_path, here):
    out = here("bench", "--quick", "--workloads", "returns", "--name", "mine", "--out", tmp_path)
    assert out.returncode == 0 and "ours (torch)" in out.stdout, out.stderr
    head, *rows = (line.split(",") for line in (tmp_path / "mine.csv").read_text().splitlines())
    rows = [dict(zip(head, row, strict=True)) for row in rows]
    assert [row["contender"] for row in rows] == ["naive", "ours (torch)"]
    assert all(float(row["memory_mb"]) >= 0 and float(row["error_targets"]) < 1e-5 for row in rows)
    assert json.loads((tmp_path / "mine.json").read_text())["command"].startswith("klq bench --quick")


def test_the_doctor_reports_versions_devices_and_weights():
    out = klq("doctor")
    for word in ("torch", "triton", "device", "SmolLM2 weights", "cache"):
        assert word in out.stdout
    assert out.returncode == (1 if "missing" in out.stdout else 0)


def test_the_doctor_works_where_much_is_missing():
    """It must not crash on what it is there to report, and its advice must be readable (brackets and all)."""
    code = "import sys; sys.modules.update(transformers=None, datasets=None, gguf=None)\n"
    code += "from klq_edu.app import doctor; doctor.PACKAGES = {'no-such-package': doctor.DEMO}; doctor.run_doctor()"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"}
    )
    assert out.returncode == 0 and "'.[demo]'" in out.stdout, out.stderr


def test_on_request_an_error_says_where_it_was_raised(tmp_path, here, monkeypatch):
    monkeypatch.setenv("KLQ_DEBUG", "1")
    with pytest.raises(ValueError, match="device 'cuda:99' is not usable here"):
        here("train", "grammar", "--device", "cuda:99", "--out", tmp_path)


def test_a_terminal_without_greek_letters_is_no_reason_to_fail():
    out = klq("demo", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert out.returncode == 0 and "KL coefficient ?" in out.stdout, out.stderr


@pytest.mark.parametrize("fine, status", [((True, True), 0), ((True, False), 1)])
def test_the_doctors_verdict_is_the_exit_status(fine, status, here, monkeypatch):
    found = [doctor.Finding("thing", ok, "seen", "" if ok else "get it") for ok in fine]
    monkeypatch.setattr(doctor, "examine", lambda: found)
    out = here("doctor")
    assert out.returncode == status and ("get it" in out.stdout) is bool(status)


def test_the_doctor_tells_one_models_weights_from_the_others(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "weights_folder", lambda: tmp_path)
    monkeypatch.setattr(doctor, "minilm_folder", lambda: None)
    found = {f.what: f for f in doctor.examine()}
    assert found["SmolLM2 weights"].fine and not found["MiniLM weights"].fine
    assert "without this judge" in found["MiniLM weights"].advice


def test_only_the_chosen_notebooks_are_checked(tmp_path, here, monkeypatch):
    monkeypatch.setattr("klq_edu.course.build.drift", lambda folder, chapter: [folder / chapter.name])
    said = here("course", "check", "--notebooks", tmp_path, "--only", "01", "07").returncode
    first, *others = said.splitlines()
    assert "out of date" in first and [line.removeprefix(f"{tmp_path}/")[:2] for line in others] == ["01", "07"]
