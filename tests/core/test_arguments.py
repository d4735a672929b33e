"""One table of every public function of klq_kernels and klq_edu.core with arguments that it accepts, and what must
hold for each: nothing broadcasts, no coefficient is out of range, no list passes for a tensor, results are float64 only
if every floating-point input is.
"""

import inspect
import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import klq_kernels
from klq_edu.core import estimators, improvement, objectives, returns, tree
from klq_kernels import loss, reference, types

B, T, V, H = 2, 3, 5, 4
F32, F64 = torch.float32, torch.float64
TREE = tree.TokenTree.random(3, 2)
UNIT, STEP = {"gamma", "lam"}, {"alpha"}  # in [0, 1], in (0, 1]; every other float is > 0
ANCHORS = [f"{part}anchors[{i}]" for i in range(2) for part in ("", "the coefficient of ")]


def token_data(shape=(B, T)):
    """An argument of every name that a function of tokens may have."""
    rng = torch.Generator().manual_seed(0)
    per_token = "rewards values logprobs ref_logprobs targets old_logprobs old_values trace_weights behaviour_logprobs "
    per_token += "advantages returns td_errors log_ratio kl x centre"
    made = {name: torch.randn(shape, generator=rng) for name in per_token.split()}
    vocab = dict(logits=V, ref_logits=V, hidden=H, ref_hidden=H + 1, logp=V, logq=V, policy=V, ref=V, q=V)
    made |= {name: torch.randn(*shape, size, generator=rng).softmax(-1) for name, size in vocab.items()}
    made |= dict(weight=torch.randn(V, H, generator=rng), ref_weight=torch.randn(V, H + 1, generator=rng))
    made |= dict(bias=torch.randn(V, generator=rng), ref_bias=torch.randn(V, generator=rng), action_value=made["q"])
    made |= dict(tokens=torch.zeros(shape, dtype=torch.long), mask=torch.ones(shape, dtype=torch.bool))
    made |= dict.fromkeys(("tau", "alpha", "lam", "clip", "log_ratio_clip", "delta", "coef", "beta", "radius"), 0.5)
    return made | dict(gamma=0.9, temperature=1.5)


def entry(function, **change):
    """(function, its arguments from `token_data`, changed)."""
    made = token_data()
    names = inspect.signature(function).parameters
    return function, {name: made[name] for name in names if name in made} | change


def policy_method(method, **coefficients):
    return lambda policy, **kw: method(TREE, policy, **kw), dict(policy=TREE.ref, **coefficients)


def public():
    """Name -> public function, found in the modules."""
    found = {f"klq_kernels.{name}": getattr(klq_kernels, name) for name in klq_kernels.__all__}
    for module in (reference, loss, types, estimators, improvement, objectives, returns):
        short = module.__name__.rsplit(".")[-1]
        found |= {f"{short}.{n}": f for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__}
    found |= {f"tree.{name}": f for name, f in vars(tree.TokenTree).items()}
    return {k: f for k, f in found.items() if inspect.isfunction(f) and not k.split(".")[1].startswith("_")}


MANUAL = {
    "types.clean": (
        lambda mask, **xs: types.clean(mask, *xs.values()),
        {k: token_data()[n] for k, n in {"mask": "mask", "tensors[0]": "x", "tensors[1]": "values"}.items()},
    ),
    "types.cast": (lambda **xs: types.cast(*xs.values()), {"tensors[0]": torch.ones(2)}),
    "types.narrow": (lambda **xs: types.narrow(*xs.values()), {"tensors[0]": torch.ones(2)}),
    "types.result_dtype": (lambda **xs: types.result_dtype(*xs.values()), {"tensors[0]": torch.ones(2)}),
    "improvement.kl_penalised_argmax": (
        lambda q, **xs: improvement.kl_penalised_argmax(q, *zip(*[iter(xs.values())] * 2)),
        dict(zip(["q", *ANCHORS], [*(token_data()[n] for n in ("q", "ref")), 0.5, token_data()["policy"], 0.5])),
    ),
    "improvement.klq_step": entry(improvement.klq_step, advantages=token_data()["q"]),
    "improvement.soft_policy_iteration": (
        lambda **kw: improvement.soft_policy_iteration(TREE, sweeps=0, **kw), dict(tau=0.5, gamma=0.9)
    ),
    "klq_kernels.linear_klq_loss": entry(klq_kernels.linear_klq_loss, ref_logprobs=None),
    "tree.optimum": (lambda **kw: TREE.optimum(**kw), dict(tau=0.5, gamma=0.9)),
    "tree.evaluate": policy_method(tree.TokenTree.evaluate, tau=0.5, gamma=0.9),
    "tree.objective": policy_method(tree.TokenTree.objective, tau=0.5, gamma=0.9),
    "tree.td_errors": policy_method(
        tree.TokenTree.td_errors, values=torch.zeros(len(TREE.ref), dtype=torch.float64), tau=0.5, gamma=0.9
    ),
    "tree.attained": policy_method(tree.TokenTree.attained, tau=0.5),
    "tree.rollout": (lambda policy: TREE.rollout(policy, 4), dict(policy=TREE.ref)),
    "tree.with_ref": (lambda ref: TREE.with_ref(ref), dict(ref=TREE.ref)),
} | {
    f"tree.{name}": policy_method(getattr(tree.TokenTree, name))
    for name in ("state_kl", "visits", "expected_reward", "sequence_kl", "sequence_distribution")
}  # fmt: skip
NOTHING_TO_CHECK = {  # checked by callers
    "tree.completions", "loss.klq_terms", "loss.check_settings", "types.select", "loss.plain_error",
    "loss.value_clipped_error", "loss.ratio_clipped_error", "loss.q_of", "loss.add_q",
}  # fmt: skip
ONE_TENSOR = {"estimators.k1", "estimators.k2", "estimators.k3", "reference.shift_left", "types.cast",
              "types.narrow", "types.result_dtype"}  # fmt: skip
