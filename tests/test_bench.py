"""`klq bench` measures every workload, its errors are small, and its bookkeeping is right. No time is asserted."""

import json
import math
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from torch.utils._pytree import tree_map_only

from klq_edu import figures
from klq_edu.bench import measure, run, workloads
from klq_edu.bench.config import MAIN, QUICK, BenchConfig, Size
from klq_edu.bench.measure import errors, exact, interleave, measure_point, repeat, run_once, stage_rows
from klq_edu.bench.run import run_bench
from klq_edu.bench.workloads import WORKLOADS, Contender, contenders, make_inputs
from klq_edu.machine import facts, threads


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The CSV and JSON of a quick run of everything but peak memory (that takes a process each)."""
    config = BenchConfig(quick=True, reps=2, memory=False, device="cpu", out=tmp_path_factory.mktemp("b"))
    path = run_bench(config)
    return pd.read_csv(path), json.loads(path.with_suffix(".json").read_text()), path


def test_every_workload_and_stage_has_its_row(result):
    rows, provenance, _ = result
    assert set(rows["workload"]) == set(WORKLOADS) == set(MAIN) == set(QUICK)
    for name, part in rows.groupby("workload"):
        assert {"naive", "ours (torch)"} <= set(part["contender"])
        assert {s for _, s in part[["contender", "stage"]].itertuples(index=False)} == set(WORKLOADS[name].stages)
    assert (rows["reps"] == 2).all() and (rows["vs_naive"] > 0).all() and (rows["seconds"] > 0).all()
    assert rows["units"].notna().eq(rows["workload"] != "returns").all()
    assert (rows["units_low"] <= rows["units"]).eq(rows["units"] <= rows["units_high"])[rows["units"].notna()].all()
    assert {"command", "settings", "method", "torch", "machine", "threads"} <= set(provenance)


def test_everyone_agrees_with_float64(result):
    rows, *_ = result
    whole = rows[rows["stage"] == rows["workload"].map(lambda name: WORKLOADS[name].stages[-1])]
    found = whole.filter(like="error_")
    assert found.notna().any(axis=1).all() and found.max().max() < 1e-5
    assert whole["error_gradient"].notna().eq(whole["workload"] != "returns").all()


def test_a_peer_says_what_it_computes(result):
    rows, *_ = result
    own = rows["contender"].str.startswith(("ours", "naive"))
    assert (rows["computes"][own] == "the same").all() and (rows["computes"][~own] != "the same").all()


@pytest.mark.parametrize("name", ["linear_stats", "klq_ref", "klq", "logits_stats", "returns"])
def test_a_wrong_contender_is_found_out(name):
    """Beyond 64 rows only some are compared: enough to see that values and gradients are off."""
    size = QUICK[name]._replace(n=160 * (size_t := QUICK[name].t or 1), t=QUICK[name].t and size_t)
    x = make_inputs(name, size, 0, "cpu")
    right = contenders(name, "cpu")[1]
    wrong = right._replace(run=lambda x: {key: 1.1 * value for key, value in right.run(x).items()})
    good, bad = (errors(run_once(c, x)[0], x, exact(c.truth, x)) for c in (right, wrong))
    assert max(good.values()) < 1e-5 and min(bad.values()) > 1e-3 and good.keys() == bad.keys()


def spoilt(operation):
    """The operation, every result times 1.1, except from the backend that is the definition."""

    def wrong(*args, **options):
        out = operation(*args, **options)
        return out if options.get("backend") == "reference" else tree_map_only(torch.Tensor, lambda x: 1.1 * x, out)

    return wrong


@pytest.mark.parametrize("name", WORKLOADS)
def test_nobody_is_compared_with_themselves(name, monkeypatch):
    """Where the operations are wrong, the naive way is still right and everyone who calls them is not."""
    for operation in ("lambda_returns", "linear_klq_loss", "linear_token_stats", "token_stats"):
        monkeypatch.setattr(workloads, operation, spoilt(getattr(workloads, operation)))
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        monkeypatch.setattr(
            torch.nn.functional, "linear_cross_entropy", spoilt(torch.nn.functional.linear_cross_entropy)
        )
    x = make_inputs(name, QUICK[name], 0, "cpu")
    found = {c.name: errors(run_once(c, x)[0], x, exact(c.truth, x)) for c in contenders(name, "cpu")}
    assert max(found.pop("naive").values()) < 1e-5 and found
    assert all(min(wrong.values()) > 1e-3 for wrong in found.values())


def test_short_work_is_repeated_until_it_can_be_timed():
    """One run of a tenth of a millisecond would be timed with cold caches and a coarse clock."""
    slow, fast = [], []
    both = Contender("slow", lambda x: slow.append(time.sleep(0.03)) or {}, truth=dict)
    repeat(both, {})
    forward, _ = repeat(both._replace(run=lambda x: fast.append(time.sleep(0.002)) or {}), {})
    assert len(slow) == 1 and 2 <= len(fast) <= 10 and 0.002 <= forward < 0.02


def test_contenders_take_turns_between_products(monkeypatch):
    monkeypatch.setattr(measure, "SHORTEST", 1e-12)
    log = []
    one, two = (
        Contender(name, lambda x, name=name: log.append(name) or {}, truth=lambda x: {}) for name in ("one", "two")
    )
    times = interleave([one, two], {}, lambda: log.append("gemm") or 2.0, 2, lambda: None)
    assert log == ["gemm", "one", "gemm", "two", "gemm", "two", "gemm", "one", "gemm"]
    assert [r["gemm"] for r in times["one"] + times["two"]] == [2.0] * 4
    rows = stage_rows(two, {"naive": [{"both": 2, "gemm": 2}], "two": [{"both": 6, "gemm": 1}]}, ("both",), True)
    assert rows[0]["units"] == 6 and rows[0]["vs_naive"] == 6


def test_peak_memory_is_that_of_a_fresh_process():
    """2048 × 4000 float32 logits are 31 MB: several of them for the naive way, far less for ours."""
    what = {"workload": "klq", "size": Size(2048, 4000, 16), "seed": 0, "device": "cpu", "compiled": False}
    naive = measure.peak_memory(**what, contender="naive")
    assert 60 < naive < 400
    code = "import torch; from klq_edu.bench.measure import resident_peak as peak\n"
    code += "print(peak(lambda: torch.ones(50 * 2**18).sum()))"  # here it would reuse what earlier tests have freed
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(out) == pytest.approx(50, abs=10)


def test_inputs_are_the_same_for_the_same_seed():
    one, two, other = (make_inputs("klq", QUICK["klq"], seed, "cpu") for seed in (1, 1, 2))
    assert torch.equal(one["hidden"], two["hidden"]) and not torch.equal(one["hidden"], other["hidden"])


def test_sizes_are_those_asked_for():
    config = BenchConfig(workloads=("klq", "update", "returns"), n=(100, 200), v=(50,), dtypes=("float32", "bfloat16"))
    assert config.points() == [
        *(("klq", Size(n, 50, 512, None, d)) for d in config.dtypes for n in (100, 200)),
        *(("update", Size(128, 50, 256, 128, d)) for d in config.dtypes),
        ("returns", Size(1024, None, None, 1024)),
    ]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"reps": 0}, "reps must be at least 1, got 0"),
        ({"n": (64, 0)}, r"n must be at least 1, got \(64, 0\)"),
        ({"workloads": ()}, "workloads must not be empty"),
        ({"h": (100,)}, r"h must be a multiple of 8 for the update's model, got \(100,\)"),
    ],
)
def test_bad_values_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        BenchConfig(**wrong)


def test_an_interrupt_keeps_what_is_measured(tmp_path, monkeypatch, capsys):
    def stop(name, *rest):
        raise KeyboardInterrupt

    config = BenchConfig(workloads=("returns", "klq"), quick=True, memory=False, device="cpu", out=tmp_path, reps=1)
    real = run.measure_point
    monkeypatch.setattr(run, "measure_point", lambda name, *rest: (real if name == "returns" else stop)(name, *rest))
    with pytest.raises(KeyboardInterrupt):
        run_bench(config)
    assert set(pd.read_csv(tmp_path / "bench.csv")["workload"]) == {"returns"}
    assert "ours (torch)" in capsys.readouterr().out


def test_a_peer_that_fails_is_named_and_skipped(tmp_path, monkeypatch, capsys):
    def fail(x):
        raise RuntimeError("no such device")

    monkeypatch.setattr(workloads, "torch_ce", fail)
    path = run_bench(BenchConfig(workloads=("klq",), quick=True, memory=False, device="cpu", out=tmp_path, reps=1))
    assert set(pd.read_csv(path)["contender"]) == {"naive", "ours (torch)"}
    assert re.search(r"F.linear_cross_entropy does not run here.*no such\s+device", capsys.readouterr().out, re.DOTALL)


def test_who_needs_too_much_memory_is_named_and_left_out():
    """On a GPU the naive way may not fit at all; ours is measured all the same."""
    naive, ours = contenders("klq", "cpu")[:2]
    size, said = QUICK["klq"], []

    def fail(x):
        raise torch.OutOfMemoryError("no room")

    config = BenchConfig(memory=False, reps=1)
    rows = measure_point("klq", size, [naive._replace(run=fail), ours], config, "cpu", said.append, lambda: None)
    assert {r["contender"] for r in rows} == {"ours (torch)"} and all(math.isnan(r["vs_naive"]) for r in rows)
    assert len(said) == 1 and re.search("naive does not run here.*no room", said[0])


def test_figures_are_drawn_with_their_captions(result):
    rows, _, path = result
    assert "cannot lie" in path.with_name("bench-times.svg").read_text().replace("\n", " ")
    part = rows[(rows["workload"] == "klq_ref") & (rows["stage"] == "both")].assign(memory_mb=1.0)
    part = pd.concat([part, part.assign(v=2 * part["v"])])
    for picture in (figures.bench_times(rows[rows["stage"] == "both"]), figures.bench_scaling(part, "v")):
        assert all(axis.get_xlabel() and axis.get_ylabel() and axis.lines for axis in picture.figure.axes)
        assert picture.figure.axes[0].get_legend() is not None and len(picture.alt) > 10


def test_each_contender_has_its_own_peak_and_inputs_of_the_seed(monkeypatch):
    asked, drawn, make = [], [], measure.make_inputs
    monkeypatch.setattr(measure, "peak_memory", lambda **what: asked.append(what) or float(len(asked)))
    monkeypatch.setattr(
        measure, "make_inputs", lambda name, size, seed, device: drawn.append(seed) or make(name, size, seed, device)
    )
    config, size = BenchConfig(reps=1, seed=7), QUICK["returns"]
    rows = measure_point("returns", size, contenders("returns", "cpu"), config, "cpu", print, lambda: None)
    assert [(r["contender"], r["memory_mb"]) for r in rows] == [("naive", 1.0), ("ours (torch)", 2.0)]
    assert [what["contender"] for what in asked] == ["naive", "ours (torch)"] and asked[0]["size"] == size
    assert drawn == [7] and {what["seed"] for what in asked} == {7}


def test_the_process_that_measures_memory_runs_the_one_it_was_asked_for(monkeypatch):
    """A tiny call first, then the size itself; another's peak would be published as ours."""
    ran = []
    monkeypatch.setattr(measure, "run_once", lambda c, x: ran.append((c.name, len(x["tokens"]))))
    monkeypatch.setattr(measure, "resident_peak", lambda call: call() or 5.0)
    assert measure.peak_here("klq", "ours (torch)", [96, 30, 8, None, "float32"], 0, "cpu", False) == 5.0
    assert ran == [("ours (torch)", QUICK["klq"].n), ("ours (torch)", 96)]


