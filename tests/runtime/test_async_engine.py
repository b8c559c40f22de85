"""The engine on its thread: many streams at once, aborts, slow readers, and a dying engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

import pytest

from llmopt_cli.errors import CapacityError, ServerError, UsageError
from llmopt_cli.runtime import AsyncEngine, Engine, RequestOutput, SamplingParams
from llmopt_cli.spec.recipe import Batching


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained("demo", dtype="float32", device="cpu", batching=Batching(max_num_seqs=8))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


async def collect(stream: AsyncIterator[RequestOutput]) -> list[RequestOutput]:
    return [output async for output in stream]


def test_concurrent_streams_equal_the_synchronous_engine(engine: Engine) -> None:
    prompts = [[10 + i] * (3 * i + 1) for i in range(12)]
    params = SamplingParams(max_tokens=12)
    expected = engine.generate(prompts, params)

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            streams = await asyncio.gather(*(collect(running.stream(prompt, params)) for prompt in prompts))
        for outputs, one in zip(streams, expected, strict=True):
            assert outputs[-1].token_ids == one.token_ids
            assert "".join(output.delta for output in outputs) == one.text
            assert sum(output.num_new_tokens for output in outputs) == len(one.token_ids)
            assert [output.finished for output in outputs[:-1]] == [False] * (len(outputs) - 1)

    run(work())


def test_a_slow_reader_gets_merged_outputs(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    [expected] = engine.generate([[9, 8, 7]], params)

    async def work() -> None:
        outputs = []
        async with AsyncEngine(engine) as running:
            async for output in running.stream([9, 8, 7], params):
                outputs.append(output)
                await asyncio.sleep(0.1)
        assert len(outputs) < 40
        assert "".join(output.delta for output in outputs) == expected.text
        assert sum(output.num_new_tokens for output in outputs) == 40

    run(work())


def test_a_reader_that_leaves_aborts_its_request(engine: Engine) -> None:
    async def work() -> None:
        async with AsyncEngine(engine) as running:
            stream = running.stream([5, 6], SamplingParams(max_tokens=2000, ignore_eos=True))
            await anext(stream)
            assert engine.stats().num_running == 1
            await stream.aclose()  # type: ignore[attr-defined]
            for _ in range(200):
                if not engine.has_work():
                    break
                await asyncio.sleep(0.01)
            assert not engine.has_work()
            engine.check_integrity()

    run(work())


def test_leaving_the_block_stops_the_thread_with_requests_running(engine: Engine) -> None:
    async def work() -> None:
        running = AsyncEngine(engine)
        async with running:
            stream = running.stream([5, 6], SamplingParams(max_tokens=2000, ignore_eos=True))
            await anext(stream)
        assert not engine.has_work()
        with pytest.raises(ServerError):
            await anext(stream)

    run(work())


def test_a_request_id_in_use_is_refused_and_harms_nobody(engine: Engine) -> None:
    async def work() -> None:
        async with AsyncEngine(engine) as running:
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            first = running.stream([5, 6], params, "x")
            await anext(first)
            with pytest.raises(UsageError, match="`x` is already running"):
                await anext(running.stream([7, 8], params, "x"))
            assert (await collect(first))[-1].finished

    run(work())


def test_a_refusal_on_the_thread_reaches_only_its_own_stream(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    add = engine.add_request

    def picky(ids: Sequence[int], params: SamplingParams, name: str | None = None, *rest: Any) -> str:
        if name == "odd":
            raise UsageError("not this one")
        return add(ids, params, name, *rest)

    async def work() -> None:
        monkeypatch.setattr(engine, "add_request", picky)
        async with AsyncEngine(engine) as running:
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            first = running.stream([5, 6], params)
            await anext(first)
            with pytest.raises(UsageError, match="not this one"):
                await anext(running.stream([7, 8], params, "odd"))
            assert (await collect(first))[-1].finished
            assert running.failure is None

    run(work())


def test_impossible_requests_raise_at_the_first_step(engine: Engine) -> None:
    async def work() -> None:
        async with AsyncEngine(engine) as running:
            with pytest.raises(CapacityError):
                await anext(running.stream([5] * 4000, SamplingParams()))

    run(work())


def test_a_dying_engine_reaches_every_reader(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> None:
        raise RuntimeError("out of luck")

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            monkeypatch.setattr(engine, "step", explode)
            with pytest.raises(ServerError, match="out of luck"):
                await collect(running.stream([5, 6], SamplingParams()))
            with pytest.raises(ServerError):
                await collect(running.stream([5, 6], SamplingParams()))
            assert isinstance(running.failure, RuntimeError)

    run(work())
    assert not engine.has_work()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_too_broken_to_clean_up_still_reaches_its_readers(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise RuntimeError("out of luck")

    async def work() -> None:
        async with AsyncEngine(engine) as running:
            monkeypatch.setattr(engine, "step", explode)
            monkeypatch.setattr(engine, "abort_all", explode)
            with pytest.raises(ServerError, match="out of luck"):
                await collect(running.stream([5, 6], SamplingParams()))

    run(work())
    monkeypatch.undo()
    engine.abort_all()


def test_the_watchdog_tells_of_a_step_that_hangs_and_where(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, go_on = engine.step, threading.Event()

    def hanging_step() -> list[RequestOutput]:
        go_on.wait()
        return step()

    async def work() -> None:
        monkeypatch.setattr(engine, "step", hanging_step)
        async with AsyncEngine(engine, stall_seconds=0.1) as running:
            await asyncio.sleep(0.3)
            assert running.stalled is None  # idle is not stuck
            reading = asyncio.ensure_future(collect(running.stream([5, 6], SamplingParams(max_tokens=4))))
            while not running.num_stalls:
                await asyncio.sleep(0.01)
            assert "no step finished" in str(running.stalled)
            assert (running.stats().stalled, running.stats().num_stalls) == (1, 1)
            go_on.set()
            assert (await reading)[-1].finished
            assert running.stalled is None
            assert running.stats().num_stalls == 1

    run(work())
    [line] = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert "requests are running" in line
    assert "hanging_step" in line


def test_steps_that_run_nothing_are_no_progress(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with AsyncEngine(engine, stall_seconds=0.1) as running:
            step = engine.step
            monkeypatch.setattr(engine, "step", list)
            reading = asyncio.ensure_future(collect(running.stream([5, 6], SamplingParams(max_tokens=4))))
            while not running.num_stalls:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(engine, "step", step)
            assert (await reading)[-1].finished

    run(work())