OWN_DTYPE = {"types.zero_unless", "reference.shift_left", "types.narrow", "types.result_dtype",
             "improvement.soft_policy_iteration"}  # fmt: skip
TABLE = {k: MANUAL.get(k) or entry(f) for k, f in public().items() if k not in NOTHING_TO_CHECK}
each = pytest.mark.parametrize("name", TABLE)


def tensors(args):
    return {k: x for k, x in args.items() if isinstance(x, torch.Tensor)}


def smaller(shape):
    """Every shape but its own that broadcasts to this one."""
    tails = (shape[i:] for i in range(len(shape) + 1))
    shapes = itertools.chain(*(itertools.product(*({1, n} for n in tail)) for tail in tails))
    return [s for s in shapes if s != tuple(shape)]


@each
def test_the_arguments_are_accepted_and_reach_every_parameter(name):
    """A new public function without arguments here, or a new parameter that nothing covers, fails."""
    function, args = TABLE[name]
    function(**args)
    assert args, f"{name} needs arguments in the table, or a line in NOTHING_TO_CHECK"
    if name not in MANUAL:
        required = {k for k, p in inspect.signature(function).parameters.items() if p.default is inspect._empty}
        assert required <= set(args)


@each
@given(data=st.data())
def test_no_argument_broadcasts(name, data):
    function, args = TABLE[name]
    if name in ONE_TENSOR or not tensors(args):
        return
    wrong = data.draw(st.sampled_from(sorted(tensors(args))))
    shapes = smaller(args[wrong].shape)
    if name.endswith("logits_klq_loss") and wrong == "logits":
        shapes.remove((B, T, 1))  # a vocabulary of one token
    shape = data.draw(st.sampled_from(shapes))
    x = args[wrong][tuple(0 for _ in range(args[wrong].dim() - len(shape)))]
    x = x[tuple(slice(n) for n in shape)].clone()
    with pytest.raises(ValueError, match=rf"(^|\W){re.escape(wrong)}\b|{re.escape(wrong)} "):
        function(**(args | {wrong: x}))


@each
@pytest.mark.parametrize("kind", ["list", "array", "number", "None"])
def test_what_is_no_tensor_is_named(name, kind):
    function, args = TABLE[name]
    parameters = inspect.signature(function).parameters
    for wrong, x in tensors(args).items():
        given = {"list": x.tolist(), "array": x.numpy(), "number": 1.0, "None": None}[kind]
        if given is None and ((wrong in parameters and parameters[wrong].default is None) or name in ONE_TENSOR):
            continue
        error = (TypeError, ValueError) if given is None else TypeError
        with pytest.raises(error, match=re.escape(wrong)) as raised:
            function(**(args | {wrong: given}))
        assert "no attribute" not in str(raised.value)


BAD = (-1.0, float("nan"), float("inf"), None, "x", True, [0.5], np.ones(2), torch.ones(2), torch.tensor(True))


@each
def test_a_bad_coefficient_is_named(name):
    function, args = TABLE[name]
    parameters = inspect.signature(function).parameters
    for wrong in (k for k, x in args.items() if isinstance(x, float)):
        zero = [] if wrong in UNIT or wrong == "beta" or wrong in ANCHORS else [0.0, torch.tensor(0.0)]
        bad = [*BAD, *zero, *([1.1] if wrong in UNIT | STEP else [])]
        for x in bad:
            if x is None and wrong in parameters and parameters[wrong].default is None:
                continue
            with pytest.raises((TypeError, ValueError), match=rf"^{re.escape(wrong)} must"):
                function(**(args | {wrong: x}))


