"""What a run remembers: earlier completions come back whole, under the present policy, bounded and bit for bit."""

from dataclasses import replace

import pytest
import torch

from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.replay import Memory, join, refreshed
from klq_edu.rlhf.rollout import collect

PROMPTS = ["w5", "w6 w7 w8", "w9 w10 w11 w12"]


def batch(policy, tokenizer, seed, prompts=PROMPTS, steps=6, constraint=None):
    """A rewarded batch whose texts and rewards (seed + row/10) say where they come from."""
    generator = torch.Generator().manual_seed(seed)
    rollout = collect(
        policy, tokenizer, prompts, max_new_tokens=steps, generator=generator, constraint=constraint
    )  # fmt: skip
    return rollout.rewarded(seed + torch.arange(len(prompts)) / 10)


def moved(policy):
    for p in policy.trainable().values():
        p.data += 0.05 * torch.randn(p.shape)
    return policy


class OnlyEven:
    """The constraint that allows tokens 0, 2, 4, …"""

    def start(self, prompts):
        return torch.zeros(len(prompts))

    def allowed(self, state):
        return (torch.arange(61) % 2 == 0).expand(len(state), -1)

    def advance(self, state, tokens):
        return state


@pytest.mark.parametrize("constraint", [None, OnlyEven()])
@pytest.mark.parametrize("blocks", [None, 1])
def test_joined_batches_score_as_each_did_alone(tiny_lm, tokenizer, blocks, constraint):
    """Prompts and completions of other lengths pad them left and right: positions, masks and rewards must not slip."""
    policy = ActorCritic(tiny_lm(), trainable_blocks=blocks)
    parts = [
        batch(policy, tokenizer, 1, PROMPTS[:1], 2, constraint),
        batch(policy, tokenizer, 2, PROMPTS, 7, constraint),
        batch(policy, tokenizer, 3, PROMPTS[1:2], 4, constraint),
    ]
    whole = join(*parts)
    assert whole.prompts == [text for p in parts for text in p.prompts] and len(whole) == 5
    stats, values = score(policy, whole, reference=True)
    rows = 0
    for part in parts:
        here, width = slice(rows, rows + len(part)), part.mask.shape[1]
        rows += len(part)
        assert torch.equal(whole.mask[here, :width], part.mask) and not whole.mask[here, width:].any()
        for got, expected in (
            (stats.logprob, part.logprobs), (stats.ref_logprob, part.ref_logprobs), (stats.kl, part.kl),
            (values, part.values), (whole.rewards, part.rewards), (whole.tokens, part.tokens),
            (whole.behaviour, part.logprobs),
        ):  # fmt: skip
            inside = torch.where(part.mask, got[here, :width], 0)
            torch.testing.assert_close(inside, torch.where(part.mask, expected, 0), rtol=1e-4, atol=1e-5)
    assert whole.rewards.sum(1).tolist() == pytest.approx([1.0, 2.0, 2.1, 2.2, 3.0])


@pytest.mark.parametrize("blocks, critic", [(None, "shared"), (1, "separate")])
def test_refreshed_completions_are_seen_by_the_present_policy(tiny_lm, tokenizer, blocks, critic):
    """Fresh log-probs, entropy and values; log π_b, rewards and the log-probs of sampling stay."""
    policy = ActorCritic(tiny_lm(), trainable_blocks=blocks, critic=critic)
    memory = Memory(3)
    memory.add(batch(policy, tokenizer, 1))
    old = memory.draw(9)
    new = refreshed(moved(policy), old)
    for row in range(len(new)):
        prompt = tokenizer(new.prompts[row])["input_ids"]
        tokens = new.tokens[row][new.mask[row]]
        ids, here = torch.tensor([prompt + tokens[:-1].tolist()]), slice(len(prompt) - 1, None)
        logits = policy.lm(ids).logits[0, here].log_softmax(-1)
        expected = logits[range(len(tokens)), tokens]
        torch.testing.assert_close(new.logprobs[row][new.mask[row]], expected, rtol=1e-4, atol=1e-5)
        entropy = -(logits.exp() * logits).sum(-1)
        torch.testing.assert_close(new.entropy[row][new.mask[row]], entropy, rtol=1e-4, atol=1e-5)
    _, values = score(policy, replace(new, trunk=None))
    torch.testing.assert_close(new.values, torch.where(new.mask, values, 0.0), rtol=1e-4, atol=1e-5)
    assert (new.logprobs - old.logprobs).abs().max() > 0.01 and (new.values - old.values).abs().max() > 0.01
    for name in ("ref_logprobs", "behaviour", "rewards", "tokens"):
        assert torch.equal(getattr(new, name), getattr(old, name)), name
    assert torch.equal(new.behaviour, old.logprobs) and not new.logprobs.requires_grad


