"""Answers that nobody catalogued: always a verdict, a pass only for what is right, never a traceback."""

import itertools
import math
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import Tensor

from klq_edu.course import exercises
from klq_edu.course.chapters import load_all
from klq_edu.course.checks import Checks, Progress
from klq_edu.course.exercises import grade
from klq_edu.course.puzzles import Puzzle
from klq_kernels.reference import shift_left

EXERCISES = {n: e for chapter in load_all() for n, e in chapter.exercises.items()}
PUZZLES = {n for n, e in EXERCISES.items() if isinstance(e, Puzzle)}  # in float32, and their inputs are only read


def differentiated(exercise):
    """Whether an answer's result is differentiated: then its arguments ask for gradients."""
    seen = []
    grade(exercise, lambda *arguments: seen.extend(arguments) or exercise.solution(*arguments), seed=0)
    return any(isinstance(x, Tensor) and x.requires_grad for x in seen)


DIFFERENTIATED = {n for n, e in EXERCISES.items() if differentiated(e)}


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def each(change):
    """solution -> an answer that is the solution with every result changed."""

    def maker(solution):
        def answer(*arguments):
            result = solution(*arguments)
            several = isinstance(result, tuple)
            parts = tuple(change(torch.as_tensor(x)) for x in (result if several else (result,)))
            return parts if several else parts[0]

        return answer

    return maker


def wrong_in_call(number):
    def maker(solution):
        calls = itertools.count()

        def answer(*arguments):
            factor = 1.01 if next(calls) == number else 1.0
            return each(lambda x: factor * x)(solution)(*arguments)

        return answer

    return maker


def zeroing(*, first):
    def maker(solution):
        def answer(*arguments):
            result = None if first else each(torch.clone)(solution)(*arguments)
            for x in arguments:
                if isinstance(x, Tensor):
                    x.detach().zero_()
            return solution(*arguments) if first else result

        return answer

    return maker


def reusing(solution):
    buffers = {}

    def keep(x):
        return buffers.setdefault(x.shape, torch.empty_like(x)).copy_(x)

    return each(keep)(solution)


def instead(act):
    """solution -> an answer that does something else, whatever is asked."""
    return lambda solution: lambda *arguments: act()


def raising(error):
    def act():
        raise error

    return instead(act)


def endless_recursion():
    return endless_recursion() + 1


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


