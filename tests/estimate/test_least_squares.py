"""The search for constants: exact where it can be, bounded, deaf to outliers, and still where nothing is known."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.estimate.least_squares import minimize, solve

TIMES = (1, 2, 4, 8, 16, 32)
WIDE = [(-9.0, 9.0)] * 2


def line(offset: float, slope: float, measured: list[float], at: list[float]) -> list[float]:
    """log(predicted / measured) of offset x e^a + slope x e^b x t."""
    a, b = (math.exp(value) for value in at)
    return [math.log((offset * a + slope * b * t) / one) for t, one in zip(TIMES, measured, strict=True)]


@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=4, max_size=4))
def test_equations_are_solved_whatever_their_order(rows: list[list[int]]) -> None:
    matrix = [[float(value + 50 * (i == 3 - j)) for j, value in enumerate(row)] for i, row in enumerate(rows)]
    wanted = [1.0, -2.0, 3.0, 0.5]
    right = [sum(a * x for a, x in zip(row, wanted, strict=True)) for row in matrix]
    assert solve(matrix, right) == pytest.approx(wanted)


def test_a_law_is_found_from_far_away() -> None:
    measured = [3 + 0.2 * t for t in TIMES]
    found = minimize(lambda at: line(0.1, 5.0, measured, at), WIDE)
    assert 0.1 * math.exp(found.at[0]) == pytest.approx(3, rel=0.03)
    assert 5.0 * math.exp(found.at[1]) == pytest.approx(0.2, rel=0.03)


def test_the_search_stays_within_bounds() -> None:
    measured = [3 + 0.2 * t for t in TIMES]
    found = minimize(lambda at: line(1, 1, measured, at), [(-0.5, 0.5), (-1.0, 1.0)])
    assert found.at == pytest.approx([0.5, -1.0], abs=0.01)


def test_what_no_residual_tells_stays_where_it_was() -> None:
    found = minimize(lambda at: [at[0] - 1.0], WIDE)
    assert found.at[0] == pytest.approx(1.0, abs=1e-2)
    assert found.at[1] == 0.0


def test_a_run_amid_other_load_does_not_bend_the_rest() -> None:
    measured = [3 + 0.2 * t for t in TIMES]
    measured[2] *= 5
    found = minimize(lambda at: line(1, 1, measured, at), WIDE)
    assert math.exp(found.at[0]) == pytest.approx(3, rel=0.15)
    assert math.exp(found.at[1]) == pytest.approx(0.2, rel=0.15)


def test_leaving_a_row_out_is_as_if_it_had_not_been_there() -> None:
    measured = [3 + 0.2 * t for t in TIMES]
    measured[0] *= 1.1
    whole = minimize(lambda at: line(1, 1, measured, at), WIDE)
    blind = whole.without([0], WIDE)
    again = minimize(lambda at: line(1, 1, measured, at)[1:], WIDE)
    assert blind == pytest.approx(again.at, abs=0.01)
    assert whole.at != pytest.approx(again.at, abs=0.01)
