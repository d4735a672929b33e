"""A two-layer GPT-2 of about 100,000 parameters, trained on a small grammar, learns to please a lexicon.

A completion is [adjective] noun verb, ended by an adverb or a full stop; people and things take different verbs.
Decoding is restricted to the grammar, for policy and reference alike, so enumerating it is enumerating the model: the
optimum J* and every policy's objective J = E[reward] − τ KL are exact. The reward is what a lexicon says of the words
and their neighbours, plus a taste of each prompt for each sentence: no sentence is the best after all prompts. Rewards
have mean 0 and standard deviation 1 under the reference.
"""

import random
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from klq_edu.core.tree import ENDS, TokenTree
from klq_edu.machine import threads
from klq_edu.rlhf.config import TrainConfig
from klq_edu.rlhf.identity import fingerprint
from klq_edu.rlhf.policy import ActorCritic
from klq_edu.rlhf.rollout import encode_prompts
from klq_edu.rlhf.sampling import Decoder
from klq_edu.worlds.weights import cached_folder
from klq_edu.worlds.world import World

PROMPTS = tuple(f"{time} the" for time in (
    "at dawn", "at noon", "at dusk", "at night", "in spring", "in summer", "in autumn", "in winter", "by moonlight",
    "by starlight", "after rain", "before sunrise", "one day", "one morning", "long ago", "far away",
))  # fmt: skip
ADJECTIVES = ("kind", "old", "quiet", "proud", "cruel", "lost")
PEOPLE = ("queen", "baker", "sailor", "thief", "child", "soldier")
THINGS = ("river", "candle", "garden", "tower", "storm", "ship")
DEEDS = ("smiles", "sings", "helps", "waits", "lies", "weeps")
EVENTS = ("shines", "grows", "rests", "falls", "burns", "breaks")
ADVERBS = ("gently", "bravely", "again", "alone", "slowly", "bitterly", "together", "forever")
END = "."
FIRST = ADJECTIVES + PEOPLE + THINGS
LAST = (*ADVERBS, END)  # each of them ends a completion
AFTER = {ADJECTIVES: PEOPLE + THINGS, PEOPLE: DEEDS, THINGS: EVENTS, DEEDS + EVENTS: LAST, LAST: ()}
LONGEST = 4
# Tastes are of words, so that they can be learnt: were each sentence's a number of its own, one would have to try it.
TASTE = 0.4  # standard deviation of a prompt's taste for a sentence, where the lexicon's is 1 …
PROXY = 0.593  # … and of a proxy's error, where the reward's is 1: they correlate by 1/√(1 + 0.593²) = 0.86
PAD = "<pad>"
VOCABULARY = (PAD, END, *dict.fromkeys(" ".join(PROMPTS).split()))
VOCABULARY += ADJECTIVES + PEOPLE + THINGS + DEEDS + EVENTS + ADVERBS
IDS = {word: i for i, word in enumerate(VOCABULARY)}

# The reward: what each word is worth, and what some pairs of neighbours add. It scores prefixes as they grow.
LEXICON = {
    "kind": 1.0, "proud": 0.2, "quiet": 0.4, "cruel": -1.2, "lost": -0.8,
    "queen": 0.3, "baker": 0.4, "child": 0.6, "thief": -0.9, "soldier": -0.3,
    "garden": 0.7, "candle": 0.5, "river": 0.3, "storm": -0.8, "tower": -0.2,
    "smiles": 1.0, "sings": 0.8, "helps": 1.2, "lies": -1.1, "weeps": -0.9,
    "shines": 0.9, "grows": 0.8, "rests": 0.4, "falls": -0.7, "burns": -0.9, "breaks": -1.0,
    "gently": 0.6, "bravely": 0.8, "together": 0.9, "alone": -0.6, "bitterly": -1.0, "forever": 0.3,
}  # fmt: skip
PAIRS = {
    "old thief": 1.5, "lost child": -1.0, "cruel storm": -0.5, "quiet garden": 0.8, "thief helps": 2.0,
    "queen lies": -0.8, "child sings": 0.7, "candle shines": 0.6, "storm rests": 1.8, "soldier weeps": 0.9,
    "sailor waits": 0.5, "tower burns": -0.7, "helps alone": 0.8, "sings together": 0.9, "falls gently": 1.1,
    "smiles bitterly": -0.8, "grows slowly": 0.5, "waits forever": -0.6,
}  # fmt: skip

