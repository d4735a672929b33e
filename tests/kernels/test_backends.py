"""The torch and triton backends against `reference` in float64: values, gradients, masks, extremes, memory layouts.

The rule for errors: no worse than `reference` in the same dtype, apart from a few roundings of the largest entry. On a
machine without a GPU the Triton kernels run in Triton's interpreter, at about 0.1 ms per operation and program, so they
get the first few cases of each set.
"""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klq_kernels import (
    autograd,
    checks,
    lambda_returns,
    linear_klq_loss,
    linear_token_stats,
    logits_klq_loss,
    token_stats,
    torch_linear,
    torch_logits,
)
from klq_kernels.loss import LOSSES, klq_loss, klq_terms
from klq_kernels.types import Head, LossInputs, LossSettings

# The interpreter computes with numpy, which warns of inf − inf and inf · 0 in lanes that are then masked.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F64, INF, NAN = torch.float32, torch.float64, float("inf"), float("nan")
DTYPES = (F32, torch.bfloat16, torch.float16)
TRITON = pytest.mark.skipif(not checks._has_triton(), reason="Triton is not installed")
BACKENDS = ("torch", pytest.param("triton", marks=TRITON))
PER_TOKEN = (
    "logits", "ref_logits", "hidden", "ref_hidden", "tokens", "ref_logprobs", "values", "targets", "old_logprobs",
    "old_values",
)  # fmt: skip
LEAVES = ("logits", "hidden", "weight", "bias", "values")
VARIANT = dict(tau=0.6, clip=0.3, log_ratio_clip=0.4, delta=0.5)
LOSS_FACTOR = 1.7
randn = partial(torch.randn, dtype=F64)  # rounded to the dtype of the case


@pytest.fixture(autouse=True)
def device(request):
    """What a test of the triton backend makes is on the GPU where there is one."""
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    with torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"):
        yield


def pairwise(most, **axes):
    """For each backend its first few cases of a set in which every two values of two axes meet, the fullest first."""
    rest = [dict(zip(axes, case)) for case in itertools.product(*axes.values())]
    pairs = {id(case): set(itertools.combinations(case.items(), 2)) for case in rest}
    missing, cases, out = set().union(*pairs.values()), [], []
    while missing:
        cases.append(max(rest, key=lambda case: len(pairs[id(case)] & missing)))
        missing -= pairs[id(cases[-1])]
    for backend, count in most.items():
        for case in [case for case in cases if backend == "torch" or case["dtype"] != F64][:count]:
            label = "-".join(str(x).removeprefix("torch.") for x in (backend, *case.values()))
            out.append(pytest.param(backend, case, id=label, marks=[TRITON] if backend == "triton" else []))
    return out


def draw_logits(shape=(2, 3), vocab=33, dtype=F32, ref=True):
    logits, ref_logits = ((2 * randn(*shape, vocab)).to(dtype) for _ in range(2))
    inputs = dict(logits=logits, tokens=torch.randint(vocab, shape))
    return inputs | (dict(ref_logits=ref_logits) if ref else {})


def draw_heads(shape=(2, 3), vocab=33, width=5, dtype=F32, heads="ref"):
    """`heads` says what there is: bias, ref (of another width), shared (the policy's weight and bias), ref_bias."""
    heads, other = heads.split(), width if "shared" in heads else width + 3
    inputs = dict(
        hidden=randn(*shape, width), weight=2 * randn(vocab, width) / width**0.5,
        ref_hidden=randn(*shape, other), ref_weight=2 * randn(vocab, other) / other**0.5,
        bias=randn(vocab), ref_bias=randn(vocab),
    )  # fmt: skip
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    own_bias = inputs["ref_bias"] if "ref_bias" in heads else None
    inputs["bias"] = inputs["bias"] if "bias" in heads else None
    if "shared" in heads:
        inputs |= dict(ref_weight=inputs["weight"], ref_bias=own_bias if own_bias is not None else inputs["bias"])
    elif "ref" in heads:
        inputs["ref_bias"] = own_bias
    else:
        inputs |= dict(ref_hidden=None, ref_weight=None, ref_bias=None)
    return inputs | dict(tokens=torch.randint(vocab, shape))


def draw_loss(shape=(2, 3), dtype=F32, mask=None, ref_logprobs=True):
    """What the losses need beside the model, on which each variant takes both of its branches."""
    given = {name: randn(shape).to(dtype) for name in ("values", "targets", "old_values")}
    given |= {name: (randn(shape) - 3).to(dtype) for name in ("ref_logprobs", "old_logprobs")}
    given["ref_logprobs"] = given["ref_logprobs"] if ref_logprobs else None
    return given | dict(mask=torch.ones(shape, dtype=torch.bool) if mask is None else mask)


def draw(op, shape=(2, 3), vocab=33, dtype=F32, mask=None):
    """Inputs of any of the four operations on a model's outputs, as complete as they get."""
    model = draw_logits if op in (token_stats, logits_klq_loss) else draw_heads
    inputs = model(shape, vocab, dtype=dtype)
    if op in (logits_klq_loss, linear_klq_loss):
        inputs.pop("ref_logits", None)
        return inputs | draw_loss(shape, dtype, mask, ref_logprobs=op is logits_klq_loss) | VARIANT
    return inputs | dict(mask=mask)


MODEL_OPS = (token_stats, linear_token_stats, logits_klq_loss, linear_klq_loss)


def poisoned(inputs, mask, poison=NAN):
    """Masked entries of every argument replaced by `poison`, those of the tokens by −100."""
    inputs = dict(inputs)
    for name in PER_TOKEN:
        if inputs.get(name) is not None:
            inputs[name] = inputs[name].clone()
            inputs[name][~mask] = -100 if name == "tokens" else poison
    return inputs


def exactly(inputs):
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}


def upstream_for(shape, names="logprob entropy kl"):
    """Random upstream gradients of these statistics."""
    return {name: torch.randn(shape) for name in names.split()}


def run(op, inputs, backend, upstream=None):
    """Results, and gradients of Σ upstream · result (of a loss: LOSS_FACTOR · loss), by name."""
    seen = {}  # a tensor given twice stays one tensor: a shared head
    args = {k: seen.setdefault(id(x), x.detach()) if isinstance(x, Tensor) else x for k, x in inputs.items()}
    leaves = {k: args[k].requires_grad_() for k in LEAVES if args.get(k) is not None}
    out = op(**args, backend=backend)
    out = {"loss": out} if isinstance(out, Tensor) else {k: x for k, x in out._asdict().items() if x is not None}
    upstream = upstream or {"loss": torch.tensor(LOSS_FACTOR)}
    grads = torch.autograd.grad(sum((u * out[name]).sum() for name, u in upstream.items()), leaves.values())
    assert all(g.dtype == x.dtype and g.shape == x.shape for g, x in zip(grads, leaves.values()))
    return {name: x.detach() for name, x in out.items()} | {f"grad of {k}": g for k, g in zip(leaves, grads)}


