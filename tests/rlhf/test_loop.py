"""The loop: reproducible, resumable, documented, and equal to the theory where the theory says so."""

import traceback
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from klq_edu import machine
from klq_edu.files import read_json
from klq_edu.machine import resolve_device
from klq_edu.rlhf import loop
from klq_edu.rlhf.algorithms import ALGORITHMS, make_targets
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.loop import METRICS, batch_rows, train
from klq_edu.rlhf.optim import clip_gradients
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rewards import score
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.runs import Run, load_checkpoint
from klq_kernels import torch_linear

PROMPTS = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(5, 12)], "target": list(range(7))})


def even_words(prompts, completions, target):
    """Reward the share of even-numbered words; checks that the dataset's columns arrive."""
    assert len(target) == len(prompts)
    words = [c.split() for c in completions]
    return [sum(int(w[1:]) % 2 == 0 for w in ws if w[1:].isdigit()) / (len(ws) or 1) for ws in words]


def settings(**changes):
    return TrainConfig(**({"updates": 4, "batch_size": 6, "epochs": 2, "max_new_tokens": 5} | changes))


def run(folder, tiny_lm, tokenizer, config=None, reward=even_words, on_update=lambda row: None, policy=None):
    config = config or settings()
    policy = policy or ActorCritic(tiny_lm(), trainable_blocks=1, critic=config.critic)
    return train(
        policy, tokenizer, PROMPTS, reward, config, run=Run(folder, config.to_dict()), on_update=on_update
    )  # fmt: skip


def timeless(rows):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def test_same_seed_same_metrics_bit_for_bit(tmp_path, tiny_lm, tokenizer):
    first, second = (run(tmp_path / name, tiny_lm, tokenizer) for name in "ab")
    other = run(tmp_path / "c", tiny_lm, tokenizer, settings(seed=1))
    assert timeless(first) == timeless(second) != timeless(other)


EVERYTHING = {
    "replay": 5, "replay_batches": 2, "tau_start": 1.0, "retrace": True, "centre": "prompt", "centre_samples": 2,
    "samples_per_prompt": 2,
}  # fmt: skip


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("when", ["scoring", "after an update"])
@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "replay, cooled and centred"])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path, tiny_lm, tokenizer, failure, when, changes):
    """Ctrl-C at any moment loses at most the update under way, and resuming changes nothing: what is replayed, and
    what is subtracted from rewards, is the same as without the interruption."""
    config, before = settings(**changes), 3 if changes and when == "scoring" else 0  # calls for the prompts' means
    whole = run(tmp_path / "whole", tiny_lm, tokenizer, config)
    calls = []

    def stop(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 + before:
            raise failure("stopped")
        return even_words(**kwargs) if kwargs else None

    hooks = {"reward": stop} if when == "scoring" else {"on_update": stop}
    with pytest.raises((failure, RuntimeError), match="stopped"):
        run(tmp_path / "cut", tiny_lm, tokenizer, config, **hooks)
    kept = 2 if when == "scoring" else 3
    done = []
    reward = {"reward": stop} if when == "scoring" else {}  # it counts its calls, and is still the same reward
    resumed = run(tmp_path / "cut", tiny_lm, tokenizer, config, on_update=done.append, **reward)
    assert timeless(resumed) == timeless(whole) and len(done) == 4 - kept
    assert len((tmp_path / "cut" / "samples.jsonl").read_text().splitlines()) == 4


def test_an_error_inside_the_first_update_after_resuming_tears_nothing(tmp_path, tiny_lm, tokenizer, monkeypatch):
    """The optimiser must not share its moments with the checkpoint it was restored from."""
    whole = run(tmp_path / "whole", tiny_lm, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tiny_lm, tokenizer, on_update=interrupt)
    calls = []

    def fail_at_the_second_step(policy, limit):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return clip_gradients(policy, limit)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "clip_gradients", fail_at_the_second_step)
        run(tmp_path / "cut", tiny_lm, tokenizer)
    assert timeless(run(tmp_path / "cut", tiny_lm, tokenizer)) == timeless(whole)


