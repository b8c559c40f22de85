"""What GPUs pay to talk to each other: measured all-reduces, and a guess for the GPUs that nobody measured.

`assets/catalog/allreduce.csv` holds message bytes / time of large all-reduces, and the time of small ones where the
link and not the engine decides it. Knows no model.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache

from llmopt_cli.spec.checkpoint import ASSETS
from llmopt_cli.spec.hardware import GB, Hardware


@dataclass(frozen=True, slots=True)
class Link:
    """A group of GPUs: seconds = `latency` (None: the engine's own) + message bytes / `rate` of an all-reduce."""

    latency: float | None
    rate: float


def all_reduce(hardware: Hardware, gpus: int, link_efficiency: float) -> Link:
    """An all-reduce among `gpus`, which moves 2 (gpus-1)/gpus of the message over each link.

    Over PCIe without a measurement it loses the same share of the link as the measured card of that generation;
    over anything faster it uses `link_efficiency` of the link.
    """
    share = 2 * (gpus - 1) / gpus
    measured = _measured().get(hardware.name) or (_measured()[_alike(hardware)] if hardware.over_pcie else None)
    if not measured:
        return Link(None, hardware.link_bandwidth * link_efficiency / share)
    count = max((known for known in measured if known <= gpus), default=min(measured))
    latency, rate, link = measured[count]
    return Link(latency, rate * (2 * (count - 1) / count) / share * (hardware.link_bandwidth / link))


def _alike(hardware: Hardware) -> str:
    return "RTX PRO 6000 Blackwell Server" if hardware.link.startswith("PCIe5") else "L40S"


@cache
def _measured() -> dict[str, dict[int, tuple[float | None, float, float]]]:
    """GPU -> count -> (latency in seconds, bytes per second, its link's bytes per second)."""
    from llmopt_cli.spec.catalog import gpus

    links = {entry.item.name: entry.item.link_bandwidth for entry in gpus()}
    found: dict[str, dict[int, tuple[float | None, float, float]]] = {}
    with (ASSETS / "catalog" / "allreduce.csv").open(encoding="utf-8", newline="") as text:
        for row in csv.DictReader(text):
            latency = float(row["latency_us"]) * 1e-6 if row["latency_us"] else None
            name = row["gpu"]
            found.setdefault(name, {})[int(row["gpus"])] = (latency, float(row["gb_s"]) * GB, links[name])
    return found