@each
def test_a_coefficient_may_be_a_scalar_tensor_or_a_numpy_number(name):
    function, args = TABLE[name]
    for make in (torch.tensor, np.float32, np.float64):
        function(**{k: make(x) if isinstance(x, float) else x for k, x in args.items()})


# dtypes


def floats(result):
    """The floating-point tensors in a result."""
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() else []
    return [x for part in result for x in floats(part)] if isinstance(result, (tuple, list)) else []


def cast(args, dtype, only=None):
    """Arguments with the floating-point tensors (or those of these names) in this dtype."""
    chosen = tensors(args) if only is None else only
    return {k: x.to(dtype) if k in chosen and x.is_floating_point() else x for k, x in args.items()}


def groups(args):
    """Names of floating-point tensors; a head's hidden states and weight must share a dtype."""
    names = [k for k, x in tensors(args).items() if x.is_floating_point() and k not in ("weight", "ref_weight")]
    return [[k, k.replace("hidden", "weight")] if "hidden" in k else [k] for k in names]


def outputs(function, args):
    """Detached results, then gradients in every floating-point argument that has one."""
    leaves = {k: x.clone().requires_grad_() for k, x in tensors(args).items() if x.is_floating_point()}
    results = floats(function(**(args | leaves)))
    if any(x.requires_grad for x in results):
        sum(x.sum() for x in results if x.requires_grad).backward()
    grads = {k: x.grad for k, x in leaves.items() if x.grad is not None}
    assert all(g.dtype == args[k].dtype for k, g in grads.items()), "a gradient has the dtype of its leaf"
    return [x.detach() for x in results] + list(grads.values()), {x.dtype for x in results}


MASKS = dict(full=[3, 3], part=[3, 1], none=[0, 0])


def batches(function, args):
    """`args` for each backend and mask that the function takes, and for no tokens at all."""
    backends = (None, "torch", "reference") if "backend" in inspect.signature(function).parameters else ()
    for some in [args | dict(backend=b) for b in backends] or [args]:
        for lengths in MASKS.values() if "mask" in args else ():
            yield some | dict(mask=torch.arange(T) < torch.tensor(lengths)[:, None])
        heads = ("weight", "bias")
        yield {k: x[:0] if k in tensors(args) and not k.endswith(heads) else x for k, x in some.items()}


@pytest.mark.parametrize("name", [k for k in TABLE if not k.startswith("tree.") and k not in OWN_DTYPE])
def test_results_are_float64_only_if_every_floating_input_is(name):
    function, args = TABLE[name]
    for batch in batches(function, args):
        doubles = cast(batch, F64)
        want, dtypes = outputs(function, batch)
        assert F64 not in dtypes and outputs(function, cast(batch, torch.bfloat16))[1] == dtypes
        assert outputs(function, doubles)[1] == ({F64} if dtypes else set())
        for some in groups(args) if len(groups(args)) > 1 else []:
            for mixed in (cast(batch, F64, some), cast(doubles, F32, some)):
                got, dtypes = outputs(function, mixed)
                assert F64 not in dtypes, f"{some} beside the others"
                for x, y in zip(got, want, strict=True):
                    torch.testing.assert_close(x.to(y.dtype), y)


@pytest.mark.parametrize("name", [k for k in TABLE if k.startswith("tree.")])
def test_a_tree_computes_in_float64_whatever_the_policy_is_in(name):
    function, args = TABLE[name]
    halves = cast(args, F64) if name == "tree.rollout" else cast(cast(args, torch.bfloat16), F32)
    halves = {k: x / x.sum(-1, keepdim=True) if isinstance(x, torch.Tensor) else x for k, x in halves.items()}
    assert {x.dtype for x in floats(function(**halves))} <= {F64}


@pytest.mark.parametrize("name", [name for name in klq_kernels.__all__ if name.islower()])
def test_triton_refuses_any_float64_by_name(name):
    function, args = TABLE[f"klq_kernels.{name}"]
    for some in groups(args):
        with pytest.raises(TypeError, match=f"got float64 {some[0]}"):
            function(**cast(args, F64, some), backend="triton")


@pytest.mark.parametrize("name", ["logits_klq_loss", "linear_klq_loss"])
def test_return_stats_and_the_loss_share_a_dtype(name):
    function, args = TABLE[f"klq_kernels.{name}"]
    for some in groups(args):
        for backend in (None, "torch", "reference"):
            out = function(**cast(args, F64, some), return_stats=True, backend=backend)
            assert {x.dtype for x in floats(out)} == {F32}


def test_a_float_mask_is_refused_everywhere():
    for function, args in TABLE.values():
        if "mask" in args:
            with pytest.raises(TypeError, match="mask must be boolean"):
                function(**(args | dict(mask=args["mask"].float())))