def test_a_value_head_from_a_checkpoint_is_not_fresh(tmp_path, tiny_lm, tokenizer):
    """Trained in one go or taken up from its folder, a policy goes into its next run with the critic it has."""
    policies = [ActorCritic(tiny_lm(), trainable_blocks=1) for _ in range(2)]
    for policy in policies:
        run(tmp_path, tiny_lm, tokenizer, settings(updates=1), policy=policy)
    assert [policy.value_is_set for policy in policies] == [True, True]


def test_replay_adds_rows_to_every_fit_and_asks_no_reward_twice(tmp_path, tiny_lm, tokenizer, monkeypatch):
    scored, fitted, fit = [], [], loop.fit

    def reward(prompts, completions, target):
        scored.append(len(completions))
        return even_words(prompts, completions, target)

    monkeypatch.setattr(
        loop, "fit", lambda policy, batch, *rest: fitted.append(len(batch)) or fit(policy, batch, *rest)
    )
    rows = run(tmp_path, tiny_lm, tokenizer, settings(replay=99, replay_batches=2, updates=5), reward=reward)
    assert scored == [6] * 5 and fitted == [6, 12, 18, 18, 18]
    assert [row["row_steps"] for row in rows] == [12, 36, 72, 108, 144]


@pytest.mark.parametrize("replay, kept", [(0, 0), (3, 2)])
def test_a_checkpoint_holds_earlier_completions_only_where_they_will_be_replayed(
    tmp_path, tiny_lm, tokenizer, replay, kept
):
    run(tmp_path, tiny_lm, tokenizer, settings(replay=replay, replay_batches=2, updates=3))
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["memory"]["batches"]) == kept


def test_means_of_the_prompts_are_sampled_once_and_subtracted(tmp_path, tiny_lm, tokenizer, monkeypatch):
    """The metrics show rewards as they are; what is fitted is less the reference's mean of the same prompt."""
    fitted, asked, fit = [], [], loop.fit

    def worth(prompts, completions, target):
        asked.append(prompts)
        return [10.0 * t + len(c) for t, c in zip(target, completions, strict=True)]

    monkeypatch.setattr(loop, "fit", lambda policy, batch, *rest: fitted.append(batch) or fit(policy, batch, *rest))
    config = settings(centre="prompt", centre_samples=3, learning_rate=1e-9)
    rows = run(tmp_path, tiny_lm, tokenizer, config, reward=worth)
    samples = [p for call in asked[1:5] for p in call]  # the first call is the first batch's
    assert sorted(samples) == sorted(PROMPTS["prompt"][:] * 3)
    assert [row["rollouts"] for row in rows] == [21 + 6 * (u + 1) for u in range(4)]
    assert max(abs(b.rewards.sum(1)).max() for b in fitted) < 15 < 25 < min(row["reward"] for row in rows)


def test_means_may_be_handed_in_and_are_part_of_the_run(tmp_path, tiny_lm, tokenizer, monkeypatch):
    fitted, fit = [], loop.fit
    monkeypatch.setattr(loop, "fit", lambda policy, batch, *rest: fitted.append(batch) or fit(policy, batch, *rest))

    def go(baselines, **changes):
        config = settings(**({"centre": "prompt", "updates": 1} | changes))
        policy, folder = ActorCritic(tiny_lm(), trainable_blocks=1), Run(tmp_path / config.centre, config.to_dict())
        return train(policy, tokenizer, PROMPTS, lambda **k: k["target"], config, run=folder, baselines=baselines)

    truth = [float(t) for t in PROMPTS["target"]]
    rows = go(truth)
    assert (fitted[0].rewards == 0).all() and rows[0]["reward"] > 0 and rows[0]["rollouts"] == 6
    for same in (truth, tuple(PROMPTS["target"]), torch.tensor(truth)):
        assert go(same, updates=2)[1]["rollouts"] == 12
    for other in ([0.0] * 7, None):
        with pytest.raises(ValueError, match="holds another run, it differs in baselines"):
            go(other, updates=2)
    for bad in ([0.0], [0.0] * 6 + [float("nan")], ["a"] * 7, 0.5, torch.zeros(7, 2)):
        with pytest.raises(ValueError, match="baselines must be 7 finite numbers, one per prompt, got"):
            go(bad, updates=2)
    with pytest.raises(ValueError, match="baselines are for config.centre = 'prompt', which is 'batch'"):
        go([0.0] * 7, centre="batch")


