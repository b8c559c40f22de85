"""The engine on a thread of its own, for servers and load generators that live on an event loop.

The engine is touched by its thread only; the loop sends it commands and gets outputs back, one hand-over a step.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import threading
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self

from llmopt_cli.errors import LlmoptError, ServerError, UsageError
from llmopt_cli.runtime.engine import Engine
from llmopt_cli.runtime.request import RequestOutput, SamplingParams
from llmopt_cli.runtime.stats import EngineStats
from llmopt_kernels import release_threads

__all__ = ["AsyncEngine", "release_threads"]  # the latter for whoever is measured beside the engine

STALL_SECONDS = 120.0  # A step may prefill a thousand tokens of a large model on a CPU; longer than this is a hang.
LOG = logging.getLogger("llmopt")


@dataclass
class _Mailbox:
    """The outputs of one request that its reader has not taken yet, merged into one."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    output: RequestOutput | None = None
    refusal: LlmoptError | None = None

    def put(self, output: RequestOutput) -> None:
        """Merge `output` into what waits, so that a slow reader costs no queue."""
        old = self.output
        if old is not None:
            new_tokens = old.num_new_tokens + output.num_new_tokens
            output = replace(output, delta=old.delta + output.delta, num_new_tokens=new_tokens)
        self.output = output
        self.arrived.set()

    def refuse(self, refusal: LlmoptError) -> None:
        """The engine did not let the request in; its reader is to raise `refusal`."""
        self.refusal = refusal
        self.arrived.set()

    async def take(self) -> RequestOutput | None:
        """Wait for and take what arrived; None if the engine died or was stopped. Raises a refusal."""
        await self.arrived.wait()
        self.arrived.clear()
        if self.refusal is not None:
            raise self.refusal
        output, self.output = self.output, None
        return output


class AsyncEngine:
    """`async with AsyncEngine(engine) as async_engine:` runs the engine while the block lasts.

    A watchdog looks whether requests get on: `stalled` says if none did for `stall_seconds`, `num_stalls` how often.
    """

    def __init__(self, engine: Engine, stall_seconds: float = STALL_SECONDS) -> None:
        self.engine = engine
        self.stall_seconds = stall_seconds
        self.num_stalls = 0
        self.failure: BaseException | None = None
        self._mailboxes: dict[str, _Mailbox] = {}
        self._commands: list[Callable[[], object]] = []
        self._wake = threading.Condition()
        self._stopping = self._ended = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = itertools.count()
        self._last_progress = time.monotonic()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        release_threads()  # those of this thread, which may have loaded the model: the engine's thread has its own
        self._thread = threading.Thread(target=self._work, name="llmopt-engine", daemon=True)
        self._thread.start()
        self._watchdog = self._loop.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._thread is not None
        self._watchdog.cancel()
        self.stop()
        await asyncio.to_thread(self._thread.join)

    def stop(self) -> None:
        """Abort what runs and end the thread after its current step; open streams raise ServerError at once."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._deliver([])

    @property
    def stalled(self) -> str | None:
        """Why nobody can expect an answer now, though requests wait for one; None while they get on."""
        waited = time.monotonic() - self._last_progress if self.engine.has_work() else 0.0
        return f"requests are running, but no step finished for {waited:.0f} s" if waited > self.stall_seconds else None

    def stats(self) -> EngineStats:
        """The engine's, and what the watchdog saw."""
        return replace(self.engine.stats(), stalled=int(self.stalled is not None), num_stalls=self.num_stalls)

    async def _watch(self) -> None:
        """Log once for each stall, with the place where the engine's thread hangs."""
        stalled = None
        while True:
            await asyncio.sleep(self.stall_seconds / 4)
            before, stalled = stalled, self.stalled
            if stalled and not before:
                self.num_stalls += 1
                LOG.error("the engine is stalled: %s; its thread is at\n%s", stalled, self._place())
            elif before and not stalled:
                LOG.warning("the engine goes on")

    def _place(self) -> str:
        """Where the engine's thread is."""
        assert self._thread is not None
        frame = sys._current_frames().get(self._thread.ident or 0)
        return "".join(traceback.format_stack(frame)) if frame else "no place: it has ended"

    async def stream(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        request_id: str | None = None,
        twin: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield outputs as they come, the last with a finish reason. Closing the iterator aborts the request.

        Raises at the first step what `Engine.add_request` raises, and ServerError if the engine died or was stopped.
        """
        if params.kv_policy is None:  # to check one may take the model, which is the engine's thread's
            self.engine.check(prompt_ids, params)
        request_id = request_id or f"stream-{next(self._ids)}"
        if request_id in self._mailboxes:
            raise UsageError(f"request id `{request_id}` is already running")
        mailbox = self._mailboxes[request_id] = _Mailbox()
        try:
            constraint = await asyncio.to_thread(self.engine.compile, params) if params.grammar else None
        except BaseException:
            del self._mailboxes[request_id]
            raise
        add = partial(self.engine.add_request, prompt_ids, params, request_id, constraint, twin)
        self._send(lambda: self._add(mailbox, add))
        finished = False
        try:
            while not finished:
                output = None if self.failure or self._stopping else await mailbox.take()
                if output is None:
                    why = f": {self.failure!r}" if self.failure else " before the request was finished"
                    raise ServerError(f"the engine stopped{why}") from self.failure
                finished = output.finished
                yield output
        finally:
            del self._mailboxes[request_id]
            if not finished and mailbox.refusal is None:
                self._send(lambda: self.engine.abort(request_id))

    def _send(self, command: Callable[[], object]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _add(self, mailbox: _Mailbox, add: Callable[[], object]) -> None:
        """On the thread: a refusal is the business of one reader, not the end of the engine."""
        assert self._loop is not None
        try:
            add()
        except LlmoptError as refusal:
            self._loop.call_soon_threadsafe(mailbox.refuse, refusal)

    def _work(self) -> None:
        """The thread: take commands, step while there is work, hand outputs to the loop."""
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._stopping or self.engine.has_work()):
                        self._wake.wait()
                    commands, self._commands = self._commands, []
                    if self._stopping:
                        break
                if not self.engine.has_work():
                    self._last_progress = time.monotonic()
                for command in commands:
                    command()
                ran = self.engine.num_steps
                outputs = self.engine.step()
                if outputs or self.engine.num_steps > ran:
                    self._last_progress = time.monotonic()
                self._hand_over(outputs)
        except BaseException as error:  # noqa: BLE001  whatever kills the thread must reach every reader
            self.failure = error
        finally:
            self._ended = True
            self._hand_over([])
            self.engine.abort_all()

    def _hand_over(self, outputs: list[RequestOutput]) -> None:
        assert self._loop is not None
        if outputs or self._ended:
            self._loop.call_soon_threadsafe(self._deliver, outputs)

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.request_id in self._mailboxes:
                self._mailboxes[output.request_id].put(output)
        if self._ended or self._stopping:
            for mailbox in self._mailboxes.values():
                mailbox.arrived.set()