def test_only_the_last_batches_are_drawn_from_each_completion_at_most_once(tiny_lm, tokenizer):
    policy, memory = ActorCritic(tiny_lm()), Memory(2)
    assert memory.draw(4) is None
    for seed in range(1, 5):
        memory.add(batch(policy, tokenizer, seed))
    generator, counts = torch.Generator().manual_seed(0), {}
    for _ in range(200):
        drawn = memory.draw(4, generator)
        rewards = [round(r, 1) for r in drawn.rewards.sum(1).tolist()]
        assert len(set(rewards)) == 4
        for r in rewards:
            counts[r] = counts.get(r, 0) + 1
    assert set(counts) == {3.0, 3.1, 3.2, 4.0, 4.1, 4.2}
    assert min(counts.values()) > 100  # of 133 expected, with a standard deviation of 7
    assert len(memory.draw(99)) == 6 and memory.draw(0) is None


def test_what_is_remembered_holds_no_activations_and_survives_a_checkpoint(tiny_lm, tokenizer, tmp_path):
    policy, memory, restored = ActorCritic(tiny_lm(), trainable_blocks=1), Memory(2), Memory(2)
    memory.baselines = torch.tensor([1.0, 2.0, 3.0])
    for seed in range(3):
        memory.add(batch(policy, tokenizer, seed))
    assert all(b.trunk is None for b in memory.batches)
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    restored.load_state_dict(torch.load(tmp_path / "memory.pt", weights_only=True))
    assert torch.equal(restored.baselines, memory.baselines) and len(restored.batches) == 2
    mine, theirs = (m.draw(5, torch.Generator().manual_seed(1)) for m in (memory, restored))
    for name, x in vars(mine).items():
        y = getattr(theirs, name)
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, name


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"replay": -1}, "replay must be >= 0, got -1"),
        ({"replay": 1.5}, "replay must be an integer, got 1.5"),
        ({"replay_batches": 0}, "replay_batches must be an integer >= 1, got 0"),
        ({"tau_start": 0.0}, "tau_start must be None or > 0, got 0.0"),
        ({"centre": "mean"}, "centre must be one of .*'prompt'.*, got 'mean'"),
        ({"centre_samples": 0}, "centre_samples must be an integer >= 1, got 0"),
        ({"retrace": True}, "retrace has no effect without replay, got True"),
        ({"retrace": "no", "replay": 3}, "retrace must be True or False, got 'no'"),
        ({"batch_size": 6, "samples_per_prompt": 4}, "samples_per_prompt must divide batch_size=6, got 4"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_cooling_ends_halfway_and_never_warms():
    taus = [TrainConfig(tau=0.1, tau_start=1.6, updates=8).cooled(u).tau for u in range(8)]
    assert taus == pytest.approx([1.6, 0.8, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    raised = [TrainConfig(tau=0.1, tau_start=1.6, updates=16).cooled(u).tau for u in (4, 8)]
    assert raised == pytest.approx([0.4, 0.1])  # where eight updates had ended cooling, sixteen go on with it
    for start in (None, 0.05, 0.1):
        assert {TrainConfig(tau=0.1, tau_start=start, updates=4).cooled(u).tau for u in range(4)} == {0.1}
