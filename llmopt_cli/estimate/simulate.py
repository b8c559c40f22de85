"""A workload on a deployment, request by request: what a closed form can't tell, percentiles above all.

Definitions are those of `bench`: for a request sent at t0 whose first token came at t1 and whose n-th and last at tn,
TTFT = t1 - t0, TPOT = (tn - t1) / (n - 1), E2E = tn - t0. Knows no scheduling (that is `timeline`) and no step times.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate.cost import usd_per_tokens
from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.latency import StepModel
from llmopt_cli.estimate.memory import budget, sequence_bytes
from llmopt_cli.estimate.pace import Pace
from llmopt_cli.estimate.timeline import Call, Timeline, new_state
from llmopt_cli.runtime.scheduler import SchedulerState
from llmopt_cli.spec.workload import Size, Slo, Workload

ENOUGH = 2000  # requests, for a 99th percentile that 20 of them lie beyond


@dataclass(frozen=True, slots=True)
class Spread:
    """Seconds over all requests; percentiles interpolate linearly."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """None without a value."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(math.fsum(values) / len(values), *(_percentile(ordered, share) for share in (0.5, 0.9, 0.99)))


def _percentile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    return low + (ordered[math.ceil(place)] - low) * (place % 1)


@dataclass(frozen=True, slots=True)
class Served:
    """One request: its lengths, when it was sent, its first token and its last, in seconds after the start."""

    size: Size
    cached: int
    sent: float
    first: float
    end: float

    @property
    def ttft(self) -> float:
        """Seconds to its first token."""
        return self.first - self.sent

    @property
    def e2e(self) -> float:
        """Seconds to its last."""
        return self.end - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None if there is none."""
        return (self.end - self.first) / (self.size.output_len - 1) if self.size.output_len > 1 else None

    def keeps(self, slo: Slo) -> bool:
        """Whether it is within every limit."""
        return slo.keeps(self.ttft, self.tpot or 0.0, self.e2e)


@dataclass(frozen=True)
class Simulation:
    """A workload on `replicas` of a deployment, from the first request sent to the last token.

    `clipped` requests were cut to the model's context; `refused` ones need more KV blocks than there are and count as
    missing every limit. `busy_share` is the part of the time in which a replica computes. `usd_per_hour` pays for all.
    """

    on: Deployment
    workload: Workload
    replicas: int
    served: tuple[Served, ...]
    clipped: int
    refused: int
    kv_tokens: int
    steps: int
    busy_share: float
    longest_queue: int
    preemptions: int
    usd_per_hour: float | None

    @cached_property
    def duration(self) -> float:
        """Seconds."""
        return max((one.end for one in self.served), default=0.0)

    @cached_property
    def ttft(self) -> Spread | None:
        """Time to first token."""
        return Spread.of([one.ttft for one in self.served])

    @cached_property
    def tpot(self) -> Spread | None:
        """Time per output token after the first."""
        return Spread.of([tpot for one in self.served if (tpot := one.tpot) is not None])

    @cached_property
    def e2e(self) -> Spread | None:
        """Time to the last token."""
        return Spread.of([one.e2e for one in self.served])

    @cached_property
    def input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(one.size.input_len for one in self.served)

    @cached_property
    def output_tokens(self) -> int:
        """Tokens generated."""
        return sum(one.size.output_len for one in self.served)

    @cached_property
    def cached_share(self) -> float:
        """The part of the prompts that was in the prefix cache."""
        return sum(one.cached for one in self.served) / max(1, self.input_tokens)

    @cached_property
    def good(self) -> tuple[Served, ...]:
        """The requests within every limit of the workload's SLO (goodput: arXiv 2401.09670)."""
        return tuple(one for one in self.served if one.keeps(self.workload.slo))

    @property
    def attainment(self) -> float:
        """Good requests as a part of all that were sent."""
        return len(self.good) / (len(self.served) + self.refused)

    @property
    def met(self) -> bool | None:
        """Whether enough of them are good; None if the SLO does not say how many are to be."""
        return None if self.workload.slo.share is None else self.attainment >= self.workload.slo.share

    @property
    def usd_per_1k_good(self) -> float | None:
        """USD per 1,000 output tokens of good requests, where there is a price and a good request."""
        tokens = sum(one.size.output_len for one in self.good)
        return usd_per_tokens(self.usd_per_hour, tokens / self.duration) if self.usd_per_hour and tokens else None

    def per_s(self, amount: float) -> float:
        """So many of anything, a second."""
        return amount / self.duration if self.duration else 0.0


