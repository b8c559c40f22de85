"""What Prometheus scrapes. Every metric has vLLM's name, under the prefix `llmopt:` and again under `vllm:`, so that
dashboards and autoscalers made for vLLM read this server as they are.

Gauges and token totals are the engine's own figures, read when scraped; latencies are measured here, where outputs
leave the engine, in seconds. Knows prometheus_client; nothing of HTTP.
Names and buckets: vLLM, "Production metrics" (docs.vllm.ai).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llmopt_cli.runtime.request import FinishReason, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from llmopt_cli.runtime.stats import EngineStats

PREFIXES = ("llmopt:", "vllm:")
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Seconds. vLLM's bounds, and below them those that small models need.
FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
WHOLE = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)

LATENCIES: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Arrival to first token.", (*FIRST, 2560)),
    "inter_token_latency_seconds": ("Token to token.", GAP),
    "request_time_per_output_token_seconds": ("Mean gap between a request's tokens after its first.", GAP),
    "e2e_request_latency_seconds": ("Arrival to last token.", WHOLE),
}
TOKEN_COUNTS = {
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Tokens generated for a request.",
    "request_params_max_tokens": "Tokens a request asked for at most.",
}
GAUGES = {  # name -> field of EngineStats
    "num_requests_running": ("Requests in the batch.", "num_running"),
    "num_requests_waiting": ("Requests in the queue.", "num_waiting"),
    "kv_cache_usage_perc": ("Share of KV blocks in use, 0 to 1.", "kv_cache_usage"),
    "engine_stalled": ("1 while requests run and no step ends.", "stalled"),
}
COUNTERS = {
    "engine_stalls": ("Times that no step ended for long.", "num_stalls"),
    "num_preemptions": ("Requests put back into the queue for want of KV blocks.", "num_preemptions"),
    "prompt_tokens": ("Prompt tokens of the requests taken in.", "prompt_tokens"),
    "generation_tokens": ("Tokens generated.", "generation_tokens"),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", "prefix_cache_queries"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", "prefix_cache_hits"),
}
SPECULATION = {  # name -> field of Tally, where something is drafted
    "spec_decode_num_drafts": ("Drafts verified.", "drafts"),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", "tokens"),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that stood.", "accepted"),
    "spec_decode_num_judged_tokens": ("Those, and the first of each draft that did not.", "judged"),
    "spec_decode_num_steps": ("Steps of requests while they decode.", "steps"),
    "spec_decode_num_step_tokens": ("Tokens that those brought.", "emitted"),
    "spec_decode_step_seconds": ("Time of steps in which all requests were decoding, drafting included.", "seconds"),
    "spec_decode_undrafted_step_seconds": ("What as many tokens would have taken without drafts.", "alone"),
}
SPECULATION_GAUGES = {
    "spec_decode_acceptance_length": ("Tokens that a request gets by a step.", "length"),
    "spec_decode_speedup": (
        "How much longer steps of as many requests without drafts would take for it.",
        "speedup",
    ),
}


def token_buckets(most: int) -> list[int]:
    """1, 2, 5, 10, 20, 50, ... up to `most`."""
    bounds = (digit * 10**power for power in range(len(str(most))) for digit in (1, 2, 5))
    return [bound for bound in bounds if bound <= most]


class Metrics(Collector):
    """The metrics of one server. `stats` reads the engine's totals."""

    def __init__(self, model_name: str, max_model_len: int, stats: Callable[[], EngineStats]) -> None:
        self._labels = {"model_name": model_name, "engine": "0"}
        self._stats = stats
        self._own = CollectorRegistry()
        tables = LATENCIES | {name: (text, token_buckets(max_model_len)) for name, text in TOKEN_COUNTS.items()}
        self._histograms = {
            name: Histogram(name, text, list(self._labels), buckets=bounds, registry=self._own).labels(**self._labels)
            for name, (text, bounds) in tables.items()
        }
        self._ended = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._rejected = self._counter("admission_rejections", "Requests turned away, by reason.", "reason")
        for reason in FinishReason:
            self._ended.labels(**self._labels, finished_reason=reason)
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def _counter(self, name: str, text: str, label: str) -> Counter:
        return Counter(name, text, [*self._labels, label], registry=self._own)

    def observe(self, name: str, value: float) -> None:
        """Add a value to the histogram `name` of LATENCIES (seconds) or TOKEN_COUNTS."""
        self._histograms[name].observe(value)

    def rejected(self, reason: str) -> None:
        """Count a request that was turned away: `queue_full`, `draining` or `invalid`."""
        self._rejected.labels(**self._labels, reason=reason).inc()

    def ended(self, reason: FinishReason) -> None:
        """Count a request that ended."""
        self._ended.labels(**self._labels, finished_reason=reason).inc()

    def exposition(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family under every prefix."""
        families = [*self._engine_families(), *self._own.collect()]
        for prefix in PREFIXES:
            for family in families:
                yield _prefixed(family, prefix)

    def _engine_families(self) -> Iterator[Metric]:
        stats = self._stats()
        names, values = list(self._labels), list(self._labels.values())
        tables: list[tuple[Any, Any, dict[str, tuple[str, str]]]]
        tables = [(stats, GaugeMetricFamily, GAUGES), (stats, CounterMetricFamily, COUNTERS)]
        tally = stats.speculation
        if tally is not None:
            tables += [(tally, CounterMetricFamily, SPECULATION), (tally, GaugeMetricFamily, SPECULATION_GAUGES)]
            text, name = "Drafted tokens that stood, by their place.", "spec_decode_num_accepted_tokens_per_pos"
            places = CounterMetricFamily(name, text, labels=[*names, "position"])
            for place, count in enumerate(tally.stood):
                places.add_metric([*values, str(place)], count)
            yield places
        for source, kind, table in tables:
            for name, (text, field) in table.items():
                family = kind(name, text, labels=names)
                family.add_metric(values, getattr(source, field))
                yield family
        cache = GaugeMetricFamily("cache_config_info", "The KV cache.", labels=[*names, "block_size", "num_gpu_blocks"])
        cache.add_metric([*values, str(stats.block_size), str(stats.num_blocks)], 1)
        yield cache


def _prefixed(family: Metric, prefix: str) -> Metric:
    copy = Metric(prefix + family.name, family.documentation, family.type)
    named = (sample._replace(name=prefix + sample.name) for sample in family.samples)
    copy.samples = [sample for sample in named if not sample.name.endswith("_created")]
    return copy


class RequestClock:
    """Measures one request from its arrival (now) to its end."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrived = time.perf_counter()
        self._first = self._last = 0.0
        self._num_tokens = 0

    def saw(self, output: RequestOutput) -> None:
        """Take the time of an output. Several tokens in one share the gap before it."""
        now = time.perf_counter()
        fresh = output.num_new_tokens
        if fresh and not self._num_tokens:
            self._metrics.observe("time_to_first_token_seconds", now - self._arrived)
            self._first, fresh = now, 0
        for _ in range(fresh):
            self._metrics.observe("inter_token_latency_seconds", (now - self._last) / fresh)
        self._num_tokens += output.num_new_tokens
        self._last = now

    def ended(self, output: RequestOutput | None, params: SamplingParams) -> None:
        """Count the end of a request with its last output; one that has not finished was aborted."""
        if output is None or output.finish_reason is None:
            self._metrics.ended(FinishReason.ABORT)
            return
        self._metrics.ended(output.finish_reason)
        self._metrics.observe("e2e_request_latency_seconds", self._last - self._arrived)
        self._metrics.observe("request_params_max_tokens", params.max_tokens)
        self._metrics.observe("request_prompt_tokens", output.num_prompt_tokens)
        self._metrics.observe("request_generation_tokens", self._num_tokens)
        if self._num_tokens > 1:
            gap = (self._last - self._first) / (self._num_tokens - 1)
            self._metrics.observe("request_time_per_output_token_seconds", gap)
