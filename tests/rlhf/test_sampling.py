"""Sampling: every draw is its row's own, finished rows cost nothing, and nothing else changes by that."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache

from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import collect
from klq_edu.rlhf.sampling import Decoder, draw, packed_linears

PROMPTS = ["w5 w6 w7 w8", "w9", "w10 w11", "w12 w13 w14"]
ALMOST_ONE = 1 - 2**-53  # the largest number that torch.rand can return in float64


def uniform(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.fixture
def quick_to_end(tiny_lm):
    """A policy on some of whose blocks EOS (token 1) is likely, so that lengths differ a lot."""

    def build(**settings):
        lm = tiny_lm()
        lm.lm_head.weight.data[1] *= 4
        return ActorCritic(lm, **settings)

    return build


def sample(policy, tokenizer, prompts=PROMPTS * 8, steps=12, seed=0, **settings):
    rng = torch.Generator().manual_seed(seed)
    return collect(policy, tokenizer, prompts, max_new_tokens=steps, generator=rng, **settings)


weights = st.lists(st.one_of(st.just(0.0), st.floats(2**-100, 1.0, width=32)), min_size=1, max_size=9).filter(any)


@given(weights, st.one_of(st.just(0.0), st.just(ALMOST_ONE), st.floats(0, ALMOST_ONE)))
def test_a_draw_inverts_the_cumulative_distribution_and_is_never_impossible(weights, u):
    """The first token at which the exact cumulative sum passes u, but for rounding where u is at a step."""
    probs = torch.tensor(weights)
    index = draw((probs / probs.sum()).unsqueeze(0), uniform(u)).item()
    assert weights[index] > 0
    exact = (probs / probs.sum()).double()
    below, upto = exact[:index].sum(), exact[: index + 1].sum()
    assert below - 1e-12 <= u * exact.sum() <= upto + 1e-12


def test_the_ends_of_the_unit_interval_draw_the_first_and_last_possible_token():
    probs = torch.tensor([[0.0, 0.25, 0.75, 0.0, 0.0]]).expand(4, -1)
    assert draw(probs, uniform(0.0, 0.25, ALMOST_ONE, 1.0)).tolist() == [1, 2, 2, 2]
    tail = torch.full((1, 50_000), 1 / 50_000)
    tail[0, -9:] = 0  # where float32 sums would end far from 1
    assert draw(tail, uniform(ALMOST_ONE)).item() == 49_990


def test_a_draw_is_as_fine_as_float64():
    """In float32 the sum ends before a rare last token, and a number just below a step lies on it."""
    assert draw(torch.tensor([[0.5, 0.5, 2**-30]]), uniform(1 - 2**-32)).item() == 2
    assert draw(torch.tensor([[0.5, 0.5]]), uniform(0.5 - 2**-40)).item() == 0


class Stairs:
    """Row b starts with token 5 + b, goes up by one each step, and may end at any; after that nothing is allowed."""

    def start(self, prompts):
        return torch.arange(5, 5 + len(prompts))

    def allowed(self, state):
        possible = nn.functional.one_hot(state.clamp(min=0), 61).bool()
        possible[:, 1] = True
        return possible & (state >= 0).unsqueeze(1)

    def advance(self, state, tokens):
        return torch.where((state >= 0) & (tokens == state), state + 1, -1)


def test_each_row_obeys_its_own_state_of_a_constraint_whoever_has_ended(quick_to_end, tokenizer):
    rollout = sample(quick_to_end(), tokenizer, steps=12, constraint=Stairs())
    lengths = rollout.mask.sum(1)
    assert len(lengths.unique()) > 3
    for b, (row, n) in enumerate(zip(rollout.tokens.tolist(), lengths.tolist(), strict=True)):
        assert row[: n - 1] == list(range(5 + b, 4 + b + n)) and row[n - 1] in (1, 4 + b + n)
    assert (
        rollout.logprobs.isfinite().all() and rollout.allowed.gather(2, rollout.tokens[..., None])[rollout.mask].all()
    )


def test_when_rows_are_dropped_changes_no_token_and_no_statistic(quick_to_end, tokenizer):
    policy = quick_to_end(trainable_blocks=2)
    dropped = sample(policy, tokenizer)
    policy.can_drop_rows = False
    kept = sample(policy, tokenizer)
    lengths = dropped.mask.sum(1)
    assert len(lengths.unique()) > 5 and dropped.completions == kept.completions
    assert torch.equal(dropped.tokens[dropped.mask], kept.tokens[kept.mask])
    for name in ("logprobs", "values", "kl", "entropy"):
        torch.testing.assert_close(getattr(dropped, name), getattr(kept, name), rtol=1e-4, atol=1e-5)


def test_a_row_keeps_its_tokens_whoever_else_ends(quick_to_end, tokenizer):
    """Row b's token at step t hangs on its own uniform number: other prompts in the other rows don't change it."""
    policy = quick_to_end()
    first = sample(policy, tokenizer, ["w5 w6", *["w9"] * 15])
    second = sample(policy, tokenizer, ["w5 w6", *["w20 w21 w22"] * 15])
    assert first.completions[0] == second.completions[0] and first.completions[1:] != second.completions[1:]


def test_the_generator_moves_on_by_the_length_limit_and_not_by_what_was_sampled(quick_to_end, tokenizer):
    rngs = [torch.Generator().manual_seed(0) for _ in range(2)]
    for rng, prompt in zip(rngs, ("w5", "w9 w10"), strict=True):
        collect(quick_to_end(), tokenizer, [prompt] * 3, max_new_tokens=20, generator=rng)
    assert torch.equal(rngs[0].get_state(), rngs[1].get_state())


def test_finished_rows_are_no_longer_decoded(quick_to_end, tokenizer, monkeypatch):
    fed, call = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, ids, mask: fed.append(len(ids)) or call(self, ids, mask))
    policy = quick_to_end()
    fed.clear()  # of the probe when the policy was built
    mask = sample(policy, tokenizer, steps=20).mask
    alive = mask.sum(0).tolist()  # rows that had not ended before each step
    assert len(fed) == len(alive) and fed[-1] < len(mask) / 2
    assert all(rows <= n / (1 - 1 / 8) + 1 for rows, n in zip(fed[1:], alive[1:], strict=True))


def test_a_prompt_that_comes_several_times_is_read_once(quick_to_end, tokenizer, monkeypatch):
    """And every row gets its own tokens, statistics and trunk; padding is part of what is compared."""
    prompts, fed, call = ["w5 w6", "w9", "w5 w6", "w7 w8 w9", "w9", "w5 w6"], [], Decoder.__call__
    policy = quick_to_end(trainable_blocks=1)
    monkeypatch.setattr(Decoder, "__call__", lambda self, ids, mask: fed.append(len(ids)) or call(self, ids, mask))
    shared = sample(policy, tokenizer, prompts)
    assert fed[:2] == [3, 6]
    policy.can_drop_rows, fed[:] = False, []
    alone = sample(policy, tokenizer, prompts)
    assert fed[0] == 6 and shared.completions == alone.completions and len(set(alone.completions)) > 3
    torch.testing.assert_close(shared.logprobs, alone.logprobs, rtol=1e-4, atol=1e-5)
    seen = shared.attention_mask[:, :3].bool()
    torch.testing.assert_close(shared.trunk[:, :3][seen], alone.trunk[:, :3][seen], rtol=1e-4, atol=1e-4)


def test_a_prompt_that_begins_like_padding_is_not_taken_for_a_shorter_one(quick_to_end, tokenizer):
    """Padding is token 0, which is <unk>: only the mask tells "<unk> w5" from a padded "w5"."""
    policy, prompts = quick_to_end(), ["<unk> w5", "w5"] * 8
    shared = sample(policy, tokenizer, prompts)
    policy.can_drop_rows = False
    assert shared.completions == sample(policy, tokenizer, prompts).completions


def test_the_trunk_kept_from_sampling_is_the_models_own(quick_to_end, tokenizer):
    policy = quick_to_end(trainable_blocks=1)
    rollout = sample(policy, tokenizer)
    fresh = policy.encode(rollout.input_ids, rollout.attention_mask)["hidden"]
    ends = torch.cat([rollout.attention_mask[:, : -rollout.tokens.shape[1] + 1].bool(), rollout.mask[:, 1:]], 1)
    torch.testing.assert_close(rollout.trunk[ends], fresh[ends], rtol=1e-4, atol=1e-4)
    again = score(policy, rollout)[0].logprob
    torch.testing.assert_close(again, rollout.logprobs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fault", [AttributeError, None])
def test_a_cache_that_cannot_drop_rows_is_found_out_and_does_without(tiny_lm, tokenizer, monkeypatch, fault):
    """A cache may lack the method, or have one that does nothing."""

    def select(self, index):
        if fault:
            raise fault("no such thing")

    with monkeypatch.context() as patch:
        patch.setattr(DynamicCache, "batch_select_indices", select)
        policy = ActorCritic(tiny_lm())
        assert not policy.can_drop_rows and sample(policy, tokenizer).ended.any()
    assert ActorCritic(tiny_lm()).can_drop_rows


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_packed_layers_multiply_as_before_and_are_unpacked_after_an_error_too(tiny_lm, family):
    """phi's have biases."""
    policy = ActorCritic(tiny_lm(family), trainable_blocks=1)
    ids = torch.randint(2, 61, (3, 7))
    expected = policy.lm(ids).logits
    layer = next(m for m in policy.lm.base_model.modules() if isinstance(m, nn.Linear))
    with pytest.raises(ZeroDivisionError), packed_linears(policy), torch.no_grad():
        packed = policy.lm(ids).logits
        assert "forward" in vars(layer)
        raise ZeroDivisionError
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(m) for m in policy.modules())
    policy.body.blocks[0].self_attn.q_proj.weight.data.mul_(2)  # training goes on: weights are packed anew
    with packed_linears(policy), torch.no_grad():
        moved = policy.lm(ids).logits
    torch.testing.assert_close(moved, policy.lm(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(moved, expected, atol=1e-3)


def test_layers_are_packed_in_the_policys_precision(tiny_lm):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    policy.dtype = torch.bfloat16
    layer = policy.lm.base_model.layers[0].mlp.up_proj
    with packed_linears(policy), torch.no_grad():
        out = layer(torch.randn(3, 32))
    assert out.dtype == (torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32)
