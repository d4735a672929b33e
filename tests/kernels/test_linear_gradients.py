"""Gradients from hidden states where a GPU differs from a CPU: float16 throughout, and a host that must not wait."""

import contextlib
from functools import cache

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

from klq_kernels import autograd, linear_klq_loss, linear_token_stats, torch_linear, torch_logits
from klq_kernels.types import Head, LossSettings

triton_linear = pytest.importorskip("klq_kernels.triton_linear")
triton_logits = pytest.importorskip("klq_kernels.triton_logits")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, in lanes that are then masked
N, V, H, TAU = 8192, 2048, 64, 0.1


@pytest.fixture
def half(monkeypatch):
    """Operands of products, chunk logits and their gradients in float16, sums in float32, as on a GPU; the triton
    backend's chunks at this size, with torch's arithmetic in place of interpreted kernels."""
    monkeypatch.setattr(torch_linear, "working_dtype", lambda weight: weight.dtype)
    monkeypatch.setattr(torch_linear, "head_logits", lambda h, out: out.copy_(h.hidden.float() @ h.weight.float().t()))
    monkeypatch.setattr(triton_linear, "triton_logits", torch_logits)


def batch(dtype=torch.float16):
    """hidden, weight, tokens; values, targets, ref_logprobs that belong to a trained model (errors of about 0.1)."""
    hidden, weight = torch.randn(N, H).to(dtype), (torch.randn(V, H) / 4).to(dtype)
    tokens, noise = torch.randint(V, (N,)), torch.randn(3, N)
    logprobs = (hidden.double() @ weight.double().t()).log_softmax(1).gather(1, tokens[:, None])[:, 0].float()
    return dict(hidden=hidden, weight=weight, tokens=tokens), dict(
        values=noise[0], targets=noise[0] + 0.1 * noise[1], ref_logprobs=logprobs + 0.3 * noise[2],
        mask=torch.rand(N) < 0.9, tau=TAU,
    )  # fmt: skip


def gradients(op, backend, model, rest, dtype=None):
    """Gradients of hidden, weight, bias: of the loss, or of the mean over tokens of random multiples of statistics."""
    hidden, weight = (model[k].to(dtype).requires_grad_() for k in ("hidden", "weight"))
    bias = torch.zeros(V, dtype=hidden.dtype, requires_grad=True)
    if op is linear_klq_loss:
        out = 2**12 * op(hidden, weight, model["tokens"], bias=bias, **rest, backend=backend)  # what a GradScaler does
    else:
        ref = hidden.detach().roll(1, 0), weight.detach()
        stats = op(hidden, weight, model["tokens"], *ref, bias=bias, backend=backend)
        out = (
            2**4
            * TAU
            * sum((x.to(y) * y).mean() for x, y in zip((rest["values"], rest["targets"]), (stats[0], stats[3])))
        )
    return torch.autograd.grad(out, (hidden, weight, bias))


@cache
def inputs_and_gradients(op):
    """The batch, and the gradients of `reference` in float64 for it."""
    torch.manual_seed(0)
    model, rest = batch()
    exact = {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in rest.items()}
    return model, rest, gradients(op, "reference", model, exact, torch.float64)


def largest_error(op, backend):
    """Relative, in the Frobenius norm, of any gradient, against float64 on the same inputs."""
    model, rest, want = inputs_and_gradients(op)
    got = gradients(op, backend, model, rest)
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want))


CASES = [(linear_klq_loss, "torch"), (linear_klq_loss, "triton"), (linear_token_stats, "torch")]


@pytest.mark.parametrize("op, backend", CASES)
def test_float16_gradients_do_not_underflow(op, backend, half):
    """A mean over 8192 tokens times τ = 0.1 leaves logit gradients of 1e−9: those are scaled before they are cast."""
    assert largest_error(op, backend) < 2e-3


@pytest.mark.parametrize("op, backend", CASES)
def test_without_the_common_factor_they_would(op, backend, half, monkeypatch):
    """Guards the test above, which would protect little if nothing underflowed."""
    monkeypatch.setattr(torch_linear, "_common_factor", lambda dtype, largest, count=1: (1 / count, None))
    assert largest_error(op, backend) > 2e-3


@pytest.mark.parametrize("size", [0.0, 1e-38, 1e32])
def test_float16_gradients_of_any_upstream_gradient(size, half):
    """… 0 included: what scales upstream gradients into float16's range must not divide by it, nor overflow."""
    hidden, weight = torch.randn(6, 4).half().requires_grad_(), torch.randn(9, 4).half().requires_grad_()
    upstream = size * torch.tensor([1.0, -0.5, 0.25, 1.0, 0.0, 1.0])
    stats = linear_token_stats(hidden, weight, torch.arange(6), backend="torch")
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logprob = (exact[0] @ exact[1].t()).log_softmax(1)[torch.arange(6), torch.arange(6)]
    want = torch.autograd.grad((upstream.double() * logprob).sum(), exact)
    for g, w in zip(torch.autograd.grad(stats.logprob, (hidden, weight), upstream), want, strict=True):
        assert not g.isnan().any() and (size > 1 or (g.double() - w).abs().max() <= 1e-7)


