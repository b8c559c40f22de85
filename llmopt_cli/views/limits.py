"""How limits look: as JSON and as lines and a table of `llmopt estimate`. Computes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.pool import find_pool
from llmopt_cli.output import lines, table
from llmopt_cli.spec.hardware import GIB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.limits import Limits


def data(limits: Limits) -> dict[str, Any]:
    """The limits as JSON: tokens, requests, GPUs, bytes."""
    on, load = limits.on, limits.load
    return {
        "gpus": on.gpus,
        "scheme": on.scheme.name,
        "max_context_tokens": limits.max_context,
        "max_context_at_requests": load.concurrency,
        "max_batch_requests": limits.max_batch,
        "max_batch_at_tokens": load.length,
        "engine": {
            "name": on.engine.name,
            "source": find_pool(on.engine).source,
            "max_num_seqs": on.batching.max_num_seqs,
            "max_num_batched_tokens": on.batching.max_num_batched_tokens,
            "own_max_num_seqs": limits.own.max_num_seqs,
            "own_max_num_batched_tokens": limits.own.max_num_batched_tokens,
            "own_kv_cache_bytes_per_gpu": max(limits.own_budget.free, 0.0),
        },
        "fewest_gpus": {
            found.scheme.name: {"gpus": found.on.gpus, "tp": found.on.tp, "pp": found.on.pp} if found.on else None
            for found in limits.fewest
        },
        "largest_model": {found.scheme.name: found.spec.name if found.spec else None for found in limits.largest},
    }


def render(limits: Limits) -> list[RenderableType]:
    """The limits for people."""
    on, load = limits.on, limits.load
    own = max(limits.own_budget.free, 0.0) / GIB
    rows = [
        (
            fewest.scheme.name,
            _split(fewest.on.tp, fewest.on.pp) if fewest.on else "none up to 64 GPUs",
            f"{largest.spec.name} ({largest.spec.num_params / 1e9:,.1f} B)" if largest.spec else "none",
        )
        for fewest, largest in zip(limits.fewest, limits.largest, strict=True)
    ]
    asked = f"{load.concurrency} requests of {load.length:,} tokens"
    columns = ("scheme", f"fewest {on.hardware.name} for {on.spec.name}", f"largest model on {on.gpus} of them")
    return [
        lines(
            [
                ("context", f"{limits.max_context:,} tokens for each of {load.concurrency} requests at once"),
                ("batch", f"{limits.max_batch:,} requests of {load.length:,} tokens, with --max-num-seqs set to it"),
                (
                    "engine",
                    f"figured with {on.batching.max_num_seqs:,} requests and {on.batching.max_num_batched_tokens:,} "
                    f"tokens a step; left to itself {on.engine.name} takes {limits.own.max_num_seqs:,} and "
                    f"{limits.own.max_num_batched_tokens:,} here: {own:,.2f} GiB of KV cache",
                ),
            ]
        ),
        table(f"\nTo hold {asked}", columns, rows),
    ]


def _split(tp: int, pp: int) -> str:
    return f"{tp * pp}" if pp == 1 else f"{tp * pp} ({tp} x {pp} stages)"
