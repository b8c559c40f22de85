"""What is asked of the engine and what it answers. Plain data: no tensors, no tokenizer, no clock."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Literal, overload

from llmopt_cli.errors import UsageError
from llmopt_cli.spec.kv_policy import KvPolicy

INFINITE = 2**63
NOT_NUMBERS = "the model's logits are not finite numbers"
TIME_UP = "its time was up"
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (1, INFINITE),
    "temperature": (0, 100),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "min_tokens": (0, INFINITE),
    "max_seconds": (0, INFINITE),
    "logprobs": (0, 100),
    "prompt_logprobs": (0, 100),
    "beams": (0, 128),
    "length_penalty": (-10, 10),
}
# What says how to draw or shape tokens, or what to tell of them: nothing of it has a meaning for beams.
NOT_WITH_BEAMS = (
    *("top_k", "top_p", "min_p", "typical_p", "seed", "stop", "min_tokens", "grammar", "logprobs", "prompt_logprobs"),
    *("kv_policy", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "allowed_token_ids"),
)


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like: `text` is a JSON schema, a regular expression, a JSON list of texts, or a grammar
    in llguidance's dialect of Lark.
    """

    kind: Literal["json schema", "regex", "choice", "grammar"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature=0` is greedy; `top_k=0`, `top_p=1`, `min_p=0`, `typical_p=1` keep everything.

    `seed=None` draws a fresh seed, so results differ from run to run; with a seed a result is a function of prompt
    and parameters alone, whatever else is in the batch (in float32: 16-bit products round differently by batch size).
    `stop` strings end the text before themselves. Only requests of the same `cache_salt` share cached prefixes, and of
    the same `adapter`: the name of the LoRA that the engine is to use, or none.

    Penalties, `logit_bias` (token, what to add) and `allowed_token_ids` change the logits; before `min_tokens` no token
    that ends the text can come. `logprobs` and `prompt_logprobs` ask for that many likeliest tokens at each position,
    as the model has them before all this; None asks for none.

    With a `grammar`, only tokens come that can still lead to what it describes. Where priorities count, a lower
    `priority` is served first; after `max_seconds` the request fails as it is.

    With `beams`, the answer is no draw: it is the likeliest sequence among those that so many beams find, where a
    sequence's score is the sum of its log-probabilities divided by its number of tokens to the `length_penalty`.

    A `kv_policy` keeps a part of the cache only.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    adapter: str = ""
    priority: int = 0
    max_seconds: float | None = None
    grammar: Grammar | None = None
    beams: int = 0
    length_penalty: float = 1.0
    kv_policy: KvPolicy | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                limits = f"lie in {low:g}..{high:g}" if high < INFINITE else f"be at least {low:g}"
                raise UsageError(f"{name} must {limits}, not {value}")
        checks = (
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}"),
            (0 < self.typical_p <= 1, f"typical_p must lie in (0, 1], not {self.typical_p}"),
            (
                0 < self.repetition_penalty <= 100,
                f"repetition_penalty must lie in (0, 100], not {self.repetition_penalty}",
            ),
            (all(self.stop), "stop strings must not be empty"),
            (all(abs(bias) <= 100 for _, bias in self.logit_bias), "logit_bias must lie in -100..100"),
            (self.min_tokens <= self.max_tokens, f"min_tokens must not exceed max_tokens, {self.max_tokens}"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)
        if self.beams:
            self._check_beams()

    def _check_beams(self) -> None:
        defaults = {one.name: one.default for one in fields(self)}
        if wrong := [name for name in NOT_WITH_BEAMS if getattr(self, name) != defaults[name]]:
            raise UsageError(f"{wrong[0]} can't be combined with beam search")
        if self.temperature not in (0, 1):
            raise UsageError(f"temperature must be 0 or 1 with beam search, not {self.temperature}")

    def child(self, index: int) -> SamplingParams:
        """The parameters of one of several answers to a prompt: the first has the seed, each other one of its own."""
        if self.seed is None or not index:
            return self
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        return replace(self, seed=int.from_bytes(digest))

    def context(self, limit: int) -> int:
        """Tokens that prompt and answer may have together where `limit` is the engine's."""
        return INFINITE if self.kv_policy is not None and self.kv_policy.unbounded else limit

    @property
    def owner(self) -> bytes:
        """Whose cached prefixes it may share."""
        return repr((self.adapter, self.cache_salt)).encode()

    @property
    def shapes_logits(self) -> bool:
        """Whether anything is done to the logits before a token is chosen."""
        penalties = (self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty)
        return any((*penalties, self.logit_bias, self.allowed_token_ids, self.min_tokens))

    @property
    def cuts(self) -> bool:
        """Whether some tokens are kept out of the draw for being unlikely."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One position: the token there, its log-probability, its rank (1 is the likeliest), and the likeliest tokens."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class Request:
    """One sequence in the engine: what is known of it, how much of it is computed, which blocks hold it.

    `num_computed` is the position of the next token to run; `num_cached` the KV slots in use. They are equal until a
    cache is compressed. That is the business of `compression`, as are `originals`, blocks that are held as they were
    first computed, and `pages`, how many of the blocks each layer has where they differ. `token_ids` is prompt and
    output together.

    `keys` are the chained hashes of its full blocks, as far as they were needed; the first `num_published` blocks can
    be shared. `num_hit` tokens were found in the cache when it was first admitted. Another `salt` shares nothing.
    A lower `priority` value comes first; at its `deadline`, in seconds of the scheduler's time, it ends as it is.
    The request `twin` has the same prompt: while it is computed for that one, this one waits. `drafts` are tokens that
    someone thinks come next: they run behind the known ones, and `rewind` forgets those that did not stand.
    """

    request_id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    salt: bytes = b""
    keys: list[bytes] = field(default_factory=list)
    num_published: int = 0
    num_hit: int | None = None
    cache_miss: str | None = None
    priority: int = 0
    deadline: float | None = None
    arrival: int = 0
    twin: str | None = None
    drafts: tuple[int, ...] = ()
    originals: list[int] = field(default_factory=list)
    pages: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_wanted(self) -> int:
        """Tokens to run: those known but not computed (the whole prompt at first, one while decoding), and drafts."""
        return len(self.token_ids) + len(self.drafts) - self.num_computed

    @property
    def is_scored(self) -> bool:
        """Whether the logits of its next tokens are wanted, since they belong to a prompt that is scored."""
        return self.params.prompt_logprobs is not None and self.num_computed < self.num_prompt

    def rewind(self) -> None:
        """Take as computed only what comes before the last known token: what was drafted behind it did not stand."""
        excess = max(0, self.num_computed - (len(self.token_ids) - 1))
        self.num_computed -= excess
        self.num_cached -= excess
        self.drafts = ()

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt :]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One sequence that a beam search found. `score` is what they are ranked by."""

    text: str
    token_ids: tuple[int, ...]
    score: float
    finish_reason: FinishReason


class Tokens(Sequence[int]):
    """The tokens of a list from `start` on, as many as it holds now: it may grow, and nothing is copied.

    Equal to a tuple of them, and with the same hash.
    """

    __slots__ = ("_places", "_source")

    def __init__(self, source: Sequence[int], start: int) -> None:
        self._source = source
        self._places = range(start, len(source))

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[int]:
        return iter(self._source[self._places.start : self._places.stop])

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...

    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        places = self._places[index]
        return self._source[places] if isinstance(places, int) else tuple(self._source[place] for place in places)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Tokens | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


@dataclass(slots=True)  # one is made for every token: a frozen one takes three times as long to make
class RequestOutput:
    """What a request has produced so far. `text` and `token_ids` are cumulative, `delta` is the new text.

    `num_new_tokens` counts the tokens that this output adds. Token ids include the stop token, the text does not.
    Of the prompt `num_cached_tokens` were found in the cache; `cache_miss` says why no more were. `logprobs` are those
    of all tokens so far, if asked for; `prompt_logprobs` those of the prompt after its first token. `error` is what
    went wrong with a request that ended by it. A beam search has one output, its last, with all `beams`, best first.
    """

    request_id: str
    text: str
    delta: str
    token_ids: Sequence[int]
    num_new_tokens: int
    num_prompt_tokens: int
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    cache_miss: str | None = None
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    beams: tuple[Hypothesis, ...] = ()

    @property
    def finished(self) -> bool:
        """Whether this is the last output of its request."""
        return self.finish_reason is not None
