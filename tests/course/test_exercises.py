"""Every exercise: the solution passes, and each catalogued mistake gets its own message, on fresh random inputs."""

import itertools

import pytest
import torch

from klq_edu.course.chapters import load, load_all
from klq_edu.course.checks import Checks, Progress
from klq_edu.course.exercises import NOT_ATTEMPTED, Exercise, Mistake, grade

EXERCISES = [e for chapter in load_all() for e in chapter.exercises.values()]
MISTAKES = [(e, m) for e in EXERCISES for m in e.mistakes]


def fresh(trial):
    """A seed nobody has tuned for; printed by pytest where it fails."""
    return torch.seed() % 10**9 + trial


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.number)
def test_the_solution_passes(exercise):
    for trial in range(3):
        assert grade(exercise, exercise.solution, seed=(seed := fresh(trial))).passed, seed


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES, ids=[f"{e.number}-{m.name}" for e, m in MISTAKES])
def test_every_mistake_gets_its_own_message(exercise, mistake):
    for trial in range(3):
        verdict = grade(exercise, mistake.answer, seed=(seed := fresh(trial)))
        assert verdict.passed is False and verdict.message.endswith(mistake.message), (seed, verdict)


@pytest.mark.parametrize("chapter", load_all(), ids=lambda c: c.number)
def test_exercises_are_complete(chapter):
    assert len(chapter.exercises) >= 2
    for number, exercise in chapter.exercises.items():
        assert number == exercise.number and number.split(".")[0] == str(int(chapter.number))
        assert len({(m.name, m.answer) for m in exercise.mistakes}) == len(exercise.mistakes)
        assert len({m.message for m in exercise.mistakes}) >= 3  # those with the same numbers are told the same
        assert len(exercise.hints) == 3 and all(exercise.hints) and exercise.level in (1, 2, 3)


DOUBLE = Exercise(
    "9.1", "Double it", 1, 1, lambda x: 2 * x, lambda g: (torch.randn(3, generator=g),),
    (Mistake("square", lambda x: x**2, "you squared it."),), ("a", "b", "c"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "passed", "says"),
    [
        (lambda x: x + x, True, "✔ Exercise 9.1 passed"),
        (lambda x: x * x, False, "you squared it."),
        (lambda x: 3 * x, False, "yours gives"),
        (lambda x: x[:2], False, "shape (3,) is expected, yours has (2,)"),
        (lambda x: (x, x), False, "one tensor is expected, yours is a list or tuple of 2"),
        (lambda x: x / 0 * 0, False, "NaN"),
        (lambda x: x.nothing(), False, "stopped with AttributeError"),
        (lambda x: None, False, "it returned None"),
        (lambda x: "two", False, "returned a str"),
        (..., None, NOT_ATTEMPTED),
    ],
)  # fmt: skip
def test_what_a_check_says(answer, passed, says):
    verdict = grade(DOUBLE, answer, seed=1)
    assert verdict.passed is passed and says in verdict.message


def test_a_hole_is_no_attempt():
    def hole(x):
        raise NotImplementedError("not attempted yet")

    assert grade(DOUBLE, hole) == (None, "· Exercise 9.1: not attempted yet.")


def test_an_answer_may_overwrite_its_inputs():
    assert grade(DOUBLE, lambda x: x.mul_(2)).passed


def test_progress_is_kept_and_only_for_what_passed(tmp_path, capsys):
    check = Checks("09", {"9.1": DOUBLE}, Progress(tmp_path / "deep" / "progress.json"))
    for answer, passed in ((lambda x: x**2, False), (DOUBLE.solution, True), (lambda x: x**2, True)):
        check.exercise("9.1", answer)
        assert ("9.1" in Progress(tmp_path / "deep" / "progress.json").read()) is passed
    (tmp_path / "deep" / "progress.json").write_text("{broken")
    assert Progress(tmp_path / "deep" / "progress.json").read() == {}
    with pytest.raises(ValueError, match=r"has exercises \['9.1'\], not '9.2'"):
        check.exercise("9.2", DOUBLE.solution)


def test_unknown_notebook_is_named():
    with pytest.raises(ValueError, match="notebook must be one of .*'01'.* got '77'"):
        load("77")


def test_numbers_are_unique():
    assert not [a.number for a, b in itertools.pairwise(EXERCISES) if a.number == b.number]
