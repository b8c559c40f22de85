"""`llmopt convert`: a quantized model into another file format, weight for weight the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli.options import JsonOpt, QuietOpt
from llmopt_cli.output import Output, lines

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.quant.convert import Converted

SourceArg = Annotated[str, typer.Argument(metavar="MODEL", help="A quantized model: a local folder or a hub id.")]
FormatOpt = Annotated[str, typer.Option("--format", help="`awq`, `gptq`, `gptq_v2` or `compressed-tensors`.")]
OutOpt = Annotated[Path | None, typer.Option("-o", "--output", help="Folder to write. [default: ./MODEL-FORMAT]")]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it holds a model.")]


def convert(
    model: SourceArg,
    output_format: FormatOpt,
    output: OutOpt = None,
    overwrite: OverwriteOpt = False,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Repack a GPTQ, AWQ or compressed-tensors model into another of these formats, without changing a weight."""
    from dataclasses import asdict

    from llmopt_cli.quant.convert import convert as run

    out = Output(as_json=as_json, quiet=quiet)
    made = run(model, output_format, output, overwrite, out.progress)
    out.result(asdict(made), lambda: _render(made))


def _render(made: Converted) -> list[RenderableType]:
    facts = (
        ("formats", f"{made.source_format} -> {made.format}"),
        ("linears", f"{made.linears}, every weight read back and equal"),
        ("bytes", f"{made.bytes_before / 1e6:,.2f} MB -> {made.bytes_after / 1e6:,.2f} MB"),
        ("written", made.path),
        ("next", f"llmopt serve {made.path}"),
    )
    return [lines(facts)]
