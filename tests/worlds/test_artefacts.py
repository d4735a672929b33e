"""Artefacts: complete or not there, made of what they say, remade when they are not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from klq_edu.worlds.artefacts import MANIFEST, artefact, contents


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KLQ_CACHE", str(tmp_path))
    return tmp_path


def maker(made, text="numbers"):
    def make(folder):
        made.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "table.csv").write_text(text)

    return make


def test_what_is_there_and_whole_is_not_made_again(cache, capsys):
    made = []
    folder = artefact("task/sft", {"seed": 0}, maker(made))
    assert artefact("task/sft", {"seed": 0}, maker(made)) == folder == cache / "task" / "sft" and len(made) == 1
    manifest = json.loads((folder / MANIFEST).read_text())
    assert (
        manifest["inputs"] == {"seed": 0} and manifest["seconds"] >= 0 and set(manifest["files"]) == {"sub/table.csv"}
    )
    assert {"torch", "python", "machine"} <= set(manifest)
    assert capsys.readouterr().out == "task/sft: not there yet\n"


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda f: (f / "sub" / "table.csv").write_text("number5"), "sub/table.csv is not as it was written"),
        (lambda f: (f / "sub" / "table.csv").unlink(), "sub/table.csv is not as it was written"),
        (lambda f: (f / MANIFEST).write_text("{"), f"{MANIFEST} can't be read"),
        (lambda f: (f / MANIFEST).unlink(), f"{MANIFEST} can't be read"),
        (lambda f: (f / MANIFEST).write_text("{}"), f"{MANIFEST} can't be read"),
    ],
)
def test_what_is_damaged_is_named_and_made_anew(change, reason, capsys):
    folder = artefact("task/sft", {"seed": 0}, maker([]))
    change(folder)
    capsys.readouterr()
    made = []
    artefact("task/sft", {"seed": 0}, maker(made))
    assert len(made) == 1 and (folder / "sub" / "table.csv").read_text() == "numbers"
    assert capsys.readouterr().out == f"task/sft: damaged ({reason})\n"


def test_other_inputs_or_a_wish_make_it_anew(capsys):
    artefact("task/sft", {"seed": 0, "epochs": 2}, maker([]))
    made = []
    artefact("task/sft", {"seed": 1, "epochs": 2}, maker(made, "others"))
    assert "made of something else (seed changed)" in capsys.readouterr().out
    folder = artefact("task/sft", {"seed": 1, "epochs": 2}, maker(made, "again"), again=True)
    assert len(made) == 2 and (folder / "sub" / "table.csv").read_text() == "again"


@pytest.mark.parametrize("before, after", [({}, {"epochs": 2}), ({"epochs": 2}, {})])
def test_an_input_more_or_less_makes_it_anew(before, after, capsys):
    artefact("task/sft", {"seed": 0} | before, maker([]))
    artefact("task/sft", {"seed": 0} | after, maker(made := []))
    assert len(made) == 1 and "made of something else (epochs changed)" in capsys.readouterr().out


def test_contents_are_what_was_made_and_not_of_what():
    """What follows is made anew only if a stage, made anew, has another result (on another machine, say)."""
    first = contents(artefact("task/sft", {"seed": 0}, maker([])))
    assert contents(artefact("task/sft", {"seed": 1}, maker([]))) == first
    assert contents(artefact("task/sft", {"seed": 1}, maker([], "others"), again=True)) != first


def test_an_error_leaves_neither_half_nor_old(cache):
    artefact("task/sft", {"seed": 0}, maker([]))

    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        artefact("task/sft", {"seed": 1}, broken)
    assert [p.name for p in (cache / "task").iterdir()] == [".sft.lock"]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_a_killed_stage_is_made_afresh_and_leaves_nothing(cache):
    code = """
        import time
        from klq_edu.worlds.artefacts import artefact
        def make(folder):
            (folder / "half").write_text("x" * 1000)
            print("half", flush=True)
            time.sleep(60)
        artefact("task/sft", {"seed": 0}, make)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    while "half" not in process.stdout.readline():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert any((cache / "task").glob(".sft-*/half"))
    folder = artefact("task/sft", {"seed": 0}, maker([]))
    assert sorted(p.name for p in (cache / "task").iterdir()) == [".sft.lock", "sft"]
    assert not (folder / "half").exists()
