"""A run's folder answers for one run only, survives signals, kills and torn files, and refuses the rest by name."""

import ast
import copy
import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import types
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from klq_edu import files
from klq_edu.app import experiment
from klq_edu.app.experiment import run_experiment
from klq_edu.rlhf import runs
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import fingerprint, identity, reward_identity
from klq_edu.rlhf.loop import train
from klq_edu.rlhf.optim import learning_rate_factor
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.replay import Memory
from klq_edu.rlhf.runs import Run, TrainState, load_checkpoint
from klq_edu.rlhf.signals import SIGNALS, Interrupted
from klq_edu.worlds.registry import preset

PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(5, 12)]})
ROOT = Path(__file__).parents[2]


def weighted(weight):
    """A reward with a closure value."""

    def reward(prompts, completions):
        return [weight * (sum(map(ord, c)) % 7) for c in completions]

    return reward


REWARD = weighted(0.1)


def settings(**changes):
    return TrainConfig(**({"updates": 4, "batch_size": 4, "epochs": 2, "max_new_tokens": 4} | changes))


@pytest.fixture(autouse=True)
def signals_not_ignored():
    """A shell's background job inherits an ignored SIGINT, and what nohup starts an ignored SIGHUP."""
    before = {s: signal.signal(s, signal.default_int_handler) for s in SIGNALS}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


@pytest.fixture
def go(tiny_lm, tokenizer):
    """A function that trains in a folder, from a fresh policy unless told otherwise."""

    def go(folder, *, config=None, policy=None, prompts=PROMPTS, reward=REWARD, **more):
        config = config or settings()
        policy = policy or ActorCritic(tiny_lm(), trainable_blocks=1)
        return train(policy, tokenizer, prompts, reward, config, run=Run(folder, config.to_dict()), **more)

    return go


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def on_backward(policy, *actions):
    """Call actions[i] in the i-th backward pass; there are `epochs` of them in an update, each before its step."""
    count = iter(range(10**6))

    def hook(grad):
        if (i := next(count)) < len(actions) and actions[i]:
            actions[i]()

    policy.value_head.weight.register_hook(hook)
    return policy


def raising(error):
    def action():
        raise error

    return action


def send(*signals):
    def action():
        assert threading.current_thread() is threading.main_thread()
        for s in signals:
            os.kill(os.getpid(), s)

    return action


# Identity


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda lm: {"reward": weighted(0.2)}, "reward .there weighted.<locals>.reward"),
        (lambda lm: {"prompts": PROMPTS.map(lambda r: {"prompt": r["prompt"].replace("w9", "w3")})}, "prompts"),
        (lambda lm: {"policy": ActorCritic(lm(seed=1), trainable_blocks=1)}, "reference weights"),
        (lambda lm: {"policy": ActorCritic(lm(), trainable_blocks=2)}, "trainable parameters"),
        (lambda lm: {"policy": ActorCritic(lm("gpt2"), trainable_blocks=1)}, "trainable parameters"),
    ],
    ids=["reward", "prompts", "model", "blocks", "architecture"],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_does_not_answer_for_another_run(tmp_path, go, tiny_lm, change, named, finished):
    before = timeless(go(tmp_path)) if finished else None
    if not finished:
        with pytest.raises(ZeroDivisionError):
            go(tmp_path, on_update=lambda row: 1 / 0)
    with pytest.raises(ValueError, match=f"holds another run, it differs in .*{named}"):
        go(tmp_path, **change(tiny_lm))
    assert before is None or timeless(go(tmp_path)) == before


def test_a_folder_does_not_answer_for_another_tokenizer_constraint_or_config(tmp_path, go, tiny_lm, tokenizer):
    go(tmp_path)
    rest = (PROMPTS, REWARD, settings())
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["w99"])
    for kind, named in (({"tokenizer": other}, "tokenizer"), ({"constraint": object()}, "constraint")):
        given = {"tokenizer": tokenizer} | kind
        with pytest.raises(ValueError, match=f"it differs in {named}"):
            policy, run = ActorCritic(tiny_lm(), trainable_blocks=1), Run(tmp_path, settings().to_dict())
            train(policy, given.pop("tokenizer"), *rest, run=run, **given)
    with pytest.raises(ValueError, match=r"run and config have other settings.*'tau': \(0.2, 0.3\)"):
        policy, run = ActorCritic(tiny_lm(), trainable_blocks=1), Run(tmp_path, settings().to_dict())
        train(policy, tokenizer, PROMPTS, REWARD, settings(tau=0.3), run=run)


