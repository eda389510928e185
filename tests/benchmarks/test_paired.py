"""Losses paired by seed, and the verdicts on them."""

import numpy as np
import pytest

import _paired


def test_a_difference_is_that_of_pairs_with_the_interval_of_student():
    """By hand: ratios less 1 of .01, .02, .06 have mean .03 and standard error sqrt(7 / 3) / 100.

    Their t of two degrees of freedom is 4.302653 in every table.
    """
    found = _paired.difference([1.01, 2.04, 4.24], [1.0, 2.0, 4.0])
    half = 4.302653 * (7 / 3) ** 0.5 / 100
    np.testing.assert_allclose(found, (0.03, 0.03 - half, 0.03 + half), rtol=1e-6)


def test_an_interval_covers_the_truth_19_times_in_20():
    """Of 2000 samples of six pairs; the tolerance is four standard deviations of that count."""
    rng = np.random.default_rng(0)
    reference = rng.uniform(1, 5, (2000, 6))
    losses = reference * (1.1 + 0.2 * rng.standard_normal((2000, 6)))
    found = [_paired.difference(*pair) for pair in zip(losses, reference, strict=True)]
    covered = sum(one.low < 0.1 < one.high for one in found)
    assert abs(covered - 1900) < 4 * (2000 * 0.95 * 0.05) ** 0.5


@pytest.mark.parametrize(
    ("low", "high", "small"),
    [(-0.02, 0.029, True), (-0.031, 0.0, False), (0.01, 0.031, False), (np.nan, np.nan, False)],
)
def test_all_of_an_interval_must_lie_within_the_margin(low, high, small):
    assert _paired.MARGIN == 0.03
    assert _paired.Difference(0.0, low, high).small == small


def test_a_row_tells_of_the_reference_and_is_blank_beside_itself():
    reference = np.array([1.0, 2.0, 4.0])
    losses = np.array([1.01, 2.04, 4.24])
    row = _paired.columns(losses, reference, "x")
    assert row["test loss (± sd over seeds)"] == "2.43 ± 2"
    assert row["against x"] == "+3.00%"
    assert row["95% interval"] == "-3.57% to +9.57%"
    assert row["within 3%"] == "no"
    assert [*_paired.columns(reference, reference, "x").values()][1:] == ["", "", ""]
    assert _paired.columns(1.001 * reference, reference, "x")["within 3%"] == "yes"
