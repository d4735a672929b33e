"""Rollouts sample exactly the distribution whose log-probabilities they store, and mask what is not there."""

import copy
import re

import pytest
import torch
import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from klq_edu.rlhf.algorithms import klq, make_targets
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.evaluate import score
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import Rollout, check_prompts, collect, encode_prompts

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


SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 1}
WIDE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 1}
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16),
    "bloom": lambda: transformers.BloomConfig(**SIZES),
    "falcon": lambda: transformers.FalconConfig(**SIZES, alibi=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**WIDE, head_dim=8, layer_types=MIXED, sliding_window=4),
    "mixtral": lambda: transformers.MixtralConfig(**WIDE, num_local_experts=4),
}


@pytest.mark.parametrize("family, blocks", [("llama", None), ("llama", 2), *((name, None) for name in FAMILIES)])
def test_stored_logprobs_are_the_training_forwards(tiny_lm, tokenizer, family, blocks):
    """The same numbers come out of a plain forward over prompt and completion, row by row and unpadded.

    Learned positions with an offset, ALiBi, sliding windows shorter than the text, experts.
    """
    lm = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval() if family in FAMILIES else tiny_lm(family)
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
    from klq_edu.worlds.registry import preset

    return preset("grammar")


def test_the_same_seed_gives_the_same_completions(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm())
    assert sample(policy, tokenizer, seed=3).completions == sample(policy, tokenizer, seed=3).completions
    assert sample(policy, tokenizer, seed=3).completions != sample(policy, tokenizer, seed=4).completions


