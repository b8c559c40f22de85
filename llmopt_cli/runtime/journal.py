"""The scheduler's log: what came in, what was planned, what came out; and its replay without a model.

One JSON document a line. Replaying makes the same calls on a new state and compares every plan: what a scheduler did in
production can be looked at, and a change of it tried, on a laptop. Holds the tokens of prompts and answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from llmopt_cli.errors import ConfigFileError, UsageError
from llmopt_cli.runtime.blocks import BlockPool
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.scheduler import Plan, schedule
from llmopt_cli.runtime.state import SchedulerState
from llmopt_cli.spec.kv_policy import OFF, parse_policy
from llmopt_cli.spec.recipe import Batching


class Journal:
    """Writes the log of one engine. Closed by its owner."""

    def __init__(self, file: TextIO, state: SchedulerState) -> None:
        self._file = file
        limits = asdict(state.limits)
        self._line("begin", limits=limits, num_blocks=state.blocks.num_blocks, share_prefixes=state.share_prefixes)

    @classmethod
    def open(cls, path: Path, state: SchedulerState) -> Journal:
        """A new log; UsageError if it can't be written."""
        try:
            return cls(path.open("w", encoding="utf-8"), state)
        except OSError as error:
            raise UsageError(f"cannot write the log `{path}`: {error.strerror}") from None

    def add(self, request: Request) -> None:
        """A request was queued."""
        params = request.params
        self._line(
            "add",
            id=request.request_id,
            prompt=request.token_ids,
            max_tokens=params.max_tokens,
            scored=params.prompt_logprobs is not None,
            salt=request.salt.hex(),
            priority=request.priority,
            deadline=request.deadline,
            twin=request.twin,
            kv_policy=str(params.kv_policy or OFF),
        )

    def move(self, event: str, request_id: str, parent: str | None) -> None:
        """A request was parked (`park`), resumed (`resume`) or forked from its parent (`fork`)."""
        self._line(event, id=request_id, parent=parent)

    def plan(self, now: float, plan: Plan) -> None:
        """A step was planned."""
        self._line("plan", now=now, **_plain(plan))

    def draft(self, request: Request) -> None:
        """Tokens were drafted for a request, to be verified by the next plan."""
        self._line("draft", id=request.request_id, tokens=request.drafts)

    def take(self, request_id: str, tokens: Sequence[int], finished: bool) -> None:
        """A request got tokens, maybe its last; of what was drafted for it, nothing else stood."""
        self._line("take", id=request_id, tokens=tokens, finished=finished)

    def drop(self, request_id: str) -> None:
        """A request was aborted, or failed."""
        self._line("drop", id=request_id)

    def forget(self) -> None:
        """The prefix cache was emptied."""
        self._line("forget")

    def close(self) -> None:
        """No more lines."""
        self._file.close()

    def _line(self, event: str, **data: Any) -> None:
        # Flushed: a log is wanted most of an engine that died.
        self._file.write(json.dumps({"event": event, **data}, separators=(",", ":")) + "\n")
        self._file.flush()


def _plain(plan: Plan) -> dict[str, Any]:
    chunks = [[chunk.request_id, chunk.start, chunk.length] for chunk in plan.chunks]
    return {"chunks": chunks, "preempted": list(plan.preempted), "expired": list(plan.expired)}


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a log held. `difference` says where the scheduler of today planned otherwise; None if nowhere."""

    requests: int
    plans: int
    tokens: int
    preemptions: int
    most_running: int
    difference: str | None


def replay(path: Path) -> Replayed:
    """Run the scheduler over a log, up to the first plan that differs. ConfigFileError if the file is no log."""
    state: SchedulerState | None = None
    live: dict[str, Request] = {}
    counts = {"add": 0, "plan": 0, "tokens": 0, "preempted": 0, "running": 0}
    for number, event in _events(path):
        try:
            if event["event"] == "begin":
                state = _begin(event)
            elif state is None:
                raise ValueError("the log does not begin with `begin`")
            elif event["event"] == "plan":
                state.now = event["now"]
                found = _plain(schedule(state))
                wanted = {name: event[name] for name in found}
                counts["plan"] += 1
                counts["tokens"] += sum(chunk[2] for chunk in found["chunks"])
                counts["preempted"] += len(found["preempted"])
                counts["running"] = max(counts["running"], len(state.running))
                if found != wanted:
                    return _replayed(counts, f"line {number}: logged {wanted}, planned {found}")
            elif event["event"] == "forget":
                state.blocks.forget()
            else:
                counts["add"] += event["event"] == "add"
                _apply(state, live, event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigFileError(f"`{path}`, line {number} is no line of a scheduler's log: {error!r}") from None
    if state is None:
        raise ConfigFileError(f"`{path}` is empty")
    state.check_integrity()
    return _replayed(counts, None)


def _replayed(counts: Mapping[str, int], difference: str | None) -> Replayed:
    return Replayed(counts["add"], counts["plan"], counts["tokens"], counts["preempted"], counts["running"], difference)


def _begin(event: Mapping[str, Any]) -> SchedulerState:
    return SchedulerState(
        Batching(**event["limits"]), BlockPool(event["num_blocks"]), share_prefixes=event["share_prefixes"]
    )


def _apply(state: SchedulerState, live: dict[str, Request], event: Mapping[str, Any]) -> None:
    """What happened beside planning."""
    name = event["id"]
    if event["event"] == "add":
        params = SamplingParams(
            max_tokens=event["max_tokens"],
            prompt_logprobs=0 if event["scored"] else None,
            kv_policy=parse_policy(event.get("kv_policy", OFF)),
        )
        live[name] = Request(
            name,
            list(event["prompt"]),
            len(event["prompt"]),
            params,
            salt=bytes.fromhex(event["salt"]),
            priority=event["priority"],
            deadline=event["deadline"],
            twin=event.get("twin"),
        )
        state.add(live[name])
    elif event["event"] == "fork":
        parent = live[event["parent"]]
        live.setdefault(name, replace(parent, request_id=name, token_ids=list(parent.token_ids), blocks=[], keys=[]))
        state.fork(parent, live[name])
    elif event["event"] == "park":
        state.park(live[name])
    elif event["event"] == "resume":
        state.resume(live[name])
    elif event["event"] == "take":
        live[name].token_ids.extend(event["tokens"])
        live[name].rewind()
        if event["finished"]:
            state.finish(live[name])
            state.running.remove(live.pop(name))
    elif event["event"] == "draft":
        live[name].drafts = tuple(event["tokens"])
    elif event["event"] == "drop":
        state.drop(live.pop(name))
    else:
        raise ValueError(f"unknown event `{event['event']}`")


def _events(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, json.loads(line)
    except (OSError, ValueError) as error:
        raise ConfigFileError(f"cannot read the log `{path}`: {error}") from None
