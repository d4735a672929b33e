"""ActorCritic: replaying the top blocks, sharing the trunk with the reference, gradients, saving."""

import pytest
import torch
import transformers
from transformers import AutoModel, AutoModelForCausalLM

from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.sampling import Decoder

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [1, 1, 11, 12, 13, 14]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
REAL = MASK.bool()
ALL = slice(0, None)


def plain_logits(lm, ids=IDS, mask=MASK):
    return lm(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits


def reference_logits(policy, inputs, keep):
    return policy.ref_head(policy.reference_features(inputs, keep))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("blocks", [None, 1, 3])
def test_logits_are_the_language_models_own(tiny_lm, family, blocks):
    """Recording the trunk and replaying the blocks above it changes nothing, left padding included."""
    lm = tiny_lm(family)
    policy = ActorCritic(lm, trainable_blocks=blocks)
    logits, _ = policy(policy.encode(IDS, MASK), ALL)
    torch.testing.assert_close(logits[REAL], plain_logits(lm)[REAL], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reference_logits(policy, policy.encode(IDS, MASK), ALL), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_decoding_yields_the_same_logits_and_the_trunk_on_the_way(tiny_lm, family):
    """The key-value cache and the activations kept during generation agree with one parallel pass."""
    policy = ActorCritic(tiny_lm(family), trainable_blocks=2)
    decode = Decoder(policy)
    steps = [decode(IDS[:, :3], MASK[:, :3])] + [decode(IDS[:, t : t + 1], MASK[:, : t + 1]) for t in range(3, 6)]
    expected, _ = policy(policy.encode(IDS, MASK), slice(2, None))
    torch.testing.assert_close(torch.stack(steps, 1), expected, rtol=1e-4, atol=1e-4)
    replayed, _ = policy(policy.encode(IDS, MASK, decode.activations()), slice(2, None))
    torch.testing.assert_close(replayed, expected, rtol=1e-4, atol=1e-4)


def test_a_step_moves_the_top_blocks_only_and_never_the_reference(tiny_lm):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    inputs = policy.encode(IDS, MASK)
    before, reference = policy.lm.state_dict(), reference_logits(policy, inputs, ALL)
    before = {name: p.clone() for name, p in before.items()}
    logits, values = policy(inputs, ALL)
    (logits.square().mean() + (values - 1).square().mean()).backward()
    torch.optim.SGD(policy.trainable().values(), lr=0.1).step()
    moved = {name for name, p in policy.lm.state_dict().items() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith(("model.layers.2.", "model.norm")) for name in moved)
    torch.testing.assert_close(reference_logits(policy, inputs, ALL), reference, rtol=0, atol=0)
    assert not torch.allclose(policy(inputs, ALL)[0], reference)


def test_a_whole_model_keeps_a_whole_reference_even_with_tied_embeddings(tiny_lm):
    policy = ActorCritic(tiny_lm("gpt2"))
    inputs = policy.encode(IDS, MASK)
    reference = reference_logits(policy, inputs, ALL)
    policy(inputs, ALL)[0].square().mean().backward()
    torch.optim.SGD(policy.trainable().values(), lr=0.1).step()
    torch.testing.assert_close(reference_logits(policy, inputs, ALL), reference, rtol=0, atol=0)


@pytest.mark.parametrize("blocks", [None, 1])
def test_dropout_stays_off_whatever_mode_a_caller_leaves_behind(tiny_lm, blocks):
    """GPT-2 drops out a tenth of everything; log-probs of sampled tokens must be those they were sampled with."""
    lm = tiny_lm("gpt2")
    policy = ActorCritic(lm, trainable_blocks=blocks, critic="separate")
    torch.nn.init.ones_(policy.value_head.weight)
    expected, values = plain_logits(lm), policy(policy.encode(IDS, MASK), ALL)[1]
    for forward in (
        lambda: policy(policy.encode(IDS, MASK), ALL)[0][:, -1],
        lambda: reference_logits(policy, policy.encode(IDS, MASK), ALL)[:, -1],
        lambda: policy(policy.encode(IDS, MASK), ALL)[0][:, -1],
        lambda: Decoder(policy)(IDS, MASK),
    ):
        policy.train()
        torch.testing.assert_close(forward(), expected[:, -1], rtol=1e-4, atol=1e-4)
    policy.train()
    torch.testing.assert_close(policy(policy.encode(IDS, MASK), ALL)[1][REAL], values[REAL])


def trunk_gradient(policy):
    torch.nn.init.ones_(policy.value_head.weight)
    policy.zero_grad()
    policy(policy.encode(IDS, MASK), ALL)[1].sum().backward()
    grads = [p.grad.flatten() for p in policy.body.parameters() if p.grad is not None]
    return torch.cat(grads) if grads else torch.zeros(1), policy.value_head.weight.grad.clone()


def test_value_grad_scale_scales_the_trunks_gradient_and_not_the_heads(tiny_lm):
    full, head = trunk_gradient(ActorCritic(tiny_lm(), trainable_blocks=2))
    scaled, same_head = trunk_gradient(ActorCritic(tiny_lm(), trainable_blocks=2, value_grad_scale=0.25))
    torch.testing.assert_close(scaled, 0.25 * full)
    torch.testing.assert_close(same_head, head)


@pytest.mark.parametrize("blocks", [None, 2])
def test_a_separate_critic_sends_no_gradient_into_the_policy(tiny_lm, blocks):
    policy = ActorCritic(tiny_lm(), trainable_blocks=blocks, critic="separate")
    in_policy, _ = trunk_gradient(policy)
    assert not in_policy.any()
    assert any(p.grad is not None and p.grad.any() for p in policy.critic_body.parameters())


def test_the_start_value_is_the_value_everywhere(tiny_lm):
    policy = ActorCritic(tiny_lm())
    policy.start_value(0.7)
    assert torch.allclose(policy(policy.encode(IDS, MASK), ALL)[1], torch.tensor(0.7))


def test_values_stay_float32_when_the_forward_is_bfloat16(tiny_lm):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    policy.dtype = torch.bfloat16
    logits, values = policy(policy.encode(IDS, MASK), ALL)
    assert (logits.dtype, values.dtype) == (torch.bfloat16, torch.float32)


def test_a_pruned_vocabulary_picks_columns_and_translates_ids(tiny_lm):
    lm, vocab = tiny_lm(), torch.tensor([1, 4, 9, 33, 60])
    policy = ActorCritic(lm, trainable_blocks=2, vocab=vocab)
    inputs = policy.encode(IDS, MASK)
    torch.testing.assert_close(policy(inputs, ALL)[0], plain_logits(lm)[..., vocab], rtol=1e-4, atol=1e-4)
    assert torch.equal(policy.token_ids(policy.action_ids(vocab)), vocab)
    assert policy.action_ids(torch.tensor([0, 5, 44])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("settings", [{}, {"trainable_blocks": 2}, {"trainable_blocks": 2, "critic": "separate"}])
def test_a_saved_policy_is_a_plain_causal_lm_with_its_critic_beside_it(tiny_lm, tmp_path, settings):
    """The full vocabulary is saved even when training pruned it, and the value head comes back."""
    vocab = torch.arange(10) if settings else None
    policy = ActorCritic(tiny_lm(), vocab=vocab, **settings)
    for p in policy.trainable().values():
        p.data.add_(0.01 * torch.randn_like(p))
    policy.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = policy(policy.encode(IDS, MASK), ALL)
    assert plain_logits(plain).shape[-1] == 61
    torch.testing.assert_close(plain_logits(plain)[REAL][:, :10], expected[0][REAL][:, :10], rtol=1e-4, atol=1e-4)
    again = ActorCritic.from_pretrained(tmp_path, vocab=vocab, **settings)
    torch.testing.assert_close(again(again.encode(IDS, MASK), ALL)[1], expected[1])
    assert again.value_is_set and not ActorCritic(tiny_lm()).value_is_set  # a run keeps a critic that was trained


def test_loading_with_another_critic_is_refused(tiny_lm, tmp_path):
    ActorCritic(tiny_lm(), critic="separate").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit this critic"):
        ActorCritic.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"trainable_blocks": 0}, r"trainable_blocks must lie in \[1, 3\].* got 0"),
        ({"trainable_blocks": 4}, r"trainable_blocks must lie in \[1, 3\].* got 4"),
        ({"trainable_blocks": 1.5}, r"trainable_blocks must lie in \[1, 3\].* got 1.5"),
        ({"critic": "twin"}, "critic must be 'shared' or 'separate', got 'twin'"),
        ({"vocab": torch.tensor([3])}, "vocab needs a frozen head: give trainable_blocks"),
        ({"trainable_blocks": 1, "vocab": torch.tensor([3, 61])}, r"vocab must hold .* \[0, 61\), got 3…61"),
        ({"trainable_blocks": 1, "vocab": torch.tensor([], dtype=torch.long)}, "vocab must hold at least one id"),
    ],
)
def test_impossible_settings_are_refused_by_name(tiny_lm, settings, message):
    with pytest.raises(ValueError, match=message):
        ActorCritic(tiny_lm(), **settings)


