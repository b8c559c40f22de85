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

    from llmopt_cli.quant.dryrun import Plan
    from llmopt_cli.quant.job import Job
    from llmopt_cli.quant.quantize import Outcome

MethodOpt = Annotated[
    str | None, typer.Option("--method", help="`awq`, `gptq`, `rtn`, `q4_k_m` and others. [default: awq]")
]
FormatOpt = Annotated[
    str | None, typer.Option("--format", help="Layout of the files. [default: the method's; a wrong name lists all]")
]
BitsOpt = Annotated[int | None, typer.Option("--bits", help="Bits of a weight. [default: the method's, mostly 4]")]
GroupOpt = Annotated[
    int | None,
    typer.Option("--group-size", help="Inputs that share a scale; -1: one scale a row. [default: the method's]"),
]
SymOpt = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Grids around zero, or with a zero point. [default: the method's]")
]
OutOpt = Annotated[
    Path | None, typer.Option("-o", "--output", help="Folder to write. [default: ./MODEL-METHOD-w4g128]")
]
OverwriteOpt = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace the folder if it holds a model, and another run that is unfinished."),
]
SamplesOpt = Annotated[int, typer.Option("--samples", min=1, help="Windows of calibration text.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=8, help="Tokens of a window, at most the model's context.")]
CalibrationOpt = Annotated[
    str | None,
    typer.Option("--calibration", help="Text to calibrate on: JSON lines of `text` or `messages`, a text, a data set."),
]
EvaluationOpt = Annotated[
    str | None, typer.Option("--evaluation", help="Text to judge by. Both default to bundled, disjoint text.")
]
CorrectOpt = Annotated[
    str | None,
    typer.Option("--correct", help="`qep`: weights make good the errors upstream; `none`. [default: `qep` with GPTQ]"),
]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Fail if any linear has to fall back to another method.")]
MaxKldOpt = Annotated[
    float | None, typer.Option("--max-kld", min=0, help="Fail, and leave no file, if the mean KL divergence is larger.")
]
PreOpt = Annotated[
    str | None,
    typer.Option("--pre", help="GGUF: llama.cpp's name for how the tokenizer splits words, if it can't be told."),
]
RotateOpt = Annotated[
    bool, typer.Option("--rotate", help="Spread outliers by rotations that are folded into the weights.")
]
HeadOpt = Annotated[bool, typer.Option("--quantize-head", help="Quantize the output head, too.")]
TargetOpt = Annotated[
    float | None,
    typer.Option("--target-bpw", min=1, help="Bits a weight on average, shared out by what each linear would lose."),
]
KvScalesOpt = Annotated[
    bool, typer.Option("--kv-scales", help="Store a scale for keys and one for values of every layer, for fp8 caches.")
]
DryRunOpt = Annotated[bool, typer.Option("--dry-run", help="Say what it will take and make, and write nothing.")]


def quantize(
    model: RecipeModelArg = None,
    method: MethodOpt = None,
    output_format: FormatOpt = None,
    bits: BitsOpt = None,
    group_size: GroupOpt = None,
    symmetric: SymOpt = None,
    output: OutOpt = None,
    overwrite: OverwriteOpt = False,
    samples: SamplesOpt = 128,
    seq_len: SeqLenOpt = 512,
    seed: SeedOpt = 0,
    calibration: CalibrationOpt = None,
    evaluation: EvaluationOpt = None,
    correct: CorrectOpt = None,
    strict: StrictOpt = False,
    max_kld: MaxKldOpt = None,
    pre: PreOpt = None,
    rotate: RotateOpt = False,
    quantize_head: HeadOpt = False,
    target_bpw: TargetOpt = None,
    kv_scales: KvScalesOpt = False,
    dry_run: DryRunOpt = False,
    recipe: RecipeOpt = None,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Make a model smaller, prove what that cost in quality, and write files that every engine loads.

    Interrupted or killed, the same command goes on where it was.
    """
    from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION
    from llmopt_cli.quant.dryrun import plan
    from llmopt_cli.quant.job import Job
    from llmopt_cli.quant.quantize import EVALUATION_WINDOWS
    from llmopt_cli.quant.quantize import quantize as run
    from llmopt_cli.spec.recipe import Recipe

    deployment = Recipe.resolve(recipe, model=model, scheme=method, device=device)
    job = Job(
        model=deployment.model,
        method=deployment.scheme or "awq",
        format=output_format,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        out=output,
        overwrite=overwrite,
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        calibration=CALIBRATION if calibration is None else calibration,
        evaluation=EVALUATION if evaluation is None else evaluation,
        device=deployment.device,
        correct=correct,
        strict=strict,
        max_kld=max_kld,
        pre=pre,
        rotate=rotate,
        quantize_head=quantize_head,
        target_bpw=target_bpw,
        kv_scales=kv_scales,
    )
    out = Output(as_json=as_json, quiet=quiet)
    if dry_run:
        planned = plan(job, EVALUATION_WINDOWS)
        out.result(asdict(planned), lambda: _render_plan(planned))
        return
    outcome = run(job, out.progress)
    for warning in outcome.warnings:
        out.warn(warning)
    out.result(asdict(outcome) | {"path": str(job.folder)}, lambda: _render(outcome, job))


def _render(outcome: Outcome, job: Job) -> list[RenderableType]:
    from llmopt_cli.quant.card import ends_of, extras, quality_rows

    quality, scheme, text = outcome.quality, outcome.scheme, outcome.calibration
    saved = 1 - outcome.bytes_after / outcome.bytes_before
    facts = (
        ("modules", outcome.summary),
        ("calibrated", f"{text.windows * text.window:,} tokens of {text.file}, sha256 {text.sha256[:16]}"),
        *_coverage(outcome),
        ("overlap", f"{outcome.overlap:.2%} of the evaluation's 13-grams are in the calibration text"),
        ("weights", f"{outcome.bytes_before / 1e6:,.2f} MB -> {outcome.bytes_after / 1e6:,.2f} MB ({saved:.1%} less)"),
        ("precision", f"{scheme.bits_per_weight:.3f} bits a weight of the blocks' linears; {ends_of(outcome)}"),
        *extras(outcome),
        ("perplexity", f"{quality.perplexity_base:.3f} -> {quality.perplexity:.3f}"),
        ("time", f"{outcome.seconds['quantizing']:,.0f} s, and {outcome.seconds['judging']:,.0f} s to judge it"),
        ("written", f"{job.folder}, read back and compared"),
        ("next", f"llmopt serve {job.folder}"),
    )
    measured = (
        f"{quality.tokens:,} tokens of {outcome.evaluation.file} in {quality.windows} windows of {quality.window};\n"
        f"{quality.convention}"
    )
    columns = ("the worst of each role", "method", "damping", "tokens", "relative output error")
    return [
        table("Modules", columns, _by_role(outcome)),
        table("Quality against the base", ("", "", "95 % interval"), quality_rows(quality), caption=measured),
        lines(facts),
    ]


def _coverage(outcome: Outcome) -> list[tuple[str, str]]:
    """How much of the calibration text reached the experts, if there are any."""
    seen = sorted(module.tokens for module in outcome.modules if ".experts." in module.name)
    if not seen:
        return []
    middle = seen[len(seen) // 2]
    return [("experts", f"{len(seen)} linears saw {seen[0]:,} to {seen[-1]:,} tokens each, {middle:,} in the middle")]


def _by_role(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row for each name that linears have in their blocks: the one with the largest error."""
    roles = dict.fromkeys(module.name.rpartition(".")[2] for module in outcome.modules)
    worst = [
        max((one for one in outcome.modules if one.name.rpartition(".")[2] == role), key=lambda one: one.error or 0)
        for role in roles
    ]
    return [
        (
            one.name,
            f"{one.method}: {one.scheme}" if outcome.ends else one.method,
            f"{one.damping:g}",
            f"{one.tokens:,}",
            "none seen" if one.error is None else f"{one.error:.2%}",
        )
        for one in worst
    ]


def _render_plan(plan: Plan) -> list[RenderableType]:
    kinds = [
        (
            kind.name,
            str(kind.count),
            " x ".join(map(str, kind.shape)),
            f"{kind.bits:.3f}",
            f"{kind.nbytes / 1e6:,.2f} MB",
        )
        for kind in plan.kinds
    ]
    facts = [
        ("peak memory", f"{plan.peak_memory_bytes / 1e6:,.0f} MB beside Python and torch"),
        ("disk", f"{plan.disk_bytes / 1e6:,.0f} MB while it runs"),
        ("time", f"about {plan.minutes:,.1f} minutes"),
        ("weights", f"{plan.bytes_before / 1e6:,.2f} MB -> {plan.bytes_after / 1e6:,.2f} MB"),
    ]
    facts += [("problem", f"{kind.name}: {kind.problem}") for kind in plan.kinds if kind.problem]
    title = f"{plan.model} with {plan.method} in {plan.format} files"
    return [
        table(title, ("tensors", "count", "shape", "bits a weight", "size"), kinds),
        table("Who loads it", ("engine", ""), list(plan.engines.items())),
        lines(facts),
    ]
