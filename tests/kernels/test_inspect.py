"""Every kernel compiles for GPUs that are not here, and its default tile keeps what the package promises; what the
machine code does is counted, the model reproduces what others measured, and bad tiles are found out."""

import json
import os
import subprocess
import sys
from functools import cache
from math import prod
from pathlib import Path

import pytest

from klq_edu.app.inspection import COMPILED, InspectConfig, _code, _model, everything, run_inspect
from klq_edu.bench import roofline
from klq_edu.bench.roofline import (
    DEVICES,
    PROMISES,
    SHAPE,
    chunked_seconds,
    compiled,
    floor_seconds,
    predict,
    shortfalls,
)
from klq_kernels.machine_code import work
from klq_kernels.offline import problems

README = Path(__file__).parents[2] / "kernels" / "README.md"
GOOD = dict(
    kernel="linear_token_stats", target="gfx942", dtype="bf16", tile="", registers=100, spill_bytes=0,
    local_accesses=0, shared_bytes=1000, shared_limit=65_536, loads={"16": 4}, stores={"4": 1},
    matrix={"v_mfma": 8}, precision="bf16", per_logit=7.0, work={},
)  # fmt: skip


@cache
def inspected(target: str, dtypes: tuple[str, ...]) -> dict:
    return everything(InspectConfig(targets=(target,), dtypes=dtypes))


def default(target: str, kernel: str) -> dict:
    records = inspected(*OFTEN[target == "sm_90"])["kernels"]
    return next(r for r in records if (r["kernel"], r["dtype"]) == (kernel, "bf16"))


def rows_first(record: dict) -> dict:
    return record | {"work": record["work"] | {"group": 0}}


def planted(target: str, tile: str, *kernels: str) -> dict[str, dict]:
    """kernel -> the record of this tile in place of its default, in bf16."""
    options = ("--targets", target, "--dtypes", "bf16", "--kernels", *kernels, "--tile", *tile.split())
    return {r["kernel"]: r for r in map(json.loads, compiled(*options))}


OFTEN = ("sm_80", ("bf16",)), ("sm_90", ("bf16", "fp32"))
RARELY = ("sm_80", ("fp32",)), ("sm_100", ("bf16", "fp32")), ("gfx942", ("bf16", "fp32"))
EVERYWHERE = [*OFTEN, *(pytest.param(*x, marks=pytest.mark.rare) for x in RARELY)]


@pytest.mark.parametrize("target, dtypes", EVERYWHERE)
def test_every_default_keeps_its_promises(target, dtypes):
    found = inspected(target, dtypes)
    assert found["problems"] == []
    seen = {(r["kernel"], r["dtype"]) for r in found["kernels"]}
    missing = {(kernel, dtype) for kernel in COMPILED for dtype in dtypes} - seen
    assert missing <= {("lambda_returns", "bf16")}, "λ-returns are always fp32"
    for r in found["kernels"]:
        if r["matrix"]:
            exact = "ieee" if target == "gfx942" else "tf32x3"
            assert r["precision"] == ("bf16" if r["dtype"] == "bf16" else exact), "plain TF32 only if asked for"


@pytest.mark.parametrize("target, dtypes", EVERYWHERE)
def test_the_k_loop_that_was_read_does_exactly_one_k_step(target, dtypes):
    """Counted from matrix instructions and their shapes; if it were more, several warps would do the same product."""
    for r in inspected(target, dtypes)["kernels"]:
        if "models" in (w := r["work"]) and r["dtype"] == "bf16":
            assert w["step_fma"] == w["together"] * w["rows"] * w["vocab"] * w["hidden"], r["kernel"]
            assert w["step_instructions"] > w["step_matrix"] > 0 and w["tile_instructions"] > w["exponentials"] > 0


