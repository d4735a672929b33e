"""`klq doctor`: what this machine has, what is missing, and what to do about it."""

import importlib.util
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from klq_edu.worlds.weights import ABSENT, cache_root, minilm_folder, weights_folder

DEMO = "pip install -c constraints.txt -e '.[demo]' (needed by stories, tldr and dialogue)"
NEEDED = ("torch", "triton", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "rich", "tyro")
PACKAGES = dict.fromkeys(NEEDED, "pip install -c constraints.txt -e .")
PACKAGES |= dict.fromkeys(("gguf", "vaderSentiment", "textblob", "rouge-score"), DEMO)


class Finding(NamedTuple):
    """One line of the report: what was looked at, whether it is all right, what was found, and what to do if not."""

    what: str
    fine: bool
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, devices, Triton's mode, the weights and the cache."""
    findings = [Finding("python", True, platform.python_version())]
    for name, advice in PACKAGES.items():
        try:
            findings.append(Finding(name, True, version(name)))
        except PackageNotFoundError:
            findings.append(Finding(name, False, "not installed", advice))
    findings += _devices() if importlib.util.find_spec("torch") else []
    optional = "tldr and dialogue do without this judge; `make setup` brings it"
    for name, folder, advice in (("SmolLM2", weights_folder(), ABSENT), ("MiniLM", minilm_folder(), optional)):
        findings.append(Finding(f"{name} weights", bool(folder), *(("installed",) if folder else ("absent", advice))))
    root = cache_root()
    made = sorted(p.name for p in root.glob("[!.]*"))
    return [*findings, Finding("cache", True, f"{root}: {', '.join(made) or 'empty, filled by the first demo'}")]


def _devices() -> list[Finding]:
    import torch

    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    device = f"CPU, {torch.get_num_threads()} threads; {gpus or 'no GPU (everything here runs without one)'}"
    mode = ("no GPU, interpreter off", "set TRITON_INTERPRET=1 to run kernels on the CPU")
    if gpus or os.environ.get("TRITON_INTERPRET") == "1":
        mode = ("compiles for the GPU" if gpus else "interpreter: kernels run on the CPU, slowly and exactly",)
    return [Finding("device", True, device), Finding("triton mode", True, *mode)]


def run_doctor() -> bool:
    """Say what this machine has, what is missing, and what to do about it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table, findings = Table("", "what", "found", "what to do", title="klq doctor"), examine()
    for f in findings:
        table.add_row("[green]ok[/]" if f.fine else "[red]missing[/]", f.what, escape(f.found), escape(f.advice))
    Console().print(table)
    return all(f.fine for f in findings)
