"""Peak memory of one contender in a fresh process: `python -m klq_edu.bench.memory '{"workload": "klq", …}'`."""

import json
import math
import subprocess
import sys
import threading

import psutil
import torch

from klq_edu.bench.config import QUICK, Size
from klq_edu.bench.contenders import contenders
from klq_edu.bench.measure import run_once
from klq_edu.bench.workloads import make_inputs

MEGABYTE = 2**20
SAMPLE_EVERY = 0.003  # seconds between looks at the resident memory


def peak_memory(**what) -> float:
    """Megabytes that a forward and backward pass needs beyond its inputs, measured in a process of its own.

    `what`: workload, contender, size, seed, device, compiled, reference. NaN if that process fails.
    """
    command = [sys.executable, "-m", "klq_edu.bench.memory", json.dumps(what)]
    out = subprocess.run(command, capture_output=True, text=True)
    return float(out.stdout.split()[-1]) if out.returncode == 0 else math.nan


def measure(workload: str, contender: str, size: list, seed: int, device: str, **options) -> float:
    """The peak over the level after a warm-up with a tiny call of the same operation."""
    (chosen,) = (c for c in contenders(workload, device, **options) if c.name == contender)
    size = Size(*size)
    run_once(chosen, make_inputs(workload, QUICK[workload]._replace(dtype=size.dtype), seed, device))
    x = make_inputs(workload, size, seed, device)
    if not device.startswith("cuda"):
        return resident_peak(lambda: run_once(chosen, x))
    level = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run_once(chosen, x)
    return (torch.cuda.max_memory_allocated() - level) / MEGABYTE


def resident_peak(call) -> float:
    """Highest resident memory during `call` over that before it, looked at every 3 ms by a thread."""
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
    print(measure(**json.loads(sys.argv[1])))
