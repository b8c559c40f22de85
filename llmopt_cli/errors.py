"""The errors a user can cause, each one sentence, a hint and an exit code.

LlmoptError                 exit 1: the work failed
├── UsageError              exit 2: the request itself is wrong
│   ├── UnknownNameError    a name that is not in its catalogue; lists the nearest
│   │   └── AmbiguousNameError  a name that several of its entries answer to; lists them
│   ├── ConfigFileError     a YAML file with an unknown key or a wrong value
│   └── TraceError          a file of recorded requests that is none
├── CheckpointError         a model on disk that cannot be used
├── ModelError              an architecture or layer that the runtime does not honour
├── CapacityError           memory, context or blocks do not suffice
├── QualityError            a result that is worse than was asked for
├── InterruptedWorkError    stopped by the user; what was done is kept
└── ServerError             an HTTP peer or socket that failed

Bugs of our own are `assert`s and never pass through here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LlmoptError(Exception):
    """A failure with a cause the user can act on; `hint` names the next command or step."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(LlmoptError):
    """The command line or a request asks for something that does not exist or contradicts itself."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name that its catalogue does not hold; the hint lists the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str], see: str | None = None) -> None:
        spelling = {entry.lower(): entry for entry in sorted(known)}
        close = difflib.get_close_matches(name.lower(), spelling, n=4, cutoff=0.4)
        close = close or difflib.get_close_matches(name.lower(), spelling, n=6, cutoff=0.0)
        near = [spelling[entry] for entry in close]
        hint = f"nearest: {', '.join(near)}" + (f"; all of them: `{see}`" if see else "")
        super().__init__(f"unknown {kind} `{name}`", hint)


class AmbiguousNameError(UnknownNameError):
    """A name that several entries of a catalogue answer to; the hint lists them."""

    def __init__(self, kind: str, name: str, matches: Iterable[str]) -> None:
        UsageError.__init__(self, f"`{name}` fits more than one {kind}", f"one of: {', '.join(sorted(matches))}")


class ConfigFileError(UsageError):
    """A YAML file that does not follow its schema; the message names key, file and line."""


class TraceError(UsageError):
    """A file of recorded requests that can't be read or is of no known format; the message names the line."""


class CheckpointError(LlmoptError):
    """A model folder that is missing, incomplete, damaged or in a refused format."""


class ModelError(LlmoptError):
    """An architecture, layer or attention semantic that the runtime would get wrong, hence refuses."""


class CapacityError(LlmoptError):
    """Memory, context length or KV blocks do not suffice for what was asked."""


class QualityError(LlmoptError):
    """A result that is measurably worse than what was asked for."""


class InterruptedWorkError(LlmoptError):
    """Work that the user stopped and that can be resumed."""

    exit_code = 130


class ServerError(LlmoptError):
    """A server that could not be started, reached, or answered with an error."""
