"""What the README shows works as it stands, and it names the two commands."""

import re
import shutil
from pathlib import Path

import pandas as pd

import klq_edu
from klq_edu.app import study
from klq_edu.app.compare import done
from klq_edu.app.comparison import algorithms, power, schedules
from klq_edu.app.report import agreement
from klq_edu.worlds.registry import WORLDS, preset

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
ORDER = ("tldr", "dialogue", "stories")  # of worlds in its tables


def test_the_example_runs(tmp_path, monkeypatch, tiny_lm, tokenizer):
    """Executed word for word, but for the model's name; the prompts' words are unknown to the tiny model, no matter."""
    tiny_lm().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    scope = {}
    exec(code.replace("path/or/hub-name", str(tmp_path / "model")), scope)
    assert len(scope["rows"]) == 3 and (tmp_path / "runs/mine/model/value_head.safetensors").exists()
    exec(code.replace("path/or/hub-name", "runs/mine/model").replace('Run("runs/mine"', 'Run("runs/next"'), scope)
    assert len(scope["rows"]) == 3


def test_the_first_screen_names_both_commands_and_every_link_leads_somewhere():
    assert "make demo" in README[:1200] and "make test" in README[:1200]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    assert "@" not in README, "a number is still to be filled in"


def test_every_room_is_named_in_the_layout_and_in_the_package():
    """What lies in klq_edu, package or module, has a line in its docstring and a place in the README's layout."""
    layout = README.split("## Layout")[1]
    rooms = [p for p in (ROOT / "klq_edu").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    for room in rooms:
        if room.name != "__init__.py":
            assert f"\n{room.stem} " in klq_edu.__doc__, f"name {room.name} in klq_edu/__init__.py"
            assert re.search(rf" (klq_edu/)?{room.name}(/| \()", layout), f"name {room.name} in README.md"
    named = re.findall(r"^    (?:klq_edu/)?(\w+)/ ", layout, re.MULTILINE) + re.findall(r"(\w+\.py) \(", layout)
    places = [ROOT, ROOT / "klq_edu", ROOT / "kernels"]
    assert all(any((place / name).exists() for place in places) for name in named), "the layout names what is not there"


def test_every_figure_and_table_of_results_is_shown_on_a_page():
    pages = "".join(path.read_text() for path in (ROOT / "README.md", ROOT / "kernels" / "README.md"))
    assert not [path.name for path in (ROOT / "results").glob("*.svg") if f"results/{path.name}" not in pages]
    for csv in (ROOT / "results").glob("*.csv"):
        assert f"results/{csv.name}" in pages, csv.name
    for folder in (path for path in (ROOT / "results" / "compare").iterdir() if path.is_dir()):
        assert WORLDS[folder.name].made and "results/compare" in pages


def test_its_tables_are_those_of_the_committed_results():
    """No number in prose that a command does not reproduce: the tables are made from the CSVs again and compared."""
    sweep, judge = (ROOT / "results" / f"grammar_{name}.csv" for name in ("sweep", "judge"))
    for rows in (schedules(sweep, ("klq", "ppo_clip")), power(judge)):
        assert rows and rows in README, "run klq sweep and update README.md"
    for csv in (sweep, judge):
        page = csv.with_suffix(".md").read_text()
        assert algorithms(csv) in page and schedules(csv) in page, "run klq sweep"


def test_the_defaults_reach_what_the_project_promises():
    """KLQ with cooled replay in the grammar world, ten seeds that nothing was chosen on, from the committed sweep."""
    runs = pd.read_csv(ROOT / "results" / "grammar_sweep.csv").query("algorithm == 'klq' and schedule == 'replay'")
    assert (runs.groupby("tau")["seed"].nunique() >= 10).all() and runs["seed"].min() >= 100
    assert (runs["rollouts"] == 5120).all()
    medians = runs.groupby("tau")["attained"].median()
    assert medians[0.05] >= 0.95 and medians[0.2] >= 0.97 and medians[1.0] >= 0.93


def test_the_benchmark_table_is_that_of_the_committed_csv():
    runs = pd.read_csv(ROOT / "results" / "bench.csv")
    runs = runs[runs["stage"] == "both"].groupby(["workload", "contender"], sort=False).first()
    text = (ROOT / "kernels" / "README.md").read_text()
    for workload in ("logits_stats", "linear_stats", "klq_ref", "klq", "update"):
        rows = (runs.loc[workload, who] for who in ("naive", "ours (torch)"))
        cells = [f"{row['units']:.2f} units, {row['memory_mb']:.0f} MB" for row in rows]
        assert f"| {workload} | {' | '.join(cells)} |" in text


def test_the_tables_of_learnt_rewards_are_those_of_the_committed_runs(tmp_path):
    folders = sorted(
        (p for p in (ROOT / "results" / "compare").iterdir() if p.is_dir()), key=lambda p: ORDER.index(p.name)
    )
    results = {folder.name: study.read(folder) for folder in folders}
    assert study.summary(results) in README, "run klq compare and update README.md"
    for folder in folders:
        copied(folder, tmp_path)
        learnt = agreement(pd.read_csv(folder / "made_held_out_pairs.csv")).astype(str).iloc[0]
        assert f"| {folder.name} | {' | '.join(learnt)} |" in README, folder.name
        runs = pd.read_csv(folder / "runs.csv", keep_default_na=False)
        for run in runs.itertuples():  # made with the settings that the code has now
            config = preset(folder.name, run.algorithm, tau=run.tau, seed=run.seed, device="cpu")
            assert run.changes or done(folder, run.run, config), run.run


def test_the_numbers_of_the_search_are_in_its_table(tmp_path):
    """Its seeds are none of those that are reported."""
    folder = ROOT / "results" / "search" / "stories"
    text = copied(folder, tmp_path / "search")
    (told,) = re.findall(r"\*\*A search\*\*.*?\n\n", README, re.DOTALL)
    numbers = re.findall(r"[+−]\d\.\d{3}", told)
    assert len(numbers) >= 4 and all(number.replace("−", "-") in text for number in numbers)
    seeds = [set(pd.read_csv(f / "runs.csv")["seed"]) for f in (folder, ROOT / "results" / "compare" / "stories")]
    assert not seeds[0] & seeds[1]


def copied(folder, place):
    """The tables of a folder, made again: they are the committed ones."""
    text = study.write(shutil.copytree(folder, place / folder.name))
    assert text + "\n" == folder.with_suffix(".md").read_text(), folder
    return text