METRICS = {
    "J": "exact objective E[R] − τ KL of the policy, by enumeration of the grammar",
    "attained": "exact (J − J(π_b)) / (J* − J(π_b)): 0 at the reference, 1 at the optimum",
    "kl_optimum": "exact KL(π ‖ π*) = (J* − J)/τ in nats: how far the policy is from the optimum",
    "mode_mass": "exact probability of the sentence that π* likes best, mean over prompts",
    "exact_reward": "exact E[R] (standardised: mean 0, standard deviation 1 under the reference)",
    "exact_kl": "exact KL(π ‖ π_b) over completions, in nats",
}


def successors(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words that may follow a partial completion, or a prompt: the last word decides.

    >>> successors(("kind", "river"))
    ('shines', 'grows', 'rests', 'falls', 'burns', 'breaks')
    """
    return next((after for kind, after in AFTER.items() if words and words[-1] in kind), FIRST)


def raw_score(words: tuple[str, ...]) -> float:
    """Lexicon value of a completion, before standardising (a prompt before it counts nothing).

    >>> round(raw_score(("old", "thief", "helps", ".")), 2)
    3.8
    """
    return sum(LEXICON.get(w, 0.0) for w in words) + sum(PAIRS.get(" ".join(p), 0.0) for p in pairwise(words))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, <pad> and the full stop (which ends a completion) included."""
    model = Tokenizer(models.WordLevel(IDS, unk_token=PAD))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=END, pad_token=PAD)


def words_of(ids: tuple[int, ...]) -> tuple[str, ...]:
    """The words of a prefix or completion."""
    return tuple(VOCABULARY[i] for i in ids)


def build_tree() -> TokenTree:
    """The grammar as a TokenTree, with a uniform reference and raw rewards to be replaced later."""

    def uniform(prefix):
        allowed = torch.tensor([IDS[w] for w in successors(words_of(prefix))])
        return torch.zeros(len(IDS), dtype=torch.float64).index_fill(0, allowed, 1 / len(allowed))

    prompts = tuple(tuple(IDS[w] for w in p.split()) for p in PROMPTS)
    ends = [IDS[w] for w in LAST]
    return TokenTree.grow(len(IDS), LONGEST, uniform, lambda prefix: raw_score(words_of(prefix)), ends, prompts)


class GrammarRule:
    """The grammar as a decoding constraint: the state is the tree's, the allowed tokens its children."""

    def __init__(self, tree: TokenTree):
        self.children, self.possible = tree.children, tree.ref > 0
        self.roots = dict(zip(PROMPTS, tree.roots.tolist(), strict=True))

    def start(self, prompts: list[str]) -> Tensor:
        """The root of each prompt; ValueError for a prompt that is not the grammar's."""
        if unknown := set(prompts) - set(PROMPTS):
            raise ValueError(f"prompts must be among {PROMPTS} in the grammar world, got {min(unknown)!r}")
        return torch.tensor([self.roots[p] for p in prompts])

    def allowed(self, state: Tensor) -> Tensor:
        """[B, V]; after the end everything is allowed, since it is masked."""
        return self.possible[state] | (state == ENDS).unsqueeze(1)

    def advance(self, state: Tensor, tokens: Tensor) -> Tensor:
        """The child states; finished rows stay finished."""
        return torch.where(state == ENDS, ENDS, self.children[state, tokens])


@torch.no_grad()
def policy_table(tree: TokenTree, tokenizer, policy: ActorCritic) -> Tensor:
    """The policy as a table [S, V], float64, zero off the grammar: level by level, each state read once."""
    decode, table, level = Decoder(policy), torch.zeros_like(tree.ref), tree.roots
    ids, attention = encode_prompts(tokenizer, PROMPTS, policy, 0)
    while len(level):
        logits = decode(ids, attention).cpu().double()
        table[level] = logits.masked_fill(tree.ref[level] == 0, -torch.inf).softmax(-1)
        parents, tokens = (tree.children[level] != ENDS).nonzero(as_tuple=True)
        level = tree.children[level][parents, tokens]
        decode.keep(parents.to(policy.device))
        ids = tokens.to(policy.device).unsqueeze(1)
        attention = torch.cat([attention[parents], torch.ones_like(ids)], dim=1)
    return table


