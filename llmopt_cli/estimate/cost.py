"""Money: an hourly rate and the seconds that a request takes make a price. Knows no model, catalogue or step time.

The base is one formula: hourly rate x seconds per 1K tokens / 3600. USD; the rate is that of all GPUs which work
together; tokens are means over the requests of a load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from llmopt_cli.errors import UsageError

MILLION = 1_000_000
DAY_HOURS = 24
DAY_S = DAY_HOURS * 3600


def usd_per_tokens(usd_per_hour: float, tokens_per_s: float, tokens: int = 1000) -> float:
    """Hourly rate x seconds per `tokens` / 3600. The rate is that of all GPUs which make the tokens together."""
    return usd_per_hour * (tokens / tokens_per_s) / 3600


@dataclass(frozen=True, slots=True)
class Work:
    """The mean request of a steady load: its tokens, and the seconds in which the GPUs work for it alone.

    `prefill` goes by what computing its prompt takes, `decode` by its share of every step that it takes part in.
    """

    input_len: float
    output_len: float
    prefill: float
    decode: float

    @property
    def seconds(self) -> float:
        """Both together; one replica completes 1 / seconds requests a second."""
        return self.prefill + self.decode

    @property
    def tokens_per_s(self) -> float:
        """Output tokens of all requests together, while prompts of new ones come in as old ones end."""
        return self.output_len / self.seconds


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What the work costs at an hourly rate. Prompt and answer share it by the seconds that they take."""

    usd_per_hour: float
    work: Work

    @property
    def per_request(self) -> float:
        """USD of one request: exactly its input and its output tokens at their prices."""
        return self.usd_per_hour * self.work.seconds / 3600

    def input(self, tokens: int = MILLION) -> float:
        """USD of so many prompt tokens: the prefill's share."""
        return self.usd_per_hour * self.work.prefill / self.work.input_len * tokens / 3600

    def output(self, tokens: int = MILLION) -> float:
        """USD of so many generated tokens: the share of decoding."""
        return self.usd_per_hour * self.work.decode / self.work.output_len * tokens / 3600

    def all_in(self, tokens: int = MILLION) -> float:
        """USD of so many generated tokens, their prompts included: the formula that everybody uses."""
        return usd_per_tokens(self.usd_per_hour, self.work.tokens_per_s, tokens)


@dataclass(frozen=True, slots=True)
class ApiPrice:
    """What a hosted model asks: USD for a million input and a million output tokens."""

    input: float
    output: float

    @classmethod
    def parse(cls, text: str) -> Self:
        """`IN,OUT` as in `0.60,2.40`; anything else raises UsageError."""
        try:
            given, made = (float(part) for part in text.split(","))
        except ValueError:
            given = made = math.nan
        if not (math.isfinite(given) and math.isfinite(made) and given >= 0 and made >= 0 and given + made > 0):
            raise UsageError(
                f"--api-price `{text}` is no pair of prices",
                "give USD for a million input and output tokens, such as `--api-price 0.60,2.40`",
            )
        return cls(given, made)

    def per_request(self, work: Work) -> float:
        """USD of one request."""
        return (work.input_len * self.input + work.output_len * self.output) / MILLION


@dataclass(frozen=True, slots=True)
class Day:
    """A day with so many requests, on as few replicas as can do them; each is paid for all 24 hours."""

    requests: float
    tokens: float  # prompts and answers
    replicas: int
    idle_share: float
    usd: float
    usd_per_1m_output: float
    api_usd: float | None


def day(cost: TokenCost, requests: float, api: ApiPrice | None = None) -> Day:
    """What `requests` a day (more than 0) cost, and the part of the paid hours in which the GPUs have nothing to do."""
    work = cost.work
    busy = requests * work.seconds / DAY_S
    replicas = max(1, math.ceil(busy))
    usd = replicas * cost.usd_per_hour * DAY_HOURS
    return Day(
        requests=requests,
        tokens=requests * (work.input_len + work.output_len),
        replicas=replicas,
        idle_share=1 - busy / replicas,
        usd=usd,
        usd_per_1m_output=usd / (requests * work.output_len) * MILLION,
        api_usd=requests * api.per_request(work) if api else None,
    )


def break_even(cost: TokenCost, api: ApiPrice) -> float | None:
    """Requests a day from which one replica, its idle hours included, costs less than the API.

    None where the API is cheaper even than a replica that is never idle.
    """
    requests = cost.usd_per_hour * DAY_HOURS / api.per_request(cost.work)
    return requests if requests * cost.work.seconds <= DAY_S else None
