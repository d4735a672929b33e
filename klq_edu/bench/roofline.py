"""What a GPU that is not here could do at best, and a model of what a kernel makes of it. Nothing was measured here.

The floor is bytes over bandwidth or operations over peak rate, whichever is longer. The model: a k-step takes as long
as the slowest of matrix units, shared memory, loads from L2 and issue; a tile adds its start and what lies outside the
k-loop, unless other blocks or warps run meanwhile; nothing beats HBM. Each prediction is a range, (slow, fast).
Constants are the vendors' or fitted to published figures: kernels/README.md has what the model says for those.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from math import ceil, inf, prod
from operator import itemgetter
from typing import NamedTuple

KERNELS = {  # name -> bytes moved and floating-point operations, from the shapes; s is the element size
    "token_stats, one model": lambda N, V, H, s: (N * V * s, 0),
    "token_stats": lambda N, V, H, s: (2 * N * V * s, 0),
    "token_stats, merge": lambda N, V, H, s: ((81 + 2 * s) * N, 0),
    "token_stats, gradient": lambda N, V, H, s: (3 * N * V * s, 0),
    "KLQ loss, gradient": lambda N, V, H, s: (2 * N * V * s, 0),
    "lambda_returns": lambda N, V, H, s: (29 * N, 0),
    "linear_token_stats, one model": lambda N, V, H, s: ((V + N) * H * s, 2 * N * V * H),
    "linear_token_stats, shared head": lambda N, V, H, s: ((V + 2 * N) * H * s, 4 * N * V * H),
    "linear_token_stats": lambda N, V, H, s: (2 * (V + N) * H * s, 4 * N * V * H),
    "linear_token_stats, tokens": lambda N, V, H, s: (4 * N * H * s, 0),
    "linear_klq_loss": lambda N, V, H, s: ((2 * V + N) * H * s, 6 * N * V * H),  # a loop of products and kernels
    "linear_klq_loss, reference": lambda N, V, H, s: ((3 * V + 2 * N) * H * s, 8 * N * V * H),
}
LOSSES = {"linear_klq_loss": 1, "linear_klq_loss, reference": 2}  # models
ELEMENTS = dict.fromkeys(("lambda_returns", "token_stats, merge"), lambda N, V, H: N)  # of all others: N V logits
ELEMENTS["linear_token_stats, tokens"] = lambda N, V, H: N * H
SIZE = {"bf16": 2, "fp32": 4}
SHAPE = (8192, 128_256, 4096)  # N, V, H that the promises are for, in bf16
PROMISES = {  # the least share of a device's floor that a default tile may be predicted to reach, at the upper end
    ("linear_token_stats, one model", "H100"): 0.50, ("linear_token_stats, shared head", "H100"): 0.50,
    ("linear_token_stats", "H100"): 0.38, ("linear_token_stats, one model", "A100"): 0.60,
    ("linear_klq_loss", "H100"): 0.58,
}  # fmt: skip
# At most, on NVIDIA, per element of the main loop.
INSTRUCTIONS = {"token_stats": 34, "token_stats, gradient": 34, "token_stats, one model": 12}


class Device(NamedTuple):
    """A GPU's published rates. Per clock of a multiprocessor: dense bf16 multiply-adds, bytes from L2 (by
    micro-benchmarks, as tiled products imply), results of ordinary instructions (`lanes`). fp32: how much slower a
    multiply-add is, and how many make an exact one (three in TF32; AMD: one)."""

    target: str
    units: int
    clock: float
    fma: int
    l2: tuple[float, float]
    l2_bytes: float
    bandwidth: float
    lanes: int = 128
    fp32: tuple[int, int] = (2, 3)

    def rate(self, dtype: str) -> float:
        """Peak of dense matrix operations per second."""
        return 2 * self.units * self.clock * self.fma / (1 if dtype == "bf16" else prod(self.fp32))


DEVICES = {  # data sheets; L2: Chips and Cheese, Luo et al. 2024
    "A100": Device("sm_80", 108, 1.41e9, 1024, (26, 34), 40e6, 2.04e12),
    "H100": Device("sm_90", 132, 1.83e9, 2048, (25, 38), 50e6, 3.35e12),
    "H200": Device("sm_90", 132, 1.83e9, 2048, (25, 38), 50e6, 4.80e12),
    "B200": Device("sm_100", 148, 1.85e9, 4096, (40, 64), 126e6, 8.0e12),
    "MI300X": Device("gfx942", 304, 2.10e9, 1024, (40, 54), 256e6, 5.30e12, lanes=64, fp32=(8, 1)),
}
THROTTLE = 1.3  # a product's clocks over the matrix units' nominal ones (power, gaps): fitted to published figures
SHARED, SPECIAL = 128, 16  # bytes from shared memory and exponentials per clock of a multiprocessor
START, BARRIER, STALL = (1500, 900), (40, 25), (1.6, 1.15)  # clocks until the first k-step, of a barrier; per issue
HBM, L2_USED = 0.9, 0.6  # shares of the bandwidth that is reached and of L2 that holds what is read again


def compiled(*options: str) -> Iterator[str]:
    """Lines that `klq_kernels.offline` prints, in a process of its own with Triton's interpreter switched off."""
    environment = {k: x for k, x in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "klq_kernels.offline", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as child:
        yield from child.stdout
        error = child.stderr.read()
    if child.returncode:
        raise RuntimeError(f"compiling failed: {(error.strip().splitlines() or [child.returncode])[-1]}")


def floor_seconds(kernel: str, device: str, dtype: str, n: int, v: int, h: int) -> float:
    """The time below which no implementation of this kernel can come on this device (a roofline, not a measurement).

    >>> round(1e3 * floor_seconds("token_stats", "H100", "bf16", 8192, 151_936, 4096), 2)
    1.49
    """
    moved, operations = KERNELS[kernel](n, v, h, SIZE[dtype])
    return max(moved / DEVICES[device].bandwidth, operations / DEVICES[device].rate(dtype))


def predict(record: dict, device: str, n: int, v: int, h: int) -> dict:
    """The model, not a measurement, for a compiled kernel (a record of `klq_kernels.offline`) or one of LOSSES:
    ms, share of the floor and what bounds it, each (slow, fast); of a kernel that multiplies also clocks and needs."""
    kernel, gpu, details = record["kernel"], DEVICES[device], {}
    floor = floor_seconds(kernel, device, record["dtype"], n, v, h)
    if kernel in LOSSES:
        from klq_kernels.torch_linear import WORKSPACE_BYTES  # with torch, which takes long to import

        rows = WORKSPACE_BYTES["cuda"] // (SIZE[record["dtype"]] * v * LOSSES[kernel])
        runs = [{"products": chunked_seconds(device, n, v, h, rows, LOSSES[kernel])}] * 2
    elif "models" in record["work"]:
        runs, clocks = zip(*(multiplied(record["work"], gpu, n, v, h, fast) for fast in (0, 1)), strict=True)
        full, loaded = clocks[0]["matrix"] / THROTTLE, _loaded(record["work"])
        details = {"clocks": clocks, "l2_needed": loaded / full, "l2_delivered": gpu.l2, "shared_delivered": (SHARED,)}
        details["shared_needed"] = (record["work"]["step_shared"] + loaded) / full
    else:
        elements = ELEMENTS[kernel](n, v, h) if kernel in ELEMENTS else n * v
        seconds = record["per_logit"] * elements / (gpu.units * gpu.lanes * gpu.clock)
        runs = [{"issue": seconds * stall, "HBM": floor / HBM} for stall in STALL]
    bound, seconds = zip(*(max(run.items(), key=itemgetter(1)) for run in runs), strict=True)
    found = {"device": device, "sizes": (n, v, h), "floor_ms": 1e3 * floor, "ms": [1e3 * s for s in seconds]}
    return found | {"share": [floor / s for s in seconds], "bound": bound} | details


def multiplied(work: dict, gpu: Device, n: int, v: int, h: int, fast: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds, by what bounds them, of a kernel that multiplies [n, h] by [v, h] in tiles; and clocks of a block: a
    k-step's by what bounds it, those of a k-loop and of the rest. `work`: see `klq_kernels.machine_code.work`."""
    passes, slots = work["models"] // work["together"], gpu.units * work["blocks"]
    fma = max(work["step_fma"], work["together"] * work["rows"] * work["vocab"] * work["hidden"])  # some may be peeled
    clocks = {
        "matrix": THROTTLE * fma * (gpu.fp32[0] if work["size"] == 4 else 1) / gpu.fma,
        "shared memory": (work["step_shared"] + _loaded(work)) / SHARED,
        "L2": _loaded(work) / work.get("multicast", 1) / gpu.l2[fast],
        "issue": work["step_instructions"] * work["threads"] / gpu.lanes,
    }
    bound, slowest = max(clocks.items(), key=itemgetter(1))
    loop, start = passes * ceil(h / work["hidden"]) * slowest, passes * START[fast]
    issue = work["tile_instructions"] * work["threads"] / gpu.lanes * STALL[fast]
    outside = max(work["exponentials"] * work["threads"] / SPECIAL, issue) + work["barriers"] * BARRIER[fast]
    exposed = (start + outside) / (1 if work["blocks"] == 1 else 2 * work["blocks"])
    if work.get("overlapped"):  # by warps of their own
        exposed = start / 5 + max(0, outside - loop)
    rows, columns = ceil(n / work["rows"]), ceil(v / work["vocab"])
    turns = min(ceil(rows * splits / slots) * ceil(columns / splits) for splits in range(1, min(columns, 32) + 1))
    seconds = {bound: turns * work["blocks"] * (loop + exposed) / gpu.clock}
    seconds["HBM"] = _traffic(work, gpu, rows, columns, v, h) / (HBM * gpu.bandwidth)
    return seconds, clocks | {"k-loop": loop, "outside": start + outside}


def _loaded(work: dict) -> int:
    """Bytes that a k-step loads."""
    return (work["together"] * work["rows"] + work["vocab"]) * work["hidden"] * work["size"]


def _traffic(work: dict, gpu: Device, rows: int, columns: int, v: int, h: int) -> float:
    """Bytes from HBM: weights once per group of row tiles that run together (`group` 0: all that have a slot); hidden
    rows once, or once per column of tiles as far as those of a group overflow L2."""
    slots = gpu.units * work["blocks"]
    live, row = min(rows, work["group"] or slots), work["rows"] * h * work["size"] * work["models"]
    missed = min(1, max(0, 1.5 * (1 - L2_USED * gpu.l2_bytes / (live * row))))
    weights = v * h * work["size"] * work["models"] // work["together"]
    return weights * ceil(rows / live) + rows * row * max(1, missed * columns / max(1, slots // live))


def chunked_seconds(device: str, n: int, v: int, h: int, rows: int, models: int = 1) -> float:
    """Seconds of a loss in bf16 by chunks of rows: each product (logits per model, dh, dW) takes as long as cuBLAS for
    its operations or as its bytes; then come three visits to the policy's logits, one to the other's. Summing dW in
    fp32 moves 8 bytes per weight in each product, and 6 in the end."""
    gpu, c = DEVICES[device], min(rows, n)
    z, w, bandwidth = c * v, v * h, HBM * gpu.bandwidth
    moved = [2 * w + 2 * z] * (models + 1) + [8 * w + 2 * z]
    products = sum(max(2 * c * w * THROTTLE / gpu.rate("bf16"), size / bandwidth) for size in moved)
    return (products + (2 + models) * 2 * z / bandwidth) * n / c + 6 * w / bandwidth


def shortfalls(record: dict) -> list[str]:
    """Where a default tile, or a loss, falls short of INSTRUCTIONS and PROMISES."""
    kernel, target, count = record["kernel"], record["target"], record["per_logit"]
    most = inf if target == "gfx942" else INSTRUCTIONS.get(kernel, inf)
    found = [f"{count} instructions per element, {most} are promised"] if count > most else []
    for (name, device), least in PROMISES.items():
        if (name, DEVICES[device].target, "bf16") == (kernel, target, record["dtype"]):
            share = predict(record, device, *SHAPE)["share"][1]
            text = f"the model predicts {share:.0%} of an {device}'s floor, {least:.0%} is promised"
            found += [text] if share < least else []
    return found
