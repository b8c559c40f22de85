"""OpenAI's completion API as data: what a request body may hold, what an answer reports beside its text.

Knows pydantic; nothing of the engine, of sockets or of a web framework. A field that OpenAI or vLLM defines and that
would change the output, but is not served, is refused by name; so is a field nobody knows.
Reference: OpenAI API, "Create chat completion" and "Create completion".
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator, model_validator

from llmopt_cli.server.body import Body, Unserved, refusal
from llmopt_cli.server.sampling import MOST_LOGPROBS, SamplingBody

# Fields that are not served -> the values (beside null) that ask for nothing, hence are let through.
UNSERVED: Unserved = {
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "return_token_ids": (False,),
    "bad_words": ([],),
}
UNSERVED_CHAT: Unserved = {
    **UNSERVED,
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
    "echo": (False,),
}
UNSERVED_COMPLETION: Unserved = {**UNSERVED, "suffix": ("",)}


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


class TextPart(Body):
    """One part of a message's content."""

    unserved: ClassVar[Unserved] = {"image_url": (), "input_audio": (), "file": (), "refusal": ()}

    type: Literal["text"]
    text: Annotated[str, AfterValidator(_text)]


class Message(Body):
    """One turn of a conversation; `developer` is the newer word for `system`."""

    unserved: ClassVar[Unserved] = {
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
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)

    @model_validator(mode="after")
    def _of_chats(self) -> Self:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise refusal("max_tokens", "invalid_value", "give `max_tokens` or `max_completion_tokens`, not both")
        if self.top_logprobs and not self.logprobs:
            raise refusal("top_logprobs", "invalid_value", "`top_logprobs` needs `logprobs: true`")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the client said so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def told(self) -> int | None:
        """As asked for by `logprobs` and `top_logprobs`."""
        return self.top_logprobs if self.logprobs else None


class CompletionRequest(SamplingBody):
    """Body of `POST /v1/completions`. OpenAI's default limit is 16 tokens.

    With `echo`, `max_tokens` may be 0: then the prompt alone is told of.
    """

    unserved = UNSERVED_COMPLETION

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    max_tokens: int = 16
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def limit(self) -> int:
        """Most tokens to generate."""
        return max(self.max_tokens, 1) if self.echo_only else self.max_tokens

    @property
    def echo_only(self) -> bool:
        """Whether nothing but the prompt is wanted back; one token is generated all the same, and not told."""
        return self.echo and self.max_tokens == 0

    @property
    def told(self) -> int | None:
        """As asked for by `logprobs`."""
        return self.logprobs

    @property
    def scored(self) -> int | None:
        """An echoed prompt is told of as the answer is."""
        wanted = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(wanted, default=None)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """OpenAI's usage object; `cached_tokens` are prompt tokens that were not computed anew."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def model_card(name: str, created: int, max_model_len: int, parent: str | None = None) -> dict[str, Any]:
    """An entry of `/v1/models`; `max_model_len` is vLLM's addition, and so is the `parent` of an adapter."""
    card = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "llmopt",
        "max_model_len": max_model_len,
    }
    return card | ({"parent": parent} if parent else {})