def test_float16_sums_beyond_its_range_come_back_into_it():
    """Scaled gradients of many rows sum to more than float16 holds, until the factor is applied."""
    head = Head(torch.full((4096, 2), 8.0).half(), torch.zeros(3, 2).half(), None)
    sums = torch_linear.HeadSums(head, (False, True, False), torch.tensor(2.0**-10), torch.float16)
    for rows in (slice(0, 2048), slice(2048, 4096)):
        sums.add(slice(0, 3), rows, torch.full((2048, 3), 64.0).half())
    torch.testing.assert_close(sums.gradients(slice(None), 4096).weight, torch.full((3, 2), 2048.0).half())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", [linear_klq_loss, linear_token_stats])
def test_masked_rows_that_a_gpu_computes_reach_nothing(op, dtype, backend, monkeypatch):
    """A GPU doesn't skip them: NaN in their hidden states must not become NaN in the weight's gradient."""
    mask, shape = torch.tensor([True, False, True, True, False, False, True]), (7, 5)
    hidden, ref_hidden = (torch.randn(shape).to(dtype).masked_fill(~mask[:, None], torch.nan) for _ in range(2))
    tokens, per_token = torch.arange(7).where(mask, -100), torch.randn(3, 7).masked_fill(~mask, torch.nan)
    weight, bias = torch.randn(33, 5).to(dtype), torch.randn(33).to(dtype)
    rest = dict(ref_hidden=ref_hidden, ref_weight=weight, mask=mask, workspace_bytes=400, backend=backend)

    def run():
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if op is linear_klq_loss:
            inputs = dict(values=per_token[0], targets=per_token[1], ref_logprobs=None, tau=0.5)
            out = op(leaves[0], leaves[1], tokens, bias=leaves[2], **inputs, **rest)
        else:
            stats = op(leaves[0], leaves[1], tokens, bias=leaves[2], **rest)
            out = stats.logprob[mask].sum() + stats.kl[mask] @ per_token[2][mask]
        return out.detach(), *torch.autograd.grad(out, leaves)

    skipped = run()
    monkeypatch.setattr(torch_linear, "every_row", lambda mask: True)
    for got, want in zip(run(), skipped, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


aten = torch.ops.aten


def view(x, index):
    """x[index] for a number, or slices of the first axes; anything else is not for a GPU's host to ask."""
    if isinstance(index, int):
        return aten.select(x, 0, index)
    for axis, part in enumerate(index if isinstance(index, tuple) else (index,)):
        assert isinstance(part, slice), f"indexed by {part}: the host would wait for a count"
        x = aten.slice(x, axis, part.start, part.stop)
    return x


def assign(x, index, value):
    """x[index] = value, likewise."""
    aten.copy_(view(x, index), value) if isinstance(value, Tensor) else aten.fill_(view(x, index), value)


# Bindings of a CPU build want a CUDA device even for fake tensors: straight to the dispatcher. What asks for a tensor's
# contents is not among them and raises.
BINDINGS = dict(copy_=aten.copy_, __invert__=aten.bitwise_not)


class Indexing(TorchFunctionMode):
    """Indices likewise. Not by patching: once patched, `Tensor.__getitem__` stays a sequence's even when it is put
    back, and torch.tensor of a list of numbers in tensors fails from then on."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        others = {Tensor.__getitem__: view, Tensor.__setitem__: assign}
        return others.get(function, function)(*args, **kwargs or {})


class Launches:
    """Kernels that only note that they were launched."""

    def __init__(self, monkeypatch):
        self.count = 0
        kernels = {triton_logits: ("stats", "merge", "grad"), triton_linear: ("linear_stats", "token_logits")}
        for module, names in kernels.items():
            for name in names:
                monkeypatch.setattr(module, f"{name}_kernel", self)

    def __getitem__(self, grid):
        self.count += 1
        return lambda *args, **options: None


@pytest.fixture
def gpu(monkeypatch):
    """Fake tensors on a GPU, whose contents nobody knows."""
    launches = Launches(monkeypatch)
    monkeypatch.setattr(triton_linear, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    for name, function in BINDINGS.items():
        monkeypatch.setattr(Tensor, name, lambda *args, function=function: function(*args), raising=False)
    with FakeTensorMode(), torch.device("cuda"), Indexing():
        yield launches


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shared", [False, True])
def test_the_host_of_a_gpu_never_waits(dtype, shared, gpu):
    """The custom ops' own code runs with a partial mask to the end without a look at any number."""
    rows, vocab, width = 300, 1000, 32
    head = dict(hidden=torch.empty(rows, width, dtype=dtype), weight=torch.empty(vocab, width, dtype=dtype))
    head |= dict(bias=torch.empty(vocab, dtype=dtype))
    ref = {f"ref_{k}": x if shared else torch.empty_like(x) for k, x in head.items()}
    given = dict(tokens=torch.empty(rows, dtype=torch.long), mask=torch.empty(rows, dtype=torch.bool))
    options = dict(temperature=0.7, workspace=70 * vocab * dtype.itemsize, backend="triton")
    settings = LossSettings(TAU)._asdict() | dict(needed=[True] * 3)
    old = dict(ref_logprobs=None, old_logprobs=None, old_values=None)
    values = dict(values=torch.empty(rows), targets=torch.empty(rows))
    out = autograd.klq_loss._init_fn(**head, **ref, **given, **values, **old, **options, **settings)
    assert [g.shape for g in out[5:8]] == [x.shape for x in head.values()] and gpu.count > 20
    stats = autograd.token_stats._init_fn(**head, **ref, **given, values=None, tau=0.0, **options)
    upstream = dict(stats=list(stats), **dict.fromkeys("abc", torch.empty(rows)), needed=[True] * 3)
    grads = autograd.token_stats_grad._init_fn(**head, **ref, **given, **upstream, **options)
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in head.values()]
