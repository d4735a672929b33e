"""Shared by all tests: one thread (pytest-xdist runs two workers), fixed seeds, tiny models of several families."""

import os

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported

torch.set_num_threads(1)
settings.register_profile("klq", deadline=None, derandomize=True, max_examples=40)
settings.register_profile("rare", deadline=None, max_examples=1000)  # make check-all: new examples each time
settings.load_profile("klq")


def pytest_collection_modifyitems(items):
    """The longest files first, lest one of two workers waits for the other at the end."""
    items.sort(key=lambda item: item.path.parent.name != "worlds" and item.path.name != "test_cli.py")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_policy():
    """A function: (tree, seed) -> a policy [S, V] with full support on the tokens the tree allows."""

    def draw(tree, seed):
        rng = torch.Generator().manual_seed(seed)
        logits = torch.randn(tree.ref.shape, generator=rng, dtype=torch.float64)
        return logits.masked_fill(tree.ref == 0, -torch.inf).softmax(-1)

    return draw


FAMILIES = {
    "llama": ("LlamaConfig", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 3}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "gpt2": ("GPT2Config", {}),
    "phi": ("PhiConfig", {}),
}


@pytest.fixture(scope="session")
def tiny_lm():
    """A function: (family, seed) -> a random three-block causal LM with a vocabulary of 61 tokens, not near-uniform."""
    import transformers

    def build(family="llama", seed=0, vocab=61):
        name, extra = FAMILIES[family]
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
        if family != "gpt2":
            sizes["intermediate_size"] = 48
        config = getattr(transformers, name)(
            vocab_size=vocab, bos_token_id=None, eos_token_id=1, pad_token_id=1, **(sizes | extra)
        )
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.mul_(3.0)  # initial weights are so small that every distribution is nearly uniform
        return model.eval()

    return build


@pytest.fixture(scope="session")
def tokenizer():
    """One token per word w2 … w60; token 1 is both EOS and padding, as in many real models."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *(f"w{i}" for i in range(2, 61))]
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="session")
def grammar():
    """The grammar world (its reference is trained on first use and cached)."""
    from klq_edu.worlds import load

    return load("grammar")
