"""Every wrong argument raises the named exception, and the message names the argument."""

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch

from klq_kernels import (
    checks,
    lambda_returns,
    linear_klq_loss,
    linear_token_q,
    linear_token_stats,
    logits_klq_loss,
    token_q,
    token_stats,
)

B, T, V, H = 2, 3, 5, 4
NAN, INF = float("nan"), float("inf")


def good(op, shape=(B, T)):
    """Arguments that `op` accepts, with a reference, biases and old quantities where it takes them."""
    per_token = {"rewards", "values", "logprobs", "ref_logprobs", "targets", "old_logprobs", "old_values"}
    made = {name: torch.zeros(shape) for name in per_token}
    made |= dict(tokens=torch.zeros(shape, dtype=torch.long), mask=torch.ones(shape, dtype=torch.bool), tau=0.5)
    made |= dict(logits=torch.zeros(*shape, V), ref_logits=torch.zeros(*shape, V), trace_weights=torch.ones(shape))
    made |= dict(hidden=torch.zeros(*shape, H), weight=torch.zeros(V, H), bias=torch.zeros(V))
    made |= dict(ref_hidden=torch.zeros(*shape, H + 1), ref_weight=torch.zeros(V, H + 1), ref_bias=torch.zeros(V))
    made |= {} if op is not linear_klq_loss else dict(ref_logprobs=None)
    return {name: made[name] for name in inspect.signature(op).parameters if name in made}


OPS = (token_stats, linear_token_stats, lambda_returns, logits_klq_loss, linear_klq_loss, token_q, linear_token_q)
MODEL_OPS = tuple(op for op in OPS if op is not lambda_returns)
LINEAR_OPS = (linear_token_stats, linear_klq_loss)
LOSS_OPS = (logits_klq_loss, linear_klq_loss)
Q_OPS = (token_q, linear_token_q)
NARROW = torch.zeros(B, 1)  # would broadcast silently


def each(ops, *rows):
    """(op, change, exception, message) for every op and row."""
    return [pytest.param(op, *row, id=f"{op.__name__}-{row[2]}-{i}") for op in ops for i, row in enumerate(rows)]


