"""Preferences: Bradley and Terry's likelihood against a float64 oracle, labels' noise, what a reward model learns."""

import math

import pytest
import torch
import transformers
from datasets import Dataset

from klq_edu.rlhf.preference import (
    RewardModel,
    bradley_terry_loss,
    margins,
    preference_pairs,
)
from klq_edu.rlhf.reading import Reader
from klq_edu.rlhf.rewards import ClassifierReward, score
from klq_edu.rlhf.rollout import collect


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_loss_is_the_log_likelihood_without_overflow(dtype):
    chosen = torch.tensor([0.0, 3.0, -3.0, 30.0, -30.0, 1e4, -1e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([0.0, 1.0, 1.0, -25.0, 25.0, -1e4, 1e4], dtype=dtype, requires_grad=True)
    gaps = [x - y for x, y in zip(chosen.tolist(), rejected.tolist())]
    oracle = [math.log1p(math.exp(-g)) if g > -700 else -g for g in gaps]
    loss = bradley_terry_loss(chosen, rejected)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert loss.item() == pytest.approx(sum(oracle) / 7, rel=tolerance)
    alone = bradley_terry_loss(chosen[3:4], rejected[3:4]).item()  # e^-55: lost where 1 + x is rounded
    assert alone == pytest.approx(math.exp(-55), rel=max(tolerance, 1e-5))
    loss.backward()
    expected = torch.tensor([-1 / (1 + math.exp(g)) / 7 if g < 700 else 0.0 for g in gaps], dtype=dtype)
    torch.testing.assert_close(chosen.grad, expected, rtol=10 * tolerance, atol=0)
    torch.testing.assert_close(rejected.grad, -chosen.grad)


@pytest.mark.parametrize("shapes", [((2,), (3,)), ((2, 1), (2,)), ((0,), (0,))])
def test_scores_that_do_not_pair_up_are_refused(shapes):
    with pytest.raises(ValueError, match="of one shape and not empty"):
        bradley_terry_loss(*map(torch.zeros, shapes))


def test_labels_are_wrong_as_often_as_their_scale_says():
    texts, scores = [["a", "b"]] * 4000, [[0.0, 1.0], [1.5, 0.5]] * 2000
    pairs = preference_pairs(["p"] * 4000, texts, scores, scale=1.2)
    right = sum(m > 0 for m in pairs["margin"]) / 4000
    assert right == pytest.approx(1 / (1 + math.exp(-1.2)), abs=0.02)  # 3 standard errors
    sure = preference_pairs(["p"] * 4000, texts, scores, scale=1e3)
    assert set(sure["margin"]) == {1.0} and set(sure["chosen"]) == {"a", "b"}
    assert pairs.to_dict() == preference_pairs(["p"] * 4000, texts, scores, scale=1.2).to_dict()
    assert pairs["chosen"][:] != preference_pairs(["p"] * 4000, texts, scores, scale=1.2, seed=1)["chosen"][:]


def test_all_pairs_of_different_completions_are_taken():
    pairs = preference_pairs(
        ["p", "q"], [["a", "a", "b"], ["c", "d", "e"]], [[0.0, 0.0, 1.0], [2.0, 1.0, 0.0]], scale=99
    )
    found = sorted(zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], pairs["margin"]))
    assert found == [("p", "b", "a", 1.0)] * 2 + [("q", "c", "d", 1.0), ("q", "c", "e", 2.0), ("q", "d", "e", 1.0)]
    with pytest.raises(ValueError, match="completions must differ"):
        preference_pairs(["p"], [["a", "a"]], [[0.0, 1.0]], scale=1.0)


PROMPTS = [f"w{2 + i % 7} w{3 + i % 5}" for i in range(40)]


def good(prompts, completions):
    """What the labels are made of: how often w7 occurs."""
    return [float(c.split().count("w7")) for c in completions]


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    draw = lambda: " ".join(f"w{i}" for i in torch.randint(5, 12, (5,), generator=generator).tolist())  # noqa: E731
    texts = [[draw() for _ in range(4)] for _ in PROMPTS]
    return preference_pairs(PROMPTS, texts, [good([], t) for t in texts], scale=2.0)


def split(pairs):
    """Pairs to learn from and others, of other prompts."""
    unseen = set(PROMPTS[:10])
    return (pairs.filter(lambda row, keep=keep: (row["prompt"] in unseen) is keep) for keep in (False, True))


def test_a_reward_model_learns_what_the_labels_are_made_of(tiny_lm, tokenizer, pairs):
    known, unseen = split(pairs)
    torch.manual_seed(0)
    model = RewardModel(Reader(tiny_lm(), tokenizer, layers=(1, 3)))
    before = model.identity
    losses = model.fit(known, ridge=0.01)
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.5 and model.identity != before
    sure = unseen.filter(lambda row: abs(row["margin"]) >= 1)
    labels, learnt = ([m > 0 for m in margins(reward, sure)] for reward in (good, model))
    assert sum(labels) / len(sure) > 0.8 and sum(learnt) / len(sure) > 0.7
    policy = collect_policy(tiny_lm())
    rollout = collect(policy, tokenizer, PROMPTS[:3], max_new_tokens=4)
    scores = score(model, rollout, reference=["x"] * 3)
    torch.testing.assert_close(scores, torch.tensor(model(rollout.prompts, rollout.completions)))


def collect_policy(lm):
    from klq_edu.rlhf.policy import ActorCritic

    return ActorCritic(lm, trainable_blocks=1)