def test_only_prompts_that_the_run_uses_are_sampled_for_their_means(tmp_path, tiny_lm, tokenizer):
    """A dataset may have many more; raising `updates` to those is refused, for the policy has left the reference."""
    asked, many = [], Dataset.from_dict({"prompt": [f"w{i}" for i in range(5, 55)], "target": [0] * 50})

    def worth(prompts, completions, target):
        asked.extend(prompts)
        return [1.0] * len(prompts)

    def go(updates):
        config = settings(centre="prompt", centre_samples=2, updates=updates, batch_size=4)
        folder = Run(tmp_path, config.to_dict())
        return train(ActorCritic(tiny_lm(), trainable_blocks=1), tokenizer, many, worth, config, run=folder)

    assert go(2)[-1]["rollouts"] == len(asked) == 8 + 16 and len(set(asked)) == 8
    with pytest.raises(
        ValueError, match=r"updates must not be raised to prompts without a mean.*prompts\[\d+\] has none"
    ):
        go(3)


def interrupt(row):
    raise KeyboardInterrupt


def test_lines_logged_after_the_last_checkpoint_are_dropped(tmp_path, tiny_lm, tokenizer):
    """A killed process (no chance to save) restarts from its last checkpoint without duplicate rows."""
    whole = run(tmp_path, tiny_lm, tokenizer)
    (tmp_path / "checkpoint.pt").unlink()
    assert timeless(run(tmp_path, tiny_lm, tokenizer)) == timeless(whole)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 5


def test_every_logged_metric_is_documented_and_every_documented_one_logged(tmp_path, tiny_lm, tokenizer):
    assert set(run(tmp_path, tiny_lm, tokenizer)[0]) == set(METRICS)


def test_the_walk_from_fit_to_the_formula_is_the_one_that_contributing_describes(
    tmp_path, tiny_lm, tokenizer, monkeypatch
):
    walks, formula = [], torch_linear.klq_terms

    def spy(*args):
        walks.append([call.name for call in traceback.extract_stack() if "klq_" in call.filename])
        return formula(*args)

    monkeypatch.setattr(torch_linear, "klq_terms", spy)
    run(tmp_path, tiny_lm, tokenizer, settings(updates=1))
    walk = walks[0][walks[0].index("train") :]
    assert walk == ["train", "fit", "klq", "linear_klq_loss", "without_autocast", "klq_loss", "linear_klq"]
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [text.index(name) for name in ("loop.train", "`fit`", "algorithms.klq", "linear_klq`", "klq_terms")]
    assert places == sorted(places)


def first_gradient(policy, batch, config):
    policy.zero_grad()
    ALGORITHMS[config.algorithm](policy, batch, make_targets(batch, config), config).loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.trainable().values()])