SASS = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 EXIT ;
.L_x_3:
        /*0012*/                   FADD R4, R4, R5 ;
        /*0014*/                   FADD R4, R4, R5 ;
        /*0016*/                   FADD R4, R4, R5 ;
        /*0018*/                   FADD R4, R4, R5 ;
        /*001a*/                   FADD R4, R4, R5 ;
        /*001c*/                   FADD R4, R4, R5 ;
        /*001e*/              @!P1 BRA `(.L_x_6) ;
.L_x_7:
        /*0020*/                   MUFU.EX2 R4, R4 ;
.L_x_1:
        /*0030*/                   LDSM.16.M88.4 R8, [R2] ;
        /*0040*/                   LDS.64 R12, [R2+0x400] ;
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   HMMA.16816.F32.BF16 R16, R8, R12, R16 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   HGMMA.64x16x8.F32.TF32 R24, R4, gdesc[UR8], R24 ;
        /*0090*/              @!P1 BRA `(.L_x_4) ;
.L_x_5:
        /*00a0*/               @P2 BRA `(.L_x_1) ;
        /*00b0*/               @P3 BRA `(.L_x_2) ;
        /*00c0*/                   FSEL R4, R4, -INF, P3 ;
        /*00d0*/                   FSEL R5, R5, -INF, P3 ;
