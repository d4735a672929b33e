"""Statistics from hidden states by the Triton kernel alone: tiles, splits, groups of row tiles, descriptors and
pointers, the token's own product, masks and extremes, against float64.

`test_backends` asks the public operations; here one launch has several groups of row tiles, several splits of the
vocabulary and ragged ends of everything, which default tiles would need thousands of rows for.
"""

from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("triton")

from klq_kernels import triton_linear
from klq_kernels.triton_linear import TILES, MatmulTile, tile, vocabulary_split
from klq_kernels.types import Head

# The interpreter computes with numpy, which warns of inf − inf and inf · 0 in lanes that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F16, BF16, INF, NAN = torch.float32, torch.float16, torch.bfloat16, float("inf"), float("nan")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB, TAU = 37, 107, 0.3  # three row tiles, four tiles of the vocabulary, both ragged
GRID = (2, 2, 2)  # row tiles of a group, splits, groups: the last group has one


@pytest.fixture
def use(monkeypatch):
    """A function: launches get tiles of 16 rows and 32 tokens with these switches; returns the launches by kernel."""

    def choose(descriptors=False, parts=1, group=GRID[0], slots=6):
        small, launched = MatmulTile(16, 32, 16, 1, 1, descriptors, parts), {}
        choices = {"cpu": small, triton_linear.POINTERS: small._replace(descriptors=False)}
        monkeypatch.setattr(triton_linear, "tile", lambda capability, *_: choices[capability])
        monkeypatch.setattr(triton_linear, "capability", lambda device: "cpu")
        monkeypatch.setattr(triton_linear, "multiprocessors", lambda device: slots)
        monkeypatch.setattr(triton_linear, "GROUP", group)
        for name in ("linear_stats_kernel", "token_logits_kernel"):
            monkeypatch.setattr(triton_linear, name, Noted(getattr(triton_linear, name), name, launched))
        return launched

    return choose


class Noted:
    """A kernel that notes its grid and flags when it is launched."""

    def __init__(self, kernel, name, launched):
        self.kernel = getattr(kernel, "kernel", kernel)
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        def launch(*args, **flags):
            self.launched[self.name] = dict(grid=grid, **flags)
            return self.kernel[grid](*args, **flags)

        return launch


def draw(work="two", dtype=F32, bias=False, rows=ROWS, vocab=VOCAB, width=24, other=32):
    """(policy, ref or None): logits of a few units, heads of different widths, or one head for both."""
    randn = lambda *shape: torch.randn(shape, dtype=torch.float64, device=DEVICE)  # noqa: E731
    other = width if work == "shared" else other
    biases = [randn(vocab).to(dtype) if bias else None for _ in range(2)]
    policy = Head(randn(rows, width).to(dtype), (2 * randn(vocab, width) / width**0.5).to(dtype), biases[0])
    ref = Head(randn(rows, other).to(dtype), (2 * randn(vocab, other) / other**0.5).to(dtype), biases[1])
    return policy, {"one": None, "shared": ref._replace(weight=policy.weight), "two": ref}[work]


def draw_mask(rows=ROWS):
    """Single holes and one whole row tile."""
    mask = torch.rand(rows, device=DEVICE) < 0.8
    mask[16:32] = rows < 32
    return mask


def log_softmax(head, temperature, dtype):
    z = head.hidden.to(dtype) @ head.weight.to(dtype).T
    return ((z if head.bias is None else z + head.bias.to(dtype)) / temperature).log_softmax(-1)


def by_hand(policy, tokens, ref, temperature, mask, values=None, tau=0.0, dtype=torch.float64):
    """The definitions, in float64 unless said otherwise; zero where masked."""
    p, index = log_softmax(policy, temperature, dtype), tokens.clamp(0, len(policy.weight) - 1)[:, None]
    expect = lambda f: torch.where(p > -INF, p.exp() * f, 0.0).sum(-1)  # noqa: E731
    out = dict(logprob=p.gather(1, index)[:, 0], entropy=-expect(p))
    if ref is not None:
        q = log_softmax(ref, temperature, dtype)
        out |= dict(ref_logprob=q.gather(1, index)[:, 0], kl=expect(p - q))
        if values is not None:
            out["q"] = tau * (out["logprob"] - out["ref_logprob"]) + values.to(dtype)
    return {name: torch.where(mask, x, 0.0) for name, x in out.items()}