@pytest.mark.parametrize("ppo", ["ppo_clip", "ppo_penalty"])
def test_klqs_first_gradient_is_ppos_on_a_language_model(tiny_lm, tokenizer, ppo):
    """Claim 2, in the code that trains: equal with PPO's value coefficient at 1/τ, and not with another one."""
    policy, tau = ActorCritic(tiny_lm().double(), trainable_blocks=2), 0.3
    policy.value_head.weight.data.normal_()
    policy.value_head.double()
    batch = collect(
        policy, tokenizer, PROMPTS["prompt"][:], max_new_tokens=6, generator=torch.Generator().manual_seed(1)
    )
    batch = batch.rewarded(score(even_words, batch, target=PROMPTS["target"][:]))
    klq = first_gradient(policy, batch, settings(tau=tau))
    same = first_gradient(policy, batch, settings(algorithm=ppo, tau=tau, vf_coef=1 / tau))
    other = first_gradient(policy, batch, settings(algorithm=ppo, tau=tau, vf_coef=0.5))
    torch.testing.assert_close(klq, same, rtol=1e-4, atol=1e-5)
    assert (klq - other).norm() > 0.01 * klq.norm()


def test_a_diverged_run_says_so_and_keeps_its_last_good_state(tmp_path, tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)

    def break_it(row):
        if row["update"] == 1:
            policy.body.norm.weight.data.fill_(float("nan"))

    with pytest.raises(FloatingPointError, match="not finite: training diverged; lower learning_rate"):
        run(tmp_path, tiny_lm, tokenizer, on_update=break_it, policy=policy)
    assert [row["update"] for row in run(tmp_path, tiny_lm, tokenizer)] == [0, 1, 2, 3]


def test_an_infinite_gradient_stops_before_any_parameter_changes(tiny_lm):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    for p in policy.trainable().values():
        p.grad = torch.full_like(p, torch.inf)
    with pytest.raises(FloatingPointError, match="gradient norms .* lower learning_rate"):
        clip_gradients(policy, 1.0)


@pytest.mark.parametrize("fast, chosen", [(True, torch.bfloat16), (False, torch.float32)])
def test_dtype_auto_picks_what_the_cpu_does_well_and_a_run_keeps_it(
    tmp_path, tiny_lm, tokenizer, monkeypatch, fast, chosen
):
    """Another machine, or another version's choice, must not change the arithmetic halfway."""
    auto = settings(dtype="auto", device="cpu")
    monkeypatch.setattr(machine, "native", lambda dtype: fast)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "auto", tiny_lm, tokenizer, auto, on_update=interrupt)
    monkeypatch.setattr(machine, "native", lambda dtype: not fast)
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    rows = run(tmp_path / "auto", tiny_lm, tokenizer, auto, policy=policy)
    kept = read_json(tmp_path / "auto" / "run.json")["dtype"]
    assert policy.dtype == chosen == getattr(torch, kept)
    named = settings(dtype=kept, device="cpu")
    assert timeless(rows) == timeless(run(tmp_path / "named", tiny_lm, tokenizer, named))


def test_the_policy_carries_out_the_settings_or_refuses_them(tmp_path, tiny_lm, tokenizer):
    """config.json must not record a scale, precision or critic that was not used."""
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    rows = run(tmp_path / "a", tiny_lm, tokenizer, settings(dtype="bfloat16", updates=2), policy=policy)
    assert (policy.value_grad_scale, policy.dtype) == (settings().tau, torch.bfloat16)
    assert {p.dtype for p in policy.parameters()} == {torch.float32} and rows[-1]["loss"] > 0
    with pytest.raises(ValueError, match="critic is 'separate' but the policy was built with critic='shared'"):
        run(tmp_path / "b", tiny_lm, tokenizer, settings(critic="separate"), policy=policy)


def test_prompts_are_used_equally_often_and_reshuffled():
    few, all_rows = (settings(batch_size=n, seed=3) for n in (4, 7))
    counts = torch.bincount(torch.tensor([row for u in range(14) for row in batch_rows(7, few, u)]))
    assert counts.tolist() == [8] * 7
    assert batch_rows(7, all_rows, 0) != batch_rows(7, all_rows, 1)


def test_a_run_folder_refuses_other_settings(tmp_path):
    Run(tmp_path, {"tau": 0.1})
    with pytest.raises(ValueError, match=r"holds other settings .*tau.*0.1, 0.2.*use another folder"):
        Run(tmp_path, {"tau": 0.2})