def test_a_reward_model_learns_what_length_is_liked_whatever_the_ridge_on_hidden_states(tiny_lm, tokenizer):
    """Three words are better than one or five: no mean over tokens shows it, nor does any line in length."""
    liked = lambda prompts, texts: [-abs(len(t.split()) - 3.0) for t in texts]  # noqa: E731
    texts = [[" ".join([f"w{2 + (i + k) % 9}"] * n) for k, n in enumerate((1, 3, 5))] for i in range(len(PROMPTS))]
    known, unseen = split(preference_pairs(PROMPTS, texts, [liked([], t) for t in texts], scale=3.0))
    model = RewardModel(Reader(tiny_lm(), tokenizer, layers=(1, 3)))
    model.fit(known, ridge=3.0)
    sure = unseen.filter(lambda row: row["margin"] > 0)
    pairs = sure.filter(lambda row: len(row["chosen"].split()) == 3)
    assert len(pairs) > 10 and sum(m > 0 for m in margins(model, pairs)) / len(pairs) > 0.95


def test_the_fit_is_the_minimum_of_the_penalised_likelihood(tiny_lm, tokenizer, pairs):
    model = RewardModel(Reader(tiny_lm(), tokenizer, layers=(2,)))
    model.fit(pairs, ridge=0.1)
    chosen, rejected = (model.features(pairs["prompt"][:], pairs[side][:]) for side in ("chosen", "rejected"))
    weight = model.head.weight.detach().double().requires_grad_()
    gap = (chosen - rejected).double() @ weight.squeeze()
    (torch.log1p(torch.exp(-gap)).mean() + 0.05 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-4


def test_a_reader_sees_each_text_as_if_it_were_alone(tiny_lm, tokenizer):
    lm = tiny_lm()
    prompts = ["w2 w3 w4 w5 w6", "w9", "w7 w8", "w9", "w9"]
    completions = ["w3", "w4 w5 w6 w7", "", "w5", "w4 w6"]
    found = Reader(lm, tokenizer, batch_size=4, layers=(1, 2))(prompts, completions)
    alone = lm.double()
    for i, (front, back) in enumerate(zip(prompts, completions)):
        front, back = tokenizer(front)["input_ids"], tokenizer(back)["input_ids"] or [tokenizer.eos_token_id]
        out = alone(torch.tensor([front + back]), output_hidden_states=True)
        logp = out.logits[0].log_softmax(-1)[len(front) - 1 : -1].gather(1, torch.tensor([back]).T).mean()
        means = torch.cat([out.hidden_states[k][0, len(front) :].mean(0) for k in (1, 2)])
        assert found.logprob[i].item() == pytest.approx(logp.item(), rel=1e-4) and found.length[i] == len(back)
        torch.testing.assert_close(found.means[i].double(), means, rtol=1e-3, atol=1e-4)


def test_what_a_reader_says_does_not_depend_on_what_it_has_read(tiny_lm, tokenizer, monkeypatch):
    reader, read = Reader(tiny_lm(), tokenizer, layers=(1,)), []
    inner = reader._read
    monkeypatch.setattr(reader, "_read", lambda front, *rest: read.append(len(front)) or inner(front, *rest))
    prompts, texts = ["w2", "w3", "w2"], ["w4", "w5", "w4"]
    first = reader(prompts, texts)
    assert read == [2] and torch.equal(first.means[0], first.means[2])
    assert reader(prompts, texts) is first and read == [2]  # the same question once more
    reader(prompts[:1], texts[:1])
    assert torch.equal(reader(prompts, texts).means, first.means) and read == [2, 1, 2]  # the same batches again
    with reader.remembering():
        reader(prompts[:2], texts[:2])
        again = reader(prompts[::-1], texts[::-1])
        assert read == [2, 1, 2, 2] and torch.equal(first.means, again.means.flip(0))
        reader(prompts[:2], texts[:2])
    reader(prompts[:2], texts[:2])
    assert read == [2, 1, 2, 2, 2]  # what was read in that context is not taken for an answer outside it
    changed = list(texts)
    reader(prompts, changed)
    changed[0] = "w9"  # a list that is asked about again with other contents
    assert reader(prompts, changed).means[0].ne(first.means[0]).any()


def test_texts_that_can_not_be_read_are_named(tiny_lm, tokenizer):
    with pytest.raises(
        ValueError, match=r"prompts need tokens, and at most 64 with their completion, got '' with 'w3'"
    ):
        Reader(tiny_lm(), tokenizer)(["w2", ""], ["w2", "w3"])
    with pytest.raises(ValueError, match="at most 64 with their completion"):
        Reader(tiny_lm(), tokenizer)(["w2"], [" ".join(["w3"] * 64)])


@pytest.fixture
def classifier():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=61, num_labels=1, pad_token_id=1, max_position_embeddings=16, **sizes)
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def test_a_classifier_scores_prompt_and_completion_in_its_own_words(classifier, tokenizer):
    reward = ClassifierReward(classifier, tokenizer, template=lambda p, c: f"w50 {p} w51 {c}", batch_size=2)
    got = reward(["w2 w3", "w4", "w2"], ["w5", "w6 w7 w8", " ".join(["w9"] * 30)], reference=["x"] * 3)
    whole = ["w50 w2 w3 w51 w5", "w50 w4 w51 w6 w7 w8", " ".join(["w9"] * 16)]  # the last is cut off in front
    for text, value in zip(whole, got, strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert classifier(ids).logits[0, 0].item() == pytest.approx(value, abs=1e-5)
    assert reward.identity.startswith("LlamaForSequenceClassification ")


def test_margins_are_of_chosen_less_rejected():
    pairs = Dataset.from_dict({"prompt": ["p"] * 3, "chosen": ["aa", "b", "c"], "rejected": ["b", "bb", "d"]})
    assert margins(lambda prompts, texts: [len(t) for t in texts], pairs) == [1, -1, 0]
