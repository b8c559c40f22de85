"""`llmopt train-heads`: heads that draft for a model, learnt from what it writes."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmopt_cli.errors import UsageError
from llmopt_cli.options import DeviceOpt, JsonOpt, ModelArg, QuietOpt, SeedOpt
from llmopt_cli.output import Output, lines, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from llmopt_cli.runtime.speculative.train_job import Outcome

KindOpt = Annotated[str, typer.Option("--kind", help="`medusa` or `eagle`.")]
HeadsOpt = Annotated[int, typer.Option("--num-heads", min=1, max=16, help="Tokens that a draft is to have.")]
OutOpt = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Folder to write. [default: MODEL-KIND, beside a model that is a folder]"),
]
OverwriteOpt = Annotated[bool, typer.Option("--overwrite", help="Replace the heads that are in the folder.")]
TextOpt = Annotated[
    str | None,
    typer.Option("--calibration", help="Text to learn from: JSON lines, a text, a data set. [default: bundled text]"),
]
RewrittenOpt = Annotated[
    bool,
    typer.Option("--rewritten/--as-is", help="Learn from what the model writes on from the text, or from the text."),
]
SamplesOpt = Annotated[int, typer.Option("--samples", min=2, help="Windows of text, at most.")]
SeqLenOpt = Annotated[int, typer.Option("--seq-len", min=32, help="Tokens of a window, at most the model's context.")]
MinutesOpt = Annotated[float, typer.Option("--minutes", min=0.01, help="Learn no longer than this.")]


def train_heads(
    model: ModelArg = "demo",
    kind: KindOpt = "eagle",
    num_heads: HeadsOpt = 4,
    out_folder: OutOpt = None,
    overwrite: OverwriteOpt = False,
    calibration: TextOpt = None,
    rewritten: RewrittenOpt = True,
    samples: SamplesOpt = 512,
    seq_len: SeqLenOpt = 256,
    minutes: MinutesOpt = 10.0,
    seed: SeedOpt = 0,
    device: DeviceOpt = None,
    as_json: JsonOpt = False,
    quiet: QuietOpt = False,
) -> None:
    """Teach a model heads that draft for it, for `--spec-method medusa` or `eagle`. The model stays as it is.

    Interrupted, it keeps what was learnt so far.
    """
    from llmopt_cli.quant import calibrate
    from llmopt_cli.runtime.speculative.train_job import Lesson, folder_for
    from llmopt_cli.runtime.speculative.train_job import train_heads as run
    from llmopt_cli.spec.checkpoint import Checkpoint

    out = Output(as_json=as_json, quiet=quiet)
    checkpoint = Checkpoint.open(model)
    folder = folder_for(checkpoint, kind, out_folder, overwrite)
    if seq_len > checkpoint.spec.max_context:
        raise UsageError(f"--seq-len {seq_len} is above the model's context of {checkpoint.spec.max_context:,} tokens")
    tokenizer = calibrate.read_tokenizer(checkpoint)
    learnt, held = (
        calibrate.windows(calibrate.Corpus.read(text), tokenizer, seq_len)
        for text in (calibration or calibrate.CALIBRATION, calibrate.EVALUATION)
    )
    lesson = Lesson(kind, num_heads, rewritten, 60 * minutes, seed)
    texts = calibrate.sample(learnt, samples, seed)
    outcome = run(
        checkpoint, lesson, texts, calibrate.sample(held, samples, seed), folder, out.progress, device or "auto"
    )
    out.result(asdict(outcome), lambda: _render(outcome, model))


def _render(outcome: Outcome, model: str) -> list[RenderableType]:
    places = zip(outcome.score.accuracy, outcome.score.tokens_per_step, strict=True)
    rows = [(str(place), f"{hit:.1%}", f"{brought:.2f}") for place, (hit, brought) in enumerate(places, 1)]
    columns = ("draft", "right", "tokens a step with so many")
    caption = (
        f"along {outcome.held_tokens:,} tokens that the model wrote from held-out text;\n"
        "each draft as if those before it were right"
    )
    facts = [
        ("learnt", f"{outcome.steps:,} steps on {outcome.tokens:,} tokens in {outcome.seconds:,.0f} s"),
        ("written", outcome.path),
        ("next", f"llmopt serve {model} --spec-method {outcome.kind} --spec-model {outcome.path}"),
    ]
    if outcome.steps < outcome.planned:
        facts.insert(1, ("left out", f"{outcome.planned - outcome.steps:,} steps: the time was up"))
    title = f"{outcome.kind} heads for {outcome.model}"
    return [table(title, columns, rows, caption=caption), lines(facts)]