def test_every_column_and_the_order_of_the_prompts_count():
    """Another reference answer is another reward, and another order other batches, under the same prompts."""
    answers = list(range(len(PROMPTS)))
    sets = [PROMPTS.add_column("answer", a) for a in (answers, answers[::-1])]
    sets += [PROMPTS, PROMPTS.select(answers[::-1])]
    assert len({identity(prompts, REWARD)["prompts"] for prompts in sets}) == 4
    assert identity(sets[0], REWARD) == identity(PROMPTS.add_column("answer", answers), REWARD)


def test_a_helper_module_that_a_reward_calls_counts():
    helpers = types.ModuleType("helpers")
    helpers.__file__ = "helpers.py"
    space = {"__name__": "__main__", "helpers": helpers}
    exec("def reward(prompts, completions): return [helpers.score(c) for c in completions]", space)
    found = set()
    for weight in "12":
        exec(f"def score(c): return {weight}.0", vars(helpers))
        found.add(reward_identity(space["reward"]))
    assert len(found) == 2


def test_a_finished_run_says_so_and_trains_nothing(tmp_path, go, capsys):
    rows = go(tmp_path)
    policy_rows = go(tmp_path, on_update=raising(AssertionError("trained")))
    assert policy_rows == rows and "finished, nothing to do (4 updates)" in capsys.readouterr().out


def test_the_checkpoint_replaces_whatever_weights_the_policy_has(tmp_path, go, tiny_lm):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    go(tmp_path, policy=policy)
    trained = {k: p.detach().clone() for k, p in policy.trainable().items()}
    go(tmp_path, policy=(again := ActorCritic(tiny_lm(), trainable_blocks=1)))
    assert all(torch.equal(p, trained[k]) for k, p in again.trainable().items())


def test_updates_may_be_raised_but_not_lowered(tmp_path, go, capsys):
    first = go(tmp_path)
    longer = settings(updates=6)
    rows = go(tmp_path, config=longer)
    assert timeless(rows[:4]) == timeless(first) and len(rows) == 6
    want = [
        longer.learning_rate * learning_rate_factor(u, updates=6, warmup_updates=0, final_lr_fraction=0.05)
        for u in (4, 5)
    ]
    assert [row["learning_rate"] for row in rows[4:]] == want
    assert "updates raised from 4 to 6" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["raised"] == [{"after": 4, "from": 4, "to": 6}]
    assert go(tmp_path, config=longer) == rows
    with pytest.raises(ValueError, match=r"other settings .*'updates': \(6, 4\).*may be raised"):
        go(tmp_path)
    with pytest.raises(ValueError, match=r"other settings .*'tau'"):
        go(tmp_path, config=settings(updates=8, tau=0.3))


@pytest.mark.parametrize("updates", [4, 5])
def test_a_folder_without_identity_or_settings_is_refused(tmp_path, go, updates):
    go(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match="differs in prompts .there unknown"):
        go(tmp_path, config=settings(updates=updates))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is damaged .it is missing, but there is a checkpoint"):
        go(tmp_path, config=settings(updates=updates, tau=7.0))


