"""How often each operation launches a kernel: kernels/README.md's table of launches is counted here."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import klq_kernels as k
from klq_kernels import triton_linear, triton_logits

README = Path(__file__).parents[2] / "kernels" / "README.md"
N, V, H, T = 6, 40, 16, 3
KERNELS = [(m, name) for m in (triton_logits, triton_linear) for name in vars(m) if name.endswith("_kernel")]


class Counted:
    """A kernel that notes its launches."""

    def __init__(self, kernel, name, launches):
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name.removesuffix("_kernel"))
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch):
    found = []
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, Counted(getattr(module, name), name, found))
    return found


def operations() -> dict:
    """Operation -> a call of it, forward and backward, on the Triton backend."""
    g = torch.Generator().manual_seed(0)
    shapes = ((N, V), (N, H), (V, H))
    tokens, mask = torch.randint(V, (N,), generator=g), torch.arange(N) % 3 != 1
    z, hidden, weight = (torch.randn(shape, generator=g).requires_grad_() for shape in shapes)
    ref_z, ref_hidden, ref_weight, values, targets = (torch.randn(s, generator=g) for s in (*shapes, (N,), (N,)))
    head, rest, on = (hidden, weight, tokens), (values, targets, mask), dict(backend="triton")
    rows, right = [torch.randn(N // T, T, generator=g) for _ in range(4)], torch.ones(N // T, T, dtype=torch.bool)
    ref, q = (ref_hidden, ref_weight), dict(tau=0.1, mask=mask, **on)
    return {
        "token_stats": lambda: _total(k.token_stats(z, tokens, ref_z, mask=mask, **on)),
        "token_q": lambda: k.token_q(z, tokens, ref_z, values, **q)[1].sum(),
        "linear_token_stats": lambda: _total(k.linear_token_stats(*head, *ref, mask=mask, **on)),
        "linear_token_q": lambda: k.linear_token_q(*head, *ref, values, **q)[1].sum(),
        "lambda_returns": lambda: k.lambda_returns(*rows, right, tau=0.1, **on).targets.sum(),
        "logits_klq_loss": lambda: k.logits_klq_loss(z, tokens, -values.abs(), *rest, tau=0.1, **on),
        "linear_klq_loss": lambda: k.linear_klq_loss(*head, -values.abs(), *rest, tau=0.1, **on),
        "linear_klq_loss, reference": lambda: k.linear_klq_loss(
            *head, None, *rest, tau=0.1, ref_hidden=ref_hidden, ref_weight=ref_weight, **on
        ),
    }  # fmt: skip


def _total(stats: k.TokenStats) -> torch.Tensor:
    return (stats.logprob + stats.entropy + stats.kl).sum()


def documented() -> dict[str, tuple[list[str], list[str]]]:
    """Operation -> kernels of its forward and of its backward pass, as the README lists them."""
    rows = re.findall(r"^\| `([^|]+)` \| ([^|]*) \| ([^|]*) \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (re.findall(r"\w+", forward), re.findall(r"\w+", backward)) for name, forward, backward in rows}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", operations())
def test_the_readme_lists_the_launches(name, launches):
    out = operations()[name]()
    forward = list(launches)
    launches.clear()
    if out.requires_grad:
        out.backward()
    expected = documented()[name]
    assert (forward, launches) == expected


def test_every_kernel_is_in_the_table():
    listed = {kernel for both in (documented()[name] for name in operations()) for part in both for kernel in part}
    assert listed == {name.removesuffix("_kernel") for _, name in KERNELS}
