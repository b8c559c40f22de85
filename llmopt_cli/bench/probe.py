"""What this machine can do at best: the bandwidth of a copy, and the rate of products in the dtypes that models have.

The least time of several tries, as other load only ever adds to it. `llmopt env --probe` keeps it for estimates.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from llmopt_cli.bench.environment import fingerprint
from llmopt_cli.estimate.host import Machine
from llmopt_cli.runtime.probe import free_memory

TRIES = 7
COPIED = {"cpu": 2**28, "cuda": 2**31}  # bytes: far beyond any cache
SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices: a tenth of a second on a core
DTYPES = (torch.float32, torch.bfloat16)


def probe() -> Machine:
    """Measure the device that `--device auto` takes, in a few seconds."""
    found = fingerprint()
    device = torch.device("cuda" if found.gpu else "cpu")
    return Machine(
        cpu=found.cpu,
        cores=found.cores,
        threads=found.threads,
        gpu=found.gpu,
        date=found.date,
        memory_bytes=free_memory(device),
        bandwidth_gb_s=_figure(_bandwidth(device) / 1e9),
        tflops={str(dtype).removeprefix("torch."): _figure(_flops(device, dtype) / 1e12) for dtype in DTYPES},
    )


def _figure(value: float) -> float:
    """As many digits as a repetition would agree with."""
    return float(f"{value:.3g}")


def _bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.zeros(min(COPIED[device.type], free_memory(device) // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(device, lambda: target.copy_(source))


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply-adds x 2 a second."""
    side = SIDE[device.type]
    one, other = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _least_seconds(device, lambda: one @ other)


def _least_seconds(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(1 + TRIES):  # the first one warms up, and is hardly the fastest
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
