"""Who competes: the naive way, ours, and peers, imported only where they are installed, each with what it computes."""

import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F

from klq_edu.bench.workloads import WORKLOADS, Outputs

PACKAGES = {name: bool(find_spec(name.replace("-", "_"))) for name in ("liger-kernel", "cut-cross-entropy")}
ONLY_CE = "cross-entropy only: no value, no reference"
MOST_OF_CE = f"{ONLY_CE}; tiny gradients are dropped"
ONLY_GRPO = "GRPO loss with a sampled KL (k3): no value, no entropy, no exact KL"
BETA = 0.04


class Contender(NamedTuple):
    """One way to compute a workload."""

    name: str
    run: Callable[[dict], Outputs]
    truth: Callable[[dict], Outputs]  # the same mathematics, accurate for float64 inputs
    gemms: tuple[int, int] | None = None  # the matrix products that forward and backward pass cannot do without
    computes: str = "the same"
    optional: bool = True  # if it fails here, say so and go on without it


def contenders(name: str, device: str, compiled: bool = False, reference: bool = False) -> list[Contender]:
    """Who competes in a workload on this device, the naive way first."""
    load = WORKLOADS[name]
    truth = partial(load.ours, backend="reference")
    found = [Contender("naive", load.naive, truth, load.naive_gemms, optional=False)]
    if compiled and name != "returns":
        found.append(Contender("naive, compiled", torch.compile(load.naive), truth, load.naive_gemms))
    if reference and name != "returns":
        found.append(Contender("reference", truth, truth, load.naive_gemms, optional=False))
    for backend in ["torch"] + ["triton"] * device.startswith("cuda"):
        ours = partial(load.ours, backend=backend)
        found.append(Contender(f"ours ({backend})", ours, truth, load.gemms, optional=False))
    return found + peers(name, device)


def absent_peers() -> list[str]:
    """What would compete if it were installed."""
    missing = [package for package, here in PACKAGES.items() if not here]
    return missing + ["F.linear_cross_entropy (in newer versions of torch)"] * (not hasattr(F, "linear_cross_entropy"))


def peers(name: str, device: str) -> list[Contender]:
    """The peers that can do some of this workload on this device."""
    gpu, (liger, cut) = device.startswith("cuda"), PACKAGES.values()
    new = hasattr(F, "linear_cross_entropy")
    known = [
        ("klq", new, Contender("F.linear_cross_entropy", torch_ce, cross_entropy, (3, 0), ONLY_CE)),
        ("klq", gpu and liger, Contender("liger cross-entropy", liger_ce, cross_entropy, (3, 0), ONLY_CE)),
        ("klq", gpu and cut, Contender("cut-cross-entropy", cut_ce, cross_entropy, (1, 3), MOST_OF_CE)),
        ("klq_ref", liger, Contender("liger GRPO", partial(liger_grpo, compiled=gpu), grpo, (5, 0), ONLY_GRPO)),
    ]
    return [peer for workload, here, peer in known if here and workload == name]


def cross_entropy(x: dict) -> Outputs:
    """What the cross-entropy peers compute."""
    return {"loss": F.cross_entropy(x["hidden"] @ x["weight"].T, x["tokens"])}


def torch_ce(x: dict) -> Outputs:
    """torch's linear cross-entropy in chunks of 512 tokens (its default chunks are half as fast on a CPU)."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=512)
    return {"loss": F.linear_cross_entropy(x["hidden"], x["weight"], x["tokens"], options=options)}


def liger_ce(x: dict) -> Outputs:
    """Liger's linear cross-entropy (Triton)."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    return {"loss": LigerFusedLinearCrossEntropyLoss()(x["weight"], x["hidden"], x["tokens"])}


def cut_ce(x: dict) -> Outputs:
    """Apple's Cut Cross-Entropy (Triton; half precision only)."""
    from cut_cross_entropy import linear_cross_entropy

    return {"loss": linear_cross_entropy(x["hidden"], x["weight"], x["tokens"])}


def grpo(x: dict) -> Outputs:
    """What `liger_grpo` computes: −ρ + β k3, ρ = π/π_old, at π = π_old and advantages 1."""
    pairs = (("hidden", "weight"), ("ref_hidden", "ref_weight"))
    logp, logq = (-F.cross_entropy(x[h] @ x[w].T, x["tokens"], reduction="none") for h, w in pairs)
    k3 = torch.expm1(logq - logp) - (logq - logp)
    return {"loss": (-(logp - logp.detach()).exp() + BETA * k3).mean()}


def liger_grpo(x: dict, compiled: bool) -> Outputs:
    """Liger's GRPO loss with a reference head, on up to eight sequences."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    rows = math.gcd(8, len(x["tokens"]))
    hidden, ref_hidden, tokens = (x[key].unflatten(0, (rows, -1)) for key in ("hidden", "ref_hidden", "tokens"))
    ones = torch.ones(tokens.shape, device=tokens.device)
    ref = {"ref_input": ref_hidden, "ref_weight": x["ref_weight"]}
    loss = LigerFusedLinearGRPOLoss(beta=BETA, compiled=compiled)
    return {"loss": loss(hidden, x["weight"], tokens, ones, ones[:, 0], **ref)[0]}
