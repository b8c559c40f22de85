"""`llmopt demo`: all four verbs on the embedded model, ending in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli import options
from llmopt_cli.errors import UsageError
from llmopt_cli.output import Output, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.demo import Row

FolderOpt = Annotated[
    Path | None, typer.Option("--output", "-o", help="Keep what the verbs write here; by default it is thrown away.")
]


def demo(output: FolderOpt = None, as_json: options.JsonOpt = False) -> None:
    """Size, quantize, benchmark and serve the embedded model: before and after in one table."""
    import sys
    from dataclasses import asdict
    from tempfile import TemporaryDirectory

    from llmopt_cli.demo import Demo, verdict

    out = Output(as_json=as_json)
    with TemporaryDirectory(prefix="llmopt-demo-") as temporary:
        folder = output or Path(temporary)
        if output and output.exists():
            raise UsageError(f"`{output}` exists already", "give a folder that does not")
        folder.mkdir(parents=True, exist_ok=True)
        rows = Demo(folder, out, sys.stderr if as_json else None).run()
    out.result([asdict(row) for row in rows], lambda: ["", _table(rows), "\n".join(verdict(rows))])


def _table(rows: list[Row]) -> RenderableType:
    loads = list(rows[0].tokens_per_s)
    columns = ["weights", "MB", "perplexity", "KL", "same top-1", *(f"tokens/s at {load}" for load in loads)]
    cells = [
        (
            row.name,
            f"{row.weight_bytes / 1e6:.2f}",
            f"x {row.perplexity_ratio:.4f}",
            f"{row.mean_kl:.4f}",
            f"{row.top1_agreement:.1%}",
            *(f"{row.tokens_per_s[load]:,.0f}" for load in loads),
        )
        for row in rows
    ]
    return table("the demo model, before and after", columns, cells)
