"""From records to figures. The definitions are vLLM's and MLPerf's, the names of the figures vLLM's.

For a request sent at t0 whose first token came at t1 and whose n-th and last at tn:
TTFT = t1 - t0; TPOT = (tn - t1) / (n - 1), undefined for n < 2; E2E = tn - t0; ITL = the gaps between tokens, pooled
over all requests. A chunk of k tokens after a gap g counts as k gaps of g/k. Goodput counts the requests that keep all
limits of the SLO (DistServe, arXiv 2401.09670); one with a single token has no TPOT to break.
Percentiles interpolate linearly. Failed requests count in `failed` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from llmopt_cli.bench.prompts import Ask
from llmopt_cli.spec.workload import Slo


class Chunk(NamedTuple):
    """Tokens that arrived together; `at` is on the clock of time.perf_counter, in seconds."""

    at: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Reply:
    """What a target answered. `interpolated`: it did not say how many tokens a chunk holds, so they were shared out."""

    chunks: tuple[Chunk, ...]
    prompt_tokens: int
    cached_tokens: int = 0
    interpolated: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One request from plan to end, in seconds of time.perf_counter. It holds a reply or an error, never both."""

    ask: Ask
    scheduled_at: float
    sent_at: float
    ended_at: float
    reply: Reply | None = None
    error: str | None = None


class Latency(NamedTuple):
    """Seconds of one answered request; `tpot` is None for a single token."""

    ttft: float
    e2e: float
    tpot: float | None
    tokens: int

    @classmethod
    def of(cls, sent_at: float, reply: Reply) -> Latency:
        """By the definitions above."""
        ttft = reply.chunks[0].at - sent_at
        e2e = reply.chunks[-1].at - sent_at
        tokens = sum(chunk.tokens for chunk in reply.chunks)
        return cls(ttft, e2e, (e2e - ttft) / (tokens - 1) if tokens > 1 else None, tokens)

    def keeps(self, slo: Slo) -> bool:
        """Whether it is within every limit."""
        return slo.keeps(self.ttft, self.tpot or 0.0, self.e2e)


def token_gaps(reply: Reply) -> list[float]:
    """The gaps between tokens in seconds; tokens that came with the first chunk have none that is known."""
    return [gap for one, two in pairwise(reply.chunks) for gap in [(two.at - one.at) / two.tokens] * two.tokens]


def summarize(records: Sequence[Record], duration: float, slo: Slo) -> dict[str, Any]:
    """All figures of a run that lasted `duration` seconds. None stands for what cannot be told."""
    answered = [(record, record.reply) for record in records if record.reply is not None]
    latencies = [Latency.of(record.sent_at, reply) for record, reply in answered]
    gaps = [gap for _, reply in answered for gap in token_gaps(reply)]
    good = sum(latency.keeps(slo) for latency in latencies)
    inputs = sum(reply.prompt_tokens for _, reply in answered)
    outputs = sum(latency.tokens for latency in latencies)
    return {
        "duration": duration,
        "completed": len(answered),
        "failed": len(records) - len(answered),
        "first_error": next((record.error for record in records if record.error is not None), None),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "requested_input_tokens": sum(record.ask.input_len for record, _ in answered),
        "requested_output_tokens": sum(record.ask.params.max_tokens for record, _ in answered),
        "request_throughput": len(answered) / duration,
        "output_throughput": outputs / duration,
        "total_token_throughput": (inputs + outputs) / duration,
        "request_goodput": good / duration,
        "slo_attainment": good / len(records) if records else None,
        "max_concurrent_requests": peak_concurrency(records),
        **_spread("ttft_ms", [latency.ttft for latency in latencies]),
        **_spread("tpot_ms", [latency.tpot for latency in latencies if latency.tpot is not None]),
        **_spread("itl_ms", gaps),
        **_spread("e2el_ms", [latency.e2e for latency in latencies]),
        **_quality(records, [reply for _, reply in answered], inputs, outputs),
    }


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds."""
    names = [f"{part}_{name}" for part in ("mean", "median", "p90", "p99")]
    if not seconds:
        return dict.fromkeys(names)
    values = 1000 * np.asarray(seconds)
    return dict(zip(names, [float(values.mean()), *map(float, np.percentile(values, (50, 90, 99)))], strict=True))


def _quality(records: Sequence[Record], replies: Sequence[Reply], inputs: int, outputs: int) -> dict[str, Any]:
    """Whether the figures can be trusted: lateness of the client, bundled tokens, prompts that were in a cache."""
    lags = [record.sent_at - record.scheduled_at for record in records]
    chunks = sum(len(reply.chunks) for reply in replies)
    return {
        "p99_send_lag_ms": 1000 * float(np.percentile(lags, 99)) if lags else None,
        "tokens_per_chunk": outputs / chunks if chunks else None,
        "itl_is_interpolated": any(reply.interpolated for reply in replies),
        "cached_input_share": sum(reply.cached_tokens for reply in replies) / inputs if inputs else None,
    }


def peak_concurrency(records: Sequence[Record]) -> int:
    """The most requests that were under way at once; one that ends as another is sent does not meet it."""
    events = sorted([(record.ended_at, -1) for record in records] + [(record.sent_at, 1) for record in records])
    running = peak = 0
    for _, change in events:
        running += change
        peak = max(peak, running)
    return peak
