"""Figures: significant digits, thousands apart, never an exponent."""

from __future__ import annotations

import pytest

from llmopt_cli.estimate.figures import plain


@pytest.mark.parametrize(
    ("value", "digits", "written"),
    [
        (5881.4, 3, "5,880"),
        (141.107, 4, "141.1"),
        (1_234_567.0, 4, "1,235,000"),
        (1026.4, 3, "1,030"),
        (0.0000951, 3, "0.0000951"),
        (323.0, 3, "323"),
        (999.96, 4, "1,000"),
        (0.0, 3, "0"),
    ],
)
def test_figures_are_written_without_an_exponent(value: float, digits: int, written: str) -> None:
    assert plain(value, digits) == written
