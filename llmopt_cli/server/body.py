"""JSON objects of which no key is ignored: each is served, known to be harmless, or refused by name.

Knows pydantic; nothing of any endpoint's fields.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

Unserved = Mapping[str, tuple[Any, ...]]  # field -> the values, beside null, that ask for nothing

# Fields that change no token of the answer: accepted and dropped.
HARMLESS = {
    "user",
    "metadata",
    "store",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "prediction",
    "service_tier",
    "parallel_tool_calls",
    "include_obfuscation",
}


class Body(BaseModel):
    """A JSON object whose every key is served, known to be harmless, or refused by name. Null means "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unserved: ClassVar[Unserved] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_out(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: value for name, value in data.items() if value is not None}
        for name, value in given.items():
            if name in cls.unserved:
                if value not in cls.unserved[name]:
                    only = " or ".join(json.dumps(value) for value in cls.unserved[name])
                    known = f" (only {only})" if only else ""
                    raise refusal(name, "unsupported_parameter", f"`{name}` is not supported by this server{known}")
            elif name not in cls.served() and name not in HARMLESS:
                raise refusal(name, "unknown_parameter", f"unknown field `{name}`{cls._nearest(name)}")
        return {name: value for name, value in given.items() if name in cls.served()}

    @classmethod
    def served(cls) -> set[str]:
        """The names that clients use of the fields that are served."""
        return {field.alias or name for name, field in cls.model_fields.items()}

    @classmethod
    def _nearest(cls, name: str) -> str:
        near = difflib.get_close_matches(name, [*sorted(cls.served()), *cls.unserved], n=1)
        return f", nearest: `{near[0]}`" if near else ""


def refusal(name: str, code: str, message: str) -> PydanticCustomError:
    """What to raise for the field `name` of a body."""
    # The name is the client's text: its braces are no template, and half a surrogate pair in it is no UTF-8.
    message, name = (text.encode(errors="backslashreplace").decode() for text in (message, name))
    return PydanticCustomError(code, "{message}", {"message": message, "field": name})
