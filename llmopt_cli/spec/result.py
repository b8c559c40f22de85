"""`Result`: one measured run as one JSON line, and `Environment`: the machine and software it was measured on.

Knows how a line is written and read back, not how anything is measured or probed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from llmopt_cli.errors import ConfigFileError


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

    `metrics` names its units (`_ms`, `_s`); `predicted` uses the names of `metrics`. A `partial` run was interrupted.
    """

    verb: str
    target: str
    command: str
    seed: int
    environment: Environment
    metrics: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    workload: Mapping[str, Any] = field(default_factory=dict)
    predicted: Mapping[str, Any] | None = None
    partial: bool = False

    def append(self, folder: Path) -> Path:
        """Add this run as a line to `folder`/<verb>.jsonl, which is made if it is not there.

        One write to a file opened for appending: lines of processes that run side by side never mix.
        """
        line = json.dumps(asdict(self), ensure_ascii=False, allow_nan=False) + "\n"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.verb}.jsonl"
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)
        return path

    @classmethod
    def parse(cls, line: str) -> Self:
        """The run in one JSON line; raises ValueError or TypeError if it is none."""
        data = json.loads(line)
        return cls(**{**data, "environment": Environment(**data["environment"])})


def read_results(path: Path) -> list[Result]:
    """All runs of a file, oldest first; a line that is no result raises ConfigFileError."""
    results = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            results.append(Result.parse(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigFileError(f"`{path}`, line {number} is not a result: {error}") from None
    return results
