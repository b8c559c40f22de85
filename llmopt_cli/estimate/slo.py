"""Which load a deployment bears: the most within the limits of an SLO, and what a rate of requests keeps busy.

Both search the closed forms, which know means in a steady state only; percentiles are a simulation's business.
"""

from __future__ import annotations

from bisect import bisect_left

from llmopt_cli.errors import UsageError
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.load import Load
from llmopt_cli.spec.workload import Slo, Workload


def meets(step: StepModel, load: Load, slo: Slo) -> bool:
    """Whether the mean request of a load is within every limit."""
    ttft, tpot = step.ttft(load), step.tpot(load)
    return slo.keeps(ttft, tpot, ttft + tpot * (load.output_len - 1))


def best_load(step: StepModel, load: Load, slo: Slo, most: int) -> Load | None:
    """The most requests at once, up to `most`, whose mean is within every limit; None if a single one is not.

    Latency grows with the requests at once, so the first that breaks a limit is found by halving.
    """
    broken = bisect_left(range(1, most + 1), True, key=lambda count: not meets(step, load.at(count), slo))
    return load.at(broken) if broken else None


def request_rate(step: StepModel, load: Load) -> float:
    """Requests a second that a closed loop completes: Little's law, requests at once / seconds of each."""
    return load.concurrency / (step.ttft(load) + step.tpot(load) * (load.output_len - 1))


def offered_rate(workload: Workload) -> float | None:
    """Requests a second that come in an open loop; None in a closed one, and for a single request.

    Raises UsageError where all come at the same time.
    """
    offsets = workload.offsets()
    if len(offsets) < 2:
        return None
    if not offsets[-1]:
        raise UsageError(f"all requests of {workload.name} come at the same time", "give a --concurrency instead")
    return (len(offsets) - 1) / offsets[-1]


def keep_up(step: StepModel, load: Load, rate: float, most: int) -> Load | None:
    """The requests that an open loop of `rate` a second keeps under way; None if even `most` at once end more slowly.

    The fewest at once of which as many end as come.
    """
    busy = bisect_left(range(1, most + 1), True, key=lambda count: request_rate(step, load.at(count)) >= rate)
    return load.at(busy + 1) if busy < most else None
