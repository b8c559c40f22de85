"""One replica over time: the runtime's own scheduler, fed by arrivals, each step as long as the step model says.

Stretches in which the same requests decode and no decision is due are passed in one jump; the result is that of single
steps. Knows lengths and which prompts begin alike, no tokens; what the times mean together is `simulate`'s business.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from typing import cast

from llmopt_cli.estimate.pace import Pace
from llmopt_cli.runtime.blocks import BlockPool, Key
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.scheduler import SchedulerState, has_seat, schedule
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.workload import Size


@dataclass(slots=True, eq=False)
class Call(Request):
    """A request of which the scheduler is told how many tokens it has, not which. Times in seconds.

    It is `sent`, reaches the scheduler when `due`, gets its `first` token and its last at `end`.
    """

    size: Size = field(kw_only=True)
    num_known: int = field(kw_only=True)
    sent: float = 0.0
    due: float = 0.0
    first: float | None = None
    end: float | None = None

    @classmethod
    def of(cls, number: int, size: Size, sent: float, keys: list[Key]) -> Call:
        """The `number`th request; `keys` name the full blocks at the head of its prompt that others may share."""
        known, params = size.input_len, _params(size.output_len)
        return cls(str(number), [], known, params, keys=keys, size=size, num_known=known, sent=sent)

    @property
    def num_tokens(self) -> int:
        """As the scheduler asks for it."""
        return self.num_known

    @property
    def num_wanted(self) -> int:
        """As the scheduler asks for it."""
        return self.num_known - self.num_computed

    @property
    def num_left(self) -> int:
        """Tokens still to be generated."""
        return sum(self.size) - self.num_known


@cache
def _params(output_len: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_len, ignore_eos=True)


def new_state(limits: Batching, num_blocks: int, *, share: bool) -> SchedulerState:
    """An empty scheduler. With `share`, blocks whose key no call named at its start are like no other."""
    fresh = count()
    return SchedulerState(
        limits,
        BlockPool(num_blocks),
        share_prefixes=share,
        chain=lambda parent, tokens: b"own/%d" % next(fresh),
    )


@dataclass
class Timeline:
    """`coming` calls are sent, in the order of their times; each of `backlog` is sent when another call ends.

    What is sent reaches the scheduler `delay` seconds later. `busy` seconds were spent in `steps`. `watch` is shown
    the state during every single step, and the step's seconds.
    """

    pace: Pace
    state: SchedulerState
    coming: deque[Call]
    backlog: deque[Call] = field(default_factory=deque)
    delay: float = 0.0
    jumps: bool = True
    watch: Callable[[SchedulerState, float], None] | None = None
    now: float = 0.0
    busy: float = 0.0
    steps: int = 0
    longest_queue: int = 0
    preemptions: int = 0
    _decoding: bool = False  # whether all that is running has its prompt behind it

    def run(self) -> None:
        """Until every call has ended."""
        for call in self.coming:
            call.due = call.sent + self.delay
        while self.coming or self.state.waiting or self.state.running:
            self._receive()
            if not (self.state.waiting or self.state.running):
                self.now = self.coming[0].due
            elif steps := self._undecided() if self.jumps else 0:
                self._jump(steps)
            else:
                self._step()
        self.state.check_integrity()

    def _receive(self) -> None:
        while self.coming and self.coming[0].due <= self.now:
            self.state.add(self.coming.popleft())
        self.longest_queue = max(self.longest_queue, len(self.state.waiting))

    def _step(self) -> None:
        """One step as the scheduler plans it."""
        plan = schedule(self.state)
        assert plan.chunks, "a step without work would never end"
        decodes, contexts, prompts = 0, 0, []
        for chunk in plan.chunks:
            if chunk.length == 1 and chunk.samples:
                decodes, contexts = decodes + 1, contexts + chunk.start + 1
            else:
                prompts.append((chunk.length, chunk.start))
        seconds = self.pace.mixed(decodes, contexts / max(1, decodes), prompts)
        self._pass_time(seconds, 1)
        if self.watch:
            self.watch(self.state, seconds)
        self.preemptions += len(plan.preempted)
        sampled = [call for call in self._running if not call.num_wanted]
        self._decoding = len(sampled) == len(self._running)
        self._add_tokens(sampled, 1)

    def _undecided(self) -> int:
        """How many steps from now on hold no decision but that all go on: until one ends, or blocks are short."""
        state = self.state
        if not (self._decoding and state.running) or (state.waiting and not self._is_shut):
            return 0
        steps, free = min(call.num_left for call in self._running), state.blocks.num_free
        if len(state.running) * (steps // state.limits.block_size + 1) <= free:
            return steps
        return bisect_right(range(1, steps + 1), free, key=self._blocks_for)

    @property
    def _is_shut(self) -> bool:
        """Whether nobody can be admitted before somebody ends, so that arrivals change nothing."""
        state = self.state
        if not has_seat(state):
            return True
        head = state.waiting[0].request_id if state.waiting else None
        # Each who runs is expected to take a block at least, and free ones become fewer.
        return state.stuck[0] == head and state.blocks.num_free - len(state.running) < state.stuck[1]

    @property
    def _running(self) -> list[Call]:
        return cast("list[Call]", self.state.running)

    def _blocks_for(self, steps: int) -> int:
        """Blocks that all who run lack for so many steps."""
        calls = self._running
        return sum(max(0, self.state.blocks_for(call.num_cached + steps) - len(call.blocks)) for call in calls)

    def _jump(self, most: int) -> None:
        """At most so many steps without a decision, up to the first before which somebody arrives who may come in."""
        calls = self._running
        context = sum(call.num_cached for call in calls) / len(calls) + 1
        line = self.pace.line(len(calls), context, context + most - 1)
        steps = min(most, int(line.high - context) + 1)
        if self.coming and not self._is_shut:
            steps = line.steps_until(context, self.coming[0].due - self.now, steps)
        self._pass_time(line.total(context, steps), steps)
        self.state.relax(steps)
        self.state.filling &= len(calls) == self.state.limits.max_num_batched_tokens
        for call in calls:
            call.num_computed += steps
            call.num_cached += steps
            missing = self.state.blocks_for(call.num_cached) - len(call.blocks)
            if missing > 0:
                call.blocks.extend(self.state.blocks.allocate(missing))
        self._add_tokens(calls, steps)

    def _pass_time(self, seconds: float, steps: int) -> None:
        self.now += seconds
        self.busy += seconds
        self.steps += steps

    def _add_tokens(self, calls: Iterable[Call], count: int) -> None:
        """Each of `calls` gets so many tokens; who has all of them ends, and makes room for one of the backlog."""
        ended = False
        for call in calls:
            call.num_known += count
            if call.first is None:
                call.first = self.now
            if not call.num_left:
                call.end, ended = self.now, True
                self.state.finish(call)
                self._send_next()
        if ended:
            self.state.running = [call for call in self._running if call.end is None]

    def _send_next(self) -> None:
        if self.backlog:
            call = self.backlog.popleft()
            call.sent, call.due = self.now, self.now + self.delay
            self.coming.append(call)
