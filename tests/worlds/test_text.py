"""The text tasks: data, gold against hacks, and the whole road on a tiny model."""

import copy
import json
from dataclasses import replace
from importlib.resources import files

import pandas as pd
import pytest
import torch
import transformers
from torch.nn.functional import cosine_similarity

from klq_edu.rlhf.identity import fingerprint
from klq_edu.rlhf.judge import words_of
from klq_edu.rlhf.reading import Reading
from klq_edu.worlds import dialogue, road, text, tldr
from klq_edu.worlds.artefacts import outdated
from klq_edu.worlds.gold import Gold, hacks
from klq_edu.worlds.judges import EmbeddingJudge, ReferenceJudge
from klq_edu.worlds.weights import cache_root

TASKS = {"tldr": (tldr.TASK, "text", "summary"), "dialogue": (dialogue.TASK, "prompt", "answer")}
WORDS = {"text": (30, 60), "summary": (5, 14), "prompt": (4, 30), "answer": (15, 40)}


def rows(name):
    return [json.loads(line) for line in (files("klq_edu.worlds") / "data" / f"{name}.jsonl").read_text().splitlines()]


def test_hacks_are_the_same_in_every_process():
    """Python numbers texts anew in each process: nothing may depend on the order of a set."""
    words = [f"w{i:02}" for i in range(30)]
    (found,) = hacks([" ".join(words)], ["one two three."])["keywords"]
    assert found == "w29, w28, w27."


@pytest.mark.parametrize("task", TASKS)
def test_the_data_are_as_the_datasheet_says(task):
    _, source, reference = TASKS[task]
    train, test = rows(f"{task}_train"), rows(f"{task}_test")
    assert len(train) >= {"tldr": 400, "dialogue": 300}[task] and len(test) == 256
    seen = {}
    for number, row in enumerate(train + test):
        for name in (source, reference):
            low, high = WORDS[name]
            assert low <= len(row[name].split()) <= high and row[name] == " ".join(row[name].split()), row
        assert row[reference][-1] in ".!?", row
        copied, said = words_of(row[source]), words_of(row[reference])
        runs = {tuple(copied[i : i + 5]) for i in range(len(copied) - 4)}
        assert not any(tuple(said[i : i + 5]) in runs for i in range(len(said) - 4)), row
        for i in range(len(said) - 5):  # no reference is another's, not even half
            assert seen.setdefault(tuple(said[i : i + 6]), number) == number, row


@pytest.mark.weights
@pytest.mark.parametrize("task", TASKS)
def test_no_item_is_nearly_another(task):
    """By sentence embeddings, within and across the split; the same question in other words has a cosine above .75."""
    from klq_edu.worlds.weights import minilm_folder

    if not (folder := minilm_folder()):
        pytest.skip("all-MiniLM-L6-v2 is not installed (see klq doctor)")
    texts = [row[TASKS[task][1]] for part in ("train", "test") for row in rows(f"{task}_{part}")]
    vectors = EmbeddingJudge(folder).embed(texts)
    assert (vectors @ vectors.T).fill_diagonal_(0).max() < 0.75


class Indifferent:
    """A reader that finds everything equally natural."""

    identity = "indifferent"

    def __call__(self, prompts, completions):
        n = len(completions)
        return Reading(torch.full((n,), -3.0), torch.ones(n), torch.zeros(n, 0))


class Plain:
    """A tokenizer's chat template, for what needs no tokens."""

    def apply_chat_template(self, messages, **_):
        return messages[-1]["content"]


@pytest.mark.parametrize("task", TASKS)
def test_the_gold_prefers_every_reference_to_every_hack(task):
    task, gold = TASKS[task][0], TASKS[task][0].gold(Indifferent())
    for data in task.data(Plain()).values():
        columns = {name: data[name][:] for name in ("source", "reference")}
        scores = {kind: gold(data["prompt"][:], texts, **columns) for kind, texts in task.hacks(data).items()}
        best = scores.pop("reference")
        assert len(scores) == 10
        for kind, found in scores.items():
            assert all(x < y for x, y in zip(found, best)), kind


@pytest.mark.parametrize("task, lead", [("tldr", " "), ("dialogue", "")])
def test_references_are_learnt_and_tried_as_the_model_writes_them(task, lead):
    """After "TL;DR:" a model goes on with a space; without it SFT would teach other tokens than are sampled."""
    data = TASKS[task][0].data(Plain())["train"]
    written = [lead + reference for reference in data["reference"]]
    assert data["completion"][:] == written == TASKS[task][0].hacks(data)["reference"]