def test_an_unwritable_folder_is_an_early_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write to the output folder .*choose another with --out"):
        Run(tmp_path / "file" / "run", {})


def test_prompts_without_the_column_are_refused(tmp_path, tiny_lm, tokenizer):
    with pytest.raises(ValueError, match="must have a column 'prompt', got columns \\['text'\\]"):
        train(None, tokenizer, Dataset.from_dict({"text": ["a"]}), even_words, settings(), run=Run(tmp_path, {}))
    with pytest.raises(TypeError, match="prompts must be a datasets.Dataset with a column 'prompt', got list"):
        train(None, tokenizer, ["a"], even_words, settings(), run=Run(tmp_path, {}))


@pytest.mark.parametrize("name", ["prompts", "completions", "completion_ids", "ended"])
def test_columns_named_like_what_a_reward_is_given_are_refused(tmp_path, tiny_lm, tokenizer, name):
    """A column `completions` would have blamed the reward, one `ended` would have replaced the truth."""
    prompts, policy = PROMPTS.add_column(name, ["x"] * 7), ActorCritic(tiny_lm())
    with pytest.raises(ValueError, match=rf"columns \['{name}'\] have names of what a reward is given.*rename"):
        train(policy, tokenizer, prompts, even_words, settings(), run=Run(tmp_path, {}))


@pytest.mark.parametrize("bad", [None, "", "w5 " * 60])
def test_a_prompt_that_can_not_be_used_is_refused_before_the_first_update(tmp_path, tiny_lm, tokenizer, bad):
    """It is never drawn in these updates: without the check the run would end in a later one."""
    prompts = Dataset.from_dict({"prompt": [*["w5"] * 5000, bad], "target": [0] * 5001})
    with pytest.raises(ValueError, match=r"prompts: 1 .*\(first: prompts\[5000\] = .*prompts.filter"):
        train(ActorCritic(tiny_lm()), tokenizer, prompts, even_words, settings(updates=1), run=Run(tmp_path, {}))


@pytest.mark.parametrize("blocks, critic", [(None, "shared"), (1, "separate")])
def test_dropout_left_on_by_hooks_changes_nothing(tmp_path, tiny_lm, tokenizer, blocks, critic):
    """Sampled and stored log-probs differed by 2 nats after an `evaluate` that ended with policy.train()."""
    rows = {}
    for mode in (False, True):
        policy = ActorCritic(tiny_lm("gpt2"), trainable_blocks=blocks, critic=critic)
        config = settings(critic=critic, eval_every=1, updates=3)
        rows[mode] = train(
            policy, tokenizer, PROMPTS, lambda policy=policy, mode=mode, **k: policy.train(mode) and even_words(**k),
            config, run=Run(tmp_path / str(mode), {}), evaluate=lambda p, mode=mode: p.train(mode) and {},
            on_update=lambda row, policy=policy, mode=mode: policy.lm.train(mode),
        )  # fmt: skip
    assert timeless(rows[True]) == timeless(rows[False])


def test_the_share_of_ids_beyond_the_tokenizer_is_logged(tmp_path, tiny_lm, tokenizer):
    seen = []

    def reward(prompts, completions, target, completion_ids):
        seen.extend(i > 60 for ids in completion_ids for i in ids)
        return [0.0] * len(prompts)

    policy = ActorCritic(tiny_lm(vocab=80), trainable_blocks=1)
    row = run(tmp_path, tiny_lm, tokenizer, settings(updates=1), reward=reward, policy=policy)[0]
    assert row["unknown"] == pytest.approx(sum(seen) / len(seen)) and 0 < row["unknown"] < 1


def test_an_absent_device_is_refused_and_auto_finds_one():
    with pytest.raises(ValueError, match="device 'cuda:99' is not usable here"):
        resolve_device("cuda:99")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps", "xpu")
