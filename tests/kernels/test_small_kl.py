"""The exact KL from 1e-8 to 3 nats in one pass, from logits and from hidden states in tiles of any width, by float64.

Hidden states are unit vectors and the weights hold the logits, so that both ways see the same logits, without rounding.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from klq_kernels import checks, linear_token_stats, token_stats

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, of inf − inf
TRITON = pytest.mark.skipif(not checks._has_triton(), reason="Triton is not installed")
BACKENDS = ("torch", pytest.param("triton", marks=TRITON))
INF = float("inf")
ROWS, VOCAB = 5, 70
TILES = {"logits": None, "tiles of 1": 1, "tiles of 3": 3, "tiles of 64": 64, "one tile": 1 << 10}
TOLERANCE = {1e-8: 1e-2, 1e-6: 1e-3, 1e-4: 1e-4, 0.04: 2e-5, 0.06: 2e-5, 3.0: 2e-5}


@pytest.fixture(autouse=True)
def device(request):
    """What a test of the triton backend makes is on the GPU where there is one."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"):
        yield


def near(size, temperature=1.0, vocab=VOCAB, scale=2.0):
    """Logits of two models whose KL is about `size`, on a grid that offsets of ±1000 leave as it is."""
    grid = 2.0**-13
    logits, noise = scale * torch.randn(ROWS, vocab), torch.randn(ROWS, vocab)
    return [(x / grid).round() * grid for x in (logits, logits + temperature * (2 * size) ** 0.5 * noise)]


def kl(logits, ref, tile, backend, temperature=1.0, upstream=None):
    """The KL [ROWS] of these logits, or its gradients in logits and, from hidden states, in the unit vectors."""
    tokens, given = torch.zeros(len(logits), dtype=torch.long), dict(temperature=temperature, backend=backend)
    logits = logits.clone().requires_grad_()
    hidden = torch.eye(len(logits), dtype=logits.dtype).requires_grad_()
    if TILES[tile] is None:
        out, leaves = token_stats(logits, tokens, ref, **given).kl, (logits,)
    else:
        given["workspace_bytes"] = 8 * TILES[tile] ** 2
        weights = logits.t().nan_to_num(neginf=0.0), ref.t().nan_to_num(neginf=0.0)  # 0 · −inf is NaN
        lows = [torch.where(x.isinf().any(0), -INF, 0.0).to(x.dtype) for x in (logits, ref)]
        args = (hidden, weights[0], tokens, hidden.detach(), weights[1])
        out = linear_token_stats(*args, bias=lows[0], ref_bias=lows[1], **given).kl
        leaves = (logits, hidden)
    return out.detach() if upstream is None else torch.autograd.grad((upstream * out).sum(), leaves)


def exact(logits, ref, temperature=1.0):
    return kl(logits.double(), ref.double(), "logits", "reference", temperature)