def test_a_model_without_a_language_model_head_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="lm must have a linear language-model head.*AutoModelForCausalLM"):
        ActorCritic(AutoModel.from_config(tiny_lm().config))


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = SIZES | {"num_attention_heads": 4, "intermediate_size": 48}
BART = {"d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}


@pytest.mark.parametrize(
    "family, sizes, message",
    [
        (
            "Gemma2",
            {**HEADS, "num_key_value_heads": 2, "final_logit_softcapping": 30.0},
            "Gemma2ForCausalLM are capped",
        ),
        (
            "Granite",
            {**HEADS, "num_key_value_heads": 2, "logits_scaling": 1.1},
            "GraniteForCausalLM .*not head\\(hidden\\)",
        ),
        ("Bert", {**HEADS, "is_decoder": True}, "BertLMHeadModel .*not head\\(hidden\\)"),
        ("Bart", {**BART, "vocab_size": 61}, "BartForCausalLM with a cache differ by .*left padding"),
        (
            "Moshi",
            {**HEADS, "num_key_value_heads": 4, "ffn_dim": 48, "sliding_window": 8},
            "MoshiForCausalLM with a cache",
        ),
        ("Mamba", SIZES, "MambaForCausalLM can't decode .*AttributeError"),
        ("Rwkv", SIZES, "RwkvForCausalLM can't decode .*AttributeError"),
    ],
)
def test_models_that_would_silently_be_other_models_are_refused_by_name(family, sizes, message):
    """Logits that are not head(hidden), positions blind to padding, a cache that forgets its window, or none."""
    config = getattr(transformers, f"{family}Config")(**sizes)
    with pytest.raises(ValueError, match=message):
        ActorCritic(AutoModelForCausalLM.from_config(config))


def test_a_model_that_sees_too_has_its_texts_blocks():
    """Its configuration keeps the depth one level down: reading it at the top died of an AttributeError."""
    config = transformers.FuyuConfig(vocab_size=61, hidden_size=32, text_config={"model_type": "persimmon", **HEADS})
    lm = AutoModelForCausalLM.from_config(config)
    policy = ActorCritic(lm, trainable_blocks=1)
    logits, _ = policy(policy.encode(IDS, MASK), ALL)
    torch.testing.assert_close(logits[REAL], plain_logits(lm)[REAL], rtol=1e-4, atol=1e-4)
