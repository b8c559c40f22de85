"""`llmopt quantize`: a smaller model, and the proof of what that cost."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli.options import DeviceOpt, JsonOpt, QuietOpt, RecipeModelArg, RecipeOpt, SeedOpt
from llmopt_cli.output import Output, lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.quant.quantize import Job, Outcome

MethodOpt = Annotated[
    str | None, typer.Option("--method", help="`awq` (scaled by activations, clipped) or `rtn`. [default: awq]")
]
FormatOpt = Annotated[str, typer.Option("--format", help="Layout of the file: `awq` (gemm), which every engine loads.")]
OutOpt = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write. [default: ./MODEL-METHOD-w4g128]")
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it holds a model.")]
SamplesOpt = Annotated[int, typer.Option("--samples", min=1, help="Windows of calibration text.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=8, help="Tokens of a window, at most the model's context.")]
CalibrationOpt = Annotated[
    Path | None, typer.Option("--calibration", help='Text to calibrate on: `*.jsonl` of {"text": ...}, or plain text.')
]
EvaluationOpt = Annotated[
    Path | None, typer.Option("--evaluation", help="Text to judge by. Both default to bundled, disjoint text.")
]
GroupOpt = Annotated[int, typer.Option("--group-size", help="Inputs that share a scale; -1: one scale a row.")]


def quantize(
    model: RecipeModelArg = None,
    method: MethodOpt = None,
    output_format: FormatOpt = "awq",
    output: OutOpt = None,
    overwrite: OverwriteOpt = False,
    samples: SamplesOpt = 32,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = 0,
    calibration: CalibrationOpt = None,
    evaluation: EvaluationOpt = None,
    group_size: GroupOpt = 128,
    recipe: RecipeOpt = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make a model smaller, prove what that cost in quality, and write files that every engine loads."""
    from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION
    from llmopt_cli.quant.quantize import Job
    from llmopt_cli.quant.quantize import quantize as run
    from llmopt_cli.spec.recipe import Recipe

    deployment = Recipe.resolve(recipe, model=model, scheme=method, device=device)
    job = Job(
        model=deployment.model,
        method=deployment.scheme or "awq",
        format=output_format,
        group_size=group_size,
        out=output,
        overwrite=overwrite,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        calibration=calibration or CALIBRATION,
        evaluation=evaluation or EVALUATION,
        device=deployment.device,
    )
    out = Output(as_json=as_json, quiet=quiet)
    outcome = run(job, out.progress)
    out.result(asdict(outcome) | {"path": str(job.folder)}, lambda: _render(outcome, job))


def _render(outcome: Outcome, job: Job) -> list[RenderableType]:
    from llmopt_cli.quant.card import quality_rows

    quality, scheme = outcome.quality, outcome.scheme
    saved = 1 - outcome.bytes_after / outcome.bytes_before
    facts = (
        ("modules", outcome.summary),
        ("weights", f"{outcome.bytes_before / 1e6:,.2f} MB -> {outcome.bytes_after / 1e6:,.2f} MB ({saved:.1%} less)"),
        ("precision", f"{scheme.bits_per_weight:.3f} bits a quantized weight; embeddings and head as they were"),
        ("perplexity", f"{quality.perplexity_base:.3f} -> {quality.perplexity:.3f}"),
        ("written", f"{job.folder}, read back and compared"),
        ("next", f"llmopt serve {job.folder}"),
    )
    measured = (
        f"{quality.tokens:,} tokens of {outcome.evaluation.file} in {quality.windows} windows of {quality.window};\n"
        f"{quality.convention}"
    )
    return [
        table("Modules", ("the worst of each role", "relative output error", "range kept"), _by_role(outcome)),
        table("Quality against the base", ("", "", "95 % interval"), quality_rows(outcome), caption=measured),
        lines(facts),
    ]


def _by_role(outcome: Outcome) -> list[tuple[str, str, str]]:
    """One row for each name that linears have in their blocks: the one with the largest error."""
    roles = dict.fromkeys(module.name.rpartition(".")[2] for module in outcome.modules)
    worst = [
        max((module for module in outcome.modules if module.name.endswith(f".{role}")), key=lambda one: one.error)
        for role in roles
    ]
    return [(module.name, f"{module.error:.2%}", f"{module.range_kept:.3f}") for module in worst]
