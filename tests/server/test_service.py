"""The engine behind the faces: what is let in, what happens when it dies or hangs, who cleans up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
import pytest

from llmopt_cli.errors import ServerError
from llmopt_cli.runtime import AsyncEngine, Engine, SamplingParams
from llmopt_cli.runtime.async_engine import STALL_SECONDS
from llmopt_cli.server.app import create_app
from llmopt_cli.server.errors import ApiError
from llmopt_cli.server.metrics import token_buckets
from llmopt_cli.server.service import Service, Settings, retry_after
from llmopt_cli.server.streaming import ClientGoneError, EventStream, merged, unless_gone

PROMPT = [5, 6, 7]
pytestmark = pytest.mark.timeout(60)
LONG = SamplingParams(max_tokens=1000, ignore_eos=True)


@asynccontextmanager
async def serving(engine: Engine, **settings: Any) -> AsyncIterator[Service]:
    async with AsyncEngine(engine) as async_engine:
        yield Service(async_engine, Settings(**settings))


async def settled(engine: Engine) -> None:
    """Wait until the engine's thread has taken its commands."""
    for _ in range(500):
        if not engine.has_work():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the engine still has work")


def test_outputs_of_several_prompts_come_with_their_index(engine: Engine) -> None:
    async def scenario() -> dict[int, tuple[int, ...]]:
        async with serving(engine) as service:
            params = [SamplingParams(max_tokens=4, ignore_eos=True), SamplingParams(max_tokens=7, ignore_eos=True)]
            latest = {index: output async for index, output in service.run([PROMPT, [8]], params)}
            assert service.in_flight == 0
            return {index: output.token_ids for index, output in latest.items()}

    tokens = asyncio.run(scenario())
    assert {index: len(ids) for index, ids in tokens.items()} == {0: 4, 1: 7}
    assert tokens[0] == engine.generate([PROMPT], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids


def test_closing_the_outputs_aborts_all_their_requests(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine) as service:
            async with aclosing(service.run([PROMPT, [8], [9]], [LONG] * 3)) as outputs:
                await anext(outputs)
                assert service.in_flight == 3
            assert service.in_flight == 0
            await settled(engine)

    asyncio.run(scenario())
    engine.check_integrity()


def test_what_is_refused_takes_no_place(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine, max_num_queued_reqs=1) as service:
            service.in_flight = service._most - 1
            for prompts, status in (([PROMPT] * 2, 429), ([PROMPT] * 10, 400)):
                with pytest.raises(ApiError) as caught:
                    await anext(service.run(prompts, [LONG] * len(prompts)))
                assert caught.value.status == status
            assert service.in_flight == service._most - 1
            service.draining = True
            with pytest.raises(ApiError) as caught:
                await anext(service.run([PROMPT], [LONG]))
            assert caught.value.status == 503
            assert service.unready() is not None
            assert service.unhealthy() is None

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("ends", "seconds"),
    [([], 1), ([50.0], 1), ([50.0, 54.0, 62.0], 6), ([50.0, 50.1], 1), ([50.0, 50.0], 1), ([0.0, 5000.0], 60)],
)
def test_a_place_is_promised_after_the_mean_gap_between_ends(ends: list[float], seconds: int) -> None:
    assert retry_after(ends) == seconds


def test_ends_from_before_an_idle_time_do_not_count_nor_do_prompts_one_by_one(engine: Engine) -> None:
    async def scenario() -> None:
        async with serving(engine) as service:
            service._ends.extend([0.0, 100.0])
            async for _ in service.run([PROMPT, [8]], [SamplingParams(max_tokens=2)] * 2):
                pass
            assert len(service._ends) == 1

    asyncio.run(scenario())


