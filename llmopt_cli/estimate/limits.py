"""The inverse questions: given what a deployment has, how much can be asked of it. All from memory, none from time.

Everything here turns `memory` around; where a window or a sampler bends the line, by bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from llmopt_cli.estimate.deployment import Deployment
from llmopt_cli.estimate.load import Load
from llmopt_cli.estimate.memory import Budget, budget, sequence_bytes
from llmopt_cli.estimate.pool import own_batching
from llmopt_cli.estimate.splits import GPU_COUNTS, shares, split_over
from llmopt_cli.spec.catalog import models
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import Scheme, find_scheme

SCHEMES = ("bf16", "fp8", "int8", "awq")  # the precisions that are answered for, beside the one asked for
MOST_REQUESTS = 2**20
SERVERS = (2, 4, 8)  # that one pipeline runs over, once one server is full


@dataclass(frozen=True, slots=True)
class Fewest:
    """The fewest GPUs of a kind that hold the load in `scheme`; None where 64 do not."""

    scheme: Scheme
    on: Deployment | None


@dataclass(frozen=True, slots=True)
class Largest:
    """The catalogue's largest model that holds the load on the same GPUs in `scheme`; None where none does."""

    scheme: Scheme
    spec: ModelSpec | None


@dataclass(frozen=True, slots=True)
class Limits:
    """What memory allows `on`, for `load`.

    `max_context`: tokens of each of the load's requests at once, capped at the model's own limit. `max_batch`: requests
    of the load's mean size at once, with max_num_seqs raised or lowered to it. `own` is the engine's batching where
    nobody tells it, `own_budget` what that leaves.
    """

    on: Deployment
    load: Load
    max_context: int
    max_batch: int
    own: Batching
    own_budget: Budget
    fewest: tuple[Fewest, ...]
    largest: tuple[Largest, ...]


def find_limits(on: Deployment, load: Load) -> Limits:
    """Turn every question around for the GPUs of `on`."""
    schemes = tuple({scheme.name: scheme for scheme in (on.scheme, *map(find_scheme, SCHEMES))}.values())
    own = replace(own_batching(on.engine, on.hardware), block_size=on.batching.block_size)
    return Limits(
        on=on,
        load=load,
        max_context=max_context(on, load.concurrency),
        max_batch=max_batch(on, load.length),
        own=own,
        own_budget=budget(replace(on, batching=own)),
        fewest=tuple(Fewest(scheme, fewest_gpus(replace(on, scheme=scheme), load)) for scheme in schemes),
        largest=tuple(Largest(scheme, largest_model(replace(on, scheme=scheme), load)) for scheme in schemes),
    )


def max_context(on: Deployment, concurrency: int) -> int:
    """The longest that each of `concurrency` requests can be at the same time, in tokens; 0 where nothing fits."""
    share, block = budget(on).free / concurrency, on.batching.block_size
    most = on.spec.max_context // block
    blocks = bisect_right(range(1, most + 1), share, key=lambda count: sequence_bytes(on, count * block))
    return on.spec.max_context if blocks == most and blocks else blocks * block


def max_batch(on: Deployment, length: int) -> int:
    """The most requests of `length` tokens at once, an engine's max_num_seqs set to just that."""
    each = sequence_bytes(on, length)

    def lacking(requests: int) -> float:
        batching = replace(
            on.batching,
            max_num_seqs=requests,
            max_num_batched_tokens=max(requests, on.batching.max_num_batched_tokens),
        )
        return requests * each - budget(replace(on, batching=batching)).free

    return bisect_right(range(1, MOST_REQUESTS + 1), 0.0, key=lacking)


def fewest_gpus(on: Deployment, load: Load) -> Deployment | None:
    """`on` split over the fewest GPUs of its kind that hold the load: a server as a plan cuts it, beyond in stages."""
    return next((split for split in _splits(on) if holds(split, load)), None)


def _splits(on: Deployment) -> Iterator[Deployment]:
    possible = [split for gpus in GPU_COUNTS if (split := split_over(on.spec, on.hardware, gpus))]
    yield from (on.split(*split) for split in possible)
    tp, pp = possible[-1]
    yield from (on.split(tp, pp * servers) for servers in SERVERS if pp * servers <= on.spec.num_layers)


def largest_model(on: Deployment, load: Load) -> ModelSpec | None:
    """The model of the catalogue with the most parameters that holds the load on the GPUs and in the scheme of `on`."""
    fitting = (
        spec
        for spec in sorted((entry.item for entry in models()), key=lambda spec: spec.num_params, reverse=True)
        if spec.max_context >= load.longest and shares(spec, on.tp) and holds(replace(on, spec=spec), load)
    )
    return next(fitting, None)


def holds(on: Deployment, load: Load) -> bool:
    """Whether all requests of the load fit at once when they end, and the longest of them."""
    free = budget(on).free
    return free >= max(load.concurrency * sequence_bytes(on, load.length), sequence_bytes(on, load.longest))
