"""`llmopt quantize`, the whole of it: refuse what can't be done, quantize block by block, judge, write, verify.

Peak memory: one block in float32 with its statistics, or what lies outside the blocks; and a batch of hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt_cli import __version__
from llmopt_cli.errors import QualityError, UnknownNameError, UsageError
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.load import pick_device
from llmopt_cli.output import Report
from llmopt_cli.quant.blocks import ModuleReport, Settings
from llmopt_cli.quant.calibrate import (
    CALIBRATION,
    EVALUATION,
    GRAM,
    Corpus,
    TextUsed,
    overlap,
    read_tokenizer,
    refuse_overlap,
    sample,
    windows,
)
from llmopt_cli.quant.card import card
from llmopt_cli.quant.methods import METHODS, Method
from llmopt_cli.quant.pipeline import Pipeline
from llmopt_cli.quant.preflight import (
    Layout,
    refuse_full_disk,
    refuse_misfits,
    refuse_not_finite,
    refuse_not_quantizable,
)
from llmopt_cli.quant.quality import Quality
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.walk import Walk
from llmopt_cli.quant.work import Work, fingerprint, working
from llmopt_cli.quant.write import refuse_existing, stored_dtypes, verify, write_model
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme

CORRECTIONS = ("qep",)
EVALUATION_WINDOWS = 64  # at most: the interval narrows with their root, the time grows with their number
NOT_THE_RUN = ("out", "overwrite", "max_kld")  # fields of a Job that change nothing about its blocks
SHARED_AT_MOST = 0.01  # of its 13-grams may a text of another author share
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Job:
    """What is wanted; None is the method's own. `samples` windows of `seq_len` tokens calibrate.

    Without `out` the job names the folder. `correct` lets weights make good the errors before them. `max_kld` is the
    mean divergence beyond which the result is no success, `strict` makes every fallback to another method a failure.
    """

    model: str
    method: str = "awq"
    format: str | None = None
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    out: Path | None = None
    overwrite: bool = False
    samples: int = 128
    seq_len: int = 512
    seed: int = 0
    calibration: str | Path = CALIBRATION
    evaluation: str | Path = EVALUATION
    device: str = "auto"
    correct: str | None = None
    strict: bool = False
    max_kld: float | None = None

    @property
    def how(self) -> Method:
        """The method; UnknownNameError if there is none of this name."""
        if self.method not in METHODS:
            raise UnknownNameError("method", self.method, METHODS)
        return METHODS[self.method]

    @property
    def layout(self) -> Format:
        """The file format; UsageError if it is none or can't hold what the method makes."""
        name = self.format or self.how.formats[0]
        if name not in FORMATS:
            raise UnknownNameError("format", name, FORMATS)
        if name not in self.how.formats:
            raise UsageError(
                f"`{name}` files can't hold what {self.method} makes", f"it goes into: {', '.join(self.how.formats)}"
            )
        return FORMATS[name]

    @property
    def scheme(self) -> Scheme:
        """The precision wanted; UsageError if the method has no such bits or the group size is none."""
        scheme = self.how.scheme
        if self.how.own_grid and (self.group_size, self.symmetric) != (None, None):
            raise UsageError(f"{self.method} has a grid of its own", "leave out --group-size, --sym and --asym")
        if self.bits is not None and self.bits != scheme.weight_bits:
            if self.bits not in self.how.bits:
                known = ", ".join(map(str, self.how.bits))
                raise UsageError(f"{self.method} makes no {self.bits}-bit weights", f"--bits can be: {known}")
            scheme = replace(scheme, weight_bits=self.bits, zero_bits=self.bits if scheme.zero_bits else 0)
        if self.group_size is not None:
            if self.group_size < 1 and self.group_size != -1:
                raise UsageError(f"the group size {self.group_size} is neither positive nor -1 (one group a row)")
            scheme = replace(scheme, group_size=max(self.group_size, 0))
        return scheme if self.symmetric is None else replace(scheme, symmetric=self.symmetric)

    @property
    def corrected(self) -> bool:
        """Whether errors upstream are corrected; UnknownNameError if in no way that is known."""
        if self.correct not in (None, *CORRECTIONS):
            raise UnknownNameError("correction", str(self.correct), CORRECTIONS)
        return self.correct is not None

    @property
    def folder(self) -> Path:
        """Where the model goes."""
        if self.out is not None:
            return self.out
        scheme = self.scheme
        group = f"g{scheme.group_size}" if scheme.group_size else ""
        return Path(f"{Path(self.model).resolve().name}-{self.method}-w{scheme.weight_bits}{group}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made and what it cost: the content of quality.json. Bytes are those of all stored tensors.

    `overlap` is the share of the evaluation's 13-grams that the calibration text has, too.
    """

    model: str
    method: str
    scheme: Scheme
    format: str
    seed: int
    calibration: TextUsed
    evaluation: TextUsed
    overlap: float
    summary: str
    warnings: tuple[str, ...]
    quality: Quality
    bytes_before: int
    bytes_after: int
    modules: tuple[ModuleReport, ...]
    llmopt: str = __version__


@dataclass(frozen=True, eq=False)
class Texts:
    """The two texts, and the token ids int64 [N, L] of each that are used."""

    calibration: Corpus
    evaluation: Corpus
    fitted: Tensor
    judged: Tensor


def quantize(job: Job, progress: Progress) -> Outcome:
    """Quantize `job.model` into `job.folder`, which appears complete and verified, or not at all.

    Interrupted or killed, the same job goes on where it was. QualityError if the result is worse than `job.max_kld`.
    """
    scheme, folder, layout, corrected = job.scheme, job.folder, job.layout, job.corrected
    checkpoint = refuse_not_quantizable(Checkpoint.open(job.model))
    refuse_existing(folder, checkpoint.path, job.overwrite)
    stored = stored_dtypes(checkpoint)
    texts = read_texts(job, checkpoint)
    with Skeleton(checkpoint, pick_device(job.device)) as skeleton:
        parts = Layout.of(skeleton)
        refuse_misfits(parts, layout, scheme)
        refuse_full_disk(folder, parts, scheme, checkpoint, (len(texts.fitted) + 2 * len(texts.judged)) * job.seq_len)
        settings = Settings(
            job.how,
            layout,
            scheme,
            {name: stored[place] for name, place in skeleton.stored.items() if place in stored},
            strict=job.strict,
            correct=corrected,
        )
        with working(folder, len(skeleton.blocks), _fingerprint(job, checkpoint, texts), job.overwrite) as work:
            if not work.done:
                with progress(f"checking {checkpoint.name}") as report:
                    refuse_not_finite(checkpoint, report)
            pipeline = Pipeline(Walk(skeleton), work, texts.fitted, texts.judged, settings)
            with progress(f"quantizing {checkpoint.name} with {job.method}") as report:
                pipeline.run(report)
            with progress("comparing with the base") as report:
                quality = pipeline.quality(report)
            _gate(job, quality)
            written = _write(work, pipeline, parts, checkpoint)
            outcome = _outcome(job, texts, pipeline, quality, (checkpoint.nbytes, written.nbytes))
            (work.output / "quality.json").write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
            (work.output / "README.md").write_text(card(outcome), encoding="utf-8")
            work.finish()
    return outcome


def read_texts(job: Job, checkpoint: Checkpoint) -> Texts:
    """Both texts in windows of at most the model's context; UsageError if too short or with a text in common."""
    calibration, evaluation = Corpus.read(job.calibration), Corpus.read(job.evaluation)
    refuse_overlap(calibration, evaluation)
    tokenizer = read_tokenizer(checkpoint)
    length = min(job.seq_len, checkpoint.spec.max_context or job.seq_len)
    fitted = sample(windows(calibration, tokenizer, length), job.samples, job.seed)
    judged = sample(windows(evaluation, tokenizer, length), EVALUATION_WINDOWS, job.seed)
    return Texts(calibration, evaluation, fitted, judged)


def _fingerprint(job: Job, checkpoint: Checkpoint, texts: Texts) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(job).items() if name not in NOT_THE_RUN}
    used = {"calibration": texts.calibration.sha256, "evaluation": texts.evaluation.sha256, "llmopt": __version__}
    return fingerprint(checkpoint, settings | used)


