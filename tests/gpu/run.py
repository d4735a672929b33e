"""`make gpu`: what only a GPU can show, within minutes and in one folder: correctness, stray accesses, races, and times
beside those that the inspector predicts.

Needs torch, triton, pytest and transformers in the Python that runs it, and nothing installed. Each step is a process
with a log; what fails, crashes or takes too long is recorded, and the next one runs. `--dry-run` is a rehearsal that
sees no GPU: the tests in Triton's interpreter and the benchmark on the CPU, both at tiny sizes.
"""

import argparse
import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "triton", "pytest", "transformers")
SHAPES = {  # SmolLM2-135M, Llama-3.1-8B
    "small": {"n": (8192,), "v": (49_152,), "h": (576,)},
    "large": {"n": (8192,), "v": (128_256,), "h": (4096,)},
}
WORKLOADS = ("logits_stats", "linear_stats", "klq_ref", "klq")
KERNELS = {  # what the inspector knows times of, by its names
    ("returns", "forward"): "lambda_returns", ("klq", "both"): "linear_klq_loss",
    ("klq_ref", "both"): "linear_klq_loss, reference", ("logits_stats", "forward"): "token_stats",
    ("logits_stats", "backward"): "token_stats, gradient", ("linear_stats", "forward"): "linear_token_stats",
}  # fmt: skip
POINT = ("workload", "stage", "n", "v", "h")
COLUMNS = (*POINT, "contender", "ms", "floor ms", "model ms", "units", "memory_mb", "error_gradient")
REHEARSED = 3  # of these: the others take long to compile
WRONG = {"error_gradient": 0.05}  # benchmarks are in bfloat16: a larger error than this (others: 0.1) is a fault
QUERY = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit,compute_mode,mig.mode.current"
SEED = 0


class Step(NamedTuple):
    """A process: its command, what its log must and must not show."""

    name: str
    command: list[str]
    reserve: float  # seconds that earlier steps leave it
    wanted: str = ""
    unwanted: str = r"(?!)"
    sanitizer: bool = False  # reaching the limit is no failure


def steps(folder: Path, dry: bool) -> list[Step]:
    """All steps in their order."""
    python = [sys.executable, __file__, *["--dry-run"] * dry, "--out", str(folder)]
    tests = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--confcutdir=tests/gpu", "--tb=short"]
    watched = [*tests, "tests/gpu", "-x", "-k", "linear_operations or on_logits or lambda_returns"]
    tests += ["tests/gpu", "--durations=10", f"--junitxml={folder / 'tests.xml'}"]
    program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
    watch = [program or "compute-sanitizer", "--report-api-errors", "no", "--error-exitcode", "9", "--tool"]
    found = r"={9} (Invalid|Misaligned|Uninit|Out-of-range|.*[Rr]ace reported|.*hazard detected).*"
    return [
        Step("tests", tests, 150, r"\b[1-9]\d* passed"),
        Step("memcheck", [*watch, "memcheck", *watched], 40, unwanted=found, sanitizer=True),
        Step("model", [*python, "--step", "model"], 30),
        *(Step(f"bench-{shape}", [*python, "--step", shape], 90, r"no fault\s*$") for shape in SHAPES),
        Step("racecheck", [*watch, "racecheck", *watched], 0, unwanted=found, sanitizer=True),
    ]


