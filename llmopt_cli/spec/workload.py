"""`Workload`: who asks what and when. Lengths and arrival times are drawn here, so every verb sees the same traffic.

Knows neither tokens nor text, and no format of a trace: `bench` fills the lengths with tokens, an estimator may
integrate over them. Standard library only; the same seed draws the same requests, and the first N of a longer run are
those of a shorter one, but for their times.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import ClassVar, Literal, NamedTuple, Self

from llmopt_cli.errors import UnknownNameError, UsageError
from llmopt_cli.spec.checkpoint import ASSETS
from llmopt_cli.spec.trace import HASHED_TOKENS, SUFFIXES, Trace, read_trace
from llmopt_cli.spec.yaml_file import find_yaml, read_yaml, recipes_folder

STEADY_ROUNDS = 4
FEWEST_ROUNDS = 2  # with less, a closed loop is never full but at its start


class Size(NamedTuple):
    """Tokens of one request: its whole prompt and what it asks for."""

    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of lengths in tokens, at least 1. `mean` and `sd` describe it before it is cut to `min`..`max`.

    `constant` takes mean, `uniform` min and max, `normal` and `lognormal` mean and sd, and min and max if wanted;
    `trace` takes nothing: the lengths are those of the workload's trace, in their order.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    kind: Literal["constant", "uniform", "normal", "lognormal", "trace"] = "constant"
    mean: float | None = None
    sd: float | None = None
    min: int | None = None
    max: int | None = None

    def __post_init__(self) -> None:
        given = {name for name in ("mean", "sd", "min", "max") if getattr(self, name) is not None}
        needed, optional = _TAKES[self.kind]
        if missing := needed - given:
            raise ValueError(f"`{self.kind}` needs {' and '.join(sorted(missing))}")
        if extra := given - needed - optional:
            raise ValueError(f"`{self.kind}` takes no {' or '.join(sorted(extra))}")
        for name, least in (("mean", 1), ("sd", 0), ("min", 1), ("max", self.least)):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise ValueError(f"{name} must be at least {least}, not {value}")

    @property
    def least(self) -> int:
        """The shortest length that can be drawn."""
        return round(self.mean or 1) if self.kind == "constant" else self.min or 1

    def draw(self, rng: Random) -> int:
        """One length."""
        drawn = max(_DRAWS[self.kind](self, rng), self.least)
        return round(drawn if self.max is None else min(drawn, self.max))


def _lognormal(lengths: Lengths, rng: Random) -> float:
    """Mean m and deviation s of the values give the logarithm's: var = ln(1 + (s/m)^2), mu = ln m - var/2."""
    assert lengths.mean is not None
    assert lengths.sd is not None
    variance = math.log1p((lengths.sd / lengths.mean) ** 2)
    return rng.lognormvariate(math.log(lengths.mean) - variance / 2, math.sqrt(variance))


