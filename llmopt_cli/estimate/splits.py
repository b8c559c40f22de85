"""How a model can be cut over GPUs: every layer in `tp` parts, the layers in `pp` stages. Knows heads and links."""

from __future__ import annotations

from llmopt_cli.spec.hardware import Hardware
from llmopt_cli.spec.model import ModelSpec

Split = tuple[int, int]  # (tp, pp)
GPU_COUNTS = (1, 2, 4, 8)  # one server; tensor parallelism does not leave it
PCIE_TP = 2  # measured all-reduces over PCIe collapse beyond: L40S 18.6, 2.5 and 1.1 GB/s on 2, 4 and 8 cards


def shares(spec: ModelSpec, gpus: int) -> bool:
    """Each GPU gets as many heads, and as many KV heads or a copy of one."""
    return spec.num_heads % gpus == 0 and (spec.num_kv_heads % gpus == 0 or gpus % spec.num_kv_heads == 0)


def splits(spec: ModelSpec, hardware: Hardware) -> tuple[Split, ...]:
    """The sensible cuts over 1, 2, 4 and 8 accelerators, fewest first; over 1 alone where no link is known."""
    found = (split_over(spec, hardware, gpus) for gpus in GPU_COUNTS if gpus == 1 or hardware.link)
    return tuple(split for split in found if split)


def split_over(spec: ModelSpec, hardware: Hardware, gpus: int) -> Split | None:
    """The cut over so many: over PCIe at most 2 share a layer, the rest are stages. None if heads can't be shared."""
    paired = hardware.over_pcie or "bridge" in hardware.link  # an NVLink bridge joins two cards
    tp = min(gpus, PCIE_TP) if paired else gpus
    if gpus % tp or (paired and not shares(spec, tp)):
        tp = 1
    return (tp, gpus // tp) if shares(spec, tp) and gpus // tp <= spec.num_layers else None