def test_rows_selects_every_field(tiny_lm, tokenizer):
    policy = ActorCritic(tiny_lm(), trainable_blocks=1)
    rollout = sample(policy, tokenizer)
    part = rollout.rows(torch.tensor([2, 0]))
    assert part.prompts == [PROMPTS[2], PROMPTS[0]]
    tensors = {name: x for name, x in vars(rollout).items() if isinstance(x, torch.Tensor)}
    assert {"tokens", "mask", "trunk", "ended", "unknown"} <= tensors.keys()
    for name, x in tensors.items():
        assert torch.equal(getattr(part, name), x[[2, 0]]), name
    torch.testing.assert_close(score(policy, part)[0].logprob, rollout.logprobs[[2, 0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask, message", [([1, 0, 1], "right-padded"), ([0, 0, 0], "row 1 is empty")])
def test_holes_and_empty_rows_are_refused(mask, message):
    mask, zeros = torch.tensor([[1, 1, 1], mask]).bool(), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        Rollout(["a", "b"], ["c", "d"], zeros.long(), mask, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts must not be empty"),
        (["w5", ""], r"1 without tokens \(first: prompts\[1\] = ''\)"),
        (
            ["w5 " * 60],
            r"1 of more than 58 tokens, the context of 64 less max_new_tokens=6 \(first: prompts\[0\] = 'w5",
        ),
    ],
)
def test_impossible_prompts_are_refused(tiny_lm, tokenizer, prompts, message):
    with pytest.raises(ValueError, match=message):
        sample(ActorCritic(tiny_lm()), tokenizer, prompts)


def test_a_context_of_another_name_is_known_too(tokenizer):
    """MPT dies beyond its max_seq_len."""
    sizes = {"vocab_size": 61, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 16}
    lm = AutoModelForCausalLM.from_config(transformers.MptConfig(**sizes))
    with pytest.raises(ValueError, match="1 of more than 10 tokens, the context of 16"):
        sample(ActorCritic(lm), tokenizer, ["w5 " * 11])


def test_a_datasets_faults_are_counted_and_the_filter_that_is_named_keeps_the_rest(tiny_lm, tokenizer):
    """One bad row in 3,000 would end a run after hours, at every retry."""
    good, long = ["w5 w6"] * 1500, "w5 " * 59
    prompts = Dataset.from_dict({"prompt": [*good, None, " ", long, *good, "", "w5 " * 58, None, None]})
    policy = ActorCritic(tiny_lm())
    with pytest.raises(ValueError) as caught:
        check_prompts(tokenizer, prompts["prompt"], policy, 6)
    message = str(caught.value)
    for part in (
        "3 no text (first: prompts[1500] = None)",
        "2 without tokens (first: prompts[1501] = ' ')",
        "1 of more",
    ):
        assert part in message
    kept = eval(message.split("Keep the others: ")[1], {"prompts": prompts, "tokenizer": tokenizer})
    assert len(kept) == 3001 and check_prompts(tokenizer, kept["prompt"], policy, 6) is None


@pytest.mark.parametrize("template, longest", [("<bos> $A", 57), ("$A <eos>", 58), ("<bos> $A <eos>", 57)])
def test_the_filter_counts_what_the_tokenizer_puts_round_a_text(tiny_lm, template, longest):
    tokenizer, policy = words(template), ActorCritic(tiny_lm())
    prompts = Dataset.from_dict({"prompt": ["", *("w5 " * n for n in range(50, 64))]})
    with pytest.raises(ValueError) as caught:
        check_prompts(tokenizer, prompts["prompt"], policy, 6)
    filtered = str(caught.value).split("Keep the others: ")[1]
    kept = eval(filtered, {"prompts": prompts, "tokenizer": tokenizer})["prompt"]
    assert [len(p.split()) for p in kept] == list(range(50, longest + 1))
    check_prompts(tokenizer, kept, policy, 6)


def test_prompts_that_are_no_text_are_refused(tiny_lm, tokenizer):
    for missing in (float("nan"), 7, [{"role": "user", "content": "w5"}]):
        with pytest.raises(ValueError, match=r"1 no text \(first: prompts\[1\]"):
            check_prompts(tokenizer, ["w5", missing], ActorCritic(tiny_lm()), 6)


def words(template=None):
    """A tokenizer that puts <bos> and <eos> round a text as the template says."""
    names = ["<unk>", "<eos>", "<bos>", *(f"w{i}" for i in range(3, 61))]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        special = [("<bos>", 2), ("<eos>", 1)]
        model.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize(
    "template, front",
    [(None, []), ("<bos> $A", [2]), ("<bos> $A <eos>", [2]), ("$A <eos>", []), ("<eos> <bos> $A", [1, 2])],
)
def test_prompts_begin_as_the_tokenizer_begins_texts_and_never_end_them(tiny_lm, template, front):
    tokenizer, policy = words(template), ActorCritic(tiny_lm())
    formatted = "<eos> <bos> w7" if len(front) == 2 else "<bos> w7"  # a chat template writes them itself
    ids, attention = encode_prompts(tokenizer, ["w5 w6", formatted], policy, 6)
    rows = [row[keep.bool()].tolist() for row, keep in zip(ids, attention, strict=True)]
    assert rows == [[*front, 5, 6], [*(front or [2]), 7]]
    if front:
        assert encode_prompts(tokenizer, [""], policy, 6)[0].tolist() == [front]
    else:
        with pytest.raises(ValueError, match="1 without tokens"):
            encode_prompts(tokenizer, [""], policy, 6)


def test_a_prompt_that_is_a_bos_takes_it_from_no_other(tiny_lm):
    ids, _ = encode_prompts(words("<bos> $A"), ["<bos>", "w5 w6"], ActorCritic(tiny_lm()), 6)
    assert ids[1].tolist() == [2, 5, 6]


def test_ids_that_the_model_does_not_have_are_never_looked_up(tiny_lm, tokenizer):
    """A padding token added without resizing the model pads as any other; in a prompt such a token is named."""
    tokenizer, policy = copy.deepcopy(tokenizer), ActorCritic(tiny_lm())
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= 61 > encode_prompts(tokenizer, ["w5 w6", "w7"], policy, 6)[0].max()
    with pytest.raises(ValueError, match=r"1 with tokens that the model does not have \(first: prompts\[1\]"):
        encode_prompts(tokenizer, ["w5", "w6 [PAD]"], policy, 6)
    with pytest.raises(ValueError) as caught:
        check_prompts(tokenizer, ["w5", "w6 [PAD]"], policy, 6)
    advice = re.search(r"prompts\.filter\((.*)\)$", str(caught.value)).group(1)
    keep = eval(advice, {"tokenizer": tokenizer})
    assert [keep({"prompt": p}) for p in ("w5", "w6 [PAD]")] == [True, False]


def test_a_heads_bias_counts_for_policy_reference_and_loss(tiny_lm, tokenizer):
    lm = tiny_lm("phi")
    lm.lm_head.bias.data.normal_()
    reference, policy = copy.deepcopy(lm), ActorCritic(lm)
    lm.lm_head.bias.data.normal_()
    rollout = sample(policy, tokenizer, ["w5 w6"] * 4)
    for plain, stored in ((lm, rollout.logprobs), (reference, rollout.ref_logprobs)):
        whole = torch.cat([torch.tensor([[5, 6]] * 4), rollout.tokens], 1)
        logp = plain(whole).logits[:, 1:-1].log_softmax(-1).gather(2, rollout.tokens[..., None])[..., 0]
        torch.testing.assert_close(stored[rollout.mask], logp[rollout.mask], rtol=1e-4, atol=1e-4)
    config = TrainConfig()
    step = klq(policy, rollout, make_targets(rollout, config), config)
    torch.testing.assert_close(step.logprobs[rollout.mask], rollout.logprobs[rollout.mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "generation, config, stops",
    [([7, 30], 1, [7, 30]), (7, 1, [7]), (None, [7, 9], [7, 9]), (None, None, [1]), (50256, 50256, [1])],
)
def test_completions_end_where_generate_would_end_them(tiny_lm, tokenizer, generation, config, stops):
    """generation_config, then config, then tokenizer; several ids (Gemma 3, Phi-3); never an id that does not exist."""
    lm = tiny_lm()
    lm.generation_config.eos_token_id, lm.config.eos_token_id = generation, config
    rollout = sample(ActorCritic(lm), tokenizer, PROMPTS * 60, steps=20)
    stop = torch.isin(rollout.tokens, torch.tensor(stops)) & rollout.mask
    assert torch.equal(stop.any(1), rollout.ended) and rollout.ended.any() and not rollout.ended.all()
    assert (stop.sum(1) <= 1).all() and (rollout.mask.sum(1)[~rollout.ended] == 20).all()
    last = rollout.mask.sum(1, keepdim=True) - 1
    assert torch.equal(stop.gather(1, last)[:, 0], rollout.ended)
    assert set(rollout.tokens[stop].tolist()) == set(stops)


def test_an_end_that_a_pruned_vocabulary_lacks_is_looked_for_elsewhere(tiny_lm, tokenizer):
    lm = tiny_lm()
    lm.generation_config.eos_token_id = [50]
    policy = ActorCritic(lm, trainable_blocks=1, vocab=torch.tensor([1]))
    assert sample(policy, tokenizer, steps=9).tokens.tolist() == [[1], [1], [1]]


def test_ids_beyond_the_tokenizer_are_sampled_decode_to_nothing_and_are_marked(tiny_lm, tokenizer):
    rollout = sample(ActorCritic(tiny_lm(vocab=80)), tokenizer, PROMPTS * 60, steps=20)
    beyond = rollout.tokens > 60
    assert torch.equal(rollout.unknown, beyond & rollout.mask) and rollout.unknown.any()
    assert (beyond & ~rollout.mask).any()  # there were some to be left out
    shown = (rollout.tokens != 1) & rollout.mask & ~rollout.unknown
    assert [len(text.split()) for text in rollout.completions] == shown.sum(1).tolist()


def test_a_tokenizer_written_in_python_survives_ids_beyond_it(tiny_lm):
    """ByT5's raises for them; like T5's it ends a text, which no prompt may be."""
    rollout = sample(ActorCritic(tiny_lm(vocab=800)), ByT5Tokenizer(), ["a", "bc"], steps=20)
    assert rollout.unknown.any() and rollout.input_ids[:, :2].tolist() == [[0, 100], [101, 102]]
