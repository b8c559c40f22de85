"""`llmopt models`: the models that `--model` knows without a file, with the source of every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmopt_cli.options import JsonOpt
from llmopt_cli.output import Output, table

if TYPE_CHECKING:
    from llmopt_cli.spec.catalog import Entry
    from llmopt_cli.spec.model import ModelSpec

COLUMNS = ("name", "short", "B params", "active", "layers", "hidden", "heads/KV", "context", "KV B/token", "source")


def models(json: JsonOpt = False) -> None:
    """List the models that `estimate --model` knows by name."""
    from dataclasses import asdict

    from llmopt_cli.spec import catalog

    entries = catalog.models()
    data = [
        {**asdict(entry.item), "parameters": entry.item.num_params, "names": entry.names, "source": entry.source}
        for entry in entries
    ]
    caption = (
        "KV bytes of one token in 16 bits inside every window; what is left out of a model: llmopt models --json\n"
        "Any other model: give its folder or config.json"
    )
    Output(as_json=json).result(
        data, lambda: table(f"{len(entries)} models", COLUMNS, [_row(entry) for entry in entries], caption)
    )


def _row(entry: Entry[ModelSpec]) -> tuple[str, ...]:
    from llmopt_cli.estimate.memory import KV_BYTES, kv_bytes_per_token

    spec = entry.item
    return (
        spec.name,
        ", ".join(entry.names[2:]),
        f"{spec.num_params / 1e9:,.2f}",
        f"{spec.num_active_params / 1e9:,.2f}",
        str(spec.num_layers),
        str(spec.hidden_size),
        f"{spec.num_heads}/{spec.num_kv_heads}",
        f"{spec.max_context:,}",
        f"{kv_bytes_per_token(spec, KV_BYTES):,.0f}",
        entry.source.split("@")[0].split(":")[0],
    )
