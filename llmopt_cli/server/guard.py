"""What is settled before a request's body is parsed: whether it carries the key, and how much of it is read.

Knows FastAPI's routes and ASGI's messages; nothing of what a body holds.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from starlette.types import Message, Receive

from llmopt_cli.server.errors import ApiError

MAX_BODY_BYTES = 4 * 2**20  # a million tokens of text; as token ids, parsed in 0.2 s


class GuardedRoute(APIRoute):
    """A route that answers 401 without a look at the body, and 413 once more than MAX_BODY_BYTES have come.

    A dependency would run too late: FastAPI reads and parses the body first. The key is `app.state.api_key`.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's own handler behind the guard."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            _check_key(request)
            return await handle(Request(request.scope, _limited(request.receive)))

        return guarded


def _check_key(request: Request) -> None:
    """Raise a 401 unless the request carries the server's key, if it has one."""
    key: str | None = request.app.state.api_key
    given = request.headers.get("Authorization", "")
    if key is not None and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise ApiError(401, "this server wants its API key as `Authorization: Bearer KEY`", code="invalid_api_key")


def _limited(receive: Receive) -> Receive:
    """`receive`, until the body is too large."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            # FastAPI turns any other exception at this place into a 400 without our words.
            raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES:,} bytes")
        return message

    return counted
