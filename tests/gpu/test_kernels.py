"""Every operation on a real GPU against the reference in float64 on the CPU: values and gradients, as compiled.

What only a GPU can show: matrix units (plain TF32 would miss the bounds here by a factor of 100), offsets beyond 2³¹,
races, and the candidate tiles.
"""

import pytest
import torch

import klq_kernels as k

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
BACKENDS = ("triton", "torch")


def draw(n, v, d, dtype, seed=0, masked=True):
    """Rounded inputs in `dtype` on the CPU, with NaN in masked rows."""
    rng = torch.Generator().manual_seed(seed)
    x = {"hidden": torch.randn(n, d, generator=rng), "weight": torch.randn(v, d, generator=rng) / d**0.5}
    x["ref_hidden"] = x["hidden"] + 0.1 * torch.randn(n, d, generator=rng)
    x["ref_weight"] = x["weight"] + 0.01 * torch.randn(v, d, generator=rng)
    x = {name: t.to(dtype) for name, t in x.items()}
    x["mask"] = torch.rand(n, generator=rng) < 0.8 if masked else torch.ones(n, dtype=torch.bool)
    x["hidden"][~x["mask"]] = x["ref_hidden"][~x["mask"]] = float("nan")
    x["tokens"] = torch.randint(0, v, (n,), generator=rng).masked_fill(~x["mask"], -100)
    x["up"] = torch.randn(3, n, generator=rng)
    x["values"], x["targets"], x["ref_logprobs"] = torch.randn(3, n, generator=rng)
    return x


def place(x, device, dtype=None):
    """The inputs on a device; floating tensors in `dtype` if given."""
    return {n: t.to(device, dtype if dtype and t.is_floating_point() else t.dtype) for n, t in x.items()}


def leaves(x, *names):
    return {name: x[name].clone().requires_grad_() for name in names}


def linear_stats(x, backend):
    leaf = leaves(x, "hidden", "weight")
    s = k.linear_token_stats(
        leaf["hidden"], leaf["weight"], x["tokens"], x["ref_hidden"], x["ref_weight"], mask=x["mask"], backend=backend
    )
    (x["up"] * torch.stack([s.logprob, s.entropy, s.kl]).to(x["up"].dtype)).sum().backward()
    return [*(t.detach() for t in s), *(t.grad for t in leaf.values())]


def logits_stats(x, backend):
    leaf = {"logits": (x["hidden"] @ x["weight"].T).requires_grad_()}
    ref = x["ref_hidden"] @ x["ref_weight"].T
    s = k.token_stats(leaf["logits"], x["tokens"], ref, temperature=0.7, mask=x["mask"], backend=backend)
    (x["up"] * torch.stack([s.logprob, s.entropy, s.kl]).to(x["up"].dtype)).sum().backward()
    return [*(t.detach() for t in s), leaf["logits"].grad]


def linear_loss(x, backend):
    leaf = leaves(x, "hidden", "weight", "values")
    loss = k.linear_klq_loss(
        leaf["hidden"], leaf["weight"], x["tokens"], x["ref_logprobs"], leaf["values"], x["targets"], x["mask"],
        tau=0.2, backend=backend,
    )  # fmt: skip
    loss.backward()
    return [loss.detach(), *(t.grad for t in leaf.values())]


def compare(operation, x, backend, dtype):
    """Error relative to the largest entry, against float64 on the CPU."""
    exact = operation(place(x, "cpu", torch.float64), "reference")
    for got, want in zip(operation(place(x, "cuda"), backend), exact, strict=True):
        error = (got.double().cpu() - want).abs().max()
        assert error <= TOLERANCE[dtype] * want.abs().max().clamp(min=1), (operation.__name__, error)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("n, v, d", [(1, 17, 3), (64, 1000, 64), (130, 4099, 200), (300, 32_000, 512)])
def test_linear_operations(n, v, d, dtype, backend):
    x = draw(n, v, d, dtype)
    compare(linear_stats, x, backend, dtype)
    compare(linear_loss, x, backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n, v", [(1, 17), (5, 50_257), (300, 4099)])
def test_operations_on_logits(n, v, backend):
    compare(logits_stats, draw(n, v, 64, torch.float32), backend, torch.float32)


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_every_candidate_tile_gives_the_same_result(choice, monkeypatch):
    monkeypatch.setenv("KLQ_TILE", str(choice))
    for dtype in (torch.float32, torch.bfloat16):
        compare(linear_stats, draw(130, 4099, 200, dtype), "triton", dtype)
    compare(logits_stats, draw(70, 9001, 64, torch.float32), "triton", torch.float32)


def test_fp32_products_are_more_accurate_than_tf32():
    """TF32 keeps 10 bits: with 4,096 terms its error here is about 1e-3."""
    x = draw(128, 512, 4096, torch.float32, masked=False)
    exact = k.linear_token_stats(*(x[n].double() for n in ("hidden", "weight")), x["tokens"]).logprob
    y = place(x, "cuda")
    got = k.linear_token_stats(y["hidden"], y["weight"], y["tokens"], backend="triton").logprob
    assert (got.double().cpu() - exact).abs().max() < 5e-6


@pytest.mark.parametrize("steps", [1, 33, 1024, 5000])
def test_lambda_returns(steps):
    rng = torch.Generator().manual_seed(0)
    given = torch.randn(4, 7, steps, generator=rng)
    mask = torch.arange(steps) < torch.randint(0, steps + 1, (7, 1), generator=rng)
    exact = k.lambda_returns(*given.double(), mask, tau=0.3, lam=0.97)
    got = k.lambda_returns(*given.cuda(), mask.cuda(), tau=0.3, lam=0.97, backend="triton")
    for a, b in zip(got, exact, strict=True):
        assert (a.double().cpu() - b).abs().max() < 1e-4


def test_offsets_beyond_two_to_the_31():
    """16,500 rows of 152,064 logits are 2.5e9 elements: the last row must be read and written at its own place."""
    n, v = 16_500, 152_064
    if torch.cuda.mem_get_info()[0] < 6 * n * v:
        pytest.skip("needs 15 GB of free GPU memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-1] = torch.randn(v, device="cuda")
    tokens = torch.full((n,), 7, device="cuda")
    exact = torch.log_softmax(logits[-1].double(), 0)[7]
    stats = k.token_stats(logits.requires_grad_(), tokens, backend="triton")
    assert (stats.logprob[-1] - exact).abs() < 1e-4
    stats.logprob.sum().backward()
    assert (logits.grad[-1, 7] - (1 - exact.exp())).abs() < 1e-2


def test_results_repeat_bit_for_bit():
    x = place(draw(300, 32_000, 512, torch.bfloat16), "cuda")
    for a, b in zip(linear_stats(x, "triton"), linear_stats(x, "triton"), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_the_whole_graph_compiles():
    x = place(draw(64, 1000, 64, torch.float32, masked=False), "cuda")

    def loss(hidden, values):
        return k.linear_klq_loss(
            hidden, x["weight"], x["tokens"], x["ref_logprobs"], values, x["targets"], x["mask"], tau=0.2
        )

    compiled = torch.compile(loss, fullgraph=True)
    torch.testing.assert_close(compiled(x["hidden"], x["values"]), loss(x["hidden"], x["values"]))