def check(policy, ref, temperature=0.7, mask=None, tokens=None, values=True, poison=NAN):
    """Poison what is masked, run, and compare: no worse than float32 by hand, and a few roundings."""
    rows, vocab = len(policy.hidden), len(policy.weight)
    mask = draw_mask(rows) if mask is None else mask
    tokens = torch.randint(vocab, (rows,), device=DEVICE) if tokens is None else tokens
    given = torch.randn(rows, device=DEVICE) if values and ref is not None else None
    args = (temperature, mask, given, TAU)
    want, naive = by_hand(policy, tokens, ref, *args), by_hand(policy, tokens, ref, *args, dtype=F32)
    dirty = [h and h._replace(hidden=torch.where(mask[:, None], h.hidden, poison)) for h in (policy, ref)]
    dirty = [policy, ref] if mask.all() else dirty  # as they lie
    tokens = torch.where(mask, tokens, -100)
    got = triton_linear.linear_stats(dirty[0], tokens, dirty[1], temperature, mask, 0, given, TAU)._asdict()
    for name, exact in want.items():
        difference = lambda x: torch.where(x == exact, 0.0, (x - exact).abs()).max().item()  # noqa: E731, B023
        finite = exact[exact.isfinite()].abs()
        allowed = 1.5 * difference(naive[name].double()) + 3e-6 * max(1.0, finite.max().item() if len(finite) else 0)
        assert difference(got[name].double()) <= allowed, f"{name}: {difference(got[name].double())} > {allowed}"
    assert len(got["kl"]) == 0 or got["kl"].min() >= 0
    return got


CASES = [  # descriptors, parts, work, dtype, bias: every two values meet
    (False, 1, "two", F32, True), (True, 2, "two", BF16, False), (True, 4, "two", F16, True),
    (True, 1, "shared", F32, False), (False, 2, "shared", F16, True), (False, 4, "shared", BF16, True),
    (True, 1, "one", BF16, True), (False, 2, "one", F32, False), (True, 4, "one", F32, True),
    (False, 1, "one", F16, False),
]  # fmt: skip


@pytest.mark.parametrize("descriptors, parts, work, dtype, bias", CASES)
def test_statistics_are_those_of_float64(use, descriptors, parts, work, dtype, bias):
    """Masked rows hold NaN; every end is ragged: rows, groups of row tiles, vocabulary, hidden size."""
    launched = use(descriptors, parts)
    check(*draw(work, dtype, bias))
    flags = launched["linear_stats_kernel"]
    assert flags["grid"] == GRID and flags["DESCRIPTORS"] == descriptors and flags["SHARED"] == (work == "shared")


@pytest.mark.parametrize("group, slots", [(1, 1), (2, 8), (3, 4), (16, 1), (16, 12)])
def test_a_row_has_the_same_statistics_in_any_raster(use, group, slots):
    """Whatever the group, its ragged last one included, and the number of splits."""
    use(group=group, slots=slots)
    torch.manual_seed(1)
    check(*draw("two", bias=True))


