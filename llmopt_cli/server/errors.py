"""An answer that is an error, in OpenAI's shape: HTTP status, message, the field it is about, a code.

Knows the errors of llmopt and of pydantic; nothing of sockets or of a web framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmopt_cli.errors import CapacityError, LlmoptError, UsageError
from llmopt_cli.runtime.request import NOT_NUMBERS, TIME_UP, RequestOutput

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}
FAILURES = {TIME_UP: (408, "timeout"), NOT_NUMBERS: (500, "engine_error")}


class ApiError(Exception):
    """An answer that is an error: HTTP status and OpenAI's `{"error": ...}` body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    @classmethod
    def of(cls, error: LlmoptError) -> ApiError:
        """What the engine refused is the client's fault, all else is the server's."""
        if isinstance(error, CapacityError):
            return cls(400, error.message, code="context_length_exceeded")
        if isinstance(error, UsageError):
            return cls(400, error.message)
        return cls(500, error.message, code="engine_error")

    @classmethod
    def of_output(cls, output: RequestOutput) -> ApiError:
        """Why a request failed alone; what its own parameters led to is the client's fault."""
        error = output.error or "the request failed"
        status, code = FAILURES.get(error, (400, "no_token_left"))
        tokens = len(output.token_ids)
        return cls(status, f"{error}, after {tokens} token{'' if tokens == 1 else 's'}", code=code)

    @classmethod
    def of_validation(cls, errors: Sequence[Any]) -> ApiError:
        """The first of pydantic's (or FastAPI's) error dicts, with the path of the field."""
        first = errors[0]
        if first["type"] == "json_invalid":
            return cls(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        context = first.get("ctx", {})
        param = _path([*first["loc"], *([context["field"]] if "field" in context else [])])
        if "field" in context:
            return cls(400, first["msg"], param=param, code=first["type"])
        if param is None:
            return cls(400, "the body must be a JSON object, sent as `Content-Type: application/json`")
        return cls(400, f"`{param}`: {first['msg'].removeprefix('Value error, ')}", param=param, code="invalid_value")

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _path(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "role")` -> `messages[0].role`."""
    path = ""
    for part in loc[1:] if loc[:1] == ["body"] else loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path or None
