"""Answers that take a while: server-sent events, clients that go away, several token streams as one.

Knows ASGI's messages and asyncio; nothing of the engine or of any protocol's JSON.
Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; there is nobody to answer."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`, or cancel it and raise ClientGoneError when the client disconnects first.

    The request body must have been read: what `receive` then yields is the disconnect.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await _cancelled(task, gone)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they have cleaned up; their outcome is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """A response of server-sent events. A client that goes away closes `rest` at once, even between two events.

    Starlette's own StreamingResponse leaves the generator to the garbage collector, and under newer ASGI versions
    notices a disconnect only when it next sends.
    """

    media_type = "text/event-stream"

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self.first = first
        self.rest = rest
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})

    @classmethod
    async def begin(cls, receive: Receive, events: AsyncGenerator[str, None]) -> EventStream:
        """Wait for the first event: what `events` raises until then can still be answered with an error status."""
        (first,) = await unless_gone(receive, _next(events))
        return cls(first, events)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: send the events as they come."""
        with suppress(ClientGoneError):
            await unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self.rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send(_message(self.first))
            async for event in self.rest:
                await send(_message(event))
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _message(event: str) -> Message:
    return {"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True}


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all streams as they come, each with its stream's index. Closing it closes them all.

    One item per stream is read ahead, so a slow reader holds the streams back.
    """
    if len(streams) == 1:  # the usual case, and without a task for each token half the price
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    waiting = {asyncio.create_task(_next(stream)): index for index, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = waiting.pop(task)
                for item in task.result():
                    waiting[asyncio.create_task(_next(streams[index]))] = index
                    yield index, item
    finally:
        await _cancelled(*waiting)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> tuple[T, ...]:
    """The next item alone, or nothing at the end."""
    try:
        return (await anext(stream),)
    except StopAsyncIteration:
        return ()
