"""Every operation on a real GPU against the reference in float64 on the CPU: values and gradients, as compiled.

What only a GPU can show: matrix units (plain TF32 would miss the bounds here), 16-bit products and sums, offsets beyond
2³¹, races, a host that waits, a second device, and the allocator's peak. Without a GPU the same code rehearses at small
sizes (see conftest.py).
"""

from contextlib import contextmanager

import pytest
import torch

import klq_kernels as k

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
VALUES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of the largest entry, or absolute below 1
GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative, Frobenius
BACKENDS = ("triton", "torch")
TAU, MEGABYTE = 0.1, 2**20
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at NaN in masked rows


def sized(*on_gpu, small):
    """Sizes for a GPU, or for the interpreter on a CPU."""
    return list(on_gpu) if GPU else [small]


def draw(n, v, d, dtype, seed=0, masked=True, logits=False):
    """Rounded inputs in `dtype` on the CPU, with NaN in masked rows; also both models' logits, if asked for."""
    rng = torch.Generator().manual_seed(seed)
    x = {"hidden": torch.randn(n, d, generator=rng), "weight": torch.randn(v, d, generator=rng) / d**0.5}
    x["ref_hidden"] = x["hidden"] + 0.1 * torch.randn(n, d, generator=rng)
    x["ref_weight"] = x["weight"] + 0.01 * torch.randn(v, d, generator=rng)
    x = {name: t.to(dtype) for name, t in x.items()}
    x["mask"] = torch.rand(n, generator=rng) < 0.8 if masked else torch.ones(n, dtype=torch.bool)
    x["hidden"][~x["mask"]] = x["ref_hidden"][~x["mask"]] = float("nan")
    if logits:
        x["logits"] = (x["hidden"].float() @ x["weight"].float().T).to(dtype)
        x["ref_logits"] = (x["ref_hidden"].float() @ x["ref_weight"].float().T).to(dtype)
    x["tokens"] = torch.randint(0, v, (n,), generator=rng).masked_fill(~x["mask"], -100)
    x["up"] = torch.randn(4, n, generator=rng)
    x["values"], x["targets"], x["ref_logprobs"] = torch.randn(3, n, generator=rng)
    x["rows"] = torch.arange(n) < torch.tensor([[n], [n // 2], [0]])
    x["padded"] = torch.randn(4, 3, n, generator=rng).masked_fill(~x["rows"], float("nan"))
    return x


def place(x, device, dtype=None):
    """The inputs on a device; floating tensors in `dtype` if given."""
    return {n: t.to(device, dtype if dtype and t.is_floating_point() else t.dtype) for n, t in x.items()}


def leaves(x, *names):
    return {name: x[name].clone().requires_grad_() for name in names}


def results(out, leaf, up=None):
    """Values by name, and gradients as "d name", after the backward pass; `up` [4, N] weighs per-token results."""
    if up is None:
        out["loss"].backward()
    else:
        sum((u * t).sum() for u, t in zip(up, out.values())).backward()
    return {n: t.detach() for n, t in out.items()} | {f"d {n}": t.grad for n, t in leaf.items()}


def per_token(stats, **more):
    return {"logprob": stats.logprob, "entropy": stats.entropy, "kl": stats.kl} | more


def linear_stats(x, backend):
    leaf = leaves(x, "hidden", "weight")
    ref = (x["ref_hidden"], x["ref_weight"])
    s = k.linear_token_stats(*leaf.values(), x["tokens"], *ref, mask=x["mask"], backend=backend)
    return results(per_token(s), leaf, x["up"])


def shared_head(x, backend):
    """As of a frozen reference with the policy's own head, whose tiles are then loaded once."""
    leaf = leaves(x, "hidden")
    ref = (x["ref_hidden"], x["weight"])
    s = k.linear_token_stats(leaf["hidden"], x["weight"], x["tokens"], *ref, mask=x["mask"], backend=backend)
    return results(per_token(s), leaf, x["up"])


def linear_q(x, backend):
    leaf = leaves(x, "hidden", "weight", "values")
    given = (x["tokens"], x["ref_hidden"], x["ref_weight"], leaf["values"])
    s, q = k.linear_token_q(leaf["hidden"], leaf["weight"], *given, tau=TAU, mask=x["mask"], backend=backend)
    return results(per_token(s, q=q), leaf, x["up"])


def logits_stats(x, backend):
    leaf = leaves(x, "logits")
    s = k.token_stats(leaf["logits"], x["tokens"], x["ref_logits"], temperature=0.7, mask=x["mask"], backend=backend)
    return results(per_token(s), leaf, x["up"])


def logits_q(x, backend):
    leaf = leaves(x, "logits", "values")
    given = (leaf["logits"], x["tokens"], x["ref_logits"], leaf["values"])
    s, q = k.token_q(*given, tau=TAU, temperature=0.7, mask=x["mask"], backend=backend)
    return results(per_token(s, q=q), leaf, x["up"])


def regression(x, values):
    return dict(values=values, targets=x["targets"], mask=x["mask"], tau=TAU)


def linear_loss(x, backend):
    leaf = leaves(x, "hidden", "weight", "values")
    given = dict(ref_logprobs=x["ref_logprobs"], **regression(x, leaf["values"]), backend=backend)
    return results({"loss": k.linear_klq_loss(leaf["hidden"], leaf["weight"], x["tokens"], **given)}, leaf)


def linear_loss_with_reference(x, backend, **options):
    leaf = leaves(x, "hidden", "weight", "values")
    given = dict(ref_logprobs=None, ref_hidden=x["ref_hidden"], ref_weight=x["ref_weight"], return_stats=True)
    given |= regression(x, leaf["values"]) | options
    loss, s = k.linear_klq_loss(leaf["hidden"], leaf["weight"], x["tokens"], **given, backend=backend)
    return results({"loss": loss} | per_token(s), leaf)


def logits_loss(x, backend):
    leaf = leaves(x, "logits", "values")
    given = dict(ref_logprobs=x["ref_logprobs"], **regression(x, leaf["values"]), backend=backend)
    loss = k.logits_klq_loss(leaf["logits"].clone(), x["tokens"], **given, inplace=backend != "reference")
    return results({"loss": loss}, leaf)


def returns(x, backend):
    return k.lambda_returns(*x["padded"], x["rows"], tau=TAU, lam=0.97, backend=backend)._asdict()


LINEAR = [linear_stats, shared_head, linear_loss, linear_loss_with_reference, linear_q]
LOGITS = [logits_stats, logits_loss, logits_q]


def compare(operation, x, backend, dtype, device=DEVICE):
    """Against float64 on the CPU."""
    got, exact = operation(place(x, device), backend), operation(place(x, "cpu", torch.float64), "reference")
    assert got.keys() == exact.keys()
    for name, want in exact.items():
        assert got[name].device.type == torch.device(device).type
        wrong = got[name].double().cpu() - want
        error, bound = wrong.abs().max(), VALUES[dtype] * want.abs().max().clamp(min=1)
        if name.startswith("d "):
            rounded = want.to(got[name].dtype).double()  # a small gradient in fp16 is no better
            error, bound = wrong.norm(), GRADIENTS[dtype] * want.norm() + (rounded - want).norm()
        assert error <= bound, f"{operation.__name__}, {name}: {error:.1e} > {bound:.1e}"


@contextmanager
def no_waiting():
    """Within this context a host that waits for the GPU is an error."""
    switch = torch.cuda.set_sync_debug_mode if GPU else lambda mode: None
    switch("error")
    try:
        yield
    finally:
        switch("default")


@pytest.mark.parametrize("operation", LINEAR)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sized(*VALUES, small=torch.bfloat16))
@pytest.mark.parametrize("n, v, d", sized((1, 17, 3), (64, 1000, 64), (300, 32_000, 512), small=(9, 70, 24)))
def test_linear_operations(n, v, d, dtype, backend, operation):
    compare(operation, draw(n, v, d, dtype), backend, dtype)


@pytest.mark.parametrize("operation", LOGITS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", sized(*VALUES, small=torch.bfloat16))
@pytest.mark.parametrize("n, v", sized((1, 17), (5, 50_257), (300, 4099), small=(5, 70)))
def test_operations_on_logits(n, v, dtype, backend, operation):
    compare(operation, draw(n, v, 64, dtype, logits=True), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", sized(1, 33, 1024, 5000, small=33))
def test_lambda_returns(steps, backend):
    compare(returns, draw(steps, 3, 2, torch.float32), backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_products_are_more_accurate_than_tf32(backend):
    """TF32 keeps 10 bits: with 4,096 terms its error here is about 1e-3."""
    x = draw(*sized((128, 512, 4096), small=(5, 70, 300))[0], torch.float32, masked=False)
    exact = k.linear_token_stats(*(x[n].double() for n in ("hidden", "weight")), x["tokens"]).logprob
    y = place(x, DEVICE)
    got = k.linear_token_stats(y["hidden"], y["weight"], y["tokens"], backend=backend).logprob
    assert (got.double().cpu() - exact).abs().max() < 5e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_in_fp16_do_not_underflow(backend):
    """1/N before the rounding would turn 99.9 % of the logits' gradients into zeros."""
    x = draw(*sized((8192, 2048, 64), small=(64, 70, 24))[0], torch.float16, masked=False)
    compare(linear_loss, x, backend, torch.float16)


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kl_of_1e_8_is_known_to_a_hundredth(backend, kind):
    """In fp32, with its gradient, where Σ p log(p/q) would err by 1e-7; never below 0, and 0 for equal models."""
    x = draw(*sized((64, 4099, 64), small=(5, 300, 24))[0], torch.float32, masked=False)
    x["ref_hidden"] = x["hidden"] + 1.5e-4 * torch.randn(x["hidden"].shape, generator=torch.Generator().manual_seed(1))
    if kind == "logits":
        x |= {n: x[n] @ x["weight"].T for n in ("hidden", "ref_hidden")}

    def kl(x, backend):
        leaf, weight = leaves(x, "hidden"), () if kind == "logits" else (x["weight"],)
        operation = k.token_stats if kind == "logits" else k.linear_token_stats
        for ref in ("hidden", "ref_hidden"):
            s = operation(leaf["hidden"], *weight, x["tokens"], x[ref], *weight, backend=backend)
            assert s.kl.min() >= 0 and (s.kl.max() < 1e-10) == (ref == "hidden")
        return results({"kl": s.kl}, leaf, torch.ones_like(s.kl)[None])

    got, exact = kl(place(x, DEVICE), backend), kl(place(x, "cpu", torch.float64), "reference")
    assert exact["kl"].min() > 1e-9 and exact["kl"].max() < 1e-7
    assert ((got["kl"].double().cpu() - exact["kl"]) / exact["kl"]).abs().max() < 1e-2
    assert (got["d hidden"].double().cpu() - exact["d hidden"]).norm() < 2e-2 * exact["d hidden"].norm()


@pytest.mark.parametrize("operation", [*LINEAR, *LOGITS, returns])
def test_the_host_never_waits(operation):
    """Neither forward nor backward, with a partial mask; compiling comes first."""
    x = place(draw(*sized((130, 4099, 64), small=(5, 70, 24))[0], torch.float32, logits=True), DEVICE)
    operation(x, "triton")
    with no_waiting():
        operation(x, "triton")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("operation", [*LINEAR, *LOGITS, returns])
def test_tensors_on_another_gpu_are_worked_on_there(operation):
    with torch.cuda.device(0):
        compare(operation, draw(64, 1000, 64, torch.float32, logits=True), "triton", torch.float32, device="cuda:1")


def test_no_logits_of_the_batch_are_kept():
    """Beyond the inputs: a few times the workspace and the gradients (fp32 sums beside the 16-bit results). All logits
    of both models would be 2 × 2.1 GB in bfloat16 alone."""
    n, v, d = sized((16_384, 64_000, 512), small=(5, 70, 24))[0]
    x, workspace = place(draw(n, v, d, torch.bfloat16, masked=False), DEVICE), 64 * MEGABYTE
    linear_loss_with_reference(x, "triton", workspace_bytes=workspace)
    if GPU:
        level = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        kept = linear_loss_with_reference(x, "triton", workspace_bytes=workspace)
        peak, copies = torch.cuda.max_memory_allocated() - level, 2 * (n + v) * d
        assert kept and peak < 3 * workspace + 8 * (n + v) * d + copies + 64 * MEGABYTE < 2 * 2 * n * v / 4


def test_offsets_in_logits_beyond_two_to_the_31():
    """16,500 rows of 152,064 logits are 2.5e9 elements: the last row must be read and written at its own place."""
    n, v = sized((16_500, 152_064), small=(5, 300))[0]
    if GPU and torch.cuda.mem_get_info()[0] < 6 * n * v:
        pytest.skip("needs 15 GB of free GPU memory")
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device=DEVICE)
    logits[-1] = torch.randn(v, device=DEVICE)
    tokens = torch.full((n,), 7, device=DEVICE)
    exact = torch.log_softmax(logits[-1].double(), 0)[7]
    stats = k.token_stats(logits.requires_grad_(), tokens, backend="triton")
    assert (stats.logprob[-1] - exact).abs() < 1e-4
    stats.logprob.sum().backward()
    assert (logits.grad[-1, 7] - (1 - exact.exp())).abs() < 1e-2


@pytest.mark.parametrize("n, v, d", sized((16, 152_064, 16_384), (550_000, 32, 4096), small=(5, 70, 24)))
def test_offsets_in_hidden_states_and_heads_beyond_two_to_the_31(n, v, d):
    """Only the last row of the batch, and the last token's, differ from 0."""
    if GPU and torch.cuda.mem_get_info()[0] < 16 * (n + v) * d:
        pytest.skip("needs 40 GB of free GPU memory")
    hidden, weight = (torch.zeros(size, d, dtype=torch.bfloat16, device=DEVICE) for size in (n, v))
    hidden[-1] = weight[-1] = d**-0.5
    tokens = torch.full((n,), v - 1, device=DEVICE)
    exact = torch.log_softmax(torch.arange(v).eq(v - 1).double(), 0)[-1]  # its logit is 1, all others are 0
    stats = k.linear_token_stats(hidden.requires_grad_(), weight, tokens, backend="triton")
    assert (stats.logprob[-1].double().cpu() - exact).abs() < 1e-2
    stats.logprob[-1].backward()
    expected = (1 - exact.exp()) * d**-0.5
    assert (hidden.grad[-1].double().cpu() - expected).abs().max() < 1e-2 * expected and not hidden.grad[:-1].any()


def test_results_repeat_bit_for_bit():
    x = place(draw(*sized((300, 32_000, 512), small=(5, 70, 24))[0], torch.bfloat16), DEVICE)
    for operation in (linear_stats, linear_loss_with_reference):
        one, two = (operation(x, "triton") for _ in range(2))
        assert all(torch.equal(one[name].nan_to_num(), two[name].nan_to_num()) for name in one)


def test_the_whole_graph_compiles():
    x = place(draw(*sized((64, 1000, 64), small=(5, 70, 24))[0], torch.float32, masked=False), DEVICE)

    def loss(hidden, values):
        return k.linear_klq_loss(
            hidden, x["weight"], x["tokens"], x["ref_logprobs"], values, x["targets"], x["mask"], tau=TAU
        )

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if GPU else "eager")
    torch.testing.assert_close(compiled(x["hidden"], x["values"]), loss(x["hidden"], x["values"]))
