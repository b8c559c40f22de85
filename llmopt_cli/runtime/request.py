"""What is asked of the engine and what it answers. Plain data: no tensors, no tokenizer, no clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from llmopt_cli.errors import UsageError


class FinishReason(StrEnum):
    """Why a request ended, in OpenAI's words where it has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. `temperature=0` is greedy; `top_k=0` and `top_p=1` keep everything.

    `seed=None` draws a fresh seed, so results differ from run to run; with a seed a result is a function of prompt
    and parameters alone, whatever else is in the batch (in float32: 16-bit products round differently by batch size).
    `stop` strings end the text before themselves. Only requests of the same `cache_salt` share cached prefixes.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    cache_salt: str = ""

    def __post_init__(self) -> None:
        checks = (
            (self.max_tokens >= 1, f"max_tokens must be at least 1, not {self.max_tokens}"),
            (0 <= self.temperature <= 100, f"temperature must lie in 0..100, not {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}"),
            (all(self.stop), "stop strings must not be empty"),
        )
        for fine, message in checks:
            if not fine:
                raise UsageError(message)


@dataclass(slots=True)
class Request:
    """One sequence in the engine: what is known of it, how much of it is computed, which blocks hold it.

    `num_computed` is the position of the next token to run; `num_cached` the KV slots in use. They are equal until a
    cache is compressed. `token_ids` is prompt and output together.

    `keys` are the chained hashes of its full blocks, as far as they were needed; the first `num_published` blocks can
    be shared. `num_hit` tokens were found in the cache when it was first admitted. Another `salt` shares nothing.
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

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known so far."""
        return len(self.token_ids)

    @property
    def num_wanted(self) -> int:
        """Tokens that are known but not computed: the whole prompt at first, one while decoding."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.num_prompt :]


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a request has produced so far. `text` and `token_ids` are cumulative, `delta` is the new text.

    `num_new_tokens` counts the tokens that this output adds. Token ids include the stop token, the text does not.
    Of the prompt `num_cached_tokens` were found in the cache; `cache_miss` says why no more were.
    """

    request_id: str
    text: str
    delta: str
    token_ids: tuple[int, ...]
    num_new_tokens: int
    num_prompt_tokens: int
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    cache_miss: str | None = None

    @property
    def finished(self) -> bool:
        """Whether this is the last output of its request."""
        return self.finish_reason is not None
