"""This machine: the device and the threads to compute with, and the facts that a measurement comes with."""

import os
import platform
from contextlib import contextmanager
from importlib.metadata import version

import torch

from klq_edu import __version__
from klq_kernels.torch_linear import native


def resolve_device(name: str) -> torch.device:
    """'auto' picks cuda, then mps, then cpu; anything else must name a device that is there."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not usable here ({error}): use 'auto' or 'cpu'") from error


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' picks bfloat16 where this device multiplies it fast, else float32; other names are torch's."""
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cpu" and native(torch.bfloat16)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


@contextmanager
def threads(count: int | None):
    """Within this context torch computes with `count` CPU threads (None: as before)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def facts(device: str) -> dict[str, str]:
    """Provenance of a measurement on this device: software versions and the class of machine, no names or paths."""
    device = resolve_device(device)
    device = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    packages = {"klq-edu": __version__} | {name: version(name) for name in ("torch", "transformers", "numpy")}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = f"{platform.machine()}, {cores} cores"
    return {"python": platform.python_version(), **packages, "machine": machine, "device": device}