def test_the_event_loop_goes_on_while_a_prompt_is_encoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(_: Any) -> list[int]:
        entered.set()
        go_on.wait()
        return PROMPT

    monkeypatch.setattr(engine.tokenizer, "encode", slow)
    monkeypatch.setattr(engine.tokenizer, "chat", slow)
    turns = [{"role": "user", "content": "a"}]
    bodies = {"completions": {"prompt": "a"}, "chat/completions": {"messages": turns}}

    async def scenario() -> None:
        async with serving(engine) as service:
            transport = httpx.ASGITransport(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                for path, body in bodies.items():
                    entered.clear()
                    go_on.clear()
                    answer = asyncio.ensure_future(client.post(f"/v1/{path}", json=body | {"max_tokens": 1}))
                    await asyncio.to_thread(entered.wait)
                    assert (await client.get("/health")).status_code == 200
                    assert not answer.done()
                    go_on.set()
                    assert (await answer).status_code == 200

    asyncio.run(scenario())


def test_a_dead_engine_fails_its_requests_and_its_health() -> None:
    engine = Engine.from_pretrained("demo")

    def broken_step() -> Any:
        raise RuntimeError("the device is gone")

    async def scenario() -> None:
        async with serving(engine) as service:
            assert service.unhealthy() is None
            engine.step = broken_step  # type: ignore[method-assign]
            for _ in range(2):
                with pytest.raises(ServerError, match="the device is gone"):
                    await anext(service.run([PROMPT], [LONG]))
            assert "the device is gone" in str(service.unhealthy())
            assert service.unready() == service.unhealthy()
            assert service.in_flight == 0

    asyncio.run(scenario())


def test_an_engine_that_hangs_is_unhealthy_until_it_moves() -> None:
    engine = Engine.from_pretrained("demo")
    step, entered, go_on = engine.step, threading.Event(), threading.Event()

    def slow_step() -> Any:
        entered.set()
        go_on.wait()
        return step()

    async def scenario() -> None:
        async with serving(engine) as service:
            service.engine._last_progress -= 10 * STALL_SECONDS
            assert service.unhealthy() is None  # idle is not stuck
            engine.step = slow_step  # type: ignore[method-assign]
            outputs = service.run([PROMPT], [LONG])
            first = asyncio.ensure_future(anext(outputs))
            await asyncio.to_thread(entered.wait)
            assert service.unhealthy() is None  # the time spent idle does not count
            service.engine._last_progress -= 10 * STALL_SECONDS
            assert "no step" in str(service.unhealthy())
            go_on.set()
            await first
            assert service.unhealthy() is None
            await outputs.aclose()

    asyncio.run(scenario())


async def counting(stop: int, closed: list[int]) -> AsyncGenerator[int, None]:
    try:
        for number in range(stop):
            await asyncio.sleep(0)
            yield number
    finally:
        closed.append(stop)


def test_merged_streams_keep_their_order_and_all_end() -> None:
    async def scenario() -> None:
        closed: list[int] = []
        items = [item async for item in merged([counting(stop, closed) for stop in (3, 0, 5)])]
        assert sorted(items) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3), (2, 4)]
        for index in (0, 2):
            numbers = [number for i, number in items if i == index]
            assert numbers == sorted(numbers)
        assert sorted(closed) == [0, 3, 5]

    asyncio.run(scenario())


def test_closing_merged_streams_closes_every_one() -> None:
    async def scenario() -> None:
        closed: list[int] = []
        async with aclosing(merged([counting(stop, closed) for stop in (3, 5)])) as items:
            await anext(items)
        assert sorted(closed) == [3, 5]

    asyncio.run(scenario())


def test_work_is_cancelled_when_the_client_goes() -> None:
    cleaned: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append("done")

    messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        await asyncio.sleep(0)
        return next(messages)

    async def scenario() -> None:
        with pytest.raises(ClientGoneError):
            await unless_gone(receive, work())
        assert cleaned == ["done"]
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(scenario())


def test_an_event_stream_closes_its_events_when_the_client_goes() -> None:
    closed: list[str] = []
    sent: list[Any] = []
    gone = asyncio.Event()

    async def events() -> AsyncGenerator[str, None]:
        try:
            yield "one"
            yield "two"
            gone.set()
            await asyncio.Event().wait()
        finally:
            closed.append("closed")

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def scenario() -> None:
        response = await EventStream.begin(receive, events())
        await response({"type": "http"}, receive, send)

    asyncio.run(scenario())
    assert [message.get("body") for message in sent] == [None, b"data: one\n\n", b"data: two\n\n"]
    assert closed == ["closed"]


def test_token_buckets_cover_the_context() -> None:
    assert token_buckets(2048) == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]
    assert token_buckets(1) == [1]
