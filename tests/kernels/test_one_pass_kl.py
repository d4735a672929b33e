"""The triton kernels' statistics in one visit: a KL of any size, however the logits fall into tiles and splits.

Against float64. What is tested is the arithmetic of `device.py`: the pivot, how tiles are joined, base 2.
"""

import math

import pytest
import torch

pytest.importorskip("triton")

from klq_kernels import lambda_returns, token_stats, triton_logits
from klq_kernels.types import Residuals

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy warns of inf − inf in lanes that are then masked
    pytest.mark.skipif(torch.cuda.is_available(), reason="made for the interpreter: on a GPU there is tests/gpu"),
]
INF, NAN = float("inf"), float("nan")
VOCAB = 200
KLS = (1e-8, 1e-6, 1e-4, 0.04, 0.06, 3.0)
OFFSETS = ((0, 0), (1000, 1000), (-1000, 1000), (1000, 0), (0, -1000), (-300, -300), (-300, 0))


@pytest.fixture
def tiles(monkeypatch):
    """A function that sets the tile's width and the number of programs that a vocabulary is split for."""

    def choose(block=64, programs=1):
        monkeypatch.setattr(triton_logits, "STATS_BLOCK", block)
        monkeypatch.setattr(triton_logits, "ROWS_PER_SPLIT", programs)

    choose()
    return choose


def draw(kl, temperature):
    """Logits [7, VOCAB] of a policy and of a reference that far from it, with offsets of its own in each row."""
    rows = len(OFFSETS)
    z = 3 * temperature * torch.randn(rows, VOCAB, dtype=torch.float64)
    step = temperature * math.sqrt(2 * kl) * (2 if kl == 3.0 else 1)
    r = z + step * torch.randn(rows, VOCAB, dtype=torch.float64)
    own, other = torch.tensor(OFFSETS).T[..., None]
    return (z + own).float(), (r + other).float()


def exact_kl(z, r, temperature=1.0):
    """Σ p log(p/q) + q − p in float64: Bregman's sum, without cancellation."""
    logp, logq = (x.double().div(temperature).log_softmax(-1) for x in (z, r))
    p, q = logp.exp(), logq.exp()
    d = torch.where(p > 0, logp - logq, 0.0)
    return torch.where(d.abs() < 1, p * (torch.expm1(-d) + d) + torch.where(p > 0, 0.0, q), q - p + p * d).sum(-1)


def kl_of(z, r, temperature=1.0):
    tokens = torch.zeros(len(z), dtype=torch.long)
    return token_stats(z, tokens, r, temperature=temperature, backend="triton").kl.double()


def assert_right(z, r, temperature=1.0, rtol=0.01):
    got, want = kl_of(z, r, temperature), exact_kl(z, r, temperature)
    assert (got >= 0).all()
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kl", KLS)
def test_a_kl_of_any_size_at_any_temperature_and_offset(kl, temperature, tiles):
    z, r = draw(kl, temperature)
    want = exact_kl(z, r, temperature)
    assert (want > kl / 8).all() and (want < 8 * max(kl, 1e-7)).all()  # offsets of 1000 round logits by 3e-5
    assert_right(z, r, temperature, rtol=1e-3 if kl < 1e-6 else 2e-5)


