"""How it is measured: time in units of a matrix product taken just before and after, and errors against float64, as
rows of the CSV. Needs torch only.

Peak memory is what a GPU's allocator counts, else that of a process of its own:
`python -m klq_edu.bench.measure '{"workload": "klq", …}'`.
"""

import copy
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from statistics import median
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor

from klq_edu.bench.config import QUICK, BenchConfig, Size
from klq_edu.bench.workloads import SHARED, WORKLOADS, Contender, Outputs, contenders, make_inputs

CHECKED_ROWS = 64
MEGABYTE = 2**20
SAMPLE_EVERY = 0.003  # seconds between looks at the resident memory
SHORTEST = 0.02  # seconds: work that is done sooner is repeated until it has taken that long
UPSTREAM = {"logprob": 0, "entropy": 1, "kl": 2}  # output -> the column of inputs["upstream"] that is its gradient


def measure_point(name: str, size: Size, everyone: list, config: BenchConfig, device: str, say, tick) -> list[dict]:
    """The rows of one workload at one size: warm-up and errors, then interleaved times, then peak memory.

    `say` gets a line of text on whatever went wrong, `tick` is called after every step.
    """
    x, rows, on_gpu = make_inputs(name, size, config.seed, device), [], device.startswith("cuda")
    found = first_runs(everyone, x, lambda text: say(f"{name} {size}: {text}"), tick)
    everyone = [c for c in everyone if c.name in found]
    gemm = reference_gemm(size, device) if size.h else lambda: 1.0
    times = interleave(everyone, x, gemm, config.reps, tick)
    peaks = {c.name: allocated_peak(c, x) for c in everyone} if on_gpu else {}
    del x, gemm  # leaves the memory to what follows
    torch.cuda.empty_cache()
    what = {"workload": name, "size": size, "seed": config.seed, "device": device, "compiled": config.compile}
    for c in everyone:
        part = stage_rows(c, times, WORKLOADS[name].stages, bool(size.h))
        part[-1] |= found[c.name]
        if config.memory:
            part[-1]["memory_mb"] = peak = peaks[c.name] if on_gpu else peak_memory(**what, contender=c.name)
            if math.isnan(peak):
                say(f"{name} {size}: {c.name} did not survive in the process that measures its memory")
        rows += [{"workload": name, **size._asdict(), **row} for row in part]
        tick()
    return rows


def first_runs(everyone: list[Contender], x: dict, say: Callable, tick: Callable) -> dict[str, dict]:
    """Contender -> its errors in a run that also warms it up. Who needs too much memory, and a peer that cannot run
    here, is named and left out."""
    found, true = {}, cache(lambda truth: exact(truth, x))
    for c in everyone:
        try:
            found[c.name] = errors(run_once(c, x)[0], x, true(c.truth))
        except Exception as error:
            if not c.optional and not isinstance(error, torch.OutOfMemoryError):
                raise
            say(f"{c.name} does not run here: {error!r:.200}")
        tick()
    return found


def stage_rows(contender: Contender, times: dict[str, list], stages: tuple[str, ...], in_units: bool) -> list[dict]:
    """A contender's time in each stage: in seconds, against naive and, where there is a GEMM, in units of that."""
    forward, backward = contender.gemms or (math.nan, math.nan)
    limit = {"forward": forward, "backward": backward, "both": forward + backward}
    rows = []
    for stage in stages:
        seconds = [r[stage] for r in times[contender.name]]
        units, naive = ([r[stage] / r["gemm"] for r in times.get(who, ())] for who in (contender.name, "naive"))
        row = {"contender": contender.name, "stage": stage, "computes": contender.computes, "reps": len(units)}
        row |= _spread("units", units if in_units else [math.nan])
        row |= {"limit": limit[stage], "vs_naive": median(units) / median(naive or [math.nan])}
        rows.append(row | _spread("seconds", seconds) | {"memory_mb": math.nan})
    return rows


def _spread(name: str, values: list[float]) -> dict[str, float]:
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def run_once(contender: Contender, x: dict) -> tuple[Outputs, float, float]:
    """Outputs, and seconds of the forward and of the backward pass (with the optimiser's step, if there is one)."""
    for leaf in leaves(x).values():
        leaf.grad = None
    start = now()
    out = contender.run(x)
    middle = now()
    differentiate(out, x)
    if "optimizer" in x:
        x["optimizer"].step()
    return out, middle - start, now() - middle


def interleave(everyone: list[Contender], x: dict, gemm: Callable[[], float], reps: int, tick) -> dict[str, list]:
    """Contender -> repetitions in rotating order: seconds by stage, and of the GEMM around (before and after)."""
    times, before = {c.name: [] for c in everyone}, gemm()
    for rep in range(reps):
        turn = rep % len(everyone)
        for contender in everyone[turn:] + everyone[:turn]:
            forward, backward = repeat(contender, x)
            after = gemm()
            seconds = {"forward": forward, "backward": backward, "both": forward + backward}
            times[contender.name].append(seconds | {"gemm": (before + after) / 2})
            before = after
            tick()
    return times


def repeat(contender: Contender, x: dict) -> tuple[float, float]:
    """Mean seconds of forward and backward pass over as many runs as last `SHORTEST` together."""
    runs = []
    while sum(map(sum, runs)) < SHORTEST:
        runs.append(run_once(contender, x)[1:])
    return tuple(sum(part) / len(runs) for part in zip(*runs, strict=True))


