"""How a figure is written for people. Knows no unit."""

from __future__ import annotations

from decimal import Decimal


def plain(value: float, digits: int) -> str:
    """`value` with `digits` significant ones and thousands apart, never as 5.88e+03 or 9.5e-05."""
    return f"{Decimal(f'{value:.{digits}g}'):,f}"