WRONG = [
    # dtypes
    *each((token_stats, logits_klq_loss), (dict(logits=torch.zeros(B, T, V).int()), TypeError, "logits must be a")),
    *each((token_stats,), (dict(ref_logits=torch.zeros(B, T, V).int()), TypeError, "ref_logits must be a")),
    *each(
        LINEAR_OPS,
        (dict(hidden=torch.zeros(B, T, H).int(), weight=torch.zeros(V, H).int()), TypeError, "hidden must be a"),
        (dict(weight=torch.zeros(V, H).bfloat16()), TypeError, "hidden and weight must share a dtype"),
        (dict(ref_weight=torch.zeros(V, H + 1).half()), TypeError, "ref_hidden and ref_weight must share a dtype"),
    ),
    *each(LOSS_OPS, (dict(values=torch.zeros(B, T).int()), TypeError, "values must be a floating-point")),
    *each(LOSS_OPS, (dict(mask=None), TypeError, "mask must be a torch.Tensor")),
    *each(
        MODEL_OPS,
        (dict(tokens=torch.zeros(B, T)), TypeError, "tokens must hold integer ids"),
        (dict(tokens=torch.zeros(B, T, dtype=torch.bool)), TypeError, "tokens must hold integer ids"),
    ),
    *each(
        OPS,
        (dict(mask=torch.ones(B, T)), TypeError, "mask must be boolean"),
        (dict(mask=torch.ones(B, T, dtype=torch.long)), TypeError, "mask must be boolean"),
    ),
    *each((lambda_returns,), (dict(rewards=torch.zeros(B, T).int()), TypeError, "rewards must be a floating-point")),
    # heads that do not fit
    *each(
        LINEAR_OPS,
        (dict(weight=torch.zeros(V, H + 2)), ValueError, r"weight must be \[V, H\] with H = 4"),
        (dict(weight=torch.zeros(H)), ValueError, r"weight must be \[V, H\]"),
        (dict(ref_weight=torch.zeros(V, H)), ValueError, r"ref_weight must be \[V, H\] with H = 5"),
        (dict(bias=torch.zeros(V + 1)), ValueError, "bias must have the shape of weight's rows"),
        (dict(bias=torch.zeros(1)), ValueError, "bias must have the shape of weight's rows"),
        (dict(ref_bias=torch.zeros(V + 1)), ValueError, "ref_bias must have the shape of ref_weight's rows"),
        (dict(ref_weight=torch.zeros(V + 1, H + 1), ref_bias=None), ValueError, "ref_weight must have weight's 5 rows"),
        (dict(ref_weight=None, ref_bias=None), ValueError, "needs both ref_hidden and ref_weight, got no ref_weight"),
    ),
    *each(
        (linear_token_stats,),
        (dict(ref_hidden=None, ref_bias=None), ValueError, "needs both ref_hidden and ref_weight, got no ref_hidden"),
        (dict(ref_hidden=None, ref_weight=None), ValueError, "ref_bias was given without ref_hidden"),
    ),
    *each(
        (linear_klq_loss,),
        (dict(ref_logprobs=torch.zeros(B, T)), ValueError, "either ref_logprobs or ref_hidden.*got both"),
        (dict(ref_hidden=None), ValueError, "either ref_logprobs or ref_hidden.*got neither"),
        (dict(ref_logprobs=NARROW, ref_hidden=None, ref_weight=None, ref_bias=None), ValueError, "ref_logprobs must"),
        (dict(ref_logprobs=torch.zeros(B, T), ref_hidden=None, ref_bias=None), ValueError, "got no ref_hidden"),
    ),
    *each((token_stats,), (dict(ref_logits=torch.zeros(B, T, V + 1)), ValueError, "ref_logits must have the shape of")),
    # values
    *each(
        MODEL_OPS,
        (dict(tokens=torch.full((B, T), V)), ValueError, r"tokens must lie in \[0, 5\).*5"),
        (dict(tokens=torch.full((B, T), -100)), ValueError, r"tokens must lie in \[0, 5\).*-100"),
        *((dict(temperature=x), ValueError, "temperature must be a finite number > 0") for x in (0, -1.0, NAN, INF)),
    ),
    *each(LINEAR_OPS, *((dict(workspace_bytes=x), ValueError, "workspace_bytes must be") for x in (0, -1))),
    *each(
        LOSS_OPS,
        *((dict(tau=x), ValueError, "tau must be a finite number > 0") for x in (0.0, -0.1, NAN, INF)),
        (dict(loss="l1"), ValueError, "loss must be one of"),
        (dict(loss="huber"), ValueError, "needs delta"),
        (dict(loss="huber", delta=0.0), ValueError, "delta must be"),
        (dict(loss="value_clipped"), ValueError, "needs clip"),
        (dict(loss="value_clipped", clip=0.1, old_values=None), ValueError, "needs old_values"),
        (dict(loss="ratio_clipped"), ValueError, "needs log_ratio_clip"),
        (dict(loss="ratio_clipped", log_ratio_clip=0.1, old_logprobs=None), ValueError, "needs old_logprobs"),
        (dict(loss="double_clipped", clip=-1.0, log_ratio_clip=0.1), ValueError, "clip must be"),
    ),
    *each(
        Q_OPS,
        *((dict(tau=x), ValueError, "tau must be a finite number > 0") for x in (0.0, -0.1, NAN, INF)),
        (dict(values=NARROW), ValueError, "values must have the shape of tokens"),
        (dict(values=torch.zeros(B, T).int()), TypeError, "values must be a floating-point"),
        (dict(values=None), TypeError, "values must be a torch.Tensor"),
    ),
    *each((token_q,), (dict(ref_logits=None), TypeError, "ref_logits must be a torch.Tensor")),
    *each(
        (linear_token_q,),
        (dict(ref_hidden=None), TypeError, "ref_hidden must be a torch.Tensor"),
        (dict(ref_weight=None), TypeError, "ref_weight must be a torch.Tensor"),
        (dict(workspace_bytes=0), ValueError, "workspace_bytes must be"),
    ),
    *each(
        (lambda_returns,),
        *((dict(tau=x), ValueError, "tau must be a finite number > 0") for x in (0.0, -0.1, NAN, INF)),
        *((dict(gamma=x), ValueError, r"gamma must lie in \[0, 1\]") for x in (-0.1, 1.1, NAN)),
        *((dict(lam=x), ValueError, r"lam must lie in \[0, 1\]") for x in (-0.1, 1.1, NAN)),
        *((dict(alpha=x), ValueError, r"alpha must lie in \(0, 1\]") for x in (0.0, 1.1, NAN)),
        (dict(mask=torch.tensor([[True] * 3, [True, False, True]])), ValueError, "mask must be right-padded.*row 1"),
    ),
    *each(OPS, *((dict(backend=x), ValueError, "backend must be None or one of") for x in ("cuda", "", "Triton"))),
]


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
@pytest.mark.parametrize("op", OPS)
def test_the_arguments_the_other_tests_start_from_are_accepted(op, backend):
    op(**good(op), backend=backend)


