"""Rollouts sample exactly the distribution whose log-probabilities they store, and mask what is not there."""

import pytest
import torch

from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import Rollout, collect

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11"]


def sample(policy, tokenizer, prompts=PROMPTS, steps=6, seed=0, **settings):
    rng = torch.Generator().manual_seed(seed)
    return collect(policy, tokenizer, prompts, max_new_tokens=steps, generator=rng, **settings)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_are_the_stored_probabilities(tiny_lm, tokenizer, temperature):
    """transformers' default top_k = 50 would empty the 11 least likely of these 61 tokens."""
    lm = tiny_lm()
    lm.generation_config.top_k, lm.generation_config.top_p, lm.generation_config.temperature = 2, 0.1, 3.0
    policy, n = ActorCritic(lm), 20_000
    rollout = sample(policy, tokenizer, ["w5 w6"] * n, steps=1, temperature=temperature)
    frequency = torch.bincount(rollout.tokens[:, 0], minlength=61) / n
    logits = lm(torch.tensor([[5, 6]])).logits[0, -1] / temperature
    probs = logits.softmax(-1).detach()
    chi_square = (n * (frequency - probs) ** 2 / probs).sum()
    assert chi_square < 110  # 60 degrees of freedom: mean 60, 99.99% below 110
    torch.testing.assert_close(rollout.logprobs[:, 0].exp(), probs[rollout.tokens[:, 0]], rtol=1e-4, atol=1e-6)
    assert (frequency > 0).sum() > 50


@pytest.mark.parametrize("blocks", [None, 2])
def test_stored_logprobs_are_the_training_forwards(tiny_lm, tokenizer, blocks):
    """The same numbers come out of a plain forward over prompt and completion, row by row and unpadded."""
    lm = tiny_lm()
    rollout = sample(ActorCritic(lm, trainable_blocks=blocks), tokenizer)
    for i, prompt in enumerate(PROMPTS):
        ids, length = tokenizer(prompt)["input_ids"], int(rollout.mask[i].sum())
        whole = torch.tensor([ids + rollout.tokens[i, :length].tolist()])
        logp = lm(whole).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, rollout.tokens[i, :length, None])[:, 0]
        torch.testing.assert_close(rollout.logprobs[i, :length], expected, rtol=1e-4, atol=1e-4)


def test_at_the_start_policy_and_reference_agree_and_masked_entries_are_zero(tiny_lm, tokenizer):
    rollout = sample(ActorCritic(tiny_lm()), tokenizer, PROMPTS * 20, steps=12)
    torch.testing.assert_close(rollout.logprobs, rollout.ref_logprobs)
    assert (rollout.kl >= 0).all() and rollout.kl.max() < 5e-6  # the floor of a KL from float32 hidden states
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "kl", "rewards"):
        assert not getattr(rollout, name)[~rollout.mask].any(), name


def test_the_mask_ends_with_eos_and_a_prompt_may_contain_it(tiny_lm, tokenizer):
    """pad = eos here: masks must come from lengths, never from comparing ids."""
    rollout = sample(ActorCritic(tiny_lm()), tokenizer, ["w5 <eos> w6", "w7"] * 100, steps=30)
    lengths = rollout.mask.sum(1)
    ended = lengths < rollout.mask.shape[1]
    assert ended.any() and rollout.mask.shape[1] <= 30
    last = rollout.tokens[torch.arange(200), lengths - 1]
    assert (last[ended] == 1).all()
    before = rollout.mask.clone()
    before[torch.arange(200), lengths - 1] = False
    assert not (rollout.tokens[before] == 1).any()


def test_sampling_stops_when_every_row_has_ended(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1, vocab=torch.tensor([1]))  # only EOS is possible
    assert sample(policy, tokenizer, steps=9).tokens.tolist() == [[1], [1], [1]]


def test_a_pruned_vocabulary_is_never_left(tiny_lm, tokenizer):
    vocab = torch.tensor([1, 3, 20, 44])
    rollout = sample(ActorCritic(tiny_lm(), trainable_blocks=2, vocab=vocab), tokenizer, PROMPTS * 30)
    assert torch.isin(rollout.tokens[rollout.mask], vocab).all()
    assert rollout.entropy.max() <= torch.tensor(4.0).log() + 1e-5


def test_a_constraint_is_obeyed_by_policy_and_reference_alike(grammar):
    policy = grammar.make_policy(grammar_config())
    rollout = sample(policy, grammar.tokenizer, list(grammar.prompts["prompt"]) * 20, 5, constraint=grammar.constraint)
    assert set(grammar.reward(rollout.prompts, rollout.completions))  # every completion is one of the grammar's
    table = grammar.tree.ref
    state = grammar.constraint.start(rollout.prompts)
    probs = table[state, rollout.tokens[:, 0]].float()
    torch.testing.assert_close(rollout.ref_logprobs[:, 0].exp(), probs, rtol=1e-4, atol=1e-6)


def grammar_config():
    from klq_edu.worlds.presets import preset

    return preset("grammar")


def test_the_same_seed_gives_the_same_completions(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm())
    assert sample(policy, tokenizer, seed=3).completions == sample(policy, tokenizer, seed=3).completions
    assert sample(policy, tokenizer, seed=3).completions != sample(policy, tokenizer, seed=4).completions


def test_rows_selects_every_field(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    rollout = sample(policy, tokenizer)
    part = rollout.rows(torch.tensor([2, 0]))
    assert part.prompts == [PROMPTS[2], PROMPTS[0]] and torch.equal(part.tokens, rollout.tokens[[2, 0]])
    torch.testing.assert_close(part.stats(policy)[0].logprob, rollout.logprobs[[2, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask, message", [([1, 0, 1], "right-padded"), ([0, 0, 0], "row 1 is empty")])
def test_holes_and_empty_rows_are_refused(mask, message):
    mask, zeros = torch.tensor([[1, 1, 1], mask]).bool(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        Rollout(["a", "b"], ["c", "d"], zeros.long(), mask, zeros, zeros, zeros, zeros, zeros, zeros, {})


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts must not be empty"),
        (["w5", ""], r"prompts\[1\] = '' has no tokens"),
        (["w5 " * 60], r"prompts\[0\] has 60 tokens; with max_new_tokens=6 .* context of 64"),
    ],
)
def test_impossible_prompts_are_refused(tiny_lm, tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        sample(ActorCritic(tiny_lm()), tokenizer, prompts)
