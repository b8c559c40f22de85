"""OpenAI's completion API as data: what a request body may hold, what an answer and an error look like.

Knows pydantic and `SamplingParams`; nothing of the engine, of sockets or of a web framework. A field that OpenAI
defines and that would change the output, but is not served, is refused by name; so is a field nobody knows.
Reference: OpenAI API, "Create chat completion" and "Create completion"; `top_k`, `ignore_eos` and `stop_token_ids` are
vLLM's additions.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from llmopt_cli.errors import CapacityError, LlmoptError, UsageError
from llmopt_cli.runtime.request import SamplingParams

ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}

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
# Fields that are not served -> the values (beside null) that ask for nothing, hence are let through.
UNSERVED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
}
UNSERVED_CHAT: dict[str, tuple[Any, ...]] = {
    **UNSERVED_SAMPLING,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "moderation": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "add_generation_prompt": (True,),
}
UNSERVED_COMPLETION: dict[str, tuple[Any, ...]] = {
    **UNSERVED_SAMPLING,
    "best_of": (1,),
    "logprobs": (),
    "suffix": ("",),
}


class Body(BaseModel):
    """A JSON object whose every key is served, known to be harmless, or refused by name. Null means "not given"."""

    model_config = ConfigDict(extra="forbid", strict=True)
    unserved: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

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
                    raise _refusal(name, "unsupported_parameter", f"`{name}` is not supported by this server{known}")
            elif name not in cls.model_fields and name not in HARMLESS:
                raise _refusal(name, "unknown_parameter", f"unknown field `{name}`{cls._nearest(name)}")
        return {name: value for name, value in given.items() if name in cls.model_fields}

    @classmethod
    def _nearest(cls, name: str) -> str:
        near = difflib.get_close_matches(name, [*cls.model_fields, *cls.unserved], n=1)
        return f", nearest: `{near[0]}`" if near else ""


def _refusal(name: str, code: str, message: str) -> PydanticCustomError:
    # The name is the client's text: its braces are no template, and half a surrogate pair in it is no UTF-8.
    message, name = (text.encode(errors="backslashreplace").decode() for text in (message, name))
    return PydanticCustomError(code, "{message}", {"message": message, "field": name})


def _listed(value: Any) -> Any:
    """A single string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _parts(value: Any) -> Any:
    """A string stands for one text part."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _text(value: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError("the text holds half of a surrogate pair")
    return value


def _prompts(value: Any) -> list[str | list[int]]:
    """All four forms of `prompt` as a list of texts or token id lists."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not (isinstance(prompts, list) and prompts and all(isinstance(p, str) or _is_ids(p) for p in prompts)):
        raise ValueError("must be a string, a list of token ids, or a list of such")
    return [_text(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]


def _is_ids(value: Any) -> bool:
    # bool is an int to Python, not to JSON.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class StreamOptions(Body):
    """`stream_options`. `continuous_usage_stats` (vLLM) puts the usage so far into every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


# Every new piece of text is searched for every stop string, on the thread that all requests share.
StopString = Annotated[str, Field(max_length=1000)]


class SamplingBody(Body):
    """What chat and text completions share. Ranges are checked by `SamplingParams`."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, lt=2**31)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[StopString], BeforeValidator(_listed), Field(max_length=16)] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise _refusal("stream_options", "invalid_value", "`stream_options` needs `stream: true`")
        return self

    def sampling(self, max_tokens: int) -> SamplingParams:
        """The engine's parameters; a value out of range raises ApiError naming its field."""
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=0 if self.top_k == -1 else self.top_k,  # -1 is vLLM's word for "off"
                top_p=self.top_p,
                seed=self.seed,
                stop=tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
            )
        except UsageError as error:
            # Its messages begin with the field's name.
            raise ApiError(400, error.message, param=error.message.split()[0]) from None


class TextPart(Body):
    """One part of a message's content."""

    unserved = {"image_url": (), "input_audio": (), "file": (), "refusal": ()}

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_text)]


class Message(Body):
    """One turn of a conversation; `developer` is the newer word for `system`."""

    unserved = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "refusal": (),
        "audio": (),
        "annotations": ([],),
    }

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts), Field(min_length=1)]
    name: str | None = None

    def turn(self) -> dict[str, str]:
        """The message as a chat template reads it."""
        text = "".join(part.text for part in self.content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": text}
        return turn | ({"name": self.name} if self.name else {})


class ChatRequest(SamplingBody):
    """Body of `POST /v1/chat/completions`. Without a limit the answer may fill the context."""

    unserved = UNSERVED_CHAT

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise _refusal("max_tokens", "invalid_value", "give `max_tokens` or `max_completion_tokens`, not both")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the client said so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(SamplingBody):
    """Body of `POST /v1/completions`. OpenAI's default limit is 16 tokens."""

    unserved = UNSERVED_COMPLETION

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int = 16
    echo: bool = False

    @property
    def limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens


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


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object; `cached_tokens` are prompt tokens that were not computed anew."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def model_card(name: str, created: int, max_model_len: int) -> dict[str, Any]:
    """An entry of `/v1/models`; `max_model_len` is vLLM's addition."""
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "llmopt",
        "max_model_len": max_model_len,
    }