@pytest.mark.parametrize("op, change, exception, message", WRONG)
def test_a_wrong_argument_is_named(op, change, exception, message):
    with pytest.raises(exception, match=message):
        op(**(dict(backend="torch") | good(op) | change))


@pytest.mark.parametrize("op", MODEL_OPS)
def test_masked_ids_are_not_among_those_that_are_named(op):
    """Padding of −100 would hide the id that is wrong."""
    given = good(op) | dict(tokens=torch.tensor([[1, 2, V + 2], [3, -100, 2]]))
    given["mask"][1, 1] = False
    with pytest.raises(ValueError, match="got ids from 1 to 7 on unmasked positions"):
        op(**given, backend="torch")


@pytest.mark.parametrize("op", MODEL_OPS)
def test_a_model_output_of_another_length_names_tokens(op):
    name = "logits" if op in (token_stats, logits_klq_loss, token_q) else "hidden"
    given = good(op)
    with pytest.raises(ValueError, match=f"tokens must have the shape of {name} without its last axis"):
        op(**(given | {name: given[name][:, :-1]}))


@pytest.mark.parametrize("op", OPS)
def test_errors_say_what_was_given(op):
    """Both shapes stand in the message."""
    given = good(op)
    name = "mask"
    with pytest.raises(ValueError, match=re.escape("(2, 3), got (2, 1)")):
        op(**(given | {name: given[name][:, :1]}))


def test_returns_of_flat_tensors_are_refused():
    flat = {name: x[0] if isinstance(x, torch.Tensor) else x for name, x in good(lambda_returns).items()}
    with pytest.raises(ValueError, match=r"rewards must be \[B, T\]"):
        lambda_returns(**flat)


def test_a_sharded_head_is_refused():
    """A DTensor's local shard would be taken for the whole vocabulary."""
    given = good(linear_token_stats)
    given["weight"].full_tensor = given["weight"].clone
    with pytest.raises(TypeError, match=r"weight is a sharded DTensor.*full_tensor"):
        linear_token_stats(**given)


# Devices


@pytest.mark.parametrize(
    "op, name", [(op, name) for op in OPS for name, x in good(op).items() if isinstance(x, torch.Tensor)]
)
def test_a_tensor_on_another_device_is_named(op, name):
    given = good(op)
    with pytest.raises(ValueError, match=f"all tensors must be on one device.*{name} on meta"):
        op(**(given | {name: given[name].to("meta")}))


# The backend that None picks


@pytest.mark.parametrize("change, backend", [({}, "reference"), (dict(values=torch.zeros(B, T)), "torch")])
def test_reference_is_for_float64_throughout(change, backend):
    """One float64 tensor beside float32 ones, values say, must not bring the naive [N, V] logits of a large model."""
    given = {k: x.double() for k, x in good(linear_klq_loss).items() if torch.is_tensor(x) and x.is_floating_point()}
    assert checks.pick_backend(None, **given | change) == backend
    assert checks.pick_backend("torch", **given) == "torch"


# The triton backend


@pytest.mark.parametrize("op", OPS)
def test_triton_refuses_float64(op):
    given = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in good(op).items()}
    first = next(name for name in ("logits", "hidden", "rewards") if name in given)
    with pytest.raises(TypeError, match=f"'triton' computes in float32, got float64 {first}: use backend='reference'"):
        op(**given, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_without_triton_its_backend_says_what_to_install(op, monkeypatch):
    monkeypatch.setattr(checks, "_has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="needs the package triton.*pip install triton"):
        op(**good(op), backend="triton")
    op(**good(op))  # backend=None does without


@pytest.mark.parametrize("value", [None, "0"])
def test_triton_on_a_cpu_says_how_to_turn_the_interpreter_on(value):
    """In a fresh process, where nothing has set TRITON_INTERPRET."""
    code = "import torch, klq_kernels as k; k.token_stats(torch.zeros(1, 4), torch.tensor([2]), backend='triton')"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | (
        {"TRITON_INTERPRET": value} if value else {}
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("RuntimeError: backend 'triton' needs a GPU")
    assert "backend='torch'" in last and "TRITON_INTERPRET=1" in last
