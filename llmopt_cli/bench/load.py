"""Sends the requests of a run to a target when they are due, and writes down what became of each.

Closed loop: as many workers as the concurrency, each sends its next request when the last one is answered. Open loop:
every request is sent at its time whatever became of the others, so a slow target cannot slow down its own load; what
the client lost on the way is in the records (`sent_at` - `scheduled_at`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from llmopt_cli.bench.drafts import Totals
from llmopt_cli.bench.metrics import Record
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.bench.targets import Target
from llmopt_cli.errors import LlmoptError
from llmopt_cli.output import Report
from llmopt_cli.spec.workload import Arrivals

Send = Callable[[Ask, float], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Run:
    """The requests that ended in `duration` seconds. `partial`: it was stopped, and those under way are left out.

    `drafts` is what speculation did meanwhile, if the target says so.
    """

    records: list[Record]
    duration: float
    partial: bool = False
    drafts: Totals | None = None


async def drive(
    target: Target,
    asks: Sequence[Ask],
    arrivals: Arrivals,
    offsets: Sequence[float],
    report: Report,
    stop: asyncio.Event,
) -> Run:
    """Send all of `asks`, those of an open loop at their `offsets`.

    `stop` ends the run early and cancels what is under way.
    """
    records: list[Record] = []

    async def send(ask: Ask, scheduled_at: float) -> None:
        sent_at = time.perf_counter()
        reply = error = None
        try:
            reply = await target.send(ask)
        except LlmoptError as failure:
            error = failure.message
        records.append(Record(ask, scheduled_at, sent_at, time.perf_counter(), reply, error))
        report(len(records), len(asks))

    started = time.perf_counter()
    if arrivals.concurrency is not None:
        load = asyncio.create_task(_closed_loop(send, asks, arrivals.concurrency))
    else:
        load = asyncio.create_task(_open_loop(send, asks, offsets))
    stopped = not await _finishes(load, stop)
    return Run(records, time.perf_counter() - started, partial=stopped)


async def _finishes(load: asyncio.Task[None], stop: asyncio.Event) -> bool:
    """Wait for the load or the stop, leave nothing running, and tell whether the load came to its end."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({load, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        finished = load.done()
        load.cancel()
        stopping.cancel()
        await asyncio.wait({load, stopping})
    if finished:
        load.result()  # raises what a bug raised in there
    return finished


async def _closed_loop(send: Send, asks: Sequence[Ask], concurrency: int) -> None:
    waiting = iter(asks)

    async def work() -> None:
        for ask in waiting:
            await send(ask, time.perf_counter())

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(asks))):
            group.create_task(work())


async def _open_loop(send: Send, asks: Sequence[Ask], offsets: Sequence[float]) -> None:
    started = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for ask, offset in zip(asks, offsets, strict=True):
            due = started + offset
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(send(ask, due))
