"""Shared by all tests: two threads, fixed seeds, one hypothesis profile."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("klq", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("klq")


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
