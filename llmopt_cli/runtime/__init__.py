"""The runtime: continuous batching over a paged cache. Exports are lazy: its torch-free parts stay torch-free."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmopt_cli.runtime.async_engine import AsyncEngine
    from llmopt_cli.runtime.engine import Engine
    from llmopt_cli.runtime.request import FinishReason, RequestOutput, SamplingParams

__all__ = ["AsyncEngine", "Engine", "FinishReason", "RequestOutput", "SamplingParams"]

HOMES = {
    "AsyncEngine": "async_engine",
    "Engine": "engine",
    "FinishReason": "request",
    "RequestOutput": "request",
    "SamplingParams": "request",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{HOMES[name]}"), name)