def _gate(job: Job, quality: Quality) -> None:
    found = quality.kl_mean
    if job.max_kld is not None and found.value > job.max_kld:
        raise QualityError(
            f"the mean KL divergence from the base is {found.value:.5f} ({found.low:.5f} to {found.high:.5f}), "
            f"more than {job.max_kld:g}; perplexity ratio {quality.perplexity_ratio.value:.4f}",
            "take more --bits, a smaller --group-size or another --method",
        )


def _write(work: Work, pipeline: Pipeline, parts: Layout, checkpoint: Checkpoint) -> Checkpoint:
    """The model's files in the working folder, read back and compared with what was judged."""
    settings = pipeline.settings
    exceptions = {parts.stored[name]: scheme for name, scheme in settings.exceptions.items()}
    config = settings.format.config(settings.scheme, parts.left, exceptions)
    blocks = [work.weights(index) for index in range(work.total)]
    write_model(work.output, checkpoint, blocks, {"quantization_config": config})
    if settings.format.config_copy:
        (work.output / settings.format.config_copy).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return verify(work.output, checkpoint, pipeline.digests())


def _outcome(job: Job, texts: Texts, pipeline: Pipeline, quality: Quality, nbytes: tuple[int, int]) -> Outcome:
    reports = tuple(pipeline.reports())
    shared = overlap(texts.fitted, texts.judged)
    return Outcome(
        model=pipeline.skeleton.checkpoint.name,
        method=job.method,
        scheme=job.scheme,
        format=job.layout.name,
        seed=job.seed,
        calibration=TextUsed.of(texts.calibration, texts.fitted),
        evaluation=TextUsed.of(texts.evaluation, texts.judged),
        overlap=shared,
        summary=_summary(reports, job.method),
        warnings=tuple(_warnings(reports, shared)),
        quality=quality,
        bytes_before=nbytes[0],
        bytes_after=nbytes[1],
        modules=reports,
    )


def _summary(reports: tuple[ModuleReport, ...], method: str) -> str:
    fallen = sum(report.fallback for report in reports)
    return f"{len(reports) - fallen}/{len(reports)} {method.upper()}, {fallen} fallback"


def _warnings(reports: tuple[ModuleReport, ...], shared: float) -> list[str]:
    """What a reader of the result should know about its calibration."""
    poor = [report for report in reports if report.tokens < report.inputs]
    unseen = [report for report in reports if report.error is None]
    found = []
    if poor:
        least = min(poor, key=lambda report: report.tokens / report.inputs)
        found.append(
            f"{len(poor)} linears saw fewer tokens than they have inputs (`{least.name}`: {least.tokens:,} of "
            f"{least.inputs:,}): their statistics are of low rank; give more --samples"
        )
    if unseen:
        found.append(f"{len(unseen)} linears, all of experts that no token chose, saw none at all")
    if shared > SHARED_AT_MOST:
        found.append(f"{shared:.1%} of the evaluation's {GRAM}-grams are in the calibration text, too: figures flatter")
    return found
