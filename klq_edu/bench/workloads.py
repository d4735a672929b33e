"""What is computed, and who competes: per workload its inputs, the naive way, ours, and a peer.

Inputs are a dict of tensors whose leading axis is the token (the sequence, where there is T), but for those in SHARED.
Both ways map them to a dict of outputs. Outputs that carry a gradient are differentiated: the loss with upstream
gradient 1, per-token statistics with the random columns of inputs["upstream"].
"""

from collections.abc import Callable
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from klq_edu.bench.config import Size
from klq_kernels import lambda_returns, linear_klq_loss, linear_token_stats, token_stats
from klq_kernels.reference import klq_loss

TAU = 0.1
HEAD = itemgetter("hidden", "weight", "tokens")
REFERENCE = itemgetter("ref_hidden", "ref_weight")
REST = itemgetter("values", "targets", "mask")
SHARED = ("weight", "ref_weight", "model", "optimizer")
Outputs = dict[str, Tensor]

ONLY_CE = "cross-entropy only: no value, no reference"


class Workload(NamedTuple):
    """What a workload computes, its inputs, and the two ways that always exist."""

    title: str
    inputs: Callable[[Size, torch.Generator], dict]
    naive: Callable[[dict], Outputs]
    ours: Callable[..., Outputs]  # ours(inputs, backend=…)
    naive_gemms: tuple[int, int] | None = None  # products N×H×V that its forward and backward pass can't do without
    gemms: tuple[int, int] | None = None  # the same for ours
    stages: tuple[str, ...] = ("forward", "backward", "both")


def make_inputs(name: str, size: Size, seed: int, device: str) -> dict:
    """The inputs of a workload, drawn on the CPU (so alike on every device) and moved there; on a GPU drawn there, as a
    billion draws take a CPU half a minute."""
    x = WORKLOADS[name].inputs(size, torch.Generator(device if device.startswith("cuda") else "cpu").manual_seed(seed))
    rounded = ("hidden", "weight", "ref_hidden", "ref_weight", "logits", "ref_logits", "model")
    x = {key: value.to(device, getattr(torch, size.dtype) if key in rounded else None) for key, value in x.items()}
    for key in {"hidden", "weight", "logits", "values"} & x.keys() if name != "returns" else ():
        x[key].requires_grad_()
    if "model" in x:  # Adam with its moments in place, and step size 0: all of the work, and always the same weights
        for p in x["model"].parameters():
            p.grad = torch.zeros_like(p)
        x["optimizer"] = torch.optim.Adam(x["model"].parameters(), lr=0.0)
        x["optimizer"].step()
    return x


def _random(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, device=rng.device)


def _logits_inputs(size: Size, rng: torch.Generator) -> dict:
    logits = 2 * _random(rng, size.n, size.v)
    near = logits + 0.2 * _random(rng, size.n, size.v)
    tokens = torch.randint(size.v, (size.n,), generator=rng, device=rng.device)
    return {"logits": logits, "ref_logits": near, "tokens": tokens, "upstream": _random(rng, size.n, 3)}


def _linear_inputs(size: Size, rng: torch.Generator) -> dict:
    """Hidden states and heads of a policy and of a reference near it, with logits of standard deviation 2."""
    hidden, weight = _random(rng, size.n, size.h), 2 * size.h**-0.5 * _random(rng, size.v, size.h)
    x = {"hidden": hidden, "ref_hidden": hidden + 0.1 * _random(rng, size.n, size.h)}
    x |= {"weight": weight, "ref_weight": weight + 0.2 * size.h**-0.5 * _random(rng, size.v, size.h)}
    tokens = torch.randint(size.v, (size.n,), generator=rng, device=rng.device)
    x |= {"tokens": tokens, "upstream": _random(rng, size.n, 3)}
    x |= {"values": _random(rng, size.n), "targets": _random(rng, size.n), "ref_logprobs": -_random(rng, size.n).abs()}
    return x | {"mask": torch.ones(size.n, dtype=torch.bool)}