def test_a_unit_is_the_mean_of_the_products_before_and_after(monkeypatch):
    monkeypatch.setattr(measure, "repeat", lambda contender, x: (4.0, 6.0))
    products = iter([1.0, 3.0, 7.0])
    one = Contender("one", dict, truth=dict)
    found = interleave([one], {}, lambda: next(products), 2, lambda: None)["one"]
    assert found == [{"forward": 4.0, "backward": 6.0, "both": 10.0, "gemm": unit} for unit in (2.0, 5.0)]


def test_times_are_medians_with_the_lowest_and_highest():
    one = Contender("one", dict, truth=dict, gemms=(1, 2))
    seconds = {"one": (8.0, 3.0, 4.0), "naive": (2.0, 9.0, 1.0)}
    times = {who: [{"both": s, "gemm": 0.5} for s in found] for who, found in seconds.items()}
    (row,) = stage_rows(one, times, ("both",), in_units=True)
    assert (row["seconds_low"], row["seconds"], row["seconds_high"]) == (3, 4, 8) and row["reps"] == 3
    assert (row["units_low"], row["units"], row["units_high"]) == (6, 8, 16)
    assert row["vs_naive"] == 2 and row["limit"] == 3


def test_limits_count_the_products_that_cannot_be_avoided():
    """Forward one per head; backward one for the hidden states and one for the weights of the policy alone. What the
    fused ways don't keep they compute again."""
    found = {name: [c.gemms for c in contenders(name, "cpu")[:2]] for name in WORKLOADS}
    heads = {"linear_stats": [(2, 2), (2, 4)], "klq_ref": [(2, 2), (4, 0)], "klq": [(1, 2), (3, 0)]}
    assert found == heads | {name: [None, None] for name in ("logits_stats", "returns", "update")}