def corpus(size: int, seed: int) -> list[str]:
    """Random sentences in which each prompt prefers some words: what the reference model is trained on."""
    rng = random.Random(seed)
    taste = {p: {w: rng.lognormvariate(0, 0.7) for w in (*LEXICON, *ADJECTIVES, *LAST)} for p in PROMPTS}
    sentences = []
    for _ in range(size):
        prompt = rng.choice(PROMPTS)
        words = prompt.split()
        while words[-1] not in LAST:
            options = successors(tuple(words))
            words += rng.choices(options, [taste[prompt].get(w, 1.0) for w in options])
        sentences.append(" ".join(words))
    return sentences


def pretrain(tokenizer, folder: Path, *, steps: int = 300, batch: int = 128, seed: int = 0) -> None:
    """Train the reference, a two-layer GPT-2 of about 100,000 parameters, from scratch and save it."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=None,
        eos_token_id=[IDS[w] for w in LAST], pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # transformers derives it from the class name, and fails with a warning
    sentences = corpus(20_000, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for step in range(steps):
        rows = [sentences[(step * batch + i) % len(sentences)] for i in range(batch)]
        data = tokenizer(rows, padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
        model(**data, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def standardise(tree: TokenTree) -> TokenTree:
    """The tree with terminal rewards shifted and scaled to mean 0 and standard deviation 1 under its reference."""
    weights, scores = tree.sequence_distribution(tree.ref), tree.rewards[tree.leaves]
    centred = scores - (weights * scores).sum()
    return with_scores(tree, centred / (weights * centred**2).sum().sqrt())


def with_scores(tree: TokenTree, scores: Tensor) -> TokenTree:
    """The tree with these scores of its completions, in their order."""
    return replace(tree, rewards=tree.rewards.index_put(tree.leaves, scores))


def with_tastes(tree: TokenTree, scale: float, seed: int) -> TokenTree:
    """The tree's rewards plus `scale` times a taste, standardised: each prompt likes each word by a number from
    N(0, 1), and a completion by the sum over its words, standardised."""
    width = len(tree.prefixes[0])
    taste = torch.randn(len(tree.roots), len(IDS), generator=torch.Generator().manual_seed(seed)).tolist()
    owners = prompt_of(tree).tolist()
    liked = [sum(taste[i][token] for token in c[width:]) for i, c in zip(owners, tree.completions(), strict=True)]
    trees = tree, with_scores(tree, torch.tensor(liked, dtype=torch.float64))
    scores, tastes = (standardise(x).rewards[tree.leaves] for x in trees)
    return standardise(with_scores(tree, scores + scale * tastes))


def lexicon_reward(tree: TokenTree, identity: str):
    """Reward f(prompts, completions): the score in the tree of each completion, with or without its full stop;
    ValueError for a text that the grammar does not have."""
    texts = (" ".join(words_of(c)).removesuffix(f" {END}") for c in tree.completions())
    scores = dict(zip(texts, tree.rewards[tree.leaves].tolist(), strict=True))

    def lexicon(prompts, completions, **_):
        words = [f"{p} {c.strip().removesuffix(END)}".split() for p, c in zip(prompts, completions, strict=True)]
        texts = [" ".join(w) for w in words]
        if unknown := [text for text in texts if text not in scores]:
            rule = f"a completion must be a sentence of the grammar after one of {PROMPTS}"
            raise ValueError(f"{rule}, got {unknown[0]!r}")
        return [scores[text] for text in texts]

    lexicon.identity = identity  # the scores' last digits differ between machines
    return lexicon


def prompt_of(tree: TokenTree) -> Tensor:
    """The prompt's number for each completion, in their order."""
    numbers, width = {tree.prefixes[r]: i for i, r in enumerate(tree.roots)}, len(tree.prefixes[0])
    return torch.tensor([numbers[c[:width]] for c in tree.completions()])


