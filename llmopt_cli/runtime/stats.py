"""`EngineStats`: what an engine counts, for dashboards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment's load and the totals since start. `kv_cache_usage` is the held share of blocks, 0..1.

    `prefix_cache_queries` are prompt tokens looked up in the prefix cache, `prefix_cache_hits` those found. `stalled`
    is 1 while requests run and no step ends, as who runs the engine saw it, `num_stalls` how often that began.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_blocks: int
    block_size: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    prefix_cache_queries: int
    prefix_cache_hits: int
    stalled: int = 0
    num_stalls: int = 0
