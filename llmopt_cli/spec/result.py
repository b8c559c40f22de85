"""`Result`: one measured run as one JSON line, and `Environment`: the machine and software it was measured on.

Knows how a line is written and read back, not how anything is measured or probed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Self

from llmopt_cli.errors import ConfigFileError, UsageError


@dataclass(frozen=True, slots=True)
class Environment:
    """The fingerprint without which a figure means nothing. Memory in bytes, the load average over one minute.

    `cores` are those this process may use, `threads` those torch computes with.
    """

    date: str
    platform: str
    cpu: str
    cores: int
    threads: int
    memory: int
    load_average: float
    versions: Mapping[str, str]
    gpu: str | None = None
    commit: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """One run. `recipe`, `workload` and `metrics` are plain records: a line outlives the code that wrote it.

    `metrics` names its units (`_ms`, `_s`). A `partial` run was interrupted. `predicted` is what was expected of it
    beforehand, figures named as in `metrics`, or holds under `unknown` why nobody could tell.
    """

    verb: str
    target: str
    command: str
    seed: int
    environment: Environment
    metrics: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    partial: bool = False
    predicted: Mapping[str, Any] = field(default_factory=dict)

    def off(self, figure: str) -> float | None:
        """Predicted / measured - 1 of a figure; None where one of the two is not known."""
        predicted, measured = self.predicted.get(figure), self.metrics.get(figure)
        return predicted / measured - 1 if predicted and measured else None

    def save(self, folder: Path) -> Path:
        """Add this run as a line to `folder`/<verb>.jsonl, which is made if it is not there; may raise UsageError.

        One write to a file opened for appending: lines of processes that run side by side never mix.
        """
        line = json.dumps(asdict(self), allow_nan=False) + "\n"  # in ASCII, so that no text of a run can end a line
        path = folder / f"{self.verb}.jsonl"
        with _writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        return path

    @classmethod
    def parse(cls, line: str | bytes) -> Self:
        """The run in one JSON line; raises ValueError or TypeError if it is none."""
        data = json.loads(line)
        return cls(**{**data, "environment": Environment(**data["environment"])})


def check_writable(folder: Path, verb: str) -> None:
    """Raise UsageError if `folder`/<verb>.jsonl could not be written: ask before measuring. Leaves nothing behind."""
    path = folder / f"{verb}.jsonl"
    with _writing(path):
        if path.exists():
            path.open("ab").close()
        else:
            TemporaryFile(dir=next(place for place in path.parents if place.exists())).close()


def read_lines(path: Path) -> Iterator[tuple[int, Result | str]]:
    """The number of every line of a file, oldest first, and the run in it or what is wrong with it."""
    with path.open("rb") as file:  # bytes: only a newline ends a line, and what is no UTF-8 is told with its line
        for number, line in enumerate(file, start=1):
            try:
                yield number, Result.parse(line)
            except (ValueError, TypeError, KeyError) as error:
                yield number, str(error)


def read_results(path: Path) -> list[Result]:
    """All runs of a file, oldest first; a line that is no result raises ConfigFileError."""
    results = []
    for number, found in read_lines(path):
        if isinstance(found, str):
            raise ConfigFileError(f"`{path}`, line {number} is not a result: {found}")
        results.append(found)
    return results


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"cannot write `{path}`: {error.strerror}", "choose a folder with --results") from None