def modes(tree: TokenTree, tau: float) -> list[int]:
    """For each prompt, in order, the completion that π* likes best, as an index into `completions()`."""
    rising = tree.sequence_distribution(tree.optimum(tau)[2]).argsort()
    best = dict(zip(prompt_of(tree)[rising].tolist(), rising.tolist()))  # the last of a prompt's counts
    return [best[prompt] for prompt in range(len(tree.roots))]


def exact_metrics(tree: TokenTree, tokenizer, tau: float):
    """A function of the policy: METRICS, by enumeration."""
    best, start = tree.optimum(tau)[1][tree.roots].mean().item(), tree.objective(tree.ref, tau).item()
    liked = modes(tree, tau)

    def measure(policy: ActorCritic) -> dict[str, float]:
        table = policy_table(tree, tokenizer, policy)
        reward, kl = tree.expected_reward(table).item(), tree.sequence_kl(table).item()
        j = reward - tau * kl
        mass = tree.sequence_distribution(table)[liked].sum().item()
        return {
            "J": j, "attained": (j - start) / (best - start), "kl_optimum": (best - j) / tau, "mode_mass": mass,
            "exact_reward": reward, "exact_kl": kl,
        }  # fmt: skip

    return measure


def win_rate(tree: TokenTree, first: Tensor, second: Tensor) -> float:
    """Exact probability that a completion of the first policy's has more reward than one of the second's to the same
    prompt, ties counted by half: tables [S, V] -> a number in [0, 1], uniformly over prompts."""
    owner, scores = prompt_of(tree), tree.rewards[tree.leaves]
    first, second = (tree.sequence_distribution(p) * len(tree.roots) for p in (first, second))
    rate = 0.0
    for prompt in owner.unique():
        here = owner == prompt
        values, place = scores[here].unique(return_inverse=True)  # in rising order
        mine, theirs = (torch.zeros_like(values).index_add(0, place, p[here]) for p in (first, second))
        rate += (mine * (theirs.cumsum(0) - theirs / 2)).sum().item()
    return rate / len(tree.roots)


@lru_cache(maxsize=2)
def load(seed: int = 0, proxy: bool = False) -> World:
    """The grammar world; the first call trains the reference (a few seconds on a CPU) and caches it. With `proxy` other
    tastes are added to the rewards that are trained on, and the judge is the true reward."""
    tokenizer = build_tokenizer()
    version = fingerprint([pretrain, raw_score, with_tastes, TASTE, PROXY])[:8]  # other code, another reference
    with threads(1):  # fast for so small a model, and the same weights whatever the number of cores
        folder = cached_folder(f"grammar-{version}-seed{seed}", lambda path: pretrain(tokenizer, path, seed=seed))
    tree = build_tree()
    tree = tree.with_ref(policy_table(tree, tokenizer, ActorCritic.from_pretrained(folder)))
    truth = with_tastes(tree, TASTE, seed)
    tree = with_tastes(truth, PROXY, seed + 1) if proxy else truth
    judge = {"judges": {"true reward": lexicon_reward(truth, folder.name)}, "truth": truth}

    def make_policy(config: TrainConfig) -> ActorCritic:
        if config.temperature != 1:
            raise ValueError(f"temperature must be 1 in the grammar world, got {config.temperature}")
        if config.max_new_tokens < LONGEST:
            raise ValueError(f"max_new_tokens must be >= {LONGEST} in the grammar world, got {config.max_new_tokens}")
        return ActorCritic.from_pretrained(folder, critic=config.critic)

    prompts = Dataset.from_dict({"prompt": list(PROMPTS)})
    return World(
        "grammar", __doc__, prompts, prompts, tokenizer, lexicon_reward(tree, folder.name + "-proxy" * proxy),
        make_policy, GrammarRule(tree), tree, lambda config: exact_metrics(tree, tokenizer, config.tau), METRICS,
        threads=1, **(judge if proxy else {}),
    )  # fmt: skip
