"""Supervised fine-tuning: what its loss counts, what it teaches, and what it leaves alone."""

import pytest
import torch
from datasets import Dataset

from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import collect, transcribe
from klq_edu.rlhf.sft import finetune, mean_loss

EXAMPLES = Dataset.from_dict({  # the last word of a prompt decides
    "prompt": [f"w{i} w{i + 1} w5"[3 * (i % 3 == 0) :] if i % 2 else f"w{i} w6" for i in range(2, 18)],
    "completion": ["w30", "w9 w8 w7"] * 8,
})  # fmt: skip


def reference_loss(lm, tokenizer, rows):
    """−log p per completion token and EOS in float64, each row alone, without padding, cache or trunk."""
    lm, found = lm.double(), []
    for row in rows:
        front, back = (tokenizer(row[name])["input_ids"] for name in ("prompt", "completion"))
        ids = torch.tensor([front + back + [tokenizer.eos_token_id]])
        logp = lm(ids).logits[0].log_softmax(-1)
        found += [-logp[t - 1, ids[0, t]].item() for t in range(len(front), ids.shape[1])]
    return sum(found) / len(found)


@pytest.mark.parametrize("trainable_blocks", [None, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_the_loss_is_that_of_completion_tokens_alone(tiny_lm, tokenizer, trainable_blocks, batch_size):
    policy = ActorCritic(tiny_lm(), trainable_blocks=trainable_blocks)
    (start,) = finetune(policy, tokenizer, EXAMPLES, EXAMPLES, epochs=0, batch_size=batch_size)
    assert start == {"epoch": 0, "held_out": pytest.approx(reference_loss(tiny_lm(), tokenizer, EXAMPLES), rel=1e-5)}


@pytest.mark.parametrize("trainable_blocks", [None, 1])
def test_it_teaches_the_completions_and_their_end(tiny_lm, tokenizer, trainable_blocks):
    policy, steps = ActorCritic(tiny_lm(), trainable_blocks=trainable_blocks), []
    frozen = {n: p.clone() for n, p in policy.named_parameters() if not p.requires_grad}
    rows = finetune(
        policy, tokenizer, EXAMPLES, EXAMPLES.select(range(4)), epochs=30, batch_size=4, learning_rate=1e-2,
        on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    assert [r["epoch"] for r in rows] == list(range(31)) and steps == [(i + 1, 120) for i in range(120)]
    assert rows[-1]["held_out"] < 1.0 < 3.0 < rows[0]["held_out"]
    rollout = collect(policy, tokenizer, EXAMPLES["prompt"][:] * 4, max_new_tokens=8)
    assert rollout.ended.float().mean() > 0.9
    assert sum(c in ("w9 w8 w7", "w30") for c in rollout.completions) > 0.5 * len(rollout)  # of some 60³
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    assert rows[-1]["held_out"] == pytest.approx(
        reference_loss(policy.lm, tokenizer, EXAMPLES.select(range(4))), rel=1e-3, abs=1e-6
    )


def test_steps_are_adams_with_clipped_gradients_and_a_rate_that_falls_to_zero(tiny_lm, tokenizer):
    """Three steps on one batch beside the same by hand, on the policy's own loss."""
    rate, limit, steps = 1e-2, 0.05, 3
    policy, by_hand = (ActorCritic(tiny_lm(), trainable_blocks=1) for _ in range(2))
    finetune(
        policy, tokenizer, EXAMPLES, EXAMPLES, epochs=steps, batch_size=16, learning_rate=rate, max_grad_norm=limit
    )
    parameters = [p for name, p in by_hand.trainable().items() if not name.startswith("value_head")]
    optimizer = torch.optim.Adam(parameters)
    order = sorted(range(16), key=lambda i: len(EXAMPLES[i]["prompt"]) + len(EXAMPLES[i]["completion"]))
    batch = transcribe(by_hand, tokenizer, *(EXAMPLES[order][name] for name in ("prompt", "completion")))
    for k in range(steps):
        stats, _ = score(by_hand, batch)
        optimizer.zero_grad()
        (-stats.logprob[batch.mask].mean()).backward()
        norm = sum(p.grad.square().sum() for p in parameters) ** 0.5
        assert norm > limit
        for p in parameters:
            p.grad *= limit / norm
        optimizer.param_groups[0]["lr"] = rate * (1 - k / steps)
        optimizer.step()
    for name, p in by_hand.trainable().items():
        torch.testing.assert_close(policy.trainable()[name], p, rtol=1e-3, atol=1e-5, msg=name)


def test_seeds_decide_the_order_and_nothing_else_does(tiny_lm, tokenizer):
    def run(seed, batch_noise=0):
        torch.manual_seed(batch_noise)
        return finetune(ActorCritic(tiny_lm()), tokenizer, EXAMPLES, EXAMPLES, epochs=2, batch_size=4, seed=seed)

    assert run(0) == run(0, batch_noise=1) != run(1)


def test_transcribed_completions_are_as_if_sampled(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    sampled = collect(policy, tokenizer, EXAMPLES["prompt"][:] * 8, max_new_tokens=6)
    index = sampled.ended.nonzero().squeeze(1)
    sampled = sampled.rows(index)
    assert len(index) > 3
    given = transcribe(policy, tokenizer, sampled.prompts, sampled.completions)
    width = given.mask.shape[1]
    assert torch.equal(given.mask, sampled.mask[:, :width]) and not sampled.mask[:, width:].any()
    assert torch.equal(given.tokens[given.mask], sampled.tokens[sampled.mask])
    expected = -sampled.logprobs[sampled.mask].mean().item()
    assert mean_loss(policy, [given]) == pytest.approx(expected, rel=1e-5)


def test_what_can_not_be_learnt_is_named(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1, vocab=torch.arange(30))
    with pytest.raises(ValueError, match=r"completions\[1\] has the token 'w30', which `vocab` leaves out"):
        transcribe(policy, tokenizer, ["w2"] * 2, ["w9", "w30"])
    with pytest.raises(ValueError, match="completion is missing"):
        finetune(policy, tokenizer, EXAMPLES.remove_columns("completion"), EXAMPLES)
    with pytest.raises(ValueError, match="examples must not be empty"):
        finetune(policy, tokenizer, EXAMPLES.select([]), EXAMPLES)
