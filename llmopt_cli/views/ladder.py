"""How a ladder looks: as JSON and as a table with the usual claims beside it. Computes nothing."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from llmopt_cli.estimate.figures import plain
from llmopt_cli.estimate.ladder import CLAIMS
from llmopt_cli.output import table
from llmopt_cli.spec.hardware import GB

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.estimate.ladder import Ladder, Rung

CLAIM_COLUMNS = ("configuration", "tok/s", "weights GB", "cost")


def data(ladder: Ladder) -> dict[str, Any]:
    """All rungs and claims as JSON; tokens are output tokens."""
    on = ladder.on
    return {
        "model": on.spec.name,
        "gpu": on.hardware.name,
        "gpus": on.gpus,
        "lengths": ladder.lengths,
        "rungs": [dataclasses.asdict(rung) for rung in ladder.rungs],
        "claims_for_70b": [dataclasses.asdict(claim) for claim in CLAIMS],
    }


def render(ladder: Ladder) -> list[RenderableType]:
    """The prediction, then the claims."""
    on, load = ladder.on, ladder.load
    columns = ("rung", "at once", "tok/s", "factor", "weights GB", "KV GB", "cost", "because")
    title = (
        f"{on.spec.name} on {on.gpus} x {on.hardware.name}, {load.concurrency:,} requests at once, "
        f"{load.input_len:,.0f} tokens in, {load.output_len:,.0f} out (lengths: {ladder.lengths})"
    )
    predicted = table(title, columns, [_row(rung) for rung in ladder.rungs], "predicted; cost: of a token, relative")
    claims = [
        (claim.name, f"{claim.tokens_per_s:,.0f}", f"{claim.memory_gb:,.0f}", f"{claim.relative_cost:.2f}")
        for claim in CLAIMS
    ]
    said = table("Commonly claimed for 70B chat, not measured here", CLAIM_COLUMNS, claims)
    return [predicted, said]


def _row(rung: Rung) -> tuple[str, ...]:
    return (
        rung.name,
        f"{rung.batch:,}",
        plain(rung.tokens_per_s, 3),
        f"x {plain(rung.factor, 3)}",
        f"{rung.weight_bytes / GB:,.1f}",
        f"{rung.kv_bytes / GB:,.1f}",
        plain(rung.relative_cost, 2),
        rung.reason,
    )
