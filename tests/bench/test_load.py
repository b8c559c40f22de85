"""The load: how many at once, who waits for whom, what becomes of failures, and how it stops. The target is a stub,
because the contracts are about a target that is slow, broken or gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import pytest

from llmopt_cli.bench.load import Run, drive
from llmopt_cli.bench.metrics import Chunk, Reply, peak_concurrency
from llmopt_cli.bench.prompts import Ask
from llmopt_cli.errors import CapacityError
from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.spec.workload import Arrivals

ASKS = [Ask((index,), 1, SamplingParams()) for index in range(24)]


class Stub:
    """Answers a request when `behave` returns."""

    name = model = "stub"
    context = encode = None
    remembers = False

    def __init__(self, behave: Callable[[int], Awaitable[None]]) -> None:
        self.behave = behave
        self.seen: list[int] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def send(self, ask: Ask) -> Reply:
        number = int(ask.prompt[0])
        self.seen.append(number)
        await self.behave(number)
        return Reply((Chunk(time.perf_counter(), 1),), 1)


def run(stub: Stub, arrivals: Arrivals, stop: asyncio.Event | None = None) -> tuple[Run, list[tuple[int, int]]]:
    reports: list[tuple[int, int]] = []
    offsets = arrivals.offsets(len(ASKS), seed=0) if arrivals.rate else []

    async def main() -> Run:
        return await drive(stub, ASKS, arrivals, offsets, lambda *pair: reports.append(pair), stop or asyncio.Event())

    return asyncio.run(main()), reports


@pytest.mark.parametrize("concurrency", [1, 5, 100])
def test_closed_loop_keeps_as_many_under_way_as_it_says(concurrency: int) -> None:
    stub = Stub(lambda number: asyncio.sleep(0.001 * (number % 3)))
    result, reports = run(stub, Arrivals(concurrency=concurrency))
    assert stub.seen == list(range(24))
    assert peak_concurrency(result.records) == min(concurrency, 24)
    assert reports == [(done, 24) for done in range(1, 25)]
    assert not result.partial
    assert result.duration >= max(r.ended_at for r in result.records) - min(r.sent_at for r in result.records)


def test_open_loop_sends_on_though_nobody_answers() -> None:
    due = Arrivals(rate=2000).offsets(24, seed=0)

    async def main() -> Run:
        all_sent = asyncio.Event()

        async def answer_at_last(number: int) -> None:
            if number == 23:
                all_sent.set()
            await all_sent.wait()

        return await drive(Stub(answer_at_last), ASKS, Arrivals(rate=2000), due, lambda *_: None, asyncio.Event())

    result = asyncio.run(main())
    assert peak_concurrency(result.records) == 24
    scheduled = sorted(record.scheduled_at for record in result.records)
    assert [at - scheduled[0] for at in scheduled] == pytest.approx(due)
    assert all(record.sent_at >= record.scheduled_at for record in result.records)


@pytest.mark.parametrize("arrivals", [Arrivals(concurrency=3), Arrivals(rate=5000)])
def test_failures_are_recorded_and_the_rest_goes_on(arrivals: Arrivals) -> None:
    async def fail_some(number: int) -> None:
        if number % 4 == 0:
            raise CapacityError(f"no room for {number}")

    result, _ = run(Stub(fail_some), arrivals)
    errors = {record.ask.prompt[0]: record.error for record in result.records}
    assert len(errors) == 24
    assert all(errors[number] == (None if number % 4 else f"no room for {number}") for number in range(24))
    assert all((record.reply is None) == (record.error is not None) for record in result.records)


def test_a_stop_keeps_what_ended_and_leaves_out_what_did_not() -> None:
    async def main() -> tuple[Run, int]:
        stop = asyncio.Event()
        cancelled = 0

        async def hang_from_ten_on(number: int) -> None:
            nonlocal cancelled
            if number >= 10:
                stop.set()
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled += 1

        return await drive(Stub(hang_from_ten_on), ASKS, Arrivals(concurrency=4), [], lambda *_: None, stop), cancelled

    result, cancelled = asyncio.run(main())
    assert result.partial
    assert sorted(record.ask.prompt[0] for record in result.records) == list(range(10))
    assert cancelled > 0


@pytest.mark.parametrize("arrivals", [Arrivals(concurrency=3), Arrivals(rate=5000)])
def test_a_bug_in_a_target_is_no_failed_request(arrivals: Arrivals) -> None:
    async def bug(number: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        run(Stub(bug), arrivals)
    assert caught.group_contains(ZeroDivisionError)