def enough(workload: Workload) -> Workload:
    """The workload with as many requests as percentiles need; a trace stays as it is."""
    if workload.trace:
        return workload
    return replace(workload, num_requests=max(ENOUGH, 10 * (workload.arrivals.concurrency or 0)))


def simulate(
    on: Deployment, workload: Workload, replicas: int = 1, usd_per_hour: float | None = None, *, jumps: bool = True
) -> Simulation:
    """Run a workload on `replicas` of a deployment, requests dealt out in turns; `usd_per_hour` is that of one.

    Every replica has its own queue and cache. Without `jumps` each step is taken singly: the same, but slow.
    Raises CapacityError if no KV cache fits beside the weights.
    """
    assert replicas >= 1
    sizes, clipped = workload.sizes(on.batching.max_model_len or on.spec.max_context)
    calls, block_size = _calls(on, workload, sizes)
    blocks = _kv_tokens(on, sizes) // block_size
    fitting = [call for call in calls if -(-sum(call.size) // block_size) <= blocks]
    share = on.batching.enable_prefix_caching and any(call.keys for call in calls)
    limits, places = replace(on.batching, block_size=block_size), workload.arrivals.concurrency
    used = min(replicas, places or replicas)  # a closed loop with fewer places sends nothing to the rest
    timelines = []
    for index in range(used):
        seats = None if places is None else len(range(index, places, used))
        timelines.append(_timeline(on, fitting[index::used], seats, new_state(limits, blocks, share=share), jumps))
        timelines[-1].run()
    served = tuple(map(_served, fitting))
    duration = max((one.end for one in served), default=0.0)
    return Simulation(
        on=on,
        workload=workload,
        replicas=replicas,
        served=served,
        clipped=clipped,
        refused=len(calls) - len(fitting),
        kv_tokens=blocks * block_size,
        steps=sum(timeline.steps for timeline in timelines),
        busy_share=sum(timeline.busy for timeline in timelines) / replicas / duration if duration else 0.0,
        longest_queue=max(timeline.longest_queue for timeline in timelines),
        preemptions=sum(timeline.preemptions for timeline in timelines),
        usd_per_hour=None if usd_per_hour is None else usd_per_hour * replicas,
    )


def _timeline(
    on: Deployment, calls: Sequence[Call], places: int | None, state: SchedulerState, jumps: bool
) -> Timeline:
    """One replica: all calls come at their times, or as many as there are places at once and the rest after them."""
    step, at_once = StepModel(on), len(calls) if places is None else places
    coming, backlog = deque(calls[:at_once]), deque(calls[at_once:])
    return Timeline(Pace(step), state, coming, backlog, step.constants.dispatch_s, jumps)


def _kv_tokens(on: Deployment, sizes: Sequence[Size]) -> int:
    """Tokens that the KV budget holds in requests of mean length: windows hold less of long ones."""
    length = max(1, sum(map(sum, sizes)) // len(sizes))
    tokens = int(budget(on).free / sequence_bytes(on, length) * length) * on.attention_dp
    if tokens < on.batching.block_size:
        raise CapacityError(
            f"{on.spec.name} in {on.scheme.name} leaves no memory for a KV cache on {on.gpus} x {on.hardware.name}",
            "take more GPUs with --tp, or fewer bits with --scheme",
        )
    return tokens


def _calls(on: Deployment, workload: Workload, sizes: Sequence[Size]) -> tuple[list[Call], int]:
    """The requests, and the tokens of a KV block: as large as a trace hashes, if it does, else the deployment's.

    A block of the trace that a prompt does not fill can't be shared.
    """
    hashed, prefixes = workload.prefixes()
    block_size = hashed if workload.trace and any(prefixes) else on.batching.block_size
    times = workload.offsets() or [0.0] * len(sizes)
    calls = []
    for number, size, sent, heads in zip(count(), sizes, times, prefixes, strict=False):
        keys = [b"%d/%d" % (head, part) for head in heads for part in range(hashed // block_size)]
        calls.append(Call.of(number, size, sent, keys[: size.input_len // block_size]))
    return calls, block_size


def _served(call: Call) -> Served:
    assert call.first is not None
    assert call.end is not None
    return Served(call.size, call.num_hit or 0, call.sent, call.first, call.end)