def reference_gemm(size: Size, device: str) -> Callable[[], float]:
    """A function that multiplies [N, H] by [H, V] into a fixed output and returns the seconds it took."""
    dtype = getattr(torch, size.dtype)
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((size.n, size.h), (size.v, size.h)))
    out = torch.empty(size.n, size.v, dtype=dtype, device=device)

    def gemm() -> float:
        start = now()
        torch.mm(a, b.T, out=out)
        return now() - start

    gemm()
    return gemm


class Exact(NamedTuple):
    """What float64 gives for some rows of a batch: outputs, and gradients by name. `whole`: these are all rows."""

    rows: Tensor | EllipsisType
    whole: bool
    out: Outputs
    grads: dict[str, Tensor]


def exact(truth: Callable[[dict], Outputs], x: dict) -> Exact:
    """A workload's truth in float64 for 64 tokens (or sequences) spread evenly over the batch, which is exact for them
    because rows are independent given the upstream gradients."""
    count = len(x["tokens"] if "tokens" in x else x["mask"])
    whole = "model" in x or count <= CHECKED_ROWS
    rows = ... if whole else torch.linspace(0, count - 1, CHECKED_ROWS).long()
    y = in_float64(x, rows)
    out = truth(y)
    differentiate(out, y, share=1.0 if whole else CHECKED_ROWS / count)
    return Exact(rows, whole, out, {name: leaf.grad for name, leaf in leaves(y).items()})


def errors(out: Outputs, x: dict, true: Exact) -> dict[str, float]:
    """Largest absolute error per output, and the largest relative one of a gradient, after `run_once`. What mixes rows
    (the mean loss, the weights' gradients) is compared where the truth knows all of them."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.detach()[true.rows].cpu().double()

    names = [name for name in true.out if name in out and (true.whole or true.out[name].dim())]
    found = {f"error_{n}": (rows(out[n]) - true.out[n]).abs().max().item() for n in names}
    pairs = [(leaf.grad, true.grads[n]) for n, leaf in leaves(x).items() if true.whole or n not in SHARED]
    wrong = [((rows(g) - t).norm() / t.norm()).item() for g, t in pairs if t is not None and t.any()]
    return found | ({"error_gradient": max(wrong)} if wrong else {})


def differentiate(out: Outputs, x: dict, share: float = 1.0) -> None:
    """Backward pass from all outputs that have one; `share` is what a loss counts for if its rows are a part."""
    live = {name: value for name, value in out.items() if value.requires_grad and name != "ref_logprob"}
    pairs = [(v, x["upstream"][:, UPSTREAM[n]] if v.dim() else torch.full_like(v, share)) for n, v in live.items()]
    if pairs:
        torch.autograd.backward(*zip(*pairs))


def leaves(x: dict) -> dict[str, Tensor]:
    """Everything that gets a gradient, by name."""
    found = {name: value for name, value in x.items() if isinstance(value, Tensor) and value.requires_grad}
    return found | (dict(x["model"].named_parameters()) if "model" in x else {})


def in_float64(x: dict, rows) -> dict:
    """The same inputs on the CPU in float64, but these rows only."""
    y = {}
    for name, value in x.items():
        if name == "model":
            y[name] = copy.deepcopy(value).cpu().double()
            y[name].zero_grad()
        elif isinstance(value, Tensor):
            part = (value if name in SHARED else value[rows]).detach().cpu()
            y[name] = part.double().requires_grad_(value.requires_grad) if part.is_floating_point() else part
    return y


def now() -> float:
    """Seconds, once everything asked of the GPU is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(**what) -> float:
    """Megabytes that a forward and backward pass needs beyond its inputs, measured in a process of its own.

    `what`: workload, contender, size, seed, device, compiled. NaN if that process fails.
    """
    command = [sys.executable, "-m", "klq_edu.bench.measure", json.dumps(what)]
    out = subprocess.run(command, capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else math.nan


def peak_here(workload: str, contender: str, size: list, seed: int, device: str, compiled: bool) -> float:
    """The peak over the level after a warm-up with a tiny call of the same operation."""
    (chosen,) = (c for c in contenders(workload, device, compiled) if c.name == contender)
    size = Size(*size)
    run_once(chosen, make_inputs(workload, QUICK[workload]._replace(dtype=size.dtype), seed, device))
    x = make_inputs(workload, size, seed, device)
    return resident_peak(lambda: run_once(chosen, x))


def allocated_peak(contender: Contender, x: dict) -> float:
    """Megabytes of GPU memory that forward and backward pass need beyond the inputs, as torch's allocator counts."""
    for leaf in leaves(x).values():
        leaf.grad = None
    level = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(contender, x)
    return (torch.cuda.max_memory_allocated() - level) / MEGABYTE


def resident_peak(call) -> float:
    """Highest resident memory during `call` over that before it, looked at every 3 ms by a thread."""
    import psutil

    process, done = psutil.Process(), threading.Event()
    level = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_EVERY):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return (max(peak, process.memory_info().rss) - level) / MEGABYTE


if __name__ == "__main__":
    print(peak_here(**json.loads(sys.argv[1])))