@pytest.mark.parametrize(
    "fault, costs",
    [
        ("copied", 0.5 * 3 / 6),  # of six triples of words, half a point if all are the source's
        ("borrowed", 1 - 0.7),  # all words, where 0.7 of them are free
        ("long", 0.03 * 6),
        ("repeated", 4 / 6 - 0.3),  # four of six words had been said, where 0.3 are free
        ("unfinished", 0.2),
    ],
)
def test_each_penalty_sees_its_own_fault_and_subtracts_what_it_says(fault, costs):
    source = "my old dog ran over the new fence and bit the kind postman on his left hand today"
    good = "Dog bites postman; what now?"
    bad = {
        "copied": "He ran over the new fence, what now?",
        "borrowed": "today hand left his on postman kind.",
        "long": " ".join(f"word{i}" for i in range(20)) + ".",
        "repeated": "Dog bites dog bites dog bites?",
        "unfinished": "Dog bites postman; what",
    }[fault]
    gold = Gold(Indifferent(), words=14)
    assert gold.penalty(good, source) == 0 and gold.penalty(bad, source) == pytest.approx(costs)


def test_the_frozen_model_judges_what_a_completion_tells_of_the_reference():
    heard = []
    reader = lambda prompts, texts: heard.append((prompts, texts)) or Indifferent()(prompts, texts)  # noqa: E731
    reader.identity = "heard"
    assert ReferenceJudge(reader)(["a prompt"], [" said "], reference=["true"]) == [-3.0]
    assert heard == [(["said\nIn other words:"], [" true"])]


