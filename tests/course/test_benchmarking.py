"""Notebook 12: its simulated accelerator, and answers to its exercises that nobody catalogued."""

import itertools
import math
import time
from statistics import mean, median, median_low

import pytest
import torch

from klq_edu.bench.config import QUICK
from klq_edu.bench.workloads import make_inputs
from klq_edu.course.chapters import c12_benchmarking as c12
from klq_edu.course.chapters import float32
from klq_edu.course.chapters.c09_one_pass import Traffic
from klq_edu.course.chapters.c12_benchmarking import EXERCISES, TROUBLES, Lab, benchmark, broken_benchmark
from klq_edu.course.exercises import Wrong, grade


def test_a_machine_without_trouble_fools_nobody_who_does_equal_work():
    assert benchmark(Lab()) == pytest.approx(2 / 3) and broken_benchmark(Lab()) == pytest.approx(2 / 3)


@pytest.mark.parametrize("trouble", TROUBLES)
def test_every_trouble_fools_the_broken_benchmark_and_not_the_repaired_one(trouble):
    reps = c12.REPS.get(trouble, 20)
    right, wrong = benchmark(Lab(trouble), reps), broken_benchmark(Lab(trouble), reps)
    truth = {"backward": 5 / 6, "wrong": math.nan}.get(trouble, 2 / 3)
    assert right == pytest.approx(truth, rel=1e-4, nan_ok=True)
    assert wrong != pytest.approx(truth, rel=0.1, nan_ok=True)


def test_the_broken_benchmark_is_told_all_six_flaws():
    message = grade(EXERCISES["12.1"], broken_benchmark).message
    assert all(flaw in message for flaw in TROUBLES.values()) and "Repaired: none" in message
    assert len(set(TROUBLES.values())) == 6


def test_flaws_that_are_left_and_those_repaired_are_named():
    message = grade(EXERCISES["12.1"], lambda lab, reps: benchmark(lab, reps, {"compiles", "wrong"})).message
    left, repaired = message.split("Repaired:")
    assert "no warm-up; no look at the result" in left and "no waiting; unequal work; inputs" in repaired


def off(result, exact):
    return (result - exact).norm() > 1e-4 * exact.norm()


def otherwise(
    lab, reps, *, start=0, often=1, between=True, order=("naive", "fused"), turn=True, middle=median, after=True,
    back=("naive", "fused"), inside=False, truth=lambda lab, logits: lab.exact(logits), bad=off,
):  # fmt: skip
    """A repaired benchmark written in another way, or with a flaw."""
    logits, seconds = lab.inputs(), {"naive": [], "fused": []}
    for rep in range(start, reps):
        for name in order[::-1] if turn and rep % 2 else order:
            lab.synchronize()
            begun = lab.clock()
            for _ in range(often if rep < 0 else 1):
                result = lab.run(name, logits)
                if between:
                    lab.synchronize()
                if name in back:
                    lab.backward(name, logits)
            if after:
                lab.synchronize()
            exact = truth(lab, logits) if inside else None
            if rep >= 0:
                seconds[name].append(lab.clock() - begun)
            exact = truth(lab, logits) if exact is None else exact
            if bad(result.double(), exact):
                return math.nan
    return middle(seconds["fused"]) / middle(seconds["naive"])