_TAKES: dict[str, tuple[set[str], set[str]]] = {  # kind -> (needed, optional)
    "constant": ({"mean"}, set()),
    "uniform": ({"min", "max"}, set()),
    "normal": ({"mean", "sd"}, {"min", "max"}),
    "lognormal": ({"mean", "sd"}, {"min", "max"}),
    "trace": (set(), set()),
}
_DRAWS: dict[str, Callable[[Lengths, Random], float]] = {
    "constant": lambda lengths, rng: lengths.mean or 1,
    "uniform": lambda lengths, rng: rng.randint(lengths.min or 1, lengths.max or 1),
    "normal": lambda lengths, rng: rng.normalvariate(lengths.mean or 1, lengths.sd or 0),
    "lognormal": _lognormal,
}


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Closed loop: `concurrency` requests are always under way. Open loop: they come at `rate` a second, ready or not.

    `burstiness` is the coefficient of variation of the gaps in the open loop: 0 even, 1 Poisson, above 1 in bursts
    (production traces show 1 to 13). With `speed` they come when those of the workload's trace came, so many times as
    fast.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    speed: float | None = None

    def __post_init__(self) -> None:
        if sum(kind is not None for kind in (self.concurrency, self.rate, self.speed)) != 1:
            raise ValueError("arrivals need either concurrency or rate, or speed where there is a trace")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")
        for name, value in (("rate", self.rate), ("speed", self.speed)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be above 0, not {value}")
        if not 0 <= self.burstiness <= 100:
            raise ValueError(f"burstiness must lie in 0..100, not {self.burstiness}")

    @property
    def label(self) -> str:
        """`concurrency 8`, `4 requests/s, CV 1`, or `the trace, 2x as fast`."""
        if self.concurrency is not None:
            return f"concurrency {self.concurrency}"
        if self.speed is not None:
            return f"the trace, {self.speed:g}x as fast"
        return f"{self.rate:g} requests/s, CV {self.burstiness:g}"

    def offsets(self, count: int, seed: int) -> list[float]:
        """Seconds after the start at which `count` requests of the open loop are due.

        The first is due at once and the last at (count - 1)/rate, so that every run offers the rate it names: the gaps
        follow a gamma law of shape 1/CV^2 (shape 1 is the exponential law of Poisson), scaled to that end. Bursty gaps
        that were left alone would add up to anything. `count` requests can show a CV of at most sqrt(count - 2).
        """
        assert self.rate is not None, "a closed loop has no timetable, and a trace its own"
        gaps = _gamma_gaps(count - 1, self.burstiness**2, Random(f"{seed}/arrivals"))
        ends = list(accumulate(gaps, initial=0.0))
        scale = (count - 1) / self.rate / (ends[-1] or 1.0)  # a single request has no gap
        return [scale * end for end in ends]


def _gamma_gaps(count: int, variance: float, rng: Random) -> list[float]:
    """Draws of a gamma law of shape 1/`variance`, as multiples of the largest.

    In logarithms, by Gamma(a) = Gamma(a + 1) * U^(1/a): most draws of a small shape are too small for a float.
    """
    if not variance:
        return [1.0] * count
    shape = 1 / variance
    logs = [math.log(rng.gammavariate(shape + 1, 1)) + math.log(1 - rng.random()) / shape for _ in range(count)]
    largest = max(logs, default=0.0)
    return [math.exp(log - largest) for log in logs]


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good request may take, in milliseconds; None is no limit. `share` of them all are to be good.

    A closed form knows means only and holds them to the limits; `share` is for who sees every request.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be at least 0, not {value}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], not {self.share}")

    @staticmethod
    def parse(text: str) -> Slo:
        """`ttft=500ms,tpot=50ms,e2e=10s`, `@p99` after it, or a bundled name; anything else raises UsageError."""
        if "=" not in text:
            if text not in bundled_slos():
                raise UnknownNameError("SLO", text, bundled_slos())
            return bundled_slos()[text]
        limits, at, percentile = text.partition("@p")
        found = [re.fullmatch(_LIMIT, limit.strip()) for limit in limits.split(",")]
        values = {f"{match[1]}_ms": float(match[2]) * _MS[match[3]] for match in found if match}
        try:
            if len(values) < len(found):
                raise ValueError("each limit is a name, a number and a unit, and is given once")
            return Slo(**values, share=float(percentile) / 100 if at else None)
        except ValueError as error:
            raise UsageError(f"--slo `{text}`: {error}", _SLO_HINT) from None

    def keeps(self, ttft: float, tpot: float, e2e: float) -> bool:
        """Whether a request (or the mean one) that took so many seconds is within every limit."""
        limits = ((self.ttft_ms, ttft), (self.tpot_ms, tpot), (self.e2e_ms, e2e))
        return all(limit is None or 1000 * seconds <= limit for limit, seconds in limits)


_LIMIT = r"(ttft|tpot|e2e)=(\d+(?:\.\d+)?)(ms|s)"
_MS = {"ms": 1, "s": 1000}
_SLO_HINT = "for example `--slo ttft=500ms,tpot=50ms`, also `e2e=10s`, and `@p99` at the end, or a name: `--slo chat`"


@cache
def bundled_slos() -> dict[str, Slo]:
    """The limits that others publish, by name; assets/catalog/slos.csv says who."""
    with (ASSETS / "catalog" / "slos.csv").open(encoding="utf-8", newline="") as text:
        rows = {row.pop("name"): row for row in csv.DictReader(text)}
    return {
        name: Slo(**{key: float(cell) for key, cell in row.items() if cell and key != "source"})
        for name, row in rows.items()
    }


