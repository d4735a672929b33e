"""One workload at one size: everyone's errors, time and peak memory, as rows of the CSV. Needs torch only."""

import math
from collections.abc import Callable
from functools import cache
from statistics import median

import torch

from klq_edu.bench.config import BenchConfig, Size
from klq_edu.bench.measure import allocated_peak, errors, exact, interleave, peak_memory, reference_gemm, run_once
from klq_edu.bench.workloads import WORKLOADS, Contender, make_inputs


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
    what = {"workload": name, "size": size, "seed": config.seed, "device": device}
    what |= {"compiled": config.compile, "reference": config.reference}
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