def test_compiled_contenders_take_part_where_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(run, "contenders", lambda *given: asked.append(given) or [])
    monkeypatch.setattr(run, "measure_point", lambda *_: [])
    for wanted in (True, False):
        run_bench(BenchConfig(workloads=("klq",), quick=True, device="cpu", compile=wanted, out=tmp_path))
    assert asked == [("klq", "cpu", True), ("klq", "cpu", False)]


def test_the_printed_table_has_each_column_under_its_heading(tmp_path, capsys):
    row = {"workload": "klq", **Size(8, 16, 4)._asdict(), "contender": "naive", "stage": "both", "computes": "the same"}
    row |= {"seconds": 1.0, "units": 2.0, "units_low": 3.0, "units_high": 4.0, "limit": 5.0, "vs_naive": 6.0}
    row |= {"memory_mb": 7.0, "error_loss": 8.0, "error_kl": 0.5, "error_gradient": 9.0}
    pd.DataFrame([row]).to_csv(tmp_path / "bench.csv", index=False)
    run.print_tables(tmp_path / "bench.csv")
    said = capsys.readouterr().out
    head, numbers = said.split("N=8 V=16 H=4 float32\n")[1].splitlines()[:2]
    assert head.split() == ["stage", "s", "units", "low", "high", "limit", "ratio", "MB", "error", "gradient"]
    assert numbers.split() == ["naive", "both", "1", "2", "3", "4", "5", "6", "7", "8", "9"]


def test_facts_name_each_package_with_its_own_version():
    found = facts("cpu")
    assert all(found[name] == version(name) for name in ("torch", "transformers", "numpy", "klq-edu"))
    assert found["device"] == "cpu" and found["python"] == platform.python_version()


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before
