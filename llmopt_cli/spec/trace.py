"""Traces: files in which somebody recorded when requests came and how long they were, one reader per format.

The format is told by looking at the file, never by its name. Files are read line by line, and a mistake is reported
with its line. Knows what was recorded; what is done with it is the business of a workload.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple, TextIO

from llmopt_cli.errors import TraceError

SUFFIXES = frozenset((".csv", ".jsonl", ".json"))
HASHED_TOKENS = 512  # of a prompt, to which one of Mooncake's hashes belongs
CHARS_PER_TOKEN = 4  # where a trace holds text and no counts: the usual figure for English
CHUNK = 1 << 20
_SEPARATORS = re.compile(r"[\s,]*")


class TracedRequest(NamedTuple):
    """One request: seconds after the first, tokens, and a number for each HASHED_TOKENS tokens of its prompt.

    Equal numbers are equal tokens after equal beginnings; without them nothing is known of the prompt's content.
    """

    at: float
    input_len: int
    output_len: int
    hash_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """The requests of a file in the order in which they came. `timed`: the file says when; else all `at` are 0.

    Requests that got no answer are left out.
    """

    format: str
    requests: tuple[TracedRequest, ...]
    timed: bool
    left_out: int

    @property
    def description(self) -> str:
        """Its size in a few words."""
        span = f" in {self.requests[-1].at:,.0f} s" if self.timed else ""
        missing = f", {self.left_out:,} without an answer left out" if self.left_out else ""
        return f"{len(self.requests):,} requests{span}{missing}"

    @property
    def hashed(self) -> bool:
        """Whether it knows which prompts begin alike."""
        return any(request.hash_ids for request in self.requests)


@dataclass(frozen=True, slots=True)
class _Format:
    """How a file is recognised by its first record and read. `wants` are keys or columns that it must have."""

    name: str
    wants: frozenset[str]
    read: Callable[[Mapping[str, Any]], TracedRequest]
    timed: bool = True


def _azure(row: Mapping[str, Any]) -> TracedRequest:
    at = datetime.fromisoformat(row["TIMESTAMP"]).replace(tzinfo=UTC)
    return TracedRequest(at.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _burst_gpt(row: Mapping[str, Any]) -> TracedRequest:
    return TracedRequest(float(row["Timestamp"]), int(row["Request tokens"]), int(row["Response tokens"]))


def _mooncake(row: Mapping[str, Any]) -> TracedRequest:
    hashes = tuple(map(int, row.get("hash_ids", ())))
    return TracedRequest(float(row["timestamp"]) / 1000, int(row["input_length"]), int(row["output_length"]), hashes)


def _share_gpt(row: Mapping[str, Any]) -> TracedRequest:
    """The first question and its answer; a conversation without them has no answer."""
    turns = [str(turn["value"]) for turn in row["conversations"][:2]]
    asked, answered = (*turns, "", "")[:2]
    return TracedRequest(0.0, -(-len(asked) // CHARS_PER_TOKEN), -(-len(answered) // CHARS_PER_TOKEN))


FORMATS = (
    _Format("Azure LLM inference trace", frozenset(("TIMESTAMP", "ContextTokens", "GeneratedTokens")), _azure),
    _Format("BurstGPT trace", frozenset(("Timestamp", "Request tokens", "Response tokens")), _burst_gpt),
    _Format("Mooncake trace", frozenset(("timestamp", "input_length", "output_length")), _mooncake),
    _Format(
        f"ShareGPT conversations, first turn, {CHARS_PER_TOKEN} characters taken for a token",
        frozenset(("conversations",)),
        _share_gpt,
        timed=False,
    ),
)
_HINT = "known: CSV of Azure or BurstGPT, JSON lines of Mooncake, JSON of ShareGPT"


@lru_cache(maxsize=4)
def read_trace(path: str) -> Trace:
    """The trace in a file. What can't be read, or is of no known format, raises TraceError with the line."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return _read(path, file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(f"cannot read trace `{path}`: {error}") from None


def _read(path: str, file: TextIO) -> Trace:
    records = _records(path, file)
    first = next(records, None)
    if first is None:
        raise TraceError(f"trace `{path}` is empty", _HINT)
    form = next((form for form in FORMATS if isinstance(first[1], dict) and form.wants <= first[1].keys()), None)
    if form is None:
        raise TraceError(f"`{path}` is a trace of no known format", _HINT)
    found = [_parse(path, form, *record) for record in (first, *records)]
    answered = sorted((one for one in found if one.output_len > 0), key=lambda one: one.at)
    if not answered:
        raise TraceError(f"trace `{path}` holds no request that was answered")
    start = answered[0].at
    requests = tuple(one._replace(at=one.at - start, input_len=max(1, one.input_len)) for one in answered)
    return Trace(form.name, requests, form.timed, len(found) - len(answered))


def _parse(path: str, form: _Format, place: str, record: Any) -> TracedRequest:
    try:
        request = form.read(record)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"`{path}`, {place} is no request of a {form.name}: {error}") from None
    if not (math.isfinite(request.at) and request.input_len >= 0 and request.output_len >= 0):
        raise TraceError(f"`{path}`, {place}: times must be finite, and lengths not negative")
    return request


def _records(path: str, file: TextIO) -> Iterator[tuple[str, Any]]:
    """What the file lists, each with its place: rows of CSV, lines of JSON, or the entries of one JSON array."""
    head = next((character for character in iter(lambda: file.read(1), "") if not character.isspace()), "")
    if head == "[":
        return ((f"entry {number}", entry) for number, entry in enumerate(_entries(path, file), start=1))
    file.seek(0)
    return _json_lines(path, file) if head == "{" else _rows(file)


def _rows(file: TextIO) -> Iterator[tuple[str, Any]]:
    reader = csv.DictReader(file)
    for row in reader:
        yield f"line {reader.line_num}", row


def _json_lines(path: str, file: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise TraceError(f"`{path}`, line {number} is not JSON: {error}") from None


def _entries(path: str, file: TextIO) -> Iterator[Any]:
    """The entries of a JSON array after its bracket. Only a part is in memory: such files reach hundreds of MB."""
    decoder = json.JSONDecoder()
    text, start, number = "", 0, 1
    while True:
        try:
            start = _SEPARATORS.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
            if text[start : start + 1] == "]":
                return
            entry, start = decoder.raw_decode(text, start)
        except ValueError as error:
            more = file.read(max(CHUNK, len(text)))
            if not more:
                raise TraceError(f"`{path}`, entry {number} is not JSON: {error}") from None
            text, start = text[start:] + more, 0
            continue
        yield entry
        number += 1