def error(got, want):
    """Largest absolute difference; equal infinities don't differ, NaN never agrees."""
    difference = torch.where(got.double() == want, 0.0, (got.double() - want).abs())
    return difference.max().item() if difference.numel() else 0.0


def assert_no_worse(got, naive, want, slack=2e-6):
    """`got` and `naive` are what a backend and `reference` made of the same rounded inputs, `want` is exact."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        finite = exact[exact.isfinite()].abs()
        scale = finite.max().item() if finite.numel() else 0.0
        if name.startswith("grad"):
            sizes = torch.finfo(got[name].dtype).eps * scale + slack * max(0.2, scale)  # sums over tokens may cancel
            allowed = 1.5 * error(naive[name], exact) + sizes
        else:
            allowed = error(naive[name], exact) + slack * max(1.0, scale)
        assert error(got[name], exact) <= allowed, f"{name}: {error(got[name], exact):.2e} > {allowed:.2e}"


def check(op, inputs, backend, upstream=None, **tolerance):
    """Run on the backend and assert the rule for errors; returns the backend's results."""
    want = run(op, exactly(inputs), "reference", {k: u.double() for k, u in (upstream or {}).items()})
    got = run(op, inputs, backend, upstream)
    assert_no_worse(got, run(op, inputs, "reference", upstream), want, **tolerance)
    return got


# Several tiles of the vocabulary and several blocks of rows, the last of each ragged


SHAPE, VOCAB, WIDTH = (5, 5), 43, 20
WORKSPACE = 1000
JOBS = ("logprob entropy kl", "kl", "entropy", "logprob")
HEADS = (
    "ref bias ref_bias", "bias", "shared bias", "ref ref_bias", "shared ref_bias", "", "ref", "ref bias", "shared",
    "shared bias ref_bias",
)  # fmt: skip
COMMON = dict(temperature=(0.7, 1.0), holes=(True, False), dtype=(*DTYPES, F64))


@pytest.fixture
def small_tiles(monkeypatch):
    """Triton's tiles are 16 wide, so that a vocabulary of 43 or 100 is walked over, split and cut into slabs."""
    from klq_kernels import triton_linear, triton_logits

    for name in ("STATS_BLOCK", "GRAD_BLOCK", "SCAN_BLOCK"):
        monkeypatch.setattr(triton_logits, name, 16)
    tile = triton_linear.MatmulTile(16, 16, 16, 1, 1)
    monkeypatch.setattr(triton_linear, "tile", lambda *_: tile)
    return triton_logits