@pytest.mark.parametrize(
    "options",
    [{"start": -1}, {"start": -3}, {"start": -1, "often": 4}, {"start": -1, "between": False},
     {"start": -1, "order": ("fused", "naive")},
     {"start": -1, "bad": lambda r, e: not torch.allclose(r, e, rtol=1e-4)},
     {"start": -1, "bad": lambda r, e: ((r - e) / e).abs().max() > 1e-4}],
)  # fmt: skip
def test_other_repairs_pass(options):
    assert grade(EXERCISES["12.1"], lambda lab, reps: otherwise(lab, reps, **options)).passed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no warm-up"),
        ({"start": -1, "middle": mean}, "spoils a mean"),
        ({"start": -1, "middle": min}, "luckiest"),
        ({"start": -1, "middle": max}, "gets slower run by run, and on one that is interrupted now and then."),
        ({"start": -1, "turn": False}, "who goes first is never changed"),
        ({"start": -1, "turn": False, "order": ("fused", "naive")}, "who goes first is never changed"),
        ({"start": -1, "turn": False, "middle": mean}, "the same one goes first each time, and you take means"),
        ({"start": -1, "middle": median_low}, "is not their median, the mean of the two in the middle"),
        ({"start": -1, "after": False}, "synchronise after it too"),
        ({"start": -1, "back": ()}, "it is in the time of neither"),
        ({"start": -1, "back": ("fused",)}, "fused's time holds the backward pass, naive's does not"),
        ({"start": -1, "back": ("naive",)}, "naive's time holds the backward pass, fused's does not"),
        ({"start": -1, "inside": True}, "is checked while the clock runs"),
        ({"start": -1, "truth": lambda lab, logits: lab.run("naive", logits).double()}, "not with the other kernel"),
        ({"start": -1, "bad": lambda r, e: (r - e).norm() > 1e-2 * e.norm()}, "1e-3 too high passed"),
        ({"start": -1, "bad": lambda r, e: ((e - r) / e).max() > 1e-4}, "either sign counts"),
        ({"start": -1, "bad": lambda r, e: (r - e).mean().abs() > 1e-4 * e.mean()}, "not its mean"),
    ],
)
def test_other_repairs_with_a_flaw_do_not(options, says):
    """Some of them no single trouble of the machine would show."""
    verdict = grade(EXERCISES["12.1"], lambda lab, reps: otherwise(lab, reps, **options))
    assert verdict.passed is False and says in verdict.message


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda lab, reps: 1 / benchmark(lab, reps), "upside down"),
        (lambda lab, reps: time.perf_counter(), "wrong on a machine without any trouble: yours gives"),
        (lambda lab, reps: benchmark(lab, reps) * (1 + 5e-5), "without any trouble"),
        (lambda lab, reps: math.nan, "yours gives NaN"),
        (lambda lab, reps: benchmark(lab, 2), "was run 3 times where `reps` = 20"),
        (lambda lab, reps: benchmark(lab, 20), "is a number of your own in the loop?"),
    ],
)
def test_before_any_trouble_the_answer_must_be_right_and_run_often_enough(answer, says):
    verdict = grade(EXERCISES["12.1"], answer)
    assert verdict.passed is False and says in verdict.message and "still there" not in verdict.message


def test_no_pair_of_flaws_passes_or_gets_a_message_with_internals():
    """It is in words, or a catalogued mistake's."""

    def said(answer):
        try:
            return c12._repaired(answer, 3e-3, 2e-3)
        except Wrong as error:
            return str(error)

    catalogue = [said(mistake.answer) for mistake in EXERCISES["12.1"].mistakes]
    for flaws in itertools.combinations([*TROUBLES, "order"], 2):
        found = said(lambda lab, reps, flaws=flaws: benchmark(lab, reps, flaws))
        assert found in catalogue or found.startswith(("still there", "wrong on a machine that")), flaws


@pytest.mark.parametrize("answer", [lambda lab, reps: math.nan, lambda lab, reps: 0.7, lambda lab: 0.7, ...])
def test_any_answer_gets_a_verdict(answer):
    assert not grade(EXERCISES["12.1"], answer).passed


def test_traffic_counts_what_operations_move_and_no_view():
    x = torch.ones(8, 5)
    with Traffic() as traffic:
        x.T.unsqueeze(0).squeeze()
        assert traffic.rows == []
        torch.empty_like(x)
        assert traffic.rows == []
        x.exp().sum()
        first = torch.zeros(8, 1, dtype=torch.long)
        x.gather(1, first)
        torch.zeros_like(x).scatter_add_(1, first, torch.ones(8, 1)).add_(x)
    assert [row for row in traffic.rows if row[0] not in ("zeros", "ones")] == [
        ("exp", 160, 160), ("sum", 160, 4), ("gather", 32 + 64, 32), ("zeros_like", 0, 160),
        ("scatter_add_", 64 + 32 + 32, 32), ("add_", 320, 160),
    ]  # fmt: skip
    assert (traffic.read, traffic.written) == tuple(sum(row[i] for row in traffic.rows) for i in (1, 2))


def test_the_roofline_of_exercise_3_is_that_of_the_library():
    """One fused kernel without operations: the floor of `token_stats`."""
    from klq_edu.bench.roofline import DEVICES, floor_seconds

    kernels, gpu = torch.tensor([[2.0, 1.0, 0.0]]).double(), DEVICES["H100"]
    _, fused = c12.kernel_seconds(kernels, 8192, 32000, 2, gpu.bandwidth, gpu.rate("bf16"))
    assert fused.item() == pytest.approx(floor_seconds("token_stats", "H100", "bf16", 8192, 32000, 1))


def test_inputs_are_in_the_precision_that_is_timed():
    """In a notebook the default is float64: `float32` keeps it out of what is measured."""
    torch.set_default_dtype(torch.float64)
    try:
        with float32():
            x = make_inputs("klq", QUICK["klq"], 0, "cpu")
        assert {v.dtype for v in x.values() if v.is_floating_point()} == {torch.float32}
    finally:
        torch.set_default_dtype(torch.float32)


def test_three_numbers_in_one_tensor_are_three_results():
    exercise = EXERCISES["12.2"]
    assert grade(exercise, lambda *x: torch.stack(exercise.solution(*x))).passed
    assert "3 results are expected" in grade(exercise, lambda *x: torch.stack(exercise.solution(*x)[:2])).message
