"""Every kernel compiles for GPUs that are not here, and its default tile keeps what the package promises."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from klq_edu.app.inspection import KERNELS, InspectConfig, findings, floor_seconds
from klq_kernels.offline import TARGETS, Finding, problems

GOOD = Finding(
    kernel="linear_token_stats", target="gfx942", dtype="bf16", tile="", default=True, registers=100, spill_bytes=0,
    local_accesses=0, shared_bytes=1000, shared_limit=65_536, loads={"16": 4}, stores={"4": 1},
    matrix={"v_mfma": 8}, precision="bf16",
)  # fmt: skip


@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.rare) for t in TARGETS])
def test_no_default_spills_overflows_shared_memory_or_loses_wide_loads_or_matrix_instructions(target):
    records = list(findings(InspectConfig(targets=(target,))))
    assert not [r for r in records if r["problems"]]
    seen = {(r["kernel"], r["dtype"]) for r in records}
    missing = {(kernel, dtype) for kernel in KERNELS for dtype in ("bf16", "fp32")} - seen
    assert missing == {("lambda_returns", "bf16")}, "λ-returns are always fp32"
    for r in records:
        if r["matrix"]:
            exact = "ieee" if target == "gfx942" else "tf32x3"
            assert r["precision"] == ("bf16" if r["dtype"] == "bf16" else exact), "plain TF32 only if asked for"


@pytest.mark.parametrize(
    "change, complaint",
    [(dict(spill_bytes=8), "spills 8 bytes"), (dict(local_accesses=2), "2 accesses to local"),
     (dict(shared_bytes=70_000), "needs 70000"), (dict(loads={"8": 3}), "no 16-byte"), (dict(matrix={}), "no matrix")],
)  # fmt: skip
def test_each_broken_promise_is_named(change, complaint):
    assert problems(GOOD, multiplies=True) == []
    (found,) = problems(replace(GOOD, **change), multiplies=True)
    assert complaint in found


def test_a_tile_too_large_for_a_device_is_found_out():
    """The compiler itself does not check the device's shared memory; candidates show it, defaults must not."""
    config = InspectConfig(
        kernels=("linear_token_stats, shared head",), targets=("gfx942",), dtypes=("bf16",), all_tiles=True
    )
    records = list(findings(config))
    assert max(r["shared_bytes"] for r in records) > 65_536 >= records[0]["shared_bytes"]


def test_sizes_of_one_compile():
    """N = 1, V = 1, T = 1 …: Triton makes constants of them, on which tensor methods fail; interpreting can't tell."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "klq_kernels.offline", "--ones", "--targets", "sm_90", "--dtypes", "fp32"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-2000:]
    assert len(out.stdout.splitlines()) == len(KERNELS)


def test_the_floor_is_the_longer_of_memory_and_arithmetic():
    """By hand: 2 · 10 · 160 · 2 bytes at 3.35 TB/s, and 4 · 1e3 · 1e3 · 1e3 operations at 989 TFLOP/s."""
    assert floor_seconds("token_stats", "H100", "bf16", 10, 160, 1) == pytest.approx(6400 / 3.35e12)
    assert floor_seconds("linear_token_stats", "H100", "bf16", 1000, 1000, 1000) == pytest.approx(4e9 / 989e12)
