"""A probed machine as JSON and as lines. Computes nothing."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmopt_cli.output import lines
from llmopt_cli.spec.hardware import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.host import Machine


def data(machine: Machine) -> dict[str, Any]:
    """Every figure, keys naming their units."""
    return asdict(machine)


def render(machine: Machine) -> list[RenderableType]:
    """The same for people."""
    rates = [(f"products in {dtype}", f"{1e3 * tflops:,.0f} GFLOPS") for dtype, tflops in machine.tflops.items()]
    return [
        lines(
            [
                ("machine", machine.name),
                ("free memory", f"{machine.memory_bytes / GIB:.1f} GiB"),
                ("copies", f"{machine.bandwidth_gb_s:,.1f} GB/s, read and written"),
                *rates,
                ("estimates", "`llmopt estimate --gpu host` uses these figures"),
            ]
        )
    ]
