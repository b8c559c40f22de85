"""What chat and text completions share: how tokens are chosen, how many answers there are, what is told of them.

Knows request bodies and `SamplingParams`; nothing of the engine. OpenAI's names, then vLLM's; `timeout` is
ours. A value out of range, or one that contradicts another, is refused by the name of its field.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

from llmopt_cli.errors import UsageError
from llmopt_cli.runtime.request import Grammar, SamplingParams
from llmopt_cli.server.body import Body, refusal
from llmopt_cli.server.errors import ApiError
from llmopt_cli.spec.kv_policy import KvPolicy, parse_policy

MOST_ANSWERS = 128  # for one prompt
MOST_LOGPROBS = 20  # for one position
ANY_OBJECT = Grammar("json schema", '{"type": "object"}')

# Every new piece of text is searched for every stop string, on the thread that all requests share.
StopString = Annotated[str, Field(max_length=1000)]
Schema = dict[str, JsonValue] | str


def _listed(value: Any) -> Any:
    """A single string stands for a list of one."""
    return [value] if isinstance(value, str) else value


def _by_token(value: Any) -> Any:
    """JSON has only texts as keys."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(token): bias for token, bias in value.items()}
    except ValueError:
        raise ValueError("its keys must be token ids") from None


class StreamOptions(Body):
    """`stream_options`. `continuous_usage_stats` (vLLM) puts the usage so far into every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """`response_format.json_schema`; a schema is always followed, be it `strict` or not."""

    name: str
    schema_: dict[str, JsonValue] = Field(alias="schema", default_factory=dict)
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_one_is_due(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise refusal("json_schema", "invalid_value", "`json_schema` is given with `type: json_schema`, only then")
        return self

    def rule(self) -> Grammar | None:
        """What the answer has to follow."""
        if self.json_schema is not None:
            return Grammar("json schema", json.dumps(self.json_schema.schema_))
        return ANY_OBJECT if self.type == "json_object" else None


class StructuredOutputs(Body):
    """`structured_outputs` (vLLM): one of these."""

    json_: Schema | None = Field(alias="json", default=None)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool = False

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [self.json_, self.regex, self.choice, self.grammar, self.json_object or None]
        if sum(one is not None for one in given) != 1:
            known = "`json`, `regex`, `choice`, `grammar` or `json_object`"
            raise ValueError(f"must hold exactly one of {known}")
        return self

    def rule(self) -> Grammar:
        """What the answer has to follow."""
        if self.json_ is not None:
            return Grammar("json schema", _source(self.json_))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar("choice", json.dumps(self.choice))
        return ANY_OBJECT if self.grammar is None else Grammar("grammar", self.grammar)


def _source(schema: Schema) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


class SamplingBody(Body):
    """The fields of both endpoints. Ranges that are not given here are checked by `SamplingParams`."""

    model: str | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = Field(0, lt=2**31)
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_by_token)] = Field(default_factory=dict)
    allowed_token_ids: list[int] = Field(default_factory=list)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=MOST_ANSWERS)
    best_of: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    use_beam_search: bool = False
    length_penalty: float = 1.0
    stop: Annotated[list[StopString], BeforeValidator(_listed)] = Field(default_factory=list, max_length=16)
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = ""
    kv_policy: str | None = None
    timeout: float | None = Field(None, gt=0)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        shapes = list(self._grammars())
        rules = (
            ("stream_options", self.stream_options and not self.stream, "needs `stream: true`"),
            ("best_of", (self.best_of or self.n) < self.n, "must not be less than `n`"),
            ("best_of", self.stream and self.ranked, "can't be streamed if it is more than `n`"),
            ("prompt_logprobs", self.stream and self.prompt_logprobs is not None, "can't be streamed"),
            (shapes[-1] if shapes else "", len(shapes) > 1, f"can't be combined with `{(shapes or [''])[0]}`"),
            (shapes[0] if shapes else "", self.use_beam_search and shapes, "can't be combined with `use_beam_search`"),
            ("length_penalty", self.length_penalty != 1 and not self.use_beam_search, "needs `use_beam_search`"),
        )
        for name, broken, why in rules:
            if broken:
                raise refusal(name, "invalid_value", f"`{name}` {why}")
        return self

    @property
    def ranked(self) -> bool:
        """Whether the best `n` of more answers are wanted."""
        return not self.use_beam_search and (self.best_of or self.n) > self.n

    @property
    def answers(self) -> int:
        """Answers to draw for each prompt; a beam search is one."""
        return 1 if self.use_beam_search else self.best_of or self.n

    @property
    @abstractmethod
    def told(self) -> int | None:
        """Likeliest tokens to tell with each token of the answer; None tells nothing."""

    @property
    def scored(self) -> int | None:
        """Likeliest tokens wanted for each token of the prompt; None: it need not be scored."""
        return self.prompt_logprobs

    def policy(self, default: KvPolicy | None) -> KvPolicy | None:
        """What the request keeps of its cache; the server's `default` is not for beams. ApiError if it is misspelt."""
        if self.kv_policy is None:
            return None if self.use_beam_search else default
        try:
            return parse_policy(self.kv_policy)
        except UsageError as error:
            raise ApiError(400, error.message, param="kv_policy") from None

    def sampling(self, max_tokens: int, adapter: str = "", policy: KvPolicy | None = None) -> SamplingParams:
        """The engine's parameters, with that LoRA `adapter`; a value out of range raises ApiError naming its field."""
        logprobs = 0 if self.told is None and self.ranked else self.told  # they are ranked by it
        try:
            return SamplingParams(
                max_tokens=max_tokens,
                temperature=self.temperature,
                top_k=0 if self.top_k == -1 else self.top_k,  # -1 is vLLM's word for "off"
                top_p=self.top_p,
                min_p=self.min_p,
                typical_p=self.typical_p,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                logit_bias=tuple(self.logit_bias.items()),
                allowed_token_ids=tuple(self.allowed_token_ids),
                min_tokens=self.min_tokens,
                seed=self.seed,
                stop=tuple(self.stop),
                stop_token_ids=tuple(self.stop_token_ids),
                ignore_eos=self.ignore_eos,
                logprobs=logprobs,
                prompt_logprobs=self.scored,
                cache_salt=self.cache_salt,
                adapter=adapter,
                priority=self.priority,
                max_seconds=self.timeout,
                grammar=next(iter(self._grammars().values()), None),
                beams=(self.best_of or self.n) if self.use_beam_search else 0,
                length_penalty=self.length_penalty,
                kv_policy=policy,
            )
        except UsageError as error:
            # Its messages begin with the field's name.
            raise ApiError(400, error.message, param=error.message.split()[0]) from None

    def _grammars(self) -> dict[str, Grammar]:
        """What the answer has to follow, by the field that says so."""
        given = {name: getattr(self, name) for name in _GRAMMARS}
        made = {name: _GRAMMARS[name](value) for name, value in given.items() if value is not None}
        return {name: grammar for name, grammar in made.items() if grammar is not None}


_GRAMMARS: dict[str, Callable[[Any], Grammar | None]] = {
    "response_format": ResponseFormat.rule,
    "structured_outputs": StructuredOutputs.rule,
    "guided_json": lambda schema: Grammar("json schema", _source(schema)),
    "guided_regex": lambda pattern: Grammar("regex", pattern),
    "guided_choice": lambda choices: Grammar("choice", json.dumps(choices)),
    "guided_grammar": lambda text: Grammar("grammar", text),
}