def environment(dry: bool, sanitizer: bool = False) -> dict[str, str]:
    """What a step's process finds: both packages and no plugins of pytest; in a rehearsal no GPU but the interpreter;
    under a sanitizer each allocation by itself, as torch's cache hides what lies beyond its end."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    out = {k: x for k, x in os.environ.items() if k not in ("TRITON_INTERPRET", "KLQ_DEVICE")}
    out |= {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONUNBUFFERED": "1"}
    if dry:
        out |= {"TRITON_INTERPRET": "1", "KLQ_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    return out | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if sanitizer else {})


def run(step: Step, folder: Path, limit: float, dry: bool, say) -> str:
    """Carry out a step within `limit` seconds; what came of it."""
    if step.sanitizer and (dry or not shutil.which(step.command[0])):
        return f"left out: needs {'a GPU and ' * dry}compute-sanitizer"
    if limit < 5:
        return f"{'left out' if step.sanitizer else 'failed'}: no time left"
    log = folder / f"{step.name}.log"
    given = dict(cwd=ROOT, env=environment(dry, step.sanitizer), stderr=subprocess.STDOUT, start_new_session=True)
    with log.open("wb") as out, subprocess.Popen(step.command, stdout=out, **given) as child:
        try:
            code = watch(child, limit, lambda: say(f"    {last_line(log):.100}"))
        finally:
            stop(child)
    text = log.read_text(errors="replace")
    if found := re.search(step.unwanted, text):
        return f"failed: {found[0]} ({log.name})"
    if code is None:
        return f"{'nothing found' if step.sanitizer else 'failed'}: stopped after {limit:.0f} s ({log.name})"
    if code or not re.search(step.wanted, text):
        return f"failed: exit status {code}: {last_line(log):.200} ({log.name})"
    return last_line(log)[:100]


def watch(child: subprocess.Popen, limit: float, tick) -> int | None:
    """The exit status, or None after `limit` seconds; `tick` is called every 20."""
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        try:
            return child.wait(timeout=min(left, 20))
        except subprocess.TimeoutExpired:
            tick()
    return None


def stop(child: subprocess.Popen) -> None:
    """End a step with everything it started: politely, so that pytest sums up, then at once."""
    for signum in (signal.SIGINT, signal.SIGKILL):
        if child.poll() is None:
            os.killpg(child.pid, signum)
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=5)


def last_line(log: Path) -> str:
    return (log.read_text(errors="replace").strip().splitlines() or ["(nothing yet)"])[-1]


def provenance() -> dict:
    """Where the results come from. Imports torch, so a process of its own is asked for it."""
    import torch
    import triton

    from klq_edu.machine import facts

    gpu = torch.cuda.is_available()
    out = {"gpu": gpu, "date": datetime.now().astimezone().isoformat(timespec="seconds"), "seed": SEED}
    out |= facts("cuda" if gpu else "cpu") | {"triton": triton.__version__, "cuda": torch.version.cuda}
    out |= {"hip": torch.version.hip, "nvidia-smi": _output("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv")}
    if gpu:
        p = torch.cuda.get_device_properties(0)
        out |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        out |= {"gigabytes": round(p.total_memory / 2**30, 1), "devices": torch.cuda.device_count()}
    out |= {
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": _output("git", "status", "--porcelain", "-uno") != "",
    }
    switches = ("CUDA_", "TRITON_", "TORCH_", "PYTORCH_", "KLQ_", "NVIDIA_TF32")
    return out | {"environment": {k: x for k, x in os.environ.items() if k.startswith(switches)}}


def _output(*command: str) -> str | None:
    """What a command prints; None where it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def bench(shape: str, folder: Path, dry: bool) -> None:
    """Every workload at one of the SHAPES, as `klq bench` measures it; the CSV is complete after each."""
    from klq_edu.bench.config import BenchConfig
    from klq_edu.bench.measure import measure_point
    from klq_edu.bench.workloads import contenders

    config = BenchConfig(workloads=WORKLOADS, dtypes=("bfloat16",), seed=SEED, device="cuda")
    points = replace(config, **SHAPES[shape]).points() + replace(config, workloads=("returns",)).points()
    for name, size in points:
        print(f"{name} {size}: {', '.join(c.name for c in contenders(name, 'cuda'))}")
    if dry:
        config = replace(config, dtypes=("float32",), quick=True, device="cpu", reps=1, memory=False)
        points = replace(config, workloads=(*WORKLOADS, "returns")).points() if shape == "small" else []
    rows, faults = [], []
    for name, size in points:
        everyone, found = contenders(name, config.device), []
        try:
            found = measure_point(name, size, everyone, config, config.device, print, lambda: None)
        except Exception as error:
            print(f"{name} {size}: {error!r:.500}")
        rows += found
        missing = {c.name for c in everyone if not c.optional and c.name != "naive"} - {r["contender"] for r in found}
        faults += [f"{name} {size}: {fault}" for fault in (*wrong(found), *(f"{who} did not run" for who in missing))]
        write_csv(folder / f"bench-{shape}.csv", rows)
    print(*faults, f"{len(rows)} rows, {len(faults) or 'no'} fault{'s' * (len(faults) > 1)}", sep="\n")


def wrong(rows: list[dict]) -> list[str]:
    """Errors of ours against float64 that no rounding explains, NaN among them."""
    errors = [(r["contender"], n, x) for r in rows for n, x in r.items() if n.startswith("error_")]
    return [f"{who}: {n} {x:.1e}" for who, n, x in errors if "ours" in who and not x <= WRONG.get(n, 0.1)]


def write_csv(path: Path, rows: list[dict]) -> None:
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        out.writeheader()
        out.writerows(rows)


def model(folder: Path, dry: bool) -> None:
    """What the inspector says of this device (of an H100 in a rehearsal) for all measurements that it knows."""
    import torch

    gpu = "H100" if dry else torch.cuda.get_device_name()
    shapes, found = [tuple(x for (x,) in shape.values()) for shape in SHAPES.values()], []
    for what, kernel in list(KERNELS.items())[: REHEARSED if dry else None]:
        for n, v, h in [(64 * 1024, "", "")] if what[0] == "returns" else shapes:
            point = dict(zip(POINT, (*what, n, v, h), strict=True))
            found.append(predicted(kernel, gpu, n, v or 1, h or 1) | point)
            (folder / "model.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} points for {gpu}")


def predicted(kernel: str, gpu: str, n: int, v: int, h: int) -> dict:
    """`klq inspect`'s floor and model of a kernel or loss on this GPU; nothing where it knows one of them not."""
    from klq_edu.bench import roofline

    device = next((known for known in roofline.DEVICES if known in gpu), None)
    if device is None or kernel not in roofline.KERNELS:
        return {}
    dtype = "fp32" if kernel == "lambda_returns" else "bf16"
    loss = kernel in roofline.LOSSES  # no kernel of its own
    record = {"kernel": kernel, "dtype": dtype} if loss else compiled(kernel, roofline.DEVICES[device].target, dtype)
    return roofline.predict(record, device, n, v, h)