def test_the_independent_judge_compares_completions_with_references_by_their_mean_states(tmp_path, tokenizer):
    """Each text as if it stood alone: neither the prompt nor what pads a batch plays a part."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.BertModel(transformers.BertConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = EmbeddingJudge(tmp_path, batch_size=2)

    def vector(text):
        return judge.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)

    said, reference = ["w5 w6 w7 w8", "w9", "w5"], ["w9", "w9", "w5 w6"]
    expected = [cosine_similarity(vector(s), vector(r), dim=0).item() for s, r in zip(said, reference)]
    assert judge(["w30 w31", "w32", "w5 w6"], said, reference=reference) == pytest.approx(expected, abs=1e-5)
    assert expected[1] > 0.999 > expected[0]


def test_the_gold_is_overlap_and_naturalness_less_the_penalties():
    """By hand: of four words two stand in the reference of five, in order: F = 4/9; −2 nats are worth −0.1."""
    read = []
    said = Reading(torch.tensor([-2.0, -4.0]), torch.ones(2), torch.zeros(2, 0))
    reader = lambda *asked: read.append(asked) or said  # noqa: E731
    reader.identity = "two and four nats"
    texts, source, reference = ["dogs bite kind postmen"] * 2, ["nothing of it"] * 2, ["dogs bite us every day"] * 2
    known = [4 / 9 - 0.05 * nats - 0.2 for nats in (2, 4)]  # 0.2: neither stops
    assert Gold(reader, words=14)(["p"] * 2, texts, source, reference) == pytest.approx(known)
    assert read == [(["p"] * 2, texts)]  # natural after the prompt, as the policy writes


@pytest.fixture
def walk(tmp_path, monkeypatch, tiny_lm, tokenizer):
    """A function (remake) -> the road of a tiny task for a tiny model, in a cache of its own."""
    monkeypatch.setenv("KLQ_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    tiny_lm().save_pretrained(base)
    tokenizer.save_pretrained(base)
    small = {
        "TRAINABLE_BLOCKS": 1,
        "TEST_SAMPLES": 4,
        "LAYERS": (1, 3),
        "HACKED": 4,
        "SFT": road.SFT | {"batch_size": 4},
    }
    for name, value in small.items():
        monkeypatch.setattr(road, name, value)
    monkeypatch.setattr(text, "minilm_folder", lambda: None)
    monkeypatch.setattr(text, "DATA", tmp_path)
    for part, numbers in {"train": range(2, 22), "test": range(22, 30)}.items():
        lines = [json.dumps({"q": f"w{i} w{i + 1} w{i + 2}", "a": f"w{i + 2} w{2 * i % 60} ."}) for i in numbers]
        (tmp_path / f"tiny_{part}.jsonl").write_text("\n".join(lines))

    def start(remake=None):
        task = text.text_task("tiny", "A tiny task.", ("q", "a"), lambda _, q: f"{q} w60", lead="", words=4)
        return road.Road(task, base, tldr_settings(max_new_tokens=5), remake)

    return start


def tldr_settings(**changes):
    from klq_edu.worlds.registry import preset

    return preset("tldr", **changes)


def test_the_road_ends_in_a_world_and_is_walked_once(walk, capsys):
    world = walk().world()
    said = capsys.readouterr().out
    assert all(f"tiny/{stage}: not there yet" in said for stage in ("sft", "pairs", "reward", "trials"))
    assert set(world.prompts.column_names) == {"prompt", "source", "reference"} and len(world.test_prompts) == 8
    assert list(world.judges) == ["gold", "SmolLM2"] and len(world.baselines) == len(world.prompts) == 20
    samples = world.tables["samples"]
    assert len(samples) == 20 * tldr.TASK.samples
    first = samples[samples["prompt"] == world.prompts[0]["prompt"]]
    assert world.baselines[0] == pytest.approx(first["proxy"].mean())
    unseen = set(world.tables["held_out_pairs"]["prompt"])
    assert unseen and unseen <= set(world.prompts["prompt"][::5])
    trials = world.tables["trials"]
    assert (trials[trials["kind"] == "reference"]["loses"] == 0).all() and trials["loses"].max() > 0
    again = walk().world()
    assert "not there" not in capsys.readouterr().out
    prompts, texts = world.prompts["prompt"][:3], ["w5 w6", "w7", ""]
    assert (
        again.reward(prompts, texts) == world.reward(prompts, texts) and again.reward.identity == world.reward.identity
    )
    pd.testing.assert_frame_equal(again.tables["trials"], world.tables["trials"])


def test_the_policy_may_write_ends_and_references_but_no_other_special_tokens(walk, tokenizer, tmp_path, monkeypatch):
    """What begins a turn decodes to nothing: a policy could hide it. Without its end no completion would ever end."""
    other = copy.deepcopy(tokenizer)
    other.bos_token = "w3"
    other.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(text, "FREQUENT_TOKENS", 6)
    made = walk()
    references = {i for reference in made.train["reference"] for i in made.ids(reference)}
    assert max(references) > 40 and set(made.vocab.tolist()) == ({*range(6)} | references) - {3}


def test_each_stage_is_handed_the_right_model_and_prompts(walk, monkeypatch):
    """Samples are the fine-tuned model's, at RL's temperature and length. Every fifth prompt is kept from the reward
    model: on those it is tested, and gold and judges are tried."""
    asked, learnt, tried, made = [], [], [], walk()
    collect, fit, hacks = road.collect, road.RewardModel.fit, made.task.hacks

    def sampled(policy, *args, **settings):
        asked.append((fingerprint(policy.lm.state_dict()), settings.get("temperature"), settings["max_new_tokens"]))
        return collect(policy, *args, **settings)

    monkeypatch.setattr(road, "collect", sampled)
    monkeypatch.setattr(
        road.RewardModel, "fit", lambda self, pairs, **rest: learnt.extend(pairs["prompt"]) or fit(self, pairs, **rest)
    )
    made.task = replace(made.task, hacks=lambda rows: tried.extend(rows["prompt"]) or hacks(rows))
    world = made.world()
    tuned = fingerprint(made.policy(made.sft).lm.state_dict())
    assert set(asked) == {(tuned, tldr_settings().temperature, 5)} and tldr_settings().temperature != 1
    unseen = set(world.prompts["prompt"][::5])
    assert set(learnt) == set(world.prompts["prompt"]) - unseen
    assert set(world.tables["held_out_pairs"]["prompt"]) == unseen == set(tried)


@pytest.mark.parametrize("stage, made", [("sft", 3), ("pairs", 2), ("reward", 1)])
def test_a_stage_and_all_that_follows_can_be_made_anew_with_the_same_numbers(stage, made, walk, capsys):
    before = walk().world()
    capsys.readouterr()
    after = walk(stage).world()
    said = capsys.readouterr().out
    assert said.count("to be made anew") == said.count("tiny/") == made, said  # what comes of it is the same
    assert after.reward.identity == before.reward.identity and after.baselines == before.baselines


@pytest.mark.parametrize(
    "change, stages",
    [
        (lambda patch: patch.setattr(road, "TRAINABLE_BLOCKS", 2), {"sft", "pairs", "reward", "trials"}),
        (lambda patch: patch.setattr(text, "FREQUENT_TOKENS", 59), {"sft", "pairs", "reward", "trials"}),
        (lambda patch: patch.setitem(road.SFT, "seed", 5), {"sft", "pairs", "reward", "trials"}),
        (lambda patch: patch.setitem(road.PAIRS, "scale", 9.0), {"pairs", "reward", "trials"}),
        (lambda patch: patch.setattr(text.Gold, "penalty", lambda *_: 0.1), {"pairs", "reward", "trials"}),
        (lambda patch: patch.setattr(road, "UNSEEN", 4), {"reward", "trials"}),
        (lambda patch: patch.setattr(text, "judges", lambda reader: {"length": letters}), {"trials"}),
        (lambda patch: patch.setattr(road, "HACKED", 2), {"trials"}),
        (lambda patch: None, set()),
    ],
    ids=["blocks", "vocabulary", "seed", "noise", "gold", "held out", "judges", "hacks", "nothing"],
)
def test_what_a_stage_was_made_of_decides_whether_it_is_made_anew(change, stages, walk, capsys, monkeypatch):
    walk().world()
    capsys.readouterr()
    change(monkeypatch)
    walk().world()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny/")]
    assert {line.split(":")[0].removeprefix("tiny/") for line in said} == stages, said
    assert all("made of something else" in line for line in said)


def test_each_setting_enters_the_stages_that_it_decides(walk, monkeypatch):
    """Nothing is made anew here: of artefacts that are there, those are found outdated that would have been made
    otherwise. (What follows them is told by their contents.)"""
    walk().world()
    edited = lambda made, part: setattr(made, part, getattr(made, part).map(lambda _: {"reference": "w2 ."}))  # noqa: E731
    settings = lambda made, **new: setattr(made, "settings", replace(made.settings, **new))  # noqa: E731
    other = torch.float32 if walk().reader.dtype == torch.bfloat16 else torch.bfloat16
    everything = {"sft", "pairs", "reward", "trials"}
    cases = {
        "training data": (lambda made, patch: edited(made, "train"), everything),
        "test data": (lambda made, patch: edited(made, "test"), {"sft"}),
        "layers": (lambda made, patch: patch.setattr(road, "LAYERS", (2, 3)), everything),
        "precision": (lambda made, patch: patch.setattr(road, "resolve_dtype", lambda *_: other), everything),
        "epochs": (lambda made, patch: patch.setitem(road.SFT, "epochs", 3), {"sft"}),
        "temperature": (lambda made, patch: settings(made, temperature=0.5), {"pairs"}),
        "length": (lambda made, patch: settings(made, max_new_tokens=6), {"pairs"}),
        "samples": (lambda made, patch: setattr(made, "task", replace(made.task, samples=4)), {"pairs"}),
        "seed of samples": (lambda made, patch: patch.setitem(road.PAIRS, "seed", 5), {"pairs"}),
        "ridge": (lambda made, patch: patch.setattr(road, "RIDGE", 9.0), {"reward"}),
        "learning rate of RL": (lambda made, patch: settings(made, learning_rate=0.5), set()),
    }
    for name, (change, stages) in cases.items():
        found, made = {}, walk()

        def look(name, inputs, make, again, found=found):
            folder = cache_root() / name
            found[folder.name] = outdated(folder, inputs)
            return folder

        with monkeypatch.context() as patch:
            patch.setattr(road, "artefact", look)
            change(made, patch)
            made.world()
        assert {stage for stage, reason in found.items() if reason} == stages, (name, found)


def test_labels_are_as_noisy_as_stated(walk):
    """The scale is per standard deviation of the gold over all samples, whatever the gold's unit."""
    made = walk()
    gold = pd.read_json(made.pairs / "samples.jsonl", lines=True)["gold"]
    noise = json.loads((made.pairs / "noise.json").read_text())
    assert noise["scale"] * gold.std(ddof=0) == pytest.approx(road.PAIRS["scale"])


