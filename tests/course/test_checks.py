"""The equation checks: what they let through, what they refuse, and what the ledger says."""

import pytest
import torch

from klq_edu.course.checks import Checks

ONE = torch.ones(3, dtype=torch.float64)


@pytest.fixture
def check():
    return Checks("09")


def test_ledger_counts_equations_once_and_keeps_the_worst_error(check, capsys):
    check.equation("9.1", ONE, ONE + 1e-13)
    check.equation("9.1", ONE, ONE.clone())
    check.inequality("9.2", ONE - 1, ONE)
    check.ledger()
    assert capsys.readouterr().out.splitlines()[-1] == "2 equations verified, worst error 1e-13"


@pytest.mark.parametrize("wrong", [1 + 1e-6, -1.0, float("nan"), float("inf")])
def test_a_false_equation_stops_the_notebook(check, wrong):
    bad = ONE.clone()
    bad[1] = wrong
    for lhs, rhs in ((bad, ONE), (ONE, bad)):
        with pytest.raises(AssertionError, match=r"✘ \(9.3\) fails"):
            check.equation("9.3", lhs, rhs)
    assert not check.errors


@pytest.mark.parametrize("wrong", [1 + 1e-6, float("nan"), float("inf")])
def test_a_false_inequality_stops_the_notebook(check, wrong):
    bad = ONE.clone()
    bad[1] = wrong
    with pytest.raises(AssertionError, match=r"≤"):
        check.inequality("9.3", bad, ONE)


def test_equal_infinities_agree(check):
    check.equation("9.4", torch.tensor([torch.inf], dtype=torch.float64), torch.tensor([torch.inf]).double())


@pytest.mark.parametrize(
    ("lhs", "rhs", "error", "says"),
    [
        (ONE.float(), ONE, TypeError, "left side is torch.float32"),
        (ONE, ONE[:2], ValueError, r"shape \(3,\), the right \(2,\)"),
        (ONE, 1.0, ValueError, "shape"),
        (ONE[:0], ONE[:0].clone(), ValueError, "nothing to compare"),
        (ONE, ONE, ValueError, "same tensor"),
    ],
)
def test_what_cannot_be_compared_is_refused(check, lhs, rhs, error, says):
    with pytest.raises(error, match=says):
        check.equation("9.5", lhs, rhs)


def test_large_numbers_are_compared_relatively(check):
    check.equation("9.6", 1e12 * ONE, 1e12 * ONE + 1e-3)
    with pytest.raises(AssertionError):
        check.equation("9.6", 1e12 * ONE, 1e12 * ONE + 1e3)
