"""`llmopt gpus`: the accelerators that `--gpu` knows, with the source of every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmopt_cli.options import JsonOpt
from llmopt_cli.output import Output, table

if TYPE_CHECKING:
    from llmopt_cli.spec.hardware import Hardware

COLUMNS = ("name", "usable GiB", "GB/s", "bf16 TFLOPS", "fp8", "link GB/s", "USD/h", "range", "price from")


def gpus(json: JsonOpt = False) -> None:
    """List the accelerators that `estimate --gpu` knows; `--json` adds the source of every figure."""
    from dataclasses import asdict

    from llmopt_cli.spec import catalog

    entries = catalog.gpus()
    data = [{**asdict(entry.item), "names": entry.names} for entry in entries]
    caption = (
        "Dense peaks of the datasheets; prices for one GPU and hour. Sources and notes: llmopt gpus --json\n"
        "Any other: write its figures into a file and give `--gpu my.yaml`"
    )
    Output(as_json=json).result(
        data, lambda: table(f"{len(entries)} accelerators", COLUMNS, [_row(entry.item) for entry in entries], caption)
    )


def _row(gpu: Hardware) -> tuple[str, ...]:
    numbers = (gpu.memory_gib, gpu.bandwidth_gb_s, gpu.bf16_tflops, gpu.fp8_tflops, gpu.link_gb_s, gpu.price_usd_hour)
    return (
        gpu.name,
        *("-" if number is None else f"{number:g}" for number in numbers),
        gpu.price_range,
        gpu.price_source,
    )