def test_rl_starts_from_the_fine_tuned_model(walk):
    made = walk()
    start = fingerprint(made.world().make_policy(tldr_settings()).lm.state_dict())
    tuned, base = (fingerprint(made.policy(folder).lm.state_dict()) for folder in (made.sft, made.base))
    assert start == tuned != base


def test_training_on_the_road_uses_its_baselines(walk, tmp_path):
    from klq_edu.app import comparison
    from klq_edu.app.experiment import run_experiment

    world = walk().world()
    config = tldr_settings(updates=2, batch_size=8, replay=4, max_new_tokens=5)
    results = [run_experiment(world, config, tmp_path / "klq")]
    first = results[0].rows[0]
    assert first["rollouts"] == 8  # none for the means
    table = comparison.verdicts(results)
    assert list(table["judge"]) == ["reward", "gold", "SmolLM2"] and (table["b"] == "reference").all()
    assert read_again(world, config, tmp_path / "klq").after.equals(results[0].after)
    world.judges = {"letters": letters}  # the same policy before another judge
    again = run_experiment(world, config, tmp_path / "klq")
    assert "letters" in again.after and "gold" not in again.after
    assert again.after["completion"].equals(results[0].after["completion"]) and again.rows == results[0].rows
    assert table["rate"].between(0, 1).all() and (table["low"] <= table["rate"]).all() and (table["n"] == 8).all()


def letters(prompts, completions, **_):
    return [len(c) for c in completions]


def read_again(world, config, folder):
    """What is known of a finished run without running anything."""
    from klq_edu.app import experiment
    from klq_edu.rlhf.runs import Run

    return experiment.read_result(Run(folder, {"world": world.name, **config.to_dict()}), experiment.judged_by(world))
