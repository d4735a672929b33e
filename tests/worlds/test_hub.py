"""Recipes for models from the hub, through the whole path on tiny random models and local rows in the same formats."""

import json
from dataclasses import replace

import pytest
import torch
import transformers

from klq_edu.app.demo import HubConfig, run_hub
from klq_edu.rlhf.rewards import ClassifierReward
from klq_edu.worlds.hub import RECIPES, load_recipe, read_recipe

TRAIN = "{updates: 2, batch_size: 4, epochs: 1, max_new_tokens: 5, tau: 0.05, learning_rate: 1e-4, device: cpu}"


def conversation(*turns):
    return "".join(f"\n\nHuman: w{a} w{b}\n\nAssistant: w{c}" for a, b, c in turns)


@pytest.fixture
def parts(tmp_path, tiny_lm, tokenizer):
    """Folders of a policy, a reward model and, by format, of data as the hub's data sets have them."""
    tiny_lm().save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(vocab_size=61, num_labels=1, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    rows = {
        "prompt": [{"prompt": f"w{i} w{i + 1} w5", "completion": f" w{i}"} for i in range(2, 12)]
        + [{"prompt": " ".join(["w7"] * 40), "completion": " w8"}],
        "single_turn": [{"chosen": conversation((i, 3, 4)), "rejected": "x"} for i in range(2, 12)]
        + [{"chosen": conversation((2, 3, 4), (5, 6, 7)), "rejected": "x"}],
    }
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        for part in ("train", "test"):
            text = "\n".join(map(json.dumps, lines))  # the test split has other words
            (tmp_path / name / f"{part}.jsonl").write_text(text.replace("w", "w1") if part == "test" else text)
    return tmp_path


@pytest.mark.parametrize("form", ["prompt", "single_turn"])
def test_a_recipe_trains_through_the_whole_path(form, parts, capsys):
    recipe = parts / "recipe.yaml"
    recipe.write_text(
        f"model: {parts / 'policy'}\nreward_model: nowhere\ndata: {parts / form}\nformat: {form}\ntest_prompts: 3\n"
        f"max_prompt_tokens: 30\nmissing_eos_penalty: 100\ntrainable_blocks: 1\ntrain: {TRAIN}\n"
    )
    judge, out = str(parts / "judge"), parts / "run"
    run_hub(HubConfig(str(recipe), reward_model=judge, algorithm="ppo_clip", out=out))
    assert "PPO-clip" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    settings = json.loads((out / "config.json").read_text())
    assert len(rows) == 2 and settings["algorithm"] == "ppo_clip" and settings["tau"] == 0.05
    given = read_recipe(recipe, reward_model=judge)
    world = load_recipe(given)
    assert len(world.prompts) == 10 and len(world.test_prompts) == 3  # too long, or of two turns
    assert set(world.test_prompts["prompt"]).isdisjoint(world.prompts["prompt"])
    assert world.make_policy(given.train).frozen_blocks == 2
    if form == "single_turn":
        assert world.prompts["prompt"][0] == "\n\nHuman: w2 w3\n\nAssistant:"
    whole, cut = (world.reward(["w2"], ["w3"], ended=[e]) for e in (True, False))
    assert whole[0] - cut[0] == pytest.approx(100)
    with pytest.raises(ValueError, match="holds other settings.*world"):  # a finished one, of another model
        other = (parts / "policy").rename(parts / "other")
        run_hub(HubConfig(str(recipe), model=str(other), reward_model=judge, algorithm="ppo_clip", out=out))
    samples = json.loads((out / "test_samples.json").read_text())["2"]
    assert all((row["reward"] < -50) is not row["ended"] for row in samples)


@pytest.mark.parametrize("name", ["tldr_pythia", "hh_pythia"])
def test_the_recipes_have_what_the_paper_reports(name):
    recipe = read_recipe(name)
    reported = {"tau": 0.05, "gamma": 1.0, "lam": 0.95, "learning_rate": 1.41e-5, "epochs": 4, "batch_size": 192}
    assert {k: getattr(recipe.train, k) for k in reported} == reported
    assert recipe.train.updates * recipe.train.batch_size == pytest.approx(75_000, rel=0.01)
    assert recipe.trainable_blocks is None and read_recipe(name, model="other").model == "other"
    assert (RECIPES / f"{name}.yaml").read_text().count("# paper") == 7


@pytest.mark.parametrize(
    "text, message",
    [
        ("model: m", r"does not hold the fields of a Recipe: .*'reward_model'"),
        ("[1, 2]", "does not hold the fields"),
        ("{model: m, reward_model: r, data: d, format: tables}", "format must be one of .* got 'tables'"),
        ("{model: m, reward_model: r, data: d, train: {tau: -1}}", "tau must be"),
        ("{model: m, reward_model: r, data: d, train: {speed: 1}}", "speed"),
    ],
)
def test_a_bad_recipe_is_explained(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_recipe(path)
    with pytest.raises(ValueError, match="hh_pythia, tldr_pythia"):
        read_recipe("nothing")


def test_a_reward_model_without_a_head_is_refused(parts):
    """transformers would give it a random one and only warn."""
    recipe = parts / "recipe.yaml"
    recipe.write_text(f"model: {parts / 'policy'}\nreward_model: {parts / 'policy'}\ndata: {parts / 'prompt'}\n")
    with pytest.raises(ValueError, match=r"must be a sequence classifier, it lacks \['score.weight'\]"):
        load_recipe(read_recipe(recipe))


def test_a_reward_is_another_with_another_penalty_template_or_tokenizer(parts):
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    tokens = transformers.AutoTokenizer.from_pretrained
    more = tokens(parts / "judge")
    more.add_tokens(["w99"])
    rewards = [ClassifierReward(load(parts / "judge"), tokens(parts / "judge"), **given)
               for given in ({}, {}, {"missing_eos_penalty": 1.0}, {"template": "{}{}".format})]  # fmt: skip
    rewards.append(ClassifierReward(load(parts / "judge"), more))
    assert rewards[0].identity == rewards[1].identity and len({r.identity for r in rewards}) == 4


def test_data_that_do_not_fit_are_explained(parts):
    recipe = parts / "recipe.yaml"
    about = f"model: {parts / 'policy'}\nreward_model: {parts / 'judge'}\ntrain: {TRAIN}\n"
    recipe.write_text(f"{about}data: {parts / 'prompt'}\nmax_prompt_tokens: 2\n")
    with pytest.raises(ValueError, match=r"at most 2 tokens, has none among 11 rows, 11 of them of the format"):
        load_recipe(read_recipe(recipe))
    with pytest.raises(ValueError, match=r"must have the column 'chosen', has prompt, completion"):
        load_recipe(read_recipe(recipe, format="single_turn"))
    (parts / "prompt" / "test.jsonl").unlink()
    with pytest.raises(ValueError, match="lacks test"):
        load_recipe(read_recipe(recipe))


def test_every_option_reaches_the_run_and_what_is_not_given_is_the_recipes(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("klq_edu.worlds.hub.load_recipe", lambda *given: asked.append(given))
    monkeypatch.setattr("klq_edu.app.report.run_in", lambda world, experiments: asked.append(experiments))
    recipe = tmp_path / "recipe.yaml"
    settings = "{algorithm: ppo_clip, whiten: true, updates: 2, seed: 5, device: cpu}"
    recipe.write_text(f"{{model: m, reward_model: r, data: d, train: {settings}}}")
    run_hub(HubConfig(str(recipe), out=tmp_path))
    (read, device), experiments = asked
    assert (read.model, read.reward_model, read.data, device) == ("m", "r", "d", "cpu")
    assert experiments == {tmp_path: read.train} and read.train.seed == 5
    asked.clear()
    more = {"algorithm": "klq", "updates": 7, "seed": 3, "device": "mps", "out": tmp_path / "here"}
    run_hub(HubConfig(str(recipe), model="M", reward_model="R", data="D", **more))
    (read, device), experiments = asked
    assert (read.model, read.reward_model, read.data, device) == ("M", "R", "D", "mps")
    wanted = {"algorithm": "klq", "whiten": False, "updates": 7, "seed": 3, "device": "mps"}
    assert experiments == {tmp_path / "here": replace(read.train, **wanted)}