@pytest.mark.parametrize("programs", [1, 100])
@pytest.mark.parametrize("block", [16, 32, 128, 256])
def test_tiles_and_splits_of_any_width(block, programs, tiles):
    tiles(block, programs)
    assert triton_logits.vocabulary_splits(programs, 7, VOCAB, block)[0] == (
        1 if programs == 1 else min(15, -(-VOCAB // block))
    )
    assert_right(*draw(1e-8, 1.0), rtol=1e-3)


def by_row(*cases):
    """Columns [7, 1] of these cases' numbers: each row has a case, in turn, and so do several offsets each case."""
    return torch.tensor([cases[i % len(cases)] for i in range(len(OFFSETS))]).T[..., None]


@pytest.mark.parametrize("programs", [1, 100])
@pytest.mark.parametrize("side", ["first", "last"])
def test_a_tile_whose_pivot_says_nothing_about_the_rest(side, programs, tiles):
    """Its tokens have a probability of e^low, and ratios p/q unlike those of all other tokens."""
    tiles(64, programs)
    z, r = draw(1e-8, 1.0)
    low, step = by_row((-14.0, 1.5), (-20.0, 3.0), (-5.0, -0.05))
    tile = slice(0, 64) if side == "first" else slice(VOCAB - 64, VOCAB)
    z[:, tile] += low
    r[:, tile] += low + step
    assert_right(z, r)


@pytest.mark.parametrize("programs", [1, 100])
def test_tokens_that_only_the_reference_gives(programs, tiles):
    """A first tile where p underflows, vanishes in float32, or is 0: all of the KL is its q."""
    tiles(64, programs)
    z, r = draw(1e-8, 1.0)
    low, gap = by_row((-80.0, 12.0), (-200.0, 12.0), (-INF, 12.0), (-80.0, 3.0), (-200.0, 3.0), (-INF, 3.0))
    z[:, :64] += low
    r[:, :64] -= gap
    assert_right(z, r, rtol=1e-4)


def forbidden(where):
    """Row 0: some tokens of the policy; 1: the same of both; 2: others of the reference, where p > 0; 3: the policy's
    first tile; 4: both first tiles; 5: the reference's; 6: all of both but one tile."""
    z, r = where
    z[0, 5:9] = z[1, 60:70] = r[1, 60:70] = r[2, 100:103] = -INF
    z[3, :64] = z[4, :64] = r[4, :64] = r[5, :64] = -INF
    for x in (z, r):
        x[6, :64] = x[6, 128:] = -INF
    return z, r


@pytest.mark.parametrize("kl, block, programs", [(1e-8, 16, 1), (3.0, 64, 1), (1e-8, 64, 100)])
def test_forbidden_tokens(kl, block, programs, tiles):
    """p = 0 < q counts, p > 0 = q is infinite, p = q = 0 is nothing."""
    tiles(block, programs)
    z, r = forbidden(draw(kl, 1.0))
    assert torch.isinf(exact_kl(z, r)).tolist() == [False, False, True, False, False, True, False]
    assert_right(z, r)


@pytest.mark.parametrize("low", [3, 64])
def test_an_infinite_ratio_of_a_token_that_underflows_is_none(low, tiles):
    """Tokens with p = e^(−200), 0 in float32, are forbidden by the reference: they contribute 0, be they a part of a
    tile or all that its running sums hold until the next one."""
    z, r = draw(1e-4, 1.0)
    z[:, :low] -= 200
    r[:, :64] -= 12
    r[:, :3] = -INF
    got = kl_of(z, r)
    z[:, :low] = -INF
    torch.testing.assert_close(got, exact_kl(z, r), rtol=1e-4, atol=0)


def test_no_kl_is_negative_and_that_of_equal_logits_is_zero(tiles):
    z = torch.tensor([1e-3, 1.0, 100.0]).repeat(10)[:, None] * torch.randn(30, 70)
    assert (kl_of(z, z.clone()) == 0).all()
    for step in (1e-7, 1e-5, 1e-3):
        assert (kl_of(z, z + step * torch.randn(30, 70)) >= 0).all()


@pytest.mark.parametrize("what", ["policy", "reference", "both"])
def test_rows_that_are_no_distribution_are_nan(what, tiles):
    z, r = draw(3.0, 1.0)
    if what != "reference":
        z[0] = -INF
    if what != "policy":
        r[0] = -INF
    stats = token_stats(z, torch.zeros(7).long(), r, backend="triton")
    own, other = (stats.logprob, stats.entropy, stats.kl), (stats.ref_logprob, stats.kl)
    assert all(x[0].isnan() and x[1:].isfinite().all() for x in (own if what != "reference" else other))
    z[1, 3], r[2, 3] = NAN, NAN
    assert kl_of(z, r)[:3].isnan().all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kl", [1e-8, 1e-4, 0.06])
def test_the_gradient_of_a_small_kl(kl, temperature, tiles):
    """dKL/dz = p (d − KL)/T with d = log(p/q), to 3e-4 of its norm in each row."""
    z, r = draw(kl, temperature)
    z.requires_grad_()
    token_stats(z, torch.zeros(7).long(), r, temperature=temperature, backend="triton").kl.sum().backward()
    exact = z.detach().double().requires_grad_()
    logp, logq = (exact / temperature).log_softmax(-1), (r.double() / temperature).log_softmax(-1)
    (logp.exp() * (logp - logq)).sum().backward()
    assert ((z.grad - exact.grad).norm(dim=1) < 3e-4 * exact.grad.norm(dim=1)).all()


def test_log_probs_are_at_most_0(tiles):
    """The token's logit may come from a product of its own, which rounds otherwise than the tile's."""
    partials = torch.tensor([20.0, 1.0, 0.0, -3.0, 1.0, 0.0, 0.0, 0.0]).reshape(8, 1, 1).contiguous()
    out, values = Residuals.zeros(torch.zeros(1), torch.float32, True, True), torch.tensor([2.0])
    token, ref_token = torch.tensor([20.00001]), torch.tensor([-4.0])
    places = (1, 5, 1, 0, 0, 0, 0, 1.0)
    triton_logits.merge_partials(
        partials, torch.tensor([0]), torch.tensor([True]), token, ref_token, places, out, values, 0.5, in_rows=False
    )
    assert out.logprob == 0 and out.ref_logprob == -1 and out.q == 0.5 * (0 + 1) + 2


def test_one_split_makes_results_independent_of_the_batch(tiles):
    """With ROWS_PER_SPLIT = 1 a row's statistics are the same bits in a batch of any size."""
    z, r = draw(1e-4, 1.0)

    def differ():
        alone = token_stats(z[:1], torch.zeros(1).long(), r[:1], backend="triton")
        among = token_stats(z, torch.zeros(7).long(), r, backend="triton")
        return any(x != y[0] for x, y in zip(alone, among))

    tiles(64, 4)
    assert differ()
    tiles(64, 1)
    assert not differ()


class Spy:
    """A kernel that notes its launches, and whether a device guard was on."""

    def __init__(self, kernel, notes, guards):
        self.kernel, self.notes, self.guards = kernel, notes, guards

    def __getitem__(self, grid):
        self.notes.append(list(self.guards))
        return self.kernel[grid]


def test_every_launch_is_guarded_and_nothing_is_launched_twice(tiles, monkeypatch):
    """Two kernels for statistics, one for a gradient, one for λ-returns, which writes every entry of its outputs."""
    guards, notes = [], []

    class Guard:
        def __init__(self, x):
            self.x = x

        def __enter__(self):
            guards.append(self.x.shape)

        def __exit__(self, *_):
            guards.pop()

    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for name in ("stats_kernel", "merge_kernel", "grad_kernel", "returns_kernel"):
        monkeypatch.setattr(triton_logits, name, Spy(getattr(triton_logits, name), notes, guards))
    z, r = draw(1e-4, 1.0)
    token_stats(z.requires_grad_(), torch.zeros(7).long(), r, backend="triton").kl.sum().backward()
    assert notes == [[z.shape]] * 3
    x, mask = torch.randn(3, 9), torch.arange(9) < torch.tensor([[9], [4], [0]])
    want = lambda_returns(x, x, x, x, mask, tau=0.1, backend="torch")
    monkeypatch.setattr(torch, "empty", lambda *shape, **kind: torch.full(*shape, NAN, **kind))
    got = lambda_returns(x, x, x, x, mask, tau=0.1, backend="triton")
    assert notes[3:] == [[mask.shape]]
    torch.testing.assert_close(tuple(got), tuple(want))