def assert_right(logits, ref, tile, backend, temperature=1.0, rtol=1e-2):
    got, want = kl(logits, ref, tile, backend, temperature).double(), exact(logits, ref, temperature)
    assert (got >= 0).all()
    torch.testing.assert_close(got, want, rtol=rtol, atol=0)
    return want


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", TOLERANCE)
def test_sizes_and_temperatures(size, temperature, tile, backend):
    if backend == "triton" and (tile not in ("logits", "one tile") or temperature == 1.0):
        pytest.skip("its tiles have sizes of their own")
    want = assert_right(*near(size, temperature), tile, backend, temperature, TOLERANCE[size])
    assert size / 4 < want.mean() < 4 * size


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", ["logits", "tiles of 3", "tiles of 64"])
@pytest.mark.parametrize("offsets", [(1000, 1000), (1000, -1000), (-1000, 0), (0, 1000), (-300, -300), (0, -300)])
def test_offsets(offsets, tile, backend):
    """… of both models or of one cost no digit."""
    logits, ref = near(1e-8)
    assert_right(logits + offsets[0], ref + offsets[1], tile, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("size", [1e-8, 0.04])
def test_a_first_tile_of_hardly_any_probability(size, tile, backend):
    """… and the last one, where all other tiles are far above, with other differences there than elsewhere."""
    logits, ref = near(size)
    for columns in (slice(0, 8), slice(-3, None)):
        logits[:, columns] -= 60
        ref[:, columns] -= 45
    assert_right(logits, ref, tile, backend, rtol=TOLERANCE[size])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", ["logits", "tiles of 1", "tiles of 3", "tiles of 64"])
@pytest.mark.parametrize("forbidden", [slice(0, 12), slice(20, 29), slice(-7, None)])
def test_tokens_forbidden_in_both_models(forbidden, tile, backend):
    logits, ref = near(1e-8)
    logits[:, forbidden] = ref[:, forbidden] = -INF
    assert_right(logits, ref, tile, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("gap", [4.0, 15.0])
def test_tokens_forbidden_in_the_policy_only(gap, tile, backend):
    """p = 0 < q counts with its q: all of the KL sits there."""
    logits = near(1e-8)[0]
    logits[:, [3, 40]] -= gap
    ref = logits.clone()
    logits[:, [3, 40]] = -INF
    want = assert_right(logits, ref, tile, backend, rtol=1e-3)
    assert gap < 10 or (want < 1e-4).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
def test_a_token_that_underflows_in_the_policy_only(tile, backend):
    """p is rounded to 0 although its logit is finite."""
    logits = near(1e-8)[0]
    ref = logits.clone()
    ref[:, 40], logits[:, 40] = ref.amax(1) - 7, -120.0
    assert_right(logits, ref, tile, backend, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
def test_tokens_forbidden_in_the_reference_only(tile, backend):
    logits, ref = near(1e-8)
    ref[:, 40] = -INF
    assert (kl(logits, ref, tile, backend) == INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("low", [-1e4, -1e9])
def test_tokens_almost_forbidden_in_the_reference_only(low, tile, backend):
    """A log(p/q) so large that float32 rounds the policy's own logit beside it."""
    logits, ref = near(3.0)
    ref[:, 20:29] = low
    assert_right(logits, ref, tile, backend, rtol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tile", TILES)
def test_a_reference_that_is_no_distribution_has_no_kl(tile, backend):
    """All tokens are forbidden, or a logit is NaN: no number is to hide that."""
    logits, ref = near(3.0)
    assert kl(logits, torch.full_like(ref, -INF), tile, backend).isnan().all()
    ref[1, 40] = float("nan")
    assert TILES[tile] or kl(logits, ref, tile, backend).isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("tile", TILES)
def test_a_policy_that_is_no_distribution_has_no_kl(tile, backend):
    """… nor, from logits, a log-prob or an entropy; other rows keep theirs."""
    logits, ref = near(3.0)
    assert kl(torch.full_like(logits, -INF), ref, tile, backend).isnan().all()
    logits[1] = -INF
    stats = token_stats(logits, torch.zeros(ROWS, dtype=torch.long), ref, backend=backend)
    for x in (stats.logprob, stats.entropy, stats.kl):
        assert x.isnan().tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tile", TILES)
def test_equal_models_have_no_kl(tile, backend):
    logits = near(0.0)[0]
    assert (kl(logits, logits.clone(), tile, backend) == 0).all()


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("noise", ["every token", "half of the vocabulary"])
def test_the_gradient_of_a_tiny_kl(noise, temperature, tile):
    """Within 1 % of its norm; a rounding common to all tokens would be of that size."""
    logits, ref = near(1e-8, temperature, vocab=5000, scale=0.5)
    if noise == "half of the vocabulary":
        ref = logits.clone()
        ref[:, 2500:] += temperature * 2.0**-11.8
    if tile in ("tiles of 1", "tiles of 3"):
        logits, ref = (torch.cat([x[:, :150], x[:, -150:]], 1) for x in (logits, ref))
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.1])
    got = kl(logits, ref, tile, "torch", temperature, upstream)
    want = kl(logits.double(), ref.double(), tile, "reference", temperature, upstream.double())
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 0.01 * w.norm()


@given(
    seed=st.integers(0, 10**6), size=st.floats(1e-8, 1e-2), temperature=st.floats(0.3, 3.0),
    tile=st.sampled_from([*TILES]), offset=st.sampled_from([0.0, -1000.0, 1000.0]), holes=st.integers(0, 60),
)  # fmt: skip
def test_random_small_kls(seed, size, temperature, tile, offset, holes):
    torch.manual_seed(seed)
    logits, ref = near(size, temperature)
    where = torch.randperm(VOCAB)[:holes]
    logits[:, where] = ref[:, where] = -INF
    got, want = kl(logits + offset, ref - offset, tile, "torch", temperature).double(), exact(logits, ref, temperature)
    assert (got >= 0).all()
    assert ((got - want).abs() <= 0.01 * want.clamp_min(1e-9)).all()