def test_the_group_changes_no_bit(use, monkeypatch):
    monkeypatch.setattr(triton_linear, "vocabulary_split", lambda *_: (2, 2))
    policy, ref = draw()
    mask, tokens = draw_mask(), torch.randint(VOCAB, (ROWS,), device=DEVICE)
    results = []
    for group in (1, 2, 16):
        use(group=group)
        results.append(triton_linear.linear_stats(policy, tokens, ref, 1.0, mask, 0))
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("poison", [INF, -INF, 3e38])
def test_what_is_masked_reaches_no_other_row(use, poison):
    """Not even in a tile with live rows; a row's statistics are bit by bit those it has beside zeros."""
    use(descriptors=True, parts=2)
    policy, ref = draw()
    mask, tokens = draw_mask(), torch.randint(VOCAB, (ROWS,), device=DEVICE)
    results = [check(policy, ref, 1.0, mask, tokens, values=False, poison=x) for x in (0.0, poison)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("work, parts", [("one", 1), ("two", 2), ("shared", 1)])
@pytest.mark.parametrize("offsets", [(1000, 1000), (-1000, 0), (0, 1000), (-300, -300), (-300, 200)])
def test_offsets_cost_no_digits(use, work, parts, offsets):
    use(parts=parts, slots=6)
    policy, ref = draw(work, rows=20)
    heads = [
        h and h._replace(bias=torch.full((VOCAB,), float(o), device=DEVICE)) for h, o in zip((policy, ref), offsets)
    ]
    check(*heads, temperature=1.3)


@pytest.mark.parametrize("work", ["one", "shared", "two"])
def test_impossible_tokens_by_bias(use, work):
    """−inf in both heads, in either, for whole tiles, and for the row's own token."""
    use(parts=2, slots=6)
    policy, ref = draw(work, bias=True, rows=24)
    policy.bias[[0, 3, 40]], policy.bias[64:80] = -INF, -INF
    if ref is not None:
        ref.bias[[0, 3]], ref.bias[64:80] = -INF, -INF
        check(policy, ref, values=False)
        ref.bias[5] = -INF
    got = check(policy, ref, tokens=torch.full((24,), 40, device=DEVICE), values=False)
    assert got["logprob"].max() <= 0 and (ref is None or got["kl"].max() == INF)


@pytest.mark.parametrize("descriptors", [True, False])
@pytest.mark.parametrize("rows, vocab, width", [(1, 1, 8), (1, 16, 8), (17, 5, 8), (16, 33, 16), (3, 32, 40)])
def test_small_and_exact_sizes(use, rows, vocab, width, descriptors):
    use(descriptors, parts=2)
    check(*draw(rows=rows, vocab=vocab, width=width), mask=torch.ones(rows, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("temperature", [0.2, 5.0])
def test_temperature(use, temperature):
    use()
    check(*draw("shared", bias=True, rows=20), temperature=temperature)


def test_rows_that_descriptors_cannot_describe_go_by_pointers(use):
    """Rows of no multiple of 16 bytes, a start that is none, rows that overlap; and a slice that they can describe."""
    launched, (policy, ref) = use(descriptors=True), draw("one", BF16, rows=10)
    mask, wide = torch.ones(10, dtype=torch.bool, device=DEVICE), torch.randn(10, 41, device=DEVICE).to(BF16)
    even = wide[:, :40].contiguous()
    odd = (wide[:, :24], even[:, 1:25], even.flatten().unfold(0, 24, 8)[:10], even[:1, :24].expand(10, -1))
    for hidden in (*odd, even[:, 8:32]):
        check(policy._replace(hidden=hidden), ref, mask=mask)
        assert launched["linear_stats_kernel"]["DESCRIPTORS"] == (hidden.data_ptr() == even[:, 8:].data_ptr())


def test_an_impossible_id_gives_its_own_row_nan(use):
    use()
    policy, ref = draw("two", bias=True, rows=20)
    mask, tokens = torch.ones(20, dtype=torch.bool, device=DEVICE), torch.arange(20, device=DEVICE)
    tokens[3], tokens[4] = VOCAB, -1
    got = triton_linear.linear_stats(policy, tokens, ref, 1.0, mask, 0)
    assert torch.equal(got.logprob.isnan(), (tokens == VOCAB) | (tokens == -1)) and got.kl.isfinite().all()


def test_a_fully_masked_batch_is_zero(use):
    use()
    mask = torch.zeros(ROWS, dtype=torch.bool, device=DEVICE)
    got = triton_linear.linear_stats(*draw("one")[:1], mask.long(), None, 1.0, mask, 0)
    assert not got.logprob.any() and not got.entropy.any()


def test_launches_go_to_the_tensors_device(use, monkeypatch):
    """… not to whichever is current."""
    launched, inside = use(), []

    @contextmanager
    def guard(x):
        inside.append(x.device)
        yield
        assert launched.keys() == {"linear_stats_kernel", "token_logits_kernel"}
        inside.append("left")

    policy, _ = draw("one", rows=20)
    monkeypatch.setattr(torch.cuda, "device_of", guard)
    mask = torch.ones(20, dtype=torch.bool, device=DEVICE)
    triton_linear.linear_stats(policy, mask.long(), None, 1.0, mask, 0)
    assert inside[0] == policy.hidden.device and inside[-1] == "left"


def test_splits_cover_the_vocabulary_once_and_leave_few_slots_idle():
    for row_tiles in (1, 2, 7, 8, 16, 17, 32, 64, 100, 128, 512):
        for tiles in (1, 2, 125, 197, 501, 593, 1002):
            for slots in (1, 108, 132, 148, 304):
                splits, span = vocabulary_split(row_tiles, tiles, slots)
                assert (splits - 1) * span < tiles <= splits * span
                waves = -(-row_tiles * splits // slots)
                busy = row_tiles * tiles / (waves * span * slots)
                if row_tiles * tiles >= 8 * slots:
                    assert busy > 0.85, (row_tiles, tiles, slots, splits, span)
                assert splits >= min(tiles, slots // min(triton_linear.GROUP, row_tiles)) * 0.5


def test_the_tile_of_a_device_is_its_own_or_its_kin_s():
    for kind in ("one", "shared", "two"):
        for dtype in (BF16, F16, F32):
            for device, table in {"sm_90": "sm_90", "sm_86": "sm_80", "sm_89": "sm_80", "sm_121": "sm_120"}.items():
                assert tile(device, dtype, kind) == TILES[table][dtype.itemsize][kind]
            assert tile("sm_103", dtype, kind) == tile("sm_100", dtype, kind)
            assert tile("gfx950", dtype, kind) == tile("gfx942", dtype, kind)
            assert not tile(triton_linear.POINTERS, dtype, kind).descriptors