# change of the solution, and the exercises where what is left is right
WRONG = {
    "noise": (each(lambda x: x * (1 + 1e-3 * torch.randn(x.shape))), set()),
    "scaled": (each(lambda x: 1.01 * x), set()),
    "shifted": (each(lambda x: x + 0.1), {"4.2", "7.3"}),  # a constant in a loss
    "negated": (each(torch.neg), set()),
    "transposed": (each(lambda x: x.T if x.dim() == 2 else x[None]), set()),
    "flattened": (each(lambda x: x.reshape(-1) if x.dim() != 1 else x[:, None]), set()),
    "one more number": (each(lambda x: torch.cat([x.reshape(-1), torch.ones(1)])), set()),
    "twice": (lambda solution: lambda *a: (solution(*a), solution(*a)), set()),
    "wrong at first": (wrong_in_call(0), set()),
    "wrong in the middle": (wrong_in_call(3), set()),
    "float32": (each(Tensor.float), PUZZLES),
    "float64": (each(Tensor.double), set(EXERCISES) - PUZZLES),
    "float16": (each(Tensor.half), set()),
    "integers": (each(lambda x: x.round().long()), set()),
    "booleans": (each(Tensor.bool), set()),
    "complex": (each(lambda x: x + 0j), set()),
    "detached": (each(torch.detach), set(EXERCISES) - DIFFERENTIATED),
    "NaN": (each(lambda x: x * torch.nan), set()),
    "overwrites its arguments first": (
        zeroing(first=True),
        {"7.1", "8.1", "12.1"},
    ),  # which are given no tensor to overwrite
    "a text": (instead(lambda: "two"), set()),
    "texts": (instead(lambda: np.array(["two"])), set()),
    "a dictionary": (instead(lambda: {"": 1.0}), set()),
    "a generator": (instead(lambda: (x for x in (1.0,))), set()),
    "an object": (instead(object), set()),
    "nothing": (instead(lambda: None), set()),
    "meta": (each(lambda x: x.to("meta")), set()),
    "no function": (lambda solution: 1.0, set()),
    "a class": (lambda solution: dict, set()),
    "ragged": (instead(lambda: [[1.0], [1.0, 2.0]]), set()),
    "exception": (raising(ValueError("no\ud800")), set()),
    "unimplemented in torch": (raising(NotImplementedError('"softmax" not implemented for "Long"')), set()),
    "unprintable": (raising(Unprintable()), set()),
    "exit": (raising(SystemExit(0)), set()),
    "its own Ctrl-C": (raising(KeyboardInterrupt()), set()),
    "generator exit": (raising(GeneratorExit()), set()),
    "recursion": (instead(endless_recursion), set()),
}
RIGHT = {
    "in memory that the next call reuses": (
        reusing,
        DIFFERENTIATED | {"7.1", "9.1", "9.3", "12.2", "12.3"},
    ),  # one shape
    "not contiguous": (each(lambda x: torch.stack([x, x], -1)[..., 0]), set()),
    "with gradient": (each(lambda x: x + torch.zeros((), requires_grad=True)), {"8.1"}),  # asks for detached losses
    "NumPy": (each(lambda x: x.numpy()), DIFFERENTIATED | {"4.1", "5.2"}),
    "overwrites its arguments afterwards": (zeroing(first=False), DIFFERENTIATED | PUZZLES | {"5.2"}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_answer_to_any_exercise_gets_a_verdict_and_never_a_pass(kind):
    change, right = WRONG[kind]
    for number, exercise in EXERCISES.items():
        verdict = grade(exercise, change(exercise.solution), seed=(seed := torch.seed() % 10**9))
        assert verdict.passed is (number in right), (seed, verdict)
        assert verdict.message[0] in "✔✘" and len(verdict.message) < 500 and verdict.message.encode()


@pytest.mark.parametrize("kind", RIGHT)
def test_a_right_answer_passes_however_its_result_lies_in_memory(kind):
    change, elsewhere = RIGHT[kind]
    for number in EXERCISES.keys() - elsewhere:
        verdict = grade(EXERCISES[number], change(EXERCISES[number].solution))
        assert verdict.passed, verdict


@pytest.mark.skipif(not exercises.ALARM, reason="no SIGALRM here, so no limit")
def test_an_endless_answer_is_stopped_and_alarms_of_others_still_ring(monkeypatch):
    def stubborn(*_):
        while True:
            with suppress(Exception):
                time.sleep(0.001)

    def deaf(*_):
        while True:
            with suppress(BaseException):
                time.sleep(100)

    def patient(*_):
        while True:
            pass

    class Endless(Exception):
        __module__ = "triton"  # of whose errors the text is looked into

        def __str__(self):
            while True:
                pass

    def unspeakable(*_):
        """Ends at once, but what it raises can't be told."""
        raise Endless

    monkeypatch.setattr(exercises, "SECONDS", 0.02)
    rung, tracer = [], sys.gettrace()
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60.0, 7.0)
        for exercise in EXERCISES.values():
            for answer in (stubborn, patient):
                verdict = grade(exercise, answer)
                assert verdict.passed is False and "stopped after 0.02 seconds" in verdict.message
        assert "stopped after" in grade(EXERCISES["1.1"], unspeakable).message
        assert "stopped after" in grade(EXERCISES["1.1"], deaf).message and sys.gettrace() is tracer
        assert sys.exc_info() == (None, None, None)
        left, every = signal.getitimer(signal.ITIMER_REAL)
        assert 1.0 < left < 59.5 and every == 7.0 and not rung  # the time that grading took is off
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        grade(EXERCISES["1.1"], patient)  # rings in the meantime: late, but not never
        time.sleep(0.01)
        assert rung == [1] and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("answer", [lambda x: x, lambda x: None], ids=["lets it through", "swallows it"])
def test_a_real_ctrl_c_interrupts_and_its_handler_is_put_back(answer):
    def pressed(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            if answer(error):
                raise

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        grade(EXERCISES["1.1"], pressed)
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_grade_without_a_limit():
    """Signals belong to the main thread; an exit there is a verdict all the same."""
    with ThreadPoolExecutor(1) as pool:
        exercise = EXERCISES["1.2"]
        assert pool.submit(grade, exercise, exercise.solution).result().passed
        assert pool.submit(grade, exercise, raising(SystemExit(1))(None)).result().passed is False


def test_what_an_answer_does_to_torch_is_undone():
    torch.set_default_dtype(torch.float32)
    exercise, state = EXERCISES["6.1"], torch.get_rng_state()

    def meddling(*arguments):
        loss = exercise.solution(*arguments)
        torch.set_default_dtype(torch.float16)
        torch.set_grad_enabled(False)
        torch.manual_seed(3)
        torch.set_default_device("meta")
        return loss

    assert grade(exercise, meddling).passed
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() is torch.float32 and torch.is_grad_enabled()
    assert torch.get_default_device().type == "cpu"
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert grade(exercise, exercise.solution).passed, "whatever mode it is called in"


def test_what_an_answer_replaces_does_not_change_what_is_right(monkeypatch):
    monkeypatch.setattr(torch, "softmax", torch.softmax)  # put back afterwards

    def cheat(q, ref, tau):
        torch.softmax = lambda *_: torch.zeros(5)
        return torch.zeros(5)

    assert grade(EXERCISES["1.2"], cheat).passed is False


def test_padding_of_a_loss_may_be_anything():
    def skips(logprobs, ref_logprobs, values, targets, mask, tau):
        error = tau * (logprobs - ref_logprobs) + values - targets.detach()
        return 0.5 * (error[~error.isnan()] ** 2).sum() / mask.sum()

    assert "padding may hold any leftovers" in grade(EXERCISES["6.1"], skips).message


def test_a_loss_that_is_no_number_is_named():
    for number in ("4.2", "7.3"):
        verdict = grade(EXERCISES[number], lambda *x, n=number: EXERCISES[n].solution(*x) + torch.nan)
        assert verdict.passed is False and "your loss is nan" in verdict.message


@pytest.mark.parametrize("kind", [Tensor.tolist, Tensor.float, Tensor.to_sparse], ids=["list", "float32", "sparse"])
def test_a_result_of_another_kind_is_named(kind):
    for number in ("4.1", "5.2"):
        verdict = grade(EXERCISES[number], lambda *x, n=number: kind(EXERCISES[n].solution(*x)))
        assert "a torch.float64 tensor is expected, yours is a " in verdict.message


def test_a_broken_progress_file_costs_the_memory_not_the_check(tmp_path, capsys):
    for broken in ("3", "[1]", "null", "{"):
        (tmp_path / "progress.json").write_text(broken)
        Checks("01", EXERCISES, Progress(tmp_path / "progress.json")).exercise("1.2", EXERCISES["1.2"].solution)
        assert "1.2" in Progress(tmp_path / "progress.json").read()


def rounds(count):
    """A scan of so many rounds for a row of length T."""

    def answer(delta, decay):
        for i in range(count(len(delta))):
            delta, decay = delta + decay * shift_left(delta, 2**i), decay * shift_left(decay, 2**i)
        return delta

    return answer


def one_by_one(delta, decay, of=list, to=torch.tensor):
    """A loop over numbers that were taken out of the tensors by `of`."""
    sums = [0.0]
    for d, a in zip(reversed(of(delta)), reversed(of(decay))):
        sums.append(d + a * sums[-1])
    return to(sums[:0:-1])


def in_secret(answer, *arguments):
    """Where no mode of this thread sees what numbers are taken out."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(answer, *arguments, of=Tensor.tolist).result()


def ceil_log2(length):
    return math.ceil(math.log2(length))


def by_cumprod(delta, decay):
    product = torch.cat([torch.ones(1), decay[:-1]]).cumprod(0)
    return (delta * product).flip(0).cumsum(0).flip(0) / product


SCANS = [  # answer, whether it passes, what is said
    (rounds(ceil_log2), True, ""),
    (rounds(int.bit_length), True, ""),  # one too many now and then
    (rounds(lambda length: int(math.log2(length))), False, "for T = 3: at [0] yours gives"),
    (rounds(lambda length: max(ceil_log2(length) - 1, 0)), False, "for T = 2"),
    (rounds(lambda length: ceil_log2(length) - (length > 256)), False, "for T = 300"),  # 8 rounds of 9
    (rounds(lambda length: ceil_log2(length) - 2 * (length > 256)), False, "for T = 300"),  # 7 of 9
    (lambda d, a: one_by_one(d, a, of=Tensor.tolist), False, "`tolist` takes numbers out"),
    (lambda d, a: one_by_one(d, a, of=Tensor.numpy), False, "`numpy` takes numbers out"),
    (lambda d, a: one_by_one(d, a, of=np.asarray), False, "`__array__` takes numbers out"),
    (lambda d, a: one_by_one(d, a, of=np.from_dlpack), False, "`__dlpack__` takes numbers out"),
    (lambda d, a: one_by_one(d, a, of=lambda x: [float(y) for y in x]), False, "`__float__` takes numbers out"),
    (lambda d, a: one_by_one(d, a, of=lambda x: [y.item() for y in x]), False, "`item` takes numbers out"),
    (lambda d, a: one_by_one(d, a, to=torch.stack), False, "operations a round"),
    (lambda d, a: one_by_one(d, a, of=Tensor.unbind, to=torch.stack), False, "operations a round"),
    (lambda d, a: in_secret(one_by_one, d, a), False, "not done by rounds of tensor operations"),
    (by_cumprod, False, "NaN"),  # 0/0 after the end of an episode
]


@pytest.mark.parametrize(("answer", "passed", "says"), SCANS)
def test_a_scan_has_all_its_rounds_and_no_loop(answer, passed, says):
    for _ in range(3):
        verdict = grade(EXERCISES["5.2"], answer)
        assert verdict.passed is passed and says in verdict.message


def test_six_significant_digits_are_six_digits():
    """And four are too few."""
    exercise = EXERCISES["1.3"]

    def rounded(digits):
        return lambda *arguments: float(f"{exercise.solution(*arguments):.{digits}g}")

    for seed in range(60):
        assert grade(exercise, rounded(6), seed).passed, seed
    assert not grade(exercise, rounded(4), seed=1).passed


def ratio(p, old):
    return (p - old).exp()


OFF_POLICY = [
    (lambda p, old, ref: (ratio(p, old) * (p - ref)).mean(), True, ""),  # with the ratio live
    (lambda p, old, ref: (ratio(p, old) * (torch.expm1(ref - p) + p - ref)).mean(), True, ""),
    (lambda p, old, ref: ((ratio(p, old) * (p - ref)).detach() * p + 3 * ratio(p, old)).mean() + 1, True, ""),
    (lambda p, old, ref: (p.exp() * (p - ref)).mean(), False, "the gradient: at [0] yours gives"),
    (lambda p, old, ref: (ratio(p, old) * 0.5 * (p - ref) ** 2).mean(), False, "Hold the ratio fixed"),
    (lambda p, old, ref: (ratio(p, old) * (p - ref)).mean().detach(), False, "no gradient at all"),
    (lambda p, old, ref: (ratio(p, old) * (p - ref)).mean().item(), False, "yours is a float"),
    (lambda p, old, ref: ratio(p, old) * (p - ref), False, "a loss is a tensor with one number"),
]


@pytest.mark.parametrize(("answer", "passed", "says"), OFF_POLICY)
def test_a_penalty_on_older_samples_weighs_them(answer, passed, says):
    for _ in range(3):
        verdict = grade(EXERCISES["4.2"], answer)
        assert verdict.passed is passed and says in verdict.message


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda p, op, v, ov, a, tau: ((tau * (p - op) + v - ov - a) ** 2).mean() / (2 * tau), "KLQ's own loss"),
        (lambda p, op, v, ov, a, tau: ((v - ov - a) ** 2).mean() / (2 * tau) - ((p - op) * a).mean(), "log ρ"),
        (
            lambda p, op, v, ov, a, tau: (
                ((v - ov - a) ** 2).mean() / (2 * tau)
                - torch.minimum((p - op).exp() * a, (p - op).exp().clamp(0.8, 1.2) * a).mean()
            ),
            "the gradient in logprobs away from π_old",
        ),
    ],
)
def test_only_ppo_is_ppo(answer, says):
    """What has its gradient at π_old and not elsewhere."""
    verdict = grade(EXERCISES["7.3"], answer)
    assert verdict.passed is False and says in verdict.message


def spoilt(number, where, change):
    def answer(*arguments):
        result = EXERCISES[number].solution(*arguments)
        mask = next(x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool)
        return torch.where(where(mask), change(result), result)

    return answer


@pytest.mark.parametrize(
    ("number", "answer", "says"),
    [
        ("5.1", spoilt("5.1", torch.logical_not, lambda x: x + 1), "(on padding, in a row of length"),
        ("5.1", spoilt("5.1", torch.logical_not, lambda x: x + 1), "yours gives 1 where 0 is expected: too large"),
        ("5.1", spoilt("5.1", lambda m: m & (m.sum(1, keepdim=True) == 1), torch.neg), "the sign is wrong"),
        ("5.1", spoilt("5.1", lambda m: m & (m.sum(1, keepdim=True) == 1), torch.neg), "in a row of length 1"),
        ("3.2", spoilt("3.2", lambda m: m.sum(1) == 1, lambda x: x - 1), "(a row of length 1)"),
        ("3.2", spoilt("3.2", lambda m: m.sum(1) == 1, lambda x: x - 1), "with padding of NaN: at ["),
        ("0.2", spoilt("0.2", lambda m: m, lambda x: x + torch.inf), "yours gives inf where"),
        ("2.2", lambda *a: (EXERCISES["2.2"].solution(*a)[0], 9.0), "result 2 of 2: yours gives 9 where"),
        ("1.2", lambda *a: 2 * EXERCISES["1.2"].solution(*a), "at [0] yours gives"),
        ("1.2", 1.0, "a function is expected, yours is a float"),
        ("6.1", lambda *a: EXERCISES["6.1"].solution(*a) - 9, "the loss: yours gives"),
        (
            "1.2",
            lambda q, r, t: EXERCISES["1.2"].solution(q, r, t) * (1 + (q[0] > 0)),
            "of 5 random inputs, first with arguments [5], [5], 0.",
        ),
    ],
)
def test_an_unknown_mistake_is_told_where_it_is_and_in_which_direction(number, answer, says):
    verdict = grade(EXERCISES[number], answer, seed=1)
    assert verdict.passed is False and says in verdict.message