@dataclass(frozen=True, slots=True)
class Workload:
    """One traffic. `warmup` requests run first and are not counted; `source` says where the figures come from.

    `shared_prefix` tokens at the head of every prompt are the same (a system prompt); they count into `input_len`.
    `trace` is a file of recorded requests, of which the first `num_requests` are taken.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    input_len: Lengths
    output_len: Lengths
    arrivals: Arrivals
    num_requests: int
    description: str = ""
    source: str = ""
    warmup: int = 0
    shared_prefix: int = 0
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    slo: Slo = field(default_factory=Slo)
    trace: str | None = None

    def __post_init__(self) -> None:
        traced = {self.input_len.kind == "trace", self.output_len.kind == "trace"}
        if len(traced) > 1:
            raise ValueError("input_len and output_len must be both those of the trace, or neither")
        if self.trace is None and (True in traced or self.arrivals.speed):
            raise ValueError("there is no `trace` to take lengths or times from")
        for name, least in (("num_requests", 1), ("warmup", 0), ("shared_prefix", 0), ("temperature", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.shared_prefix >= self.input_len.least:
            raise ValueError(f"shared_prefix {self.shared_prefix} leaves the shortest prompt no token of its own")

    @classmethod
    def read(cls, name: str | Path) -> Self:
        """Read a workload file, the bundled workload of that name, or a trace: its requests at their own times."""
        if Path(name).suffix in SUFFIXES:
            return cls.of_trace(Path(name))
        path = find_yaml("workload", name, recipes_folder() / "workloads")
        workload = read_yaml(path, cls)
        return replace(workload, trace=str(path.parent / workload.trace)) if workload.trace else workload

    @classmethod
    def of_trace(cls, path: Path) -> Self:
        """All requests of a trace; a closed loop of 8 where it records no times."""
        trace = read_trace(str(path))
        return cls(
            name=path.stem,
            description=trace.description,
            source=trace.format,
            input_len=Lengths("trace"),
            output_len=Lengths("trace"),
            arrivals=Arrivals(speed=1.0) if trace.timed else Arrivals(concurrency=8),
            num_requests=len(trace.requests),
            ignore_eos=True,
            trace=str(path),
        )

    def with_load(self, *, concurrency: int | None = None, rate: float | None = None) -> Self:
        """The same requests under another load; `burstiness` stays."""
        return replace(self, arrivals=replace(self.arrivals, concurrency=concurrency, rate=rate, speed=None))

    @property
    def rounds(self) -> float:
        """How many requests follow each other in each place of a closed loop; no end of them in an open one."""
        return self.num_requests / self.arrivals.concurrency if self.arrivals.concurrency else math.inf

    def steady(self) -> Self:
        """With enough requests for STEADY_ROUNDS, as its places empty one by one in the last of them."""
        return replace(self, num_requests=max(self.num_requests, STEADY_ROUNDS * (self.arrivals.concurrency or 0)))

    def warm_up(self) -> Self:
        """The requests to send beforehand, all at once; `warmup` must not be 0."""
        fewer = replace(self, num_requests=self.warmup, seed=self.seed + 1)
        return fewer.with_load(concurrency=self.warmup)

    def sizes(self, context: int | None) -> tuple[list[Size], int]:
        """The lengths of all requests, and how many of them had to be clipped to `context` tokens.

        A clipped request keeps its output and loses prompt, but never the last token of it.
        """
        wanted = self._traced_sizes() if self.input_len.kind == "trace" else self._drawn_sizes()
        fitted = [_clip(size, context) for size in wanted]
        return fitted, sum(one != other for one, other in zip(wanted, fitted, strict=True))

    def offsets(self) -> list[float]:
        """Seconds after the start at which the requests of an open loop are due; none in a closed one."""
        if self.arrivals.concurrency is not None:
            return []
        if self.arrivals.speed is None:
            return self.arrivals.offsets(self.num_requests, self.seed)
        return [request.at / self.arrivals.speed for request in self.recorded().requests[: self.num_requests]]

    def prefixes(self) -> tuple[int, list[tuple[int, ...]]]:
        """Which prompts begin alike: tokens of a block, and for each request a number for each block at its head.

        Equal numbers stand for equal blocks after equal beginnings.
        """
        if self.input_len.kind == "trace":
            return HASHED_TOKENS, [one.hash_ids for one in self.recorded().requests[: self.num_requests]]
        return self.shared_prefix, [(0,) if self.shared_prefix else ()] * self.num_requests

    def recorded(self) -> Trace:
        """The trace; there must be one. May raise TraceError."""
        assert self.trace is not None
        return read_trace(self.trace)

    def _drawn_sizes(self) -> list[Size]:
        ins, outs = Random(f"{self.seed}/input"), Random(f"{self.seed}/output")
        return [Size(self.input_len.draw(ins), self.output_len.draw(outs)) for _ in range(self.num_requests)]

    def _traced_sizes(self) -> list[Size]:
        return [Size(one.input_len, one.output_len) for one in self.recorded().requests[: self.num_requests]]


def _clip(size: Size, context: int | None) -> Size:
    if context is None or sum(size) <= context:
        return size
    output_len = min(size.output_len, context - 1)
    return Size(min(size.input_len, context - output_len), output_len)