@pytest.fixture
def tiles(request, backend, monkeypatch):
    """What makes SHAPE and VOCAB large: the torch backend's cache holds two rows of logits, a split of Triton's two
    tiles."""
    monkeypatch.setattr(torch_logits, "BLOCK_BYTES", 360)
    if backend == "triton":
        from klq_kernels import triton_linear

        monkeypatch.setattr(request.getfixturevalue("small_tiles"), "ROWS_PER_SPLIT", 50)
        monkeypatch.setattr(triton_linear, "multiprocessors", lambda device: 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_small_sizes_make_several_tiles_and_several_blocks(backend, tiles):
    """Guards the tests below, which would protect little if everything fitted into one tile."""
    head, mask = Head(torch.zeros(25, 1), torch.zeros(VOCAB, 1), None), torch.ones(25, dtype=torch.bool)
    assert len([*torch_logits.row_blocks(mask, 4 * VOCAB)]) > 2
    share = 1 - autograd.kernels(backend, "linear").REF_SHARE
    assert len([*torch_linear.blocks(25, int(WORKSPACE * share) // (4 * VOCAB))]) > 2
    if backend == "triton":
        kernels = autograd.kernels(backend, "logits")
        assert kernels.vocabulary_splits(kernels.ROWS_PER_SPLIT, 25, VOCAB, 16) == (2, 32)
    for heads in ((head, None), (head, head)):
        height = torch_linear._height(heads, WORKSPACE)
        tiles = [*torch_linear.logit_tiles(heads, WORKSPACE, height)]
        assert len({c.start for c, *_ in tiles}) > 2 and len({r.start for _, r, _ in tiles}) > 1


def check_tiles(op, case, inputs, backend, names="logprob entropy kl"):
    """`check`, with single holes in the mask and a run of them, NaN in each, if the case says so."""
    mask = torch.ones(SHAPE, dtype=torch.bool)
    if case["holes"]:
        mask = torch.rand(SHAPE) < 0.8
        mask[2] = False
    tokens = torch.randperm(VOCAB)[: mask.numel()].reshape(SHAPE)
    inputs |= dict(tokens=tokens, mask=mask, temperature=case["temperature"])
    inputs |= dict(workspace_bytes=WORKSPACE) if "hidden" in inputs else {}
    upstream, slack = upstream_for(SHAPE, names), 1e-12 if case["dtype"] == F64 else 2e-6
    check(op, poisoned(inputs, mask), backend, upstream if op in MODEL_OPS[:2] else None, slack=slack)


def job(case, with_ref):
    """Statistics with an upstream gradient; the KL alone becomes log-prob and entropy where there is no reference."""
    return case["job"] if with_ref else {"kl": "logprob entropy"}.get(case["job"], case["job"][:15])


@pytest.mark.parametrize(
    "backend, case",
    pairwise({"torch": 99, "triton": 4}, ref=(True, False), strided=(False, True), job=JOBS, **COMMON),
)
def test_tiles_of_token_stats(backend, case, tiles):
    inputs = draw_logits(SHAPE, VOCAB, case["dtype"], case["ref"])
    inputs |= {name: LAYOUTS["time before batch"](x) for name, x in inputs.items() if case["strided"]}
    check_tiles(token_stats, case, inputs, backend, job(case, case["ref"]))


@pytest.mark.parametrize("backend, case", pairwise({"torch": 99, "triton": 8}, heads=HEADS[:6], job=JOBS, **COMMON))
def test_tiles_of_linear_token_stats(backend, case, tiles):
    inputs = draw_heads(SHAPE, VOCAB, WIDTH, case["dtype"], case["heads"])
    check_tiles(linear_token_stats, case, inputs, backend, job(case, inputs["ref_hidden"] is not None))


@pytest.mark.parametrize(
    "backend, case",
    pairwise({"torch": 99, "triton": 3}, loss=LOSSES, strided=(False, True), **COMMON),
)
def test_tiles_of_logits_klq_loss(backend, case, tiles):
    inputs = draw_logits(SHAPE, VOCAB, case["dtype"], ref=False)
    inputs |= dict(logits=LAYOUTS["time before batch"](inputs["logits"])) if case["strided"] else {}
    inputs |= draw_loss(SHAPE, case["dtype"]) | VARIANT | dict(loss=case["loss"])
    check_tiles(logits_klq_loss, case, inputs, backend)


@pytest.mark.parametrize("backend, case", pairwise({"torch": 99, "triton": 4}, heads=HEADS[:6], loss=LOSSES, **COMMON))
def test_tiles_of_linear_klq_loss(backend, case, tiles):
    """With ref_logprobs where the heads hold no reference, else with the reference in the same pass."""
    inputs = draw_heads(SHAPE, VOCAB, WIDTH, case["dtype"], case["heads"])
    inputs |= draw_loss(SHAPE, case["dtype"], ref_logprobs=inputs["ref_hidden"] is None) | VARIANT
    check_tiles(linear_klq_loss, case, inputs | dict(loss=case["loss"]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1, 400])  # one row, two or three rows
@pytest.mark.parametrize("heads", ["bias", "ref bias ref_bias"])
def test_statistics_that_ride_along_with_the_loss(backend, heads, workspace_bytes):
    """return_stats gives what linear_token_stats gives, detached; the reference's log-probs serve the loss."""
    model = draw_heads(heads=heads)
    rest = draw_loss(ref_logprobs=heads == "bias") | VARIANT | dict(workspace_bytes=workspace_bytes, return_stats=True)
    leaf = model | dict(hidden=model["hidden"].clone().requires_grad_())
    for mask in (torch.tensor([[True, True, False], [False, True, True]]), rest["mask"]):
        loss, stats = linear_klq_loss(**leaf, **(rest | dict(mask=mask)), backend=backend)
        want = linear_token_stats(**exactly(model), mask=mask, backend="reference")
        for got, exact in zip(stats, want, strict=True):
            assert (got is None) == (exact is None)
            assert got is None or (not got.requires_grad and got.shape == mask.shape and error(got, exact) < 5e-6)
        assert loss.requires_grad


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("loss", LOSSES)
def test_either_loss_is_klq_loss_of_the_statistics(loss, backend):
    """… with each setting in its own place: the definition is called past the operations."""
    rest = draw_loss((40,)) | VARIANT | dict(loss=loss)
    for op, stats_of, model in [
        (logits_klq_loss, token_stats, draw_logits((40,), ref=False)),
        (linear_klq_loss, linear_token_stats, draw_heads((40,), heads="bias")),
    ]:
        want = klq_loss(stats_of(**exactly(model)).logprob, **exactly(rest))
        torch.testing.assert_close(op(**model, **rest, backend=backend), want.float())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("inplace", [False, True])
def test_statistics_that_ride_along_with_the_loss_from_logits(backend, inplace):
    """return_stats changes neither loss nor gradient and gives token_stats' log-probs and entropies, detached."""
    model, mask = draw_logits(ref=False), torch.tensor([[True, True, False], [False, True, True]])
    rest = draw_loss(mask=mask) | VARIANT | dict(temperature=0.7, inplace=inplace, backend=backend)
    leaf = model["logits"].clone().requires_grad_()
    both, alone = (
        logits_klq_loss(leaf * 1.0, model["tokens"], **rest, return_stats=True),
        logits_klq_loss(leaf * 1.0, model["tokens"], **rest),
    )
    (loss, stats), want = both, token_stats(**exactly(model), temperature=0.7, mask=mask, backend="reference")
    assert torch.equal(loss, alone) and torch.equal(*(torch.autograd.grad(x, leaf)[0] for x in (loss, alone)))
    assert stats.ref_logprob is None and stats.kl is None
    for got, exact in zip(stats[:2], want[:2], strict=True):
        assert not got.requires_grad and got.shape == mask.shape and error(got, exact) < 5e-6


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_a_bias_of_another_dtype(dtype, backend):
    """… gives what it gives in the heads' own: these numbers are the same in both. A workspace may be a float."""
    inputs = draw_heads((3,), 5, 4, dtype) | dict(workspace_bytes=1e6)
    biases = (torch.arange(5.0, dtype=other) for other in (torch.float16, torch.bfloat16, F32))
    results = [linear_token_stats(**(inputs | dict(bias=bias)), backend=backend) for bias in biases]
    assert all(error(x, results[0].logprob) < 0.02 for x, *_ in results)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
@pytest.mark.parametrize("op", MODEL_OPS[:2])
def test_any_integer_dtype_of_tokens(op, dtype, backend):
    mask = torch.tensor([[True, True, False], [False, True, True]])
    inputs = draw(op, vocab=300, mask=mask)
    inputs["tokens"] %= 256
    inputs |= dict(workspace_bytes=6000) if op is linear_token_stats else {}  # the vocabulary in tiles
    narrow = inputs | dict(tokens=inputs["tokens"].to(dtype))
    assert equal(run_all(op, narrow, backend), run_all(op, inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", ["policy", "reference"])
def test_policy_and_reference_of_two_dtypes(low, backend):
    inputs = draw_logits()
    inputs["logits" if low == "policy" else "ref_logits"] = inputs["logits"].bfloat16()
    check(token_stats, inputs, backend, upstream_for((2, 3)))
    heads = draw_heads(heads="ref bias ref_bias")
    names = ("hidden", "weight", "bias") if low == "policy" else ("ref_hidden", "ref_weight", "ref_bias")
    check(linear_token_stats, heads | {name: heads[name].bfloat16() for name in names}, backend, upstream_for((2, 3)))


@pytest.mark.parametrize("native", [True, False])
def test_the_gradient_of_an_almost_certain_token(native, monkeypatch):
    """p − 1 = −0.001 although bfloat16 rounds such a p to 1: the token's row of the weight learns as the others do."""
    monkeypatch.setattr(torch_linear, "native", lambda x: native and x == torch.bfloat16)
    inputs = dict(hidden=torch.tensor([[1.0, 2.0]]), weight=torch.tensor([[7.0, 0.0], [0.0, 0.0]]))
    inputs = {name: x.bfloat16() for name, x in inputs.items()} | dict(tokens=torch.tensor([0]))
    inputs |= draw_loss((1,)) | VARIANT
    got, want = run(linear_klq_loss, inputs, "torch"), run(linear_klq_loss, exactly(inputs), "reference")
    for name in ("grad of hidden", "grad of weight"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=0.02, atol=0)


@pytest.mark.parametrize("op", [linear_token_stats, linear_klq_loss])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_torch_on_cpus_with_and_without_16_bit_products(native, dtype, op, monkeypatch):
    """Where the CPU multiplies bfloat16 quickly, the torch backend lets it, and rounds logits as `reference` does."""
    monkeypatch.setattr(torch_linear, "native", lambda x: native and x == torch.bfloat16)
    inputs = draw(op, vocab=130, dtype=dtype, mask=torch.rand(2, 3) < 0.8)
    check(op, inputs, "torch", upstream_for((2, 3)) if op is linear_token_stats else None)


# Masks and the smallest shapes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [NAN, -INF])
@pytest.mark.parametrize("op", MODEL_OPS)
def test_masked_entries_of_every_argument_are_ignored(op, poison, backend):
    """Results and gradients are those of the batch with the masked tokens removed, and zero where masked."""
    mask = torch.tensor([[True, False, True], [False] * 3, [False, True, True]])
    inputs = draw(op, (3, 3), mask=mask)
    upstream = None if op in (logits_klq_loss, linear_klq_loss) else upstream_for((3, 3))
    kept = {name: x[mask] if name in PER_TOKEN and x is not None else x for name, x in inputs.items()}
    kept["mask"] = mask[mask]
    few = None if upstream is None else {name: u[mask].double() for name, u in upstream.items()}
    want = run(op, exactly(kept), "reference", few)
    if upstream is not None:
        upstream = {name: u.masked_fill(~mask, poison) for name, u in upstream.items()}
    got = run(op, poisoned(inputs, mask, poison), backend, upstream)
    for name, exact in want.items():
        per_token = got[name].shape != exact.shape
        torch.testing.assert_close(got[name][mask] if per_token else got[name], exact.float(), rtol=1e-5, atol=3e-6)
        assert not per_token or (got[name][~mask] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("op", MODEL_OPS)
def test_nothing_unmasked_gives_zeros_with_zero_gradients(op, shape, backend):
    mask = torch.zeros(shape, dtype=torch.bool)
    upstream = None if op in (logits_klq_loss, linear_klq_loss) else upstream_for(shape)
    got = run(op, poisoned(draw(op, shape, mask=mask), mask), backend, upstream)
    assert all((x == 0).all() and x.dtype == F32 for x in got.values())


@pytest.mark.parametrize("op", MODEL_OPS)
def test_results_are_float64_for_float64_even_where_all_is_masked(op):
    inputs = draw(op, dtype=F64, mask=torch.zeros(2, 3, dtype=torch.bool))
    assert {x.dtype for x in run_all(op, inputs, "torch").values()} == {F64}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 3), (3, 1), (2, 1, 2)])
@pytest.mark.parametrize("op", MODEL_OPS)
def test_any_leading_shape(op, shape, backend):
    upstream = None if op in (logits_klq_loss, linear_klq_loss) else upstream_for(shape)
    got = check(op, draw(op, shape), backend, upstream)
    assert upstream is None or got["kl"].shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2,)])
def test_without_a_reference_there_is_no_kl(shape, backend):
    """… in an empty batch either."""
    _, riding = linear_klq_loss(
        **draw_heads(shape, heads="bias"), **draw_loss(shape), **VARIANT, return_stats=True, backend=backend
    )
    linear = linear_token_stats(**draw_heads(shape, heads=""), backend=backend)
    for stats in (token_stats(**draw_logits(shape, ref=False), backend=backend), linear, riding):
        assert stats.ref_logprob is None and stats.kl is None and stats.entropy.shape == shape


# Extremes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset, ref_offset", [(1000.0, -1000.0), (-1000.0, 1000.0), (-500.0, -500.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_offsets_of_the_logits_neither_overflow_nor_cost_digits(offset, ref_offset, temperature, backend):
    inputs = draw_logits((4,), vocab=70) | dict(temperature=temperature)
    inputs |= dict(logits=inputs["logits"] + offset, ref_logits=inputs["ref_logits"] + ref_offset)
    check(token_stats, inputs, backend, upstream_for((4,)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_single_tokens_far_from_the_rest(backend, tiles):
    """Running maxima jump by hundreds from tile to tile, up and down, at different places in the two models."""
    inputs = draw_logits((4,), 100)
    for row, (column, ref_column) in enumerate([(0, 99), (99, 0), (50, 50), (5, 6)]):
        inputs["logits"][row, column] += 300.0
        inputs["ref_logits"][row, ref_column] += 80.0
    check(token_stats, inputs, backend, upstream_for((4,)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["policy", "both", "reference", "policy here, reference there"])
@pytest.mark.parametrize("names", ["kl", "logprob entropy kl"])
def test_forbidden_tokens(where, names, backend):
    """p = 0 contributes nothing; p > 0 = q makes the KL infinite, and such a row passes no gradient through it."""
    inputs = draw_logits((4,), 33) | dict(tokens=torch.tensor([0, 1, 2, 32]))
    rows = slice(1, None)  # row 0 stays ordinary
    if where != "reference":
        inputs["logits"][rows, 20:24] = -INF
    if where in ("both", "reference"):
        inputs["ref_logits"][rows, 20:24] = -INF
    if where == "policy here, reference there":
        inputs["ref_logits"][rows, 8] = -INF
    got = check(token_stats, inputs, backend, upstream_for((4,), names))
    infinite = where in ("reference", "policy here, reference there")
    assert (got["kl"][rows] == INF).all() == infinite and got["kl"][0] < INF
    assert names != "kl" or not infinite or (got["grad of logits"][rows] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 40])
@pytest.mark.parametrize("heads", ["ref bias", "ref ref_bias", "ref bias ref_bias", "shared bias"])
def test_tokens_forbidden_by_the_bias(heads, workspace_bytes, backend, tiles):
    """The first and some later ones, so that whole tiles of the vocabulary hold no allowed token."""
    inputs = draw_heads(vocab=50, heads=heads) | dict(tokens=torch.arange(6).reshape(2, 3) + 24)
    for name in ("bias", "ref_bias"):
        if inputs[name] is not None:
            inputs[name][:16] = inputs[name][20:24] = inputs[name][32:48] = -INF
    inputs["workspace_bytes"] = workspace_bytes
    got = check(linear_token_stats, inputs, backend, upstream_for((2, 3)), slack=4e-6)  # KLs of 12 nats round so
    assert (got["kl"] == INF).all() == (heads == "ref ref_bias")
    assert inputs["bias"] is None or (got["grad of bias"][20:24] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 20])
@pytest.mark.parametrize("jumps", [(100.0, 0.0), (0.0, 100.0), (-100.0, 100.0)])
def test_biases_that_jump_in_the_middle_of_the_vocabulary(jumps, workspace_bytes, backend):
    """One token is masked: what its row would overflow to must not spread either."""
    inputs = draw_heads(vocab=70, heads="ref bias ref_bias") | dict(workspace_bytes=workspace_bytes)
    inputs["mask"] = torch.tensor([[True, True, False], [True, True, True]])
    for name, jump in zip(("bias", "ref_bias"), jumps, strict=True):
        inputs[name][35:] += jump
    check(linear_token_stats, inputs, backend, upstream_for((2, 3)), slack=4e-6)  # logits of 100 round to 4e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab, scale", [(7, 0.5), (100, 3.0)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_kl_of_1e_8_is_right_to_one_percent(vocab, scale, temperature, backend, tiles):
    logits = scale * torch.randn(4, vocab)
    inputs = dict(logits=logits, tokens=torch.zeros(4, dtype=torch.long), temperature=temperature)
    inputs["ref_logits"] = logits + 2e-4 * torch.randn(4, vocab)
    got = token_stats(**inputs, backend=backend).kl
    want = token_stats(**exactly(inputs)).kl
    assert (got >= 0).all() and (want < 1e-7).all()
    assert ((got - want).abs() <= 0.01 * want.clamp_min(1e-9)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0.1, 0.3])
def test_a_kl_on_either_side_of_the_switch_between_formulas(step, backend):
    """KLs of 0.005 and 0.05, where a series, the Bregman sum and Σ p log(p/q) meet."""
    logits = 2 * torch.randn(4, 130)
    inputs = dict(logits=logits, ref_logits=logits + step * torch.randn(4, 130), tokens=torch.arange(4))
    torch.testing.assert_close(
        token_stats(**inputs, backend=backend).kl.double(), token_stats(**exactly(inputs)).kl, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [5.0, 16.0])
def test_a_small_kl_by_one_forbidden_token(gap, backend):
    """−log(1 − q) for a token of probability q that the policy forbids: all of it sits where p = 0."""
    ref_logits = torch.randn(4, 33)
    ref_logits[:, 7] -= gap
    inputs = dict(logits=ref_logits.clone(), ref_logits=ref_logits, tokens=torch.arange(4))
    inputs["logits"][:, 7] = -INF
    want = -torch.log1p(-ref_logits.double().softmax(-1)[:, 7])
    torch.testing.assert_close(token_stats(**inputs, backend=backend).kl.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_a_small_kl_from_hidden_states_is_not_negative(step, dtype, backend):
    """Two products' roundings leave an absolute error; with equal hidden states and one head there is none."""
    inputs = draw_heads((4,), 130, 20, dtype, "shared bias")
    inputs["ref_hidden"] = inputs["hidden"] + (step * torch.randn(4, 20)).to(dtype)
    got, naive = (linear_token_stats(**inputs, backend=b).kl for b in (backend, "reference"))
    want = linear_token_stats(**exactly(inputs)).kl
    rounding = error(naive, want) if dtype != F32 else 0.0  # a CPU that multiplies in bfloat16 rounds the logits
    assert (got >= 0).all() and error(got, want) < 5e-6 + rounding
    assert step or (got < 1e-6).all()


# Memory: strides, workspace, in place


def spied_logits(monkeypatch):
    """weight's address -> (rows of its logits so far, bytes of the largest memory that held some)."""
    original, seen = torch_linear.head_logits, {}

    def spy(head, out):
        rows, most = seen.get(head.weight.untyped_storage().data_ptr(), (0, 0))
        held = max(most, out.untyped_storage().nbytes())
        seen[head.weight.untyped_storage().data_ptr()] = rows + len(out), held
        return original(head, out)

    monkeypatch.setattr(torch_linear, "head_logits", spy)
    return seen


@pytest.mark.parametrize("op", [linear_token_stats, linear_klq_loss])
def test_both_models_logits_fit_the_workspace_together(op, monkeypatch):
    """… in the forward and in the backward pass, where a row of each and a few tokens' columns fit at all."""
    inputs, seen = draw(op, SHAPE, VOCAB, mask=torch.ones(SHAPE, dtype=torch.bool)), spied_logits(monkeypatch)
    run_all(op, inputs | dict(workspace_bytes=WORKSPACE), "torch")
    assert len(seen) == 2 and WORKSPACE / 2 < sum(held for _, held in seen.values()) <= WORKSPACE


@pytest.mark.parametrize("op", [linear_token_stats, linear_klq_loss])
def test_masked_rows_cost_no_product_on_a_cpu(op, monkeypatch):
    mask = torch.tensor([[True, False, True], [False] * 3])
    inputs, seen = draw(op, mask=mask), spied_logits(monkeypatch)
    op(**inputs, backend="torch")
    assert [rows for rows, _ in seen.values()] == [2, 2]


@pytest.mark.parametrize("name", ["linear_stats", "linear_klq"])
def test_the_workspace_is_64_mib_on_a_cpu_unless_given(name, monkeypatch):
    op = linear_token_stats if name == "linear_stats" else linear_klq_loss
    original, found = getattr(torch_linear, name), []

    def spy(*given):
        found.extend(x for x in given if type(x) is int and x > 1)
        return original(*given)

    monkeypatch.setattr(torch_linear, name, spy)
    op(**draw(op), backend="torch")
    op(**draw(op), backend="torch", workspace_bytes=5000)
    assert found == [1 << 26, 5000]


LAYOUTS = {
    "all but the last step": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "every second vocabulary entry": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "time before batch": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "columns of a wider matrix": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "one row for all": lambda x: x[:1, :1].expand(x.shape),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_hidden_states_of_any_strides(layout, backend):
    change = LAYOUTS[layout]
    inputs = draw_logits()
    inputs |= {name: change(inputs[name]) for name in ("logits", "ref_logits")}
    assert not inputs["logits"].is_contiguous()
    check(token_stats, inputs, backend, upstream_for((2, 3)))
    heads = draw_heads(heads="ref bias")
    heads |= {name: change(heads[name]) for name in ("hidden", "ref_hidden")}
    check(linear_token_stats, heads, backend, upstream_for((2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_and_biases_of_any_strides(backend):
    heads = draw_heads(heads="ref bias ref_bias")
    heads |= {name: heads[name].t().contiguous().t() for name in ("weight", "ref_weight")}
    heads |= {name: heads[name].repeat_interleave(2)[::2] for name in ("bias", "ref_bias")}
    check(linear_token_stats, heads, backend, upstream_for((2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flat_and_four_dimensional_strided_logits(backend):
    wide = torch.randn(2, 2, 4, 33)
    flat = dict(logits=wide[0, 0].t()[:4].t(), ref_logits=wide[1, 1, :, ::8][:, :4], tokens=torch.randint(4, (4,)))
    check(token_stats, flat, backend, upstream_for((4,)))
    deep = dict(logits=wide[:, :, :-1], ref_logits=wide.transpose(0, 1)[:, :, 1:], tokens=torch.randint(33, (2, 2, 3)))
    check(token_stats, deep, backend, upstream_for((2, 2, 3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4,), (4, 1)], ids=["column", "last step"])
@pytest.mark.parametrize("op", MODEL_OPS)
def test_per_token_arguments_that_are_columns_of_wider_tensors(op, shape, backend):
    """tokens[:, −1:] and the like keep their stride when flattened."""
    mask = torch.tensor([True, True, False, True]).reshape(shape)
    inputs = draw(op, shape, mask=mask)
    strided = dict(inputs)
    for name in (*PER_TOKEN, "mask"):
        if inputs.get(name) is not None and inputs[name].shape == shape:
            strided[name] = torch.stack([inputs[name].flip(0), inputs[name]], 1)[:, 1]
            assert strided[name].stride(0) == 2
    assert equal(run_all(op, strided, backend), run_all(op, inputs, backend))


def run_all(op, inputs, backend, names=("logprob", "entropy", "kl")):
    """`run` with an upstream gradient of 1, expanded and hence of stride 0, for every result."""
    ones = torch.ones(()).expand(inputs["tokens"].shape)
    return run(op, inputs, backend, dict.fromkeys(names, ones) if op in MODEL_OPS[:2] else None)


def equal(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, LOSS_FACTOR])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_the_loss_in_place_leaves_its_gradient_where_the_logits_were(shape, factor, backend, tiles):
    """… equal to the one out of place, and no second [N, V] tensor is handed to the model."""
    mask = torch.rand(shape) < 0.7
    inputs = draw(logits_klq_loss, shape, mask=mask)
    values = inputs["values"].requires_grad_()
    grads = []
    for inplace in (False, True):
        leaf = inputs["logits"].clone().requires_grad_()
        logits = leaf * 1.0
        loss = logits_klq_loss(**(inputs | dict(logits=logits)), inplace=inplace, backend=backend) * factor
        grads.append((loss, *torch.autograd.grad(loss, (logits, values))))
    for other, own in zip(*grads, strict=True):
        torch.testing.assert_close(own, other)
    assert grads[1][1].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_refuses_logits_that_cannot_be_viewed_as_rows(backend):
    inputs = draw(logits_klq_loss)
    inputs["logits"] = torch.cat([inputs["logits"]] * 2, 1)[:, :3]
    with pytest.raises(ValueError, match="in place needs logits"):
        logits_klq_loss(**inputs, inplace=True, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_another_use_of_logits_that_the_loss_overwrote(backend):
    inputs = draw(logits_klq_loss)
    logits = inputs["logits"].requires_grad_() * 1.0
    other = (logits**2).sum()
    loss = logits_klq_loss(**(inputs | dict(logits=logits)), inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + other).backward()


# Autograd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODEL_OPS)
def test_gradients_reach_the_policy_and_the_values_only(op, backend):
    inputs = draw(op, mask=torch.ones(2, 3, dtype=torch.bool))
    leaves = {k: x.requires_grad_() for k, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    out = op(**inputs, backend=backend)
    (out if isinstance(out, Tensor) else out.logprob.sum() + out.entropy.sum() + out.kl.sum()).backward()
    assert {name for name, x in leaves.items() if x.grad is not None} == set(LEAVES) & leaves.keys()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODEL_OPS[:2])
def test_the_reference_s_log_probs_hold_no_graph(op, backend):
    """Kept in a rollout, they would keep the logits alive."""
    inputs = draw(op)
    leaf = {k: inputs[k].requires_grad_() for k in ("logits", "hidden") if k in inputs}
    stats = op(**(inputs | leaf), backend=backend)
    assert stats.logprob.requires_grad and not stats.ref_logprob.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", [linear_token_stats, linear_klq_loss])
def test_a_shared_head_gets_the_policy_s_gradient_only(op, backend):
    model = draw_heads(heads="shared bias")
    model |= draw_loss(ref_logprobs=False) | VARIANT if op is linear_klq_loss else {}
    apart = model | dict(ref_weight=model["weight"].clone(), ref_bias=model["bias"].clone())
    for own, other in zip(run_all(op, model, backend).values(), run_all(op, apart, backend).values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("op", [linear_token_stats, linear_klq_loss])
def test_gradients_not_asked_for_are_not_computed(op, wanted, backend, monkeypatch):
    """A frozen trunk or head saves its matrix product, and the others' gradients stay as they were."""
    name = "linear_grad" if op is linear_token_stats else "linear_klq"
    original, made = getattr(torch_linear, name), []

    def spy(*args, **given):
        out = original(*args, **given)
        made.append(next(x for x in (out if name == "linear_klq" else [out]) if isinstance(x, Head)))
        return out

    inputs = draw_heads(heads="bias") | (draw_loss() | VARIANT if op is linear_klq_loss else {})
    want = run_all(op, inputs, backend, ("logprob", "entropy"))
    monkeypatch.setattr(torch_linear, name, spy)
    leaves = {k: inputs[k].clone().requires_grad_() for k in wanted}
    out = op(**(inputs | leaves), backend=backend)
    (LOSS_FACTOR * out if isinstance(out, Tensor) else out.logprob + out.entropy).sum().backward()
    assert [k for k, g in made[0]._asdict().items() if g is not None] == list(wanted)
    for k, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, want[f"grad of {k}"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODEL_OPS[2:])
def test_a_frozen_model_costs_no_gradient(op, backend, monkeypatch):
    inputs = draw(op)
    values = inputs["values"].requires_grad_()
    want = torch.autograd.grad(op(**inputs, backend="reference"), values)
    inputs_kind, step = ("logits", "logits_grad") if op is logits_klq_loss else ("linear", "chunk_grad")
    monkeypatch.setattr(autograd.kernels(backend, inputs_kind), step, None)
    torch.testing.assert_close(torch.autograd.grad(op(**inputs, backend=backend), values), want)


@pytest.mark.parametrize("op", MODEL_OPS[2:])
def test_without_grad_mode_no_gradient_is_computed(op, monkeypatch):
    """Evaluation pays for the loss alone, although the model could learn."""
    inputs = draw(op)
    inputs |= {k: inputs[k].requires_grad_() for k in LEAVES if inputs.get(k) is not None}
    kind, step = ("logits", "logits_grad") if op is logits_klq_loss else ("linear", "chunk_grad")
    monkeypatch.setattr(autograd.kernels("torch", kind), step, None)
    with torch.no_grad():
        assert op(**inputs, backend="torch").isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", MODEL_OPS)
def test_without_grad_mode_there_is_no_graph(op, backend):
    inputs = draw(op, mask=torch.ones(2, 3, dtype=torch.bool))
    leaves = {k: inputs[k].requires_grad_() for k in LEAVES if k in inputs and inputs[k] is not None}
    with torch.no_grad():
        outs = op(**inputs, backend=backend)
    outs, want = ((x,) if isinstance(x, Tensor) else x for x in (outs, op(**exactly(inputs), backend="reference")))
    assert leaves and not any(x.requires_grad for x in outs)
    assert max(error(x, y.detach()) for x, y in zip(outs, want)) < 5e-6


INPLACE = partial(logits_klq_loss, inplace=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, LOSS_FACTOR])
@pytest.mark.parametrize("op", [*MODEL_OPS, INPLACE])
def test_a_kept_graph_gives_the_gradient_twice(op, factor, backend):
    inputs = draw(getattr(op, "func", op), mask=torch.ones(2, 3, dtype=torch.bool))
    leaves = {k: inputs[k].requires_grad_() for k in LEAVES if inputs.get(k) is not None}
    out = op(**(inputs | {k: x * 1.0 for k, x in leaves.items()}), backend=backend)
    total = factor * (out if isinstance(out, Tensor) else out.logprob.sum() + out.kl.sum())
    once = [g.clone() for g in torch.autograd.grad(total, leaves.values(), retain_graph=True)]
    torch.testing.assert_close(list(torch.autograd.grad(total, leaves.values())), once)


@pytest.mark.parametrize("op", [logits_klq_loss, INPLACE, linear_klq_loss])
def test_what_becomes_of_a_gradient_does_not_change_the_next_one(op):
    """A caller who keeps the graph may clip the first pass's gradient in place."""
    inputs = draw(getattr(op, "func", op))
    values = inputs["values"].requires_grad_()
    loss = op(**inputs, backend="torch")
    (first,) = torch.autograd.grad(loss, values, retain_graph=True)
    want = first.clone()
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, values)[0], want)


def under_autocast(op, **arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return op(**arguments)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("op", [*MODEL_OPS, INPLACE])
def test_autocast_rounds_nothing(op, backend):
    """Training loops compute their losses under it: products of float32 stay accurate, results and gradients alike."""
    inputs = draw(getattr(op, "func", op))
    upstream = upstream_for((2, 3)) if op in MODEL_OPS[:2] else None
    if op is INPLACE:  # must not overwrite a leaf, nor what the other call reads
        op = lambda logits, **rest: INPLACE(logits * 1.0, **rest)  # noqa: E731
    assert equal(run(partial(under_autocast, op), inputs, backend, upstream), run(op, inputs, backend, upstream))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_autocast_rounds_no_lambda_returns(backend):
    batch = draw_returns([130, 40], 130) | dict(trace_weights=None, tau=0.7, backend=backend)
    for got, want in zip(under_autocast(lambda_returns, **batch), lambda_returns(**batch), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, LOSS_FACTOR])
@pytest.mark.parametrize("op", [logits_klq_loss, INPLACE, linear_klq_loss])
def test_a_second_backward_pass_without_the_graph(op, factor, backend):
    """It raises what autograd raises, or, where nothing was freed, gives the gradient again."""
    inputs = draw(getattr(op, "func", op))
    leaf = inputs["values"].requires_grad_()
    loss = op(**inputs, backend=backend)
    loss.backward(torch.tensor(factor))
    once = leaf.grad.clone()
    try:
        loss.backward(torch.tensor(factor))
    except RuntimeError as raised:
        assert "second time" in str(raised)
    else:
        torch.testing.assert_close(leaf.grad, 2 * once)


@pytest.mark.parametrize("op", MODEL_OPS)
def test_an_undefined_upstream_gradient_is_none(op):
    """What autograd hands to a node whose result contributed nothing."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    inputs = draw(op)
    name = "logits" if "logits" in inputs else "hidden"
    out = op(**(inputs | {name: inputs[name].requires_grad_()}), backend="torch")
    out = out if isinstance(out, Tensor) else out.logprob.sum()
    (grad,) = torch.autograd.grad(Nothing.apply(out), inputs[name], allow_unused=True)
    assert grad is None or (grad == 0).all()


# Random batches


BATCHES = dict(
    seed=st.integers(0, 10**6), shape=st.one_of(st.tuples(st.integers(0, 7)), st.tuples(*[st.integers(0, 3)] * 2)),
    vocab=st.integers(1, 90), width=st.integers(1, 20), density=st.sampled_from([0.0, 0.5, 1.0]),
    temperature=st.floats(0.3, 3.0), heads=st.sampled_from(HEADS), dtype=st.sampled_from(DTYPES),
    loss=st.sampled_from(LOSSES),
)  # fmt: skip


def check_random_batch(backend, seed, shape, vocab, width, density, temperature, heads, dtype, loss):
    """All four operations with NaN in every masked entry. Roundings get more room than elsewhere: temperatures of 0.3
    multiply them, and among thousands of batches `reference` is sometimes lucky."""
    near = partial(check, backend=backend, slack=5e-5 + 2 * torch.finfo(dtype).eps)
    torch.manual_seed(seed)
    mask = torch.rand(shape) < density
    rest = dict(mask=mask, temperature=temperature)
    model = draw_heads(shape, vocab, width, dtype, heads) | rest
    alone = model["ref_hidden"] is None
    upstream = upstream_for(shape, "logprob entropy" if alone else "logprob entropy kl")
    near(linear_token_stats, poisoned(model, mask), upstream=upstream)
    near(token_stats, poisoned(draw_logits(shape, vocab, dtype) | rest, mask), upstream=upstream_for(shape))
    given = draw_loss(shape, dtype, mask) | VARIANT | dict(loss=loss, temperature=temperature)
    near(logits_klq_loss, poisoned(draw_logits(shape, vocab, dtype, ref=False) | given, mask))
    given["ref_logprobs"] = given["ref_logprobs"] if alone else None
    near(linear_klq_loss, poisoned(model | given, mask))


@given(**BATCHES)
def test_torch_on_random_batches(**batch):
    check_random_batch("torch", **batch)


@TRITON
@pytest.mark.parametrize("backend", ["triton"])
@given(**BATCHES)
@settings(max_examples=settings.default.max_examples // 5)
def test_triton_on_random_batches(backend, **batch):
    check_random_batch(backend, **batch)


@given(
    seed=st.integers(0, 10**6), loss=st.sampled_from(LOSSES), tau=st.floats(0.01, 3), clip=st.floats(0.01, 3),
    log_ratio_clip=st.floats(0.01, 3), delta=st.floats(0.01, 3), dtype=st.sampled_from([F32, F64]),
)  # fmt: skip
@settings(max_examples=5 * settings.default.max_examples)
def test_klq_terms_are_the_loss_and_its_derivatives(seed, loss, dtype, **thresholds):
    """… as autograd has them, in every variant, with NaN where masked. It holds for float32 too: a clamp that doesn't
    bind must not hide the gradient because of a rounding."""
    torch.manual_seed(seed)
    mask = torch.rand(40) < 0.8
    batch = {name: torch.randn(40, dtype=dtype).masked_fill(~mask, NAN) for name in PER_TOKEN[-5:]}
    logp, v = (x.requires_grad_() for x in (torch.randn(40, dtype=dtype), batch.pop("values")))
    inputs, settings = LossInputs(logprobs=logp, values=v, mask=mask, **batch), LossSettings(loss=loss, **thresholds)
    want = klq_loss(**inputs._asdict(), **settings._asdict(), reduction="none").sum()
    total, dlogp, dv = klq_terms(inputs._replace(logprobs=logp.detach(), values=v.detach()), settings)
    for got, exact in zip((total, dlogp, dv), (want.detach(), *torch.autograd.grad(want, (logp, v))), strict=True):
        torch.testing.assert_close(got, exact)


# λ-returns


def draw_returns(lengths, steps, dtype=F32, poison=NAN):
    """Right-padded rows of these lengths with `poison` in the padding."""
    mask = torch.arange(steps)[None, :] < torch.tensor(lengths)[:, None]
    names = ("rewards", "values", "logprobs", "ref_logprobs", "trace_weights")
    batch = {name: torch.randn(mask.shape).masked_fill(~mask, poison).to(dtype) for name in names}
    batch["trace_weights"] = batch["trace_weights"].sigmoid()
    return batch | dict(mask=mask)


def check_returns(batch, backend, **coefficients):
    coefficients = dict(tau=0.7, gamma=0.98, lam=0.95, alpha=0.6) | coefficients
    want = lambda_returns(**exactly(batch), **coefficients, backend="reference")._asdict()
    naive = lambda_returns(**batch, **coefficients, backend="reference")._asdict()
    got = lambda_returns(**batch, **coefficients, backend=backend)._asdict()
    assert_no_worse(got, naive, want)
    assert all(x.dtype == F32 and (x[~batch["mask"]] == 0).all() for x in got.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("steps", [1, 2, 33, 130])
@pytest.mark.parametrize("retrace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_lambda_returns(steps, retrace, dtype, backend):
    batch = draw_returns([steps, 0, steps // 2, min(steps, 1)], steps, dtype)
    check_returns(batch if retrace else batch | dict(trace_weights=None), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coefficients", [dict(lam=0.0), dict(gamma=0.0), dict(lam=1.0, gamma=1.0, alpha=1.0)])
def test_lambda_returns_at_the_ends_of_their_ranges(coefficients, backend):
    check_returns(draw_returns([150, 70], 150) | dict(trace_weights=None), backend, **coefficients)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", [INF, -INF, 1e30])
def test_padding_of_lambda_returns_is_ignored(poison, backend):
    check_returns(draw_returns([5, 0, 9], 9, poison=poison), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1)])
def test_smallest_lambda_returns(shape, backend):
    check_returns(draw_returns([shape[1]] * shape[0], shape[1]), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["every second row", "columns of a wider tensor", "time first", "expanded"])
def test_strided_lambda_returns(layout, backend):
    change = {
        "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
        "columns of a wider tensor": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
        "time first": lambda x: x.t().contiguous().t(),
        "expanded": lambda x: x[:1].expand(x.shape),
    }[layout]
    check_returns({name: change(x) for name, x in draw_returns([9, 4, 0], 9).items()}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lambda_returns_of_tensors_each_of_which_lies_otherwise(backend):
    """Every argument is a view of a tensor of its own width: no stride serves for another."""
    batch = draw_returns([9, 4, 0], 9)
    batch = {name: torch.cat([x, x[:, :i]], 1)[:, :9] for i, (name, x) in enumerate(batch.items())}
    assert len({x.stride(0) for x in batch.values()}) == len(batch)
    check_returns(batch, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hole_in_the_mask_is_an_error(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("on a GPU the mask is asserted on the device, which takes the process down")
    batch = draw_returns([9, 9], 9)
    batch["mask"][1, 3] = False
    with pytest.raises(ValueError, match=r"mask must be right-padded.*row 1"):
        lambda_returns(**batch, tau=1.0, backend=backend)


@given(seed=st.integers(0, 10**6), lengths=st.lists(st.integers(0, 200), min_size=1, max_size=5), retrace=st.booleans())
def test_torch_lambda_returns_of_random_lengths(seed, lengths, retrace):
    torch.manual_seed(seed)
    batch = draw_returns(lengths, 200)
    check_returns(batch if retrace else batch | dict(trace_weights=None), "torch")


# Triton's paths for large inputs, reached by small tiles


@TRITON
@pytest.mark.parametrize("backend", ["triton"])
class TestTritonTiles:
    """The vocabulary in several blocks, splits and slabs, time in several blocks."""

    @pytest.mark.parametrize("rows_per_split", [1, 264])
    def test_splits_and_blocks_without_an_allowed_token(self, rows_per_split, small_tiles, backend, monkeypatch):
        """Row 0: the policy's first blocks; row 1: the reference's, where the policy has p > 0; row 2: both; row 3:
        all blocks but one."""
        monkeypatch.setattr(small_tiles, "ROWS_PER_SPLIT", rows_per_split)
        inputs = draw_logits((4,), 60) | dict(tokens=torch.full((4,), 33))
        inputs["logits"][0, :20] = inputs["ref_logits"][1, :20] = -INF
        inputs["logits"][2, :20] = inputs["ref_logits"][2, :20] = -INF
        inputs["logits"][3, :32] = inputs["logits"][3, 48:] = inputs["ref_logits"][3, 48:] = -INF
        got = check(token_stats, inputs, backend, upstream_for((4,)))
        assert (got["kl"] == INF).tolist() == [False, True, False, False]

    @pytest.mark.parametrize(
        "heads, dtype", [("bias", torch.float16), ("ref ref_bias", torch.bfloat16), ("shared bias", F32)]
    )
    def test_hidden_states_over_row_tiles_and_splits(self, heads, dtype, small_tiles, backend):
        """Two tiles of rows, the first of which is all masked; two of the hidden width; a split of one tile each."""
        mask = torch.arange(20) >= 17
        inputs = draw_heads((20,), 40, 20, dtype, heads) | dict(mask=mask)
        upstream = upstream_for((20,), "logprob entropy" if heads == "bias" else "logprob entropy kl")
        check(linear_token_stats, poisoned(inputs, mask), backend, upstream)

    @pytest.mark.parametrize("retrace", [False, True])
    def test_returns_over_several_blocks_of_time(self, retrace, small_tiles, backend):
        """Rows that end inside, at and just after the border of a block of 16 steps."""
        batch = draw_returns([50, 31, 32, 33, 0, 16], 50)
        check_returns(batch if retrace else batch | dict(trace_weights=None), backend)