@cache
def compiled(kernel: str, target: str, dtype: str) -> dict:
    """What the inspector finds in the machine code of a kernel's default tile."""
    from klq_edu.bench.roofline import compiled

    return json.loads(next(iter(compiled("--targets", target, "--dtypes", dtype, "--kernels", kernel))))


def report(folder: Path, facts: dict, outcomes: dict[str, str]) -> str:
    """The page that says what came out."""
    title = facts["device"] if facts["gpu"] else "Rehearsal: no number here was measured on a GPU"
    lines = [f"# {title}", "", *(f"- {k}: {x}" for k, x in facts.items() if x not in (None, {}, "")), ""]
    lines += [*(f"- {step}: {outcome}" for step, outcome in outcomes.items()), ""]
    rows = []
    for path in sorted(folder.glob("bench-*.csv")):
        with path.open(newline="") as file:
            rows += list(csv.DictReader(file))
    known = json.loads((folder / "model.json").read_text()) if (folder / "model.json").exists() else []
    said = {tuple(str(x[key]) for key in POINT): x for x in known}
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        expected = said.get(tuple(row[key] for key in POINT), {}) if row["contender"] == "ours (triton)" else {}
        shown = row | {"ms": 1e3 * float(row["seconds"]), "floor ms": expected.get("floor_ms", "")}
        shown["model ms"] = " to ".join(_short(x) for x in sorted(expected.get("ms", ())))
        lines.append("| " + " | ".join(_short(shown.get(name, "")) for name in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _short(x) -> str:
    """A number as a table shows it; anything else, and integers, as they are.

    >>> _short("0.12345"), _short("8192"), _short("nan"), _short("naive")
    ('0.123', '8192', '', 'naive')
    """
    text = str(x)
    if text == "nan" or not re.fullmatch(r"-?\d*\.\d*(e-?\d+)?", text):
        return text.replace("nan", "")
    return f"{float(text):.3g}"


def ask_facts(dry: bool) -> dict:
    """`provenance` of this machine; SystemExit that says what is missing."""
    if missing := [name for name in NEEDED if not find_spec(name)]:
        sys.exit(f"{sys.executable} has no {', '.join(missing)}: choose another with make gpu PYTHON=…")
    command = [sys.executable, __file__, "--step", "facts"]
    asked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(dry))
    if asked.returncode:
        sys.exit(f"this Python can't say what machine this is:\n{asked.stderr[-2000:]}")
    facts = json.loads(asked.stdout.splitlines()[-1])
    if not (facts["gpu"] or dry):
        sys.exit(f"no GPU: torch {facts['torch']} sees none; a rehearsal without one: make gpu ARGS=--dry-run")
    return facts


def everything(out: Path, dry: bool, minutes: float) -> int:
    """All steps; at any time the folder holds what is done. The exit status is 0 if none failed."""
    start, facts = time.monotonic(), ask_facts(dry)
    device = re.sub(r"\W+", "-", facts["device"].lower()) if facts["gpu"] else "rehearsal"
    folder = out / f"{device}-{datetime.now():%Y-%m-%d-%H%M%S}"
    folder.mkdir(parents=True)
    plan, outcomes = steps(folder, dry), {}

    def left() -> float:
        return 60 * minutes - (time.monotonic() - start)

    def say(text: str) -> None:
        print(f"[{left():4.0f} s left] {text}", flush=True)

    def record(name: str, outcome: str) -> None:
        outcomes[name] = outcome
        commands = {step.name: shlex.join(step.command) for step in plan}
        content = facts | {"commands": commands, "outcomes": outcomes}
        (folder / "provenance.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "report.md").write_text(report(folder, facts, outcomes))

    try:
        for index, step in enumerate(plan):
            say(f"{step.name}: {shlex.join(step.command)}")
            record(step.name, "failed: interrupted")
            limit = left() - sum(later.reserve for later in plan[index + 1 :])
            record(step.name, run(step, folder, limit, dry, say))
            say(f"{step.name}: {outcomes[step.name]}")
    except KeyboardInterrupt:
        say("interrupted; what is done is kept")
    print(f"{folder / 'report.md'}", *(f"  {step}: {outcome}" for step, outcome in outcomes.items()), sep="\n")
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


def main(argv: list[str] | None = None) -> int:
    """The command; `--step` is for the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="rehearse everything without a GPU")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="each run makes a folder in it")
    parser.add_argument("--minutes", type=float, default=8, help="all that may take, in all")
    parser.add_argument("--step", choices=("facts", "model", *SHAPES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.step is None:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        return everything(args.out.resolve(), args.dry_run, args.minutes)
    if args.step == "facts":
        print(json.dumps(provenance()))
    elif args.step == "model":
        model(args.out, args.dry_run)
    else:
        bench(args.step, args.out, args.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