.L_x_2:
        /*00e0*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00f0*/                   MUFU.EX2 R5, R5 ;
        /*0100*/               @P4 BRA `(.L_x_3) ;
        /*0110*/                   EXIT ;
.L_x_4:
        /*0120*/              @!P1 BRA `(.L_x_4) ;
        /*0130*/                   BRA `(.L_x_5) ;
.L_x_6:
        /*0132*/              @!P1 BRA `(.L_x_6) ;
        /*0134*/                   BRA `(.L_x_7) ;
        /*0140*/                   NOP ;
"""


def test_loops_and_what_is_in_them_are_read_as_by_hand():
    """A k-loop in a loop over tiles, a ragged tile's instructions that are jumped over, waits behind the last exit, a
    load that never happens. 256 threads are 8 warps or 2 groups of four."""
    assert work(SASS, threads=256, rows=64, vocab=128) == {
        "step_instructions": 8, "step_matrix": 3, "step_fma": 8 * 16 * 8 * 16 + 2 * 64 * 128 * 16 + 2 * 64 * 16 * 8,
        "step_shared": 256 * (16 + 8) + 2 * 32 * (64 + 128) + 2 * 32 * 16,
        "tile_instructions": 12, "exponentials": 2, "barriers": 1,
    }  # fmt: skip


def test_the_loops_of_amd_code_are_read_as_by_hand():
    """A k-loop that jumps back from two places, and a tile that ends early unless it is ragged; of eight waves only the
    vector instructions count."""
    code = [
        ".LBB0_1:", "s_mov_b32 s0, 0", "v_exp_f32_e32 v1, v1", ".LBB0_2:", "v_mfma_f32_32x32x8_bf16 v[0:15], v16",
        "s_cbranch_scc1 .LBB0_2", "ds_read_b64 v[2:3], v9", "ds_read2_b32 v[4:5], v9", "s_cbranch_scc0 .LBB0_2",
        "s_barrier", "s_cbranch_scc1 .LBB0_1", "v_mul_f32_e32 v1, v1, v2 ; tail", "s_branch .LBB0_1", "s_endpgm",
    ]  # fmt: skip
    assert work("\n".join(line if line.endswith(":") else f"\t{line}" for line in code), 512, 256, 128) == {
        "step_instructions": 1, "step_matrix": 1, "step_fma": 8 * 32 * 32 * 8, "step_shared": 512 * 16,
        "tile_instructions": 1, "exponentials": 1, "barriers": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, complaint",
    [(dict(spill_bytes=8), "spills 8 bytes"), (dict(local_accesses=2), "2 accesses to local"),
     (dict(shared_bytes=70_000), "needs 70000"), (dict(loads={"8": 3}), "no 16-byte"), (dict(matrix={}), "no matrix")],
)  # fmt: skip
def test_each_broken_promise_is_named(change, complaint):
    assert problems(**GOOD) == []
    (found,) = problems(**GOOD | change)
    assert complaint in found


@pytest.mark.parametrize("target, device", [("sm_80", "A100"), ("sm_90", "H100")])
def test_small_tiles_are_found_out_with_either_raster(target, device):
    """The first kernels' tiles, which spilled nothing and moved four times what L2 delivers, and their row tiles that
    vary fastest, whose hidden rows stream past L2: all of it falls short, and the raster alone never helps."""
    promised = [kernel for kernel, where in PROMISES if where == device and kernel in COMPILED]
    small = planted(target, "64 64 64 8 3", *promised)
    for kernel in promised:
        good, bad = default(target, kernel), small[kernel]
        assert not shortfalls(good) and not bad["problems"]
        for record in (bad, rows_first(bad)):
            assert f"an {device}'s floor, {PROMISES[kernel, device]:.0%} is promised" in "".join(shortfalls(record))
        for record in (bad, good):
            assert predict(record, device, *SHAPE)["ms"] <= predict(rows_first(record), device, *SHAPE)["ms"]


def test_rows_that_vary_fastest_are_seen_with_good_tiles_too():
    """In a long batch with two heads; in the promises' shape large tiles need few enough passes to hide it."""
    record, long = default("sm_90", "linear_token_stats"), (65_536, *SHAPE[1:])
    grouped, streamed = predict(record, "H100", *long), predict(rows_first(record), "H100", *long)
    assert streamed["bound"][1] == "HBM" != grouped["bound"][1] and streamed["ms"][1] > 1.25 * grouped["ms"][1]


def test_a_tile_that_spills_and_overflows_shared_memory_is_found_out():
    """The compiler itself checks neither."""
    (found,) = planted("sm_80", "128 256 64 4 5", "linear_token_stats, one model").values()
    spills, overflows = found["problems"]
    assert "accesses to local memory" in spills and "of shared memory, sm_80 has 166912" in overflows


@pytest.mark.parametrize("kernel, most", roofline.INSTRUCTIONS.items())
def test_too_many_instructions_are_found_out(kernel, most):
    record = default("sm_90", kernel)
    assert shortfalls(record | {"per_logit": most}) == []
    assert f"{most} are promised" in shortfalls(record | {"per_logit": most + 0.1})[0]


def test_a_broken_promise_is_exit_status_1_and_everything_is_in_the_json(tmp_path, monkeypatch, capsys):
    config = InspectConfig(("sm_90",), ("bf16",), ("linear_token_stats, one model",), json=tmp_path / "all.json")
    lines = []
    monkeypatch.setattr(roofline, "compiled", lambda *options: lines.extend(compiled(*options)) or lines)
    assert run_inspect(config)
    monkeypatch.setattr(roofline, "compiled", lambda *options: lines)
    monkeypatch.setitem(PROMISES, ("linear_token_stats, one model", "H100"), 0.99)
    assert not run_inspect(config)
    assert "99% is promised" in " ".join(capsys.readouterr().out.split())
    found = json.loads(config.json.read_text(encoding="utf-8"))
    (record,) = found["kernels"]
    assert GOOD.keys() | {"problems", "predictions"} == record.keys()
    assert {"threads", "models", "together", "size", "blocks", "group", "rows", "vocab", "hidden"} < record[
        "work"
    ].keys()
    assert [p["device"] for p in record["predictions"]] == ["H100", "H200"]
    model = "device sizes floor_ms ms share bound clocks l2_needed l2_delivered shared_needed shared_delivered"
    assert all(p.keys() == set(model.split()) for p in record["predictions"])
    assert len(found["losses"]) == 2 and found["problems"]
    assert "a model" in found["note"]


def test_sizes_of_one_compile():
    """N = 1, V = 1, T = 1 …: Triton makes constants of them, on which tensor methods fail; interpreting can't tell."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "klq_kernels.offline", "--ones", "--targets", "sm_90", "--dtypes", "fp32"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-2000:]
    assert len(out.stdout.splitlines()) == len(COMPILED)


def test_the_floor_is_the_longer_of_memory_and_arithmetic():
    """By hand: 2 · 10 · 160 · 2 bytes at 3.35 TB/s, and 4 · 1e3 · 1e3 · 1e3 operations at 989 TFLOP/s."""
    assert floor_seconds("token_stats", "H100", "bf16", 10, 160, 1) == pytest.approx(6400 / 3.35e12)
    assert floor_seconds("linear_token_stats", "H100", "bf16", 1000, 1000, 1000) == pytest.approx(
        4e9 / 989e12, rel=1e-3
    )
    assert floor_seconds("linear_token_stats", "A100", "fp32", 999, 999, 999) == pytest.approx(
        4 * 999**3 / 52e12, rel=1e-3
    )


PEER = dict.fromkeys(("models", "together", "blocks"), 1) | {"size": 2, "group": 16, "threads": 256, "barriers": 8}
PEER |= {"step_instructions": 80, "tile_instructions": 1200, "exponentials": 0}  # about as in our own code
WGMMA = PEER | {"rows": 128, "vocab": 256, "hidden": 64, "step_fma": 1 << 21, "step_shared": 81_920}
PUBLISHED = {  # what and where -> its share of the peak, or its seconds; device, sizes; its tile, or rows of a chunk
    "Cut Cross-Entropy, forward (arXiv 2411.09009, table 1)": (0.67, "A100", (8192, 256_000, 2304), PEER | {
        "rows": 256, "vocab": 128, "hidden": 32, "step_fma": 1 << 20, "step_shared": 65_536, "exponentials": 128}),
    "cuBLAS product (triton-lang/triton#2339)": (0.73, "H100", (2048, 8192, 8192), WGMMA | {
        "multicast": 1.5, "overlapped": True}),
    "Triton products, 61–67 %": (0.64, "H100", (8192, 8192, 8192), WGMMA),
    "Liger CuTe, forward (Liger-Kernel#1370)": (0.735, "H100", (16_384, 131_072, 4096), WGMMA | {
        "multicast": 1.5, "overlapped": True, "exponentials": 128}),
    "product by one tcgen05 block (pyptx.dev)": (0.55, "B200", (8192, 8192, 8192), WGMMA | {"step_shared": 49_152}),
    "Liger Triton loss, chunks of 256 rows (Liger-Kernel#1472)": (0.0530, "H200", SHAPE, 256),
    "Liger Triton loss, chunks of 4096 rows (Liger-Kernel#1472)": (0.0351, "H200", SHAPE, 4096),
    "Liger CuTe loss, chunks of 1024 rows (Liger-Kernel#1339)": (0.0175, "B200", SHAPE, 1024),
}  # fmt: skip


def calibration() -> dict[str, tuple[float, float, float]]:
    """Every figure of PUBLISHED -> (published, model slow, model fast), as in kernels/README.md."""
    found = {}
    for what, (published, device, sizes, how) in PUBLISHED.items():
        gpu = DEVICES[device]
        if isinstance(how, int):
            model = [chunked_seconds(device, *sizes, rows=how)] * 2
        else:
            runs = [max(roofline.multiplied(how, gpu, *sizes, fast)[0].values()) for fast in (0, 1)]
            model = [2 * prod(sizes) / gpu.rate("bf16") / seconds for seconds in runs]
        found[f"{device}, {what}"] = (published, *model)
    return found


@pytest.mark.parametrize("figure, values", calibration().items())
def test_the_model_reproduces_what_others_measured(figure, values):
    """Within a quarter, in the middle of its range; a constant of the model that is changed has to pass here too."""
    published, slow, fast = values
    assert (slow + fast) / 2 == pytest.approx(published, rel=0.25)
    row = f"| {figure} | {published:.3g} | {'–'.join(dict.fromkeys(f'{x:.3g}' for x in (slow, fast)))} |"
    assert row in README.read_text(encoding="utf-8")


def test_the_model_of_a_tile_is_as_by_hand():
    """128 × 256 × 64 on an H100, L2 at 25 or 38 bytes per clock; 64 × 501 tiles in two splits of 132 slots."""
    tile = WGMMA | {"step_instructions": 0, "tile_instructions": 0, "barriers": 0}
    for fast, (step, start) in enumerate([(384 * 64 * 2 / 25, 1500), (1.3 * 1024, 900)]):
        seconds, _ = roofline.multiplied(tile, DEVICES["H100"], *SHAPE, fast)
        assert max(seconds.values()) == pytest.approx(251 * (64 * step + start) / 1.83e9)


def test_the_model_of_the_loss_in_one_chunk_is_as_by_hand():
    n, v, h = SHAPE
    products = 1.3 * 6 * n * v * h / DEVICES["H100"].rate("bf16")
    moved = 3 * 2 * n * v + 6 * v * h
    assert chunked_seconds("H100", n, v, h, rows=n) == pytest.approx(products + moved / (0.9 * 3.35e12))


def test_the_sizes_and_choices_asked_for_are_those_that_are_predicted(monkeypatch):
    asked = []
    monkeypatch.setattr(roofline, "compiled", lambda *options: asked.extend(options) or iter(()))
    config = InspectConfig(("sm_90", "gfx942"), ("fp32",), ("token_stats",), n=10, v=200, h=30)
    found = everything(config)
    assert asked == ["--targets", "sm_90", "gfx942", "--dtypes", "fp32", "--kernels", "token_stats"]
    predictions = [p for record in found["losses"] for p in record["predictions"]]
    assert {p["sizes"] for p in predictions} == {(10, 200, 30)}
    assert [p["device"] for p in predictions] == ["H100", "H200", "MI300X"] * 2


def shown(table) -> dict:
    (row,) = zip(*(column.cells for column in table.columns), strict=True)
    return dict(zip((column.header for column in table.columns), row, strict=True))


def test_each_number_is_printed_under_its_heading():
    """Times and shares from fast to slow and from slow to fast: the lower one first."""
    predicted = {"device": "H100", "bound": ("L2", "issue"), "floor_ms": 1.5, "ms": (4.0, 2.0), "share": (0.375, 0.75)}
    predicted |= {"l2_needed": 20.0, "l2_delivered": (25, 38), "shared_needed": 90.0, "shared_delivered": (128,)}
    predicted["clocks"] = [{"k-loop": 500.0, "outside": 70.0}, {"k-loop": 300.0, "outside": 40.0}]
    record = GOOD | {"spill_bytes": 8, "shared_bytes": 10_240, "tile": "a tile", "problems": ["spills"]}
    record |= {"work": {"step_instructions": 80, "blocks": 2}, "predictions": [predicted]}
    assert shown(_code([record])) == {
        "kernel": "linear_token_stats", "target": "gfx942", "dtype": "bf16", "tile": "a tile", "dot": "bf16",
        "matrix": "8×v_mfma", "loads": "4×16 B", "stores": "1×4 B", "regs": "100", "spill": "8", "shared": "10/64K",
        "k-step": "80", "logit": "7.0",
    }  # fmt: skip
    assert shown(_model([record])) == {
        "kernel": "linear_token_stats", "dtype": "bf16", "device": "H100", "bound": "L2/issue", "blocks": "2",
        "L2": "20 of 25–38", "shared": "90 of 128", "k-loop": "300", "outside": "40", "floor\\[ms]": "1.5",
        "ms": "2–4", "share\\[%]": "38–75",
    }  # fmt: skip


def test_a_compiler_that_fails_is_an_error_and_no_empty_list(tmp_path, monkeypatch):
    """… after which "every tile keeps its promises" would be said of none, with exit status 0."""
    compiler = tmp_path / "python"
    compiler.write_text('#!/bin/sh\necho "$TRITON_INTERPRET|$3"\necho "no such target" >&2\nexit 3\n')
    compiler.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(compiler))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    lines = compiled("--targets")
    assert next(lines) == "|--targets\n", "without the interpreter, which compiles nothing"
    with pytest.raises(RuntimeError, match="compiling failed: no such target"):
        next(lines)
