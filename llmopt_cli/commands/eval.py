"""`llmopt eval`: what one checkpoint loses against another."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli.options import DeviceOpt, JsonOpt, QuietOpt, SeedOpt
from llmopt_cli.output import Output, lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.quant.evaluate import Comparison

BaseArg = Annotated[
    str, typer.Argument(metavar="BASE", help="The checkpoint to compare with: folder, hub id or `demo`.")
]
OtherArg = Annotated[
    str, typer.Argument(metavar="OTHER", help="The one that is judged, quantized in any format or not.")
]
TextOpt = Annotated[
    str | None, typer.Option("--text", help="Text, JSON lines or data set to judge by. [default: bundled text]")
]
SamplesOpt = Annotated[int, typer.Option("--samples", min=2, help="Windows of text, at most.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=8, help="Tokens of a window, at most the models' context.")]


def eval(  # noqa: A001 - the verb
    base: BaseArg,
    other: OtherArg,
    text: TextOpt = None,
    samples: SamplesOpt = 64,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Compare two checkpoints on one text: perplexity, KL divergence, top-1 agreement, each with an interval."""
    from llmopt_cli.quant.calibrate import EVALUATION
    from llmopt_cli.quant.evaluate import evaluate

    out = Output(as_json=as_json, quiet=quiet)
    judged_by = EVALUATION if text is None else text
    found = evaluate(base, other, out.progress, judged_by, samples, seq_len, seed, device or "auto")
    out.result(asdict(found), lambda: _render(found))


def _render(found: Comparison) -> list[RenderableType]:
    from llmopt_cli.quant.card import quality_rows

    quality = found.quality
    caption = (
        f"{quality.tokens:,} tokens of {found.text.file} in {quality.windows} windows of {quality.window};\n"
        f"{quality.convention}"
    )
    facts = (
        ("weights", f"{found.bytes_base / 1e6:,.2f} MB -> {found.bytes_other / 1e6:,.2f} MB"),
        ("perplexity", f"{quality.perplexity_base:.3f} -> {quality.perplexity:.3f}"),
    )
    title = f"{found.other} against {found.base}"
    return [table(title, ("", "", "95 % interval"), quality_rows(quality), caption=caption), lines(facts)]