def test_raised_updates_cut_off_in_the_last_samples_are_not_finished(tmp_path, grammar, monkeypatch):
    """The samples of the shorter run must not pass for those of the longer one."""
    config = preset("grammar", updates=1, batch_size=4, epochs=1)
    run_experiment(grammar, config, tmp_path)
    calls, sample = [], experiment.held_out_samples

    def cut_off(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sample(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "held_out_samples", cut_off)
        patch.setattr(grammar, "reference_samples", {})
        run_experiment(grammar, replace(config, updates=2), tmp_path)
    run = Run(tmp_path, {"world": "grammar", **replace(config, updates=2).to_dict()})
    assert experiment.read_result(run, experiment.judged_by(grammar)) is None


def test_a_dropped_first_update_leaves_the_value_head_unset(tmp_path, go, tiny_lm):
    policy = on_backward(ActorCritic(tiny_lm(), trainable_blocks=1), send(signal.SIGTERM))
    with pytest.raises(Interrupted):
        go(tmp_path / "a", policy=policy, reward=weighted(100.0))
    row = go(tmp_path / "b", policy=policy)[0]
    assert row["value"] == pytest.approx(row["reward"])


THRESHOLD = 1


def helper(x):
    return x > 1


def uses_globals(prompts, completions):
    return [float(helper(len(c)) + THRESHOLD) for c in completions]


class Scorer:
    def __init__(self, words):
        self.words = words

    def __call__(self, prompts, completions):
        return [float(any(w in c for w in self.words)) for c in completions]


def matching(pattern):
    return lambda prompts, completions: [float(bool(pattern.match(c))) for c in completions]


def carrying(**attributes):
    def reward(prompts, completions):
        return [reward.scale] * len(completions)

    vars(reward).update(attributes)
    return reward


def edited(body, helped="0.0", module="__main__"):
    """An object of a class with this code, as after an edit: the name is always the same."""
    space = {"__name__": module}
    code = f"def __call__(self, prompts, completions): {body}\n    def helped(self): return [{helped}]"
    exec(f"class Edited:\n    {code}", space)
    return space["Edited"]()


@pytest.mark.parametrize(
    "some, other",
    [
        (weighted(1), weighted(2)),
        (weighted({"a": torch.zeros(2)}), weighted({"a": torch.ones(2)})),
        (lambda p, c: [1.0] * len(c), lambda p, c: [2.0] * len(c)),
        (lambda p, c, k=1: k, lambda p, c, k=2: k),
        (lambda p, c: c.count("a"), lambda p, c: c.index("a")),
        (Scorer({"a", "b"}), Scorer({"a", "c"})),
        (Scorer(["a"]).__call__, Scorer(["b"]).__call__),
        (partial(uses_globals, 1), partial(uses_globals, 2)),
        (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
        (matching(re.compile("a")), matching(re.compile("b"))),
        (edited("return [1.0]"), edited("return [2.0]")),
        (edited("return self.helped()", "1.0"), edited("return self.helped()", "2.0")),
        (edited("return [1.0]", module="builtins"), edited("return [2.0]", module="builtins")),
        (torch.nn.Sequential(torch.nn.LeakyReLU(0.1)), torch.nn.Sequential(torch.nn.LeakyReLU(0.2))),
        (carrying(scale=1), carrying(scale=2)),
        (weighted(torch.eye(2).to_sparse()), weighted(torch.ones(2, 2).to_sparse())),
        (weighted(Counter("a")), weighted(Counter("b"))),
    ],
    ids=lambda reward: "",
)
def test_rewards_that_differ_anywhere_have_other_digests(some, other):
    assert reward_identity(some) == reward_identity(some) != reward_identity(other)


def test_globals_that_a_reward_uses_count(monkeypatch):
    before = reward_identity(uses_globals)
    for name, value in (("THRESHOLD", 2), ("helper", lambda x: x > 2)):
        with monkeypatch.context() as patch:
            patch.setitem(globals(), name, value)
            assert reward_identity(uses_globals) != before, name
    assert reward_identity(uses_globals) == before


def test_digests_are_the_same_in_every_process():
    """Sets of texts have another order in each: seen in both of these, in a function's constants and in an object."""
    code = """from klq_edu.rlhf.identity import fingerprint
contains, texts = lambda c: c in {'a', 'b', 'c', 'd'}, {'x', 'y'}
print(fingerprint((contains, texts)), contains.__code__.co_consts, texts, sep='|')"""
    command = [sys.executable, "-c", code]
    one, other = (
        subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in "12"
    )
    (digest, *sets), (same, *others) = one.split("|"), other.split("|")
    assert digest == same and len(digest) == 16 and all(x != y for x, y in zip(sets, others, strict=True))


def test_a_fingerprint_survives_cycles_and_what_cannot_be_looked_into():
    loop = []
    loop.append(loop)
    assert fingerprint(loop) and fingerprint([threading.Lock(), iter([]), object()])


def test_a_reward_may_name_itself(tmp_path, go):
    """… where its state changes for reasons that don't matter."""

    def named(cache):
        def reward(prompts, completions):
            return REWARD(prompts, completions)

        reward.identity, reward.cache = "mine, version 1", cache
        return reward

    rows = go(tmp_path, reward=named(1))
    assert go(tmp_path, reward=named(2)) == rows


# One writer


def test_two_writers_are_refused(tmp_path, go):
    with Run(tmp_path, settings().to_dict()).writing(), pytest.raises(ValueError, match="is in use by another process"):
        go(tmp_path)
    assert len(go(tmp_path)) == 4


def test_the_lock_dies_with_its_process(tmp_path, go):
    fork = multiprocessing.get_context("fork")  # a process that need not import torch first
    locked = fork.Event()

    def hold():
        with Run(tmp_path, settings().to_dict()).writing():
            locked.set()
            signal.pause()

    other = fork.Process(target=hold, daemon=True)
    other.start()
    assert locked.wait(60)
    with pytest.raises(ValueError, match="is in use by another process"):
        go(tmp_path)
    other.kill()
    other.join()
    assert len(go(tmp_path)) == 4


def test_torchrun_is_refused(tmp_path, go, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, but WORLD_SIZE is 2"):
        go(tmp_path)


@pytest.mark.parametrize("spoil", [lambda x: x[1:2] * 2 + x[2:], lambda x: [x[0], x[0], *x[2:]], lambda x: x[:-1]])
def test_a_log_that_is_not_one_row_per_update_is_refused(tmp_path, go, spoil):
    go(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(spoil(lines)))
    with pytest.raises(ValueError, match=r"metrics.jsonl does not hold the 4 updates .*another folder"):
        go(tmp_path)


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("backward, kept", [(4, 2), (5, 3)], ids=["before the first step", "after it"])
def test_a_signal_drops_an_update_not_begun_and_finishes_one_that_is(tmp_path, go, tiny_lm, name, backward, kept):
    signum = getattr(signal, name)
    whole = go(tmp_path / "whole")
    before = [signal.getsignal(s) for s in SIGNALS]
    policy = on_backward(ActorCritic(tiny_lm(), trainable_blocks=1), *[None] * backward, send(signum))
    with pytest.raises(Interrupted) as caught:
        go(tmp_path / "cut", policy=policy)
    assert caught.value.signum == signum and isinstance(caught.value, KeyboardInterrupt)
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["updates"] == kept
    assert timeless(go(tmp_path / "cut")) == timeless(whole)


def test_an_interruption_reaches_the_parent_process_as_it_was():
    again = pickle.loads(pickle.dumps(Interrupted(signal.SIGTERM)))
    assert isinstance(again, KeyboardInterrupt) and again.signum == signal.SIGTERM


def test_a_signal_that_the_reward_swallows_still_drops_the_update(tmp_path, go):
    def deaf(prompts, completions):
        with suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        return REWARD(prompts, completions)

    with pytest.raises(Interrupted):
        go(tmp_path, reward=deaf)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_counts(tmp_path, go, tiny_lm):
    config = settings(epochs=3, checkpoint_every=2)
    whole = go(tmp_path / "whole", config=config)
    later = []
    actions = [*[None] * 10, send(signal.SIGTERM, signal.SIGINT), lambda: later.append(1)]  # amid the fourth update
    policy = on_backward(ActorCritic(tiny_lm(), trainable_blocks=1), *actions)
    with pytest.raises(Interrupted):
        go(tmp_path / "cut", config=config, policy=policy)
    assert not later and load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["updates"] == 2
    assert timeless(go(tmp_path / "cut", config=config)) == timeless(whole)
    ours, theirs = ((tmp_path / name / "samples.jsonl").read_text() for name in ("cut", "whole"))
    assert ours == theirs, "what was sampled after the checkpoint stands there once"


def test_ignored_signals_stay_ignored(tmp_path, go):
    """nohup ignores SIGHUP, and a shell's background job SIGINT."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(go(tmp_path, on_update=lambda row: os.kill(os.getpid(), signal.SIGINT))) == 4
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("where", ["steps", "evaluation"])
def test_an_error_amid_an_update_falls_back_to_the_last_checkpoint(tmp_path, go, tiny_lm, where):
    config = settings(checkpoint_every=2, eval_every=1)
    whole = go(tmp_path / "whole", config=config, evaluate=lambda policy: {"x": 1})
    policy, calls = ActorCritic(tiny_lm(), trainable_blocks=1), []

    def evaluate(policy):
        calls.append(1)
        return {"x": 1 / (where == "steps" or len(calls) < 4)}

    if where == "steps":
        on_backward(policy, *[None] * 7, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        go(tmp_path / "cut", config=config, policy=policy, evaluate=evaluate)
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["updates"] == 2
    resumed = go(tmp_path / "cut", config=config, policy=policy, evaluate=lambda policy: {"x": 1})
    assert timeless(resumed) == timeless(whole)


def test_a_torn_policy_without_a_checkpoint_is_not_taken_for_a_fresh_one(tmp_path, go, tiny_lm):
    policy = on_backward(ActorCritic(tiny_lm(), trainable_blocks=1), None, raising(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, policy=policy)
    with pytest.raises(ValueError, match="no checkpoint yet, and the policy no longer has the weights it began with"):
        go(tmp_path, policy=policy)
    assert len(go(tmp_path)) == 4


# Files


def test_each_checkpoint_is_written_once(tmp_path, go, monkeypatch):
    """Once per `checkpoint_every`; the last one is not written again at the end."""
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: (saved.append(state["updates"]), save(state, path)))
    go(tmp_path, config=settings(checkpoint_every=2))
    assert saved == [2, 4]


def small_checkpoint(folder):
    parameter = torch.nn.Parameter(torch.arange(6.0))
    state = TrainState({"p": parameter}, torch.optim.Adam([parameter]), torch.Generator(), Memory(1))
    parameter.sum().backward()
    state.optimizer.step()
    state.finish_update()
    Run(folder, {}).save(state)
    return folder / "checkpoint.pt", state


def test_a_checkpoint_with_any_byte_changed_or_missing_is_refused(tmp_path):
    path, state = small_checkpoint(tmp_path)
    good = path.read_bytes()
    assert load_checkpoint(path)["updates"] == 1
    spoilt = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in range(0, len(good), 7)]
    for data in (*spoilt, b"", good[:-1], good[: len(good) // 2], good[-40:], good + b"x"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .*empty the folder"):
            Run(tmp_path, {}).resume(state)


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(tmp_path, monkeypatch):
    path, state = small_checkpoint(tmp_path)
    good = path.read_bytes()

    def full_disk(content, target):
        target.write_bytes(good[:100])
        raise OSError("No space left on device")

    state.finish_update()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(torch, "save", full_disk)
        Run(tmp_path, {}).save(state)
    assert path.read_bytes() == good and not list(tmp_path.glob("*.new"))
    order = []
    for module in (runs, files):
        monkeypatch.setattr(module, "sync", lambda path: order.append(("sync", path.name, path.exists())))
    Run(tmp_path, {}).save(state)
    assert order[0] == ("sync", "checkpoint.pt.new", True)  # on the disk before it takes the old one's place
    (tmp_path / "metrics.jsonl").touch()
    order.clear()
    Run(tmp_path, {}).save(state)
    assert [name for _, name, _ in order[:2]] == ["metrics.jsonl", "checkpoint.pt.new"]  # the log is never behind


@pytest.mark.parametrize("name", ["config.json", "run.json"])
@pytest.mark.parametrize("text", ['{"tau": 0.2,', "", "[1]"])
def test_a_torn_file_is_named_with_the_way_out(tmp_path, go, name, text):
    go(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} is damaged .*empty the folder"):
        go(tmp_path)


def test_a_log_that_is_no_text_is_named(tmp_path, go):
    go(tmp_path)
    (tmp_path / "samples.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="samples.jsonl is damaged"):
        go(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(ValueError, match="metrics.jsonl is damaged [^(]*[(]'utf-8' codec") as caught:
        Run(tmp_path, settings().to_dict()).rows()
    assert str(caught.value).count("is damaged") == 1


def test_a_line_cut_off_in_writing_does_not_matter(tmp_path, go):
    rows = go(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "rew')
    assert Run(tmp_path, settings().to_dict()).rows() == rows == go(tmp_path)


def test_unicode_line_separators_end_no_line(tmp_path, go):
    prompts = Dataset.from_dict({"prompt": ["w5\u2028w6", "w7\u0085w8", "w9 w3", "w4 w5"]})
    with pytest.raises(ZeroDivisionError):
        go(tmp_path, prompts=prompts, on_update=lambda row: 1 / (1 - row["update"]))
    go(tmp_path, prompts=prompts)
    lines = (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(lines) == 4 and {p for line in lines for p, _ in json.loads(line)} == set(prompts["prompt"])


def test_every_text_file_says_that_it_is_utf_8():
    """A locale with another encoding must not decide what is in a run's folder or a notebook."""
    silent = []
    for path in [*(ROOT / "klq_edu").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for call in (x for x in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(x, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            binary = name == "open" and (not modes or "b" in modes[0])  # without a mode it is the browser's
            if (name in ("read_text", "write_text") and isinstance(call.func, ast.Attribute)) or (
                name == "open" and not binary
            ):
                given = {k.arg for k in call.keywords}
                silent += [] if "encoding" in given else [f"{path.name}:{call.lineno}"]
    assert not silent


# What evaluate returns


def test_evaluate_may_return_tensors(tmp_path, go):
    rows = go(tmp_path, evaluate=lambda policy: {"x": torch.tensor(1.5), "n": torch.tensor(2)})
    assert (rows[-1]["x"], rows[-1]["n"]) == (1.5, 2) and Run(tmp_path, settings().to_dict()).rows() == rows


@pytest.mark.parametrize("result", [None, 1.0, {"x": torch.ones(2)}, {"x": "good"}, {3: 1.0}, {"reward": 1.0}])
def test_evaluate_must_return_numbers_under_names_of_their_own(tmp_path, go, result):
    with pytest.raises(TypeError, match="evaluate must return a dict of numbers"):
        go(tmp_path, evaluate=lambda policy: result)


def test_runs_from_one_reference_share_its_samples(tmp_path, grammar, monkeypatch):
    """… and only those: what was sampled in other batches, or other lengths, is other completions."""
    seen, sample = [], experiment.held_out_samples
    monkeypatch.setattr(experiment, "held_out_samples", lambda *args: seen.append(args) or sample(*args))
    monkeypatch.setattr(grammar, "reference_samples", {})
    config = preset("grammar", updates=1, batch_size=4, epochs=1)
    first = run_experiment(grammar, config, tmp_path / "a")
    second = run_experiment(grammar, replace(config, algorithm="ppo_clip"), tmp_path / "b")
    assert len(seen) == 3 and first.before.equals(second.before) and not first.after.equals(first.before)
    run_experiment(grammar, replace(config, batch_size=8), tmp_path / "c")
    assert len(seen) == 5


def test_digests_do_not_know_where_python_is_installed(monkeypatch):
    from klq_edu.rlhf import identity
    from klq_edu.rlhf.preference import RewardModel  # its `identity` calls `fingerprint`

    here = identity.fingerprint(RewardModel)
    monkeypatch.setattr(identity, "LIBRARIES", (*identity.LIBRARIES, "/another/environment"))
    assert identity.fingerprint(RewardModel) == here


CHANGES = {"seed": 5, "batch_size": 4, "max_new_tokens": 3, "temperature": 0.5, "device": "cpu", "dtype": "bfloat16"}


@pytest.mark.parametrize("name", CHANGES)
def test_the_reference_is_sampled_again_where_it_would_say_something_else(name, monkeypatch):
    world, calls, config = types.SimpleNamespace(reference_samples={}), [], TrainConfig()
    monkeypatch.setattr(experiment, "held_out_samples", lambda *given: calls.append(given) or len(calls))
    others = (config, replace(config, algorithm="ppo_clip", tau=0.3))
    assert [experiment.reference_samples(world, None, c) for c in others] == [1, 1]
    assert experiment.reference_samples(world, None, replace(config, **{name: CHANGES[name]})) == 2