def _returns_inputs(size: Size, rng: torch.Generator) -> dict:
    """Sequences of random length, at least one token each."""
    names = ("rewards", "values", "logprobs", "ref_logprobs")
    x = {name: _random(rng, size.n // size.t, size.t) for name in names}
    lengths = torch.randint(1, size.t + 1, (size.n // size.t, 1), generator=rng, device=rng.device)
    return x | {"mask": torch.arange(size.t, device=rng.device) < lengths}


def _update_inputs(size: Size, rng: torch.Generator) -> dict:
    """A random two-block Llama, sequences of T+1 tokens, and per token what the loss needs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=size.v, hidden_size=size.h, intermediate_size=3 * size.h, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=size.t + 1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.initial_seed())
        model = LlamaForCausalLM(config).eval()
    x = {name: _random(rng, size.n // size.t, size.t) for name in ("values", "targets", "ref_logprobs")}
    x["ref_logprobs"] -= 9
    x["tokens"] = torch.randint(size.v, (size.n // size.t, size.t + 1), generator=rng, device=rng.device)
    return x | {"mask": torch.ones_like(x["values"], dtype=torch.bool), "model": model}


def naive_stats(x: dict, logits: Tensor, ref_logits: Tensor, differentiable: bool = True) -> Outputs:
    """What people write: every [N, V] intermediate spelled out in float32."""
    logp = torch.log_softmax(logits.float(), -1)
    with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        p, logq = logp.exp(), torch.log_softmax(ref_logits.float(), -1)
        entropy, kl = -(p * logp).sum(-1), (p * (logp - logq)).sum(-1)
    logprob, ref_logprob = (z.gather(-1, x["tokens"][:, None]).squeeze(-1) for z in (logp, logq))
    return {"logprob": logprob, "entropy": entropy, "kl": kl, "ref_logprob": ref_logprob}


def naive_linear_stats(x: dict, **options) -> Outputs:
    """`naive_stats` of hidden states: both models' logits in memory."""
    with torch.no_grad():
        ref_logits = x["ref_hidden"] @ x["ref_weight"].T
    return naive_stats(x, x["hidden"] @ x["weight"].T, ref_logits, **options)


def naive_klq_ref(x: dict) -> Outputs:
    """The KLQ loss with its reference model; entropy and KL are for the log, so they keep no graph."""
    stats = naive_linear_stats(x, differentiable=False)
    loss = klq_loss(stats["logprob"], stats["ref_logprob"], *REST(x), tau=TAU)
    return {"loss": loss} | {name: value.detach() for name, value in stats.items()}


def naive_loss(x: dict, logits: Tensor, tokens: Tensor) -> Outputs:
    """The KLQ loss from logits, with the reference's log-probabilities at hand."""
    logprob = torch.log_softmax(logits.float(), -1).gather(-1, tokens[..., None]).squeeze(-1)
    return {"loss": klq_loss(logprob, x["ref_logprobs"], *REST(x), tau=TAU)}


def our_klq_ref(x: dict, backend: str) -> Outputs:
    """`klq_kernels.linear_klq_loss` with the reference's head: one pass for the loss and all statistics."""
    ref = dict(zip(("ref_hidden", "ref_weight"), REFERENCE(x), strict=True))
    loss, stats = linear_klq_loss(*HEAD(x), None, *REST(x), tau=TAU, **ref, return_stats=True, backend=backend)
    return {"loss": loss} | stats._asdict()


def our_loss(x: dict, hidden: Tensor, weight: Tensor, tokens: Tensor, backend: str) -> Outputs:
    """`klq_kernels.linear_klq_loss`, with the reference's log-probabilities at hand."""
    return {"loss": linear_klq_loss(hidden, weight, tokens, x["ref_logprobs"], *REST(x), tau=TAU, backend=backend)}


def our_update(x: dict, backend: str) -> Outputs:
    """The policy's loss from the last hidden states: the model's head is never applied."""
    hidden = x["model"].base_model(x["tokens"][:, :-1], use_cache=False).last_hidden_state
    return our_loss(x, hidden, x["model"].get_output_embeddings().weight, x["tokens"][:, 1:], backend)


def our_returns(x: dict, backend: str) -> Outputs:
    """`klq_kernels.lambda_returns`; its reference is the Python loop over time that people write."""
    args = (x[key] for key in ("rewards", "values", "logprobs", "ref_logprobs", "mask"))
    return lambda_returns(*args, tau=TAU, backend=backend)._asdict()


WORKLOADS = {
    "logits_stats": Workload(
        "log-prob, entropy, exact KL from logits", _logits_inputs,
        lambda x: naive_stats(x, x["logits"], x["ref_logits"]),
        lambda x, backend: token_stats(x["logits"], x["tokens"], x["ref_logits"], backend=backend)._asdict(),
    ),
    "linear_stats": Workload(
        "log-prob, entropy, exact KL from hidden states", _linear_inputs,
        naive_linear_stats,
        lambda x, backend: linear_token_stats(*HEAD(x), *REFERENCE(x), backend=backend)._asdict(), (2, 2), (2, 4),
    ),
    "klq_ref": Workload(
        "KLQ loss from hidden states of policy and reference", _linear_inputs,
        naive_klq_ref, our_klq_ref, (2, 2), (4, 0),
    ),
    "klq": Workload(
        "KLQ loss from hidden states, reference log-probs given", _linear_inputs,
        lambda x: naive_loss(x, x["hidden"] @ x["weight"].T, x["tokens"]),
        lambda x, backend: our_loss(x, *HEAD(x), backend), (1, 2), (3, 0),
    ),
    "returns": Workload(
        "λ-returns", _returns_inputs, partial(our_returns, backend="reference"), our_returns, stages=("forward",)
    ),
    "update": Workload(
        "a whole KLQ update (loss; then gradients, Adam) of a small Llama", _update_inputs,
        lambda x: naive_loss(x, x["model"](x["tokens"][:, :-1], use_cache=False).logits, x["tokens"][:, 1:]),
        our_update,
    ),
}  # fmt: skip


class Contender(NamedTuple):
    """One way to compute a workload."""

    name: str
    run: Callable[[dict], Outputs]
    truth: Callable[[dict], Outputs]  # the same mathematics, accurate for float64 inputs
    gemms: tuple[int, int] | None = None  # the matrix products that forward and backward pass cannot do without
    computes: str = "the same"
    optional: bool = True  # if it fails here, say so and go on without it


def contenders(name: str, device: str, compiled: bool = False) -> list[Contender]:
    """Who competes in a workload on this device, the naive way first."""
    load = WORKLOADS[name]
    truth = partial(load.ours, backend="reference")
    found = [Contender("naive", load.naive, truth, load.naive_gemms, optional=False)]
    if compiled and name != "returns":
        found.append(Contender("naive, compiled", torch.compile(load.naive), truth, load.naive_gemms))
    for backend in ["torch"] + ["triton"] * device.startswith("cuda"):
        ours = partial(load.ours, backend=backend)
        found.append(Contender(f"ours ({backend})", ours, truth, load.gemms, optional=False))
    if name == "klq" and hasattr(F, "linear_cross_entropy"):  # in newer versions of torch
        found.append(Contender("F.linear_cross_entropy", torch_ce, cross_entropy, (3, 0), ONLY_CE))
    return found


def cross_entropy(x: dict) -> Outputs:
    """What the peer computes."""
    return {"loss": F.cross_entropy(x["hidden"] @ x["weight"].T, x["tokens"])}


def torch_ce(x: dict) -> Outputs:
    """torch's linear cross-entropy in chunks of 512 tokens (its default chunks are half as fast on a CPU)."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return {"loss": F.linear_cross_entropy(x["hidden"], x["weight"], x["tokens"], options=options)}
