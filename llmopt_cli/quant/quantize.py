"""`llmopt quantize`, the whole of it: refuse what can't be done, quantize block by block, judge, write, verify.

Peak memory: one block in float32 with its statistics, or what lies outside the blocks; and a batch of hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt_cli import __version__
from llmopt_cli.errors import QualityError
from llmopt_cli.model.load import pick_device
from llmopt_cli.output import Report
from llmopt_cli.quant.blocks import ModuleReport, Settings
from llmopt_cli.quant.calibrate import (
    Corpus,
    TextUsed,
    overlap,
    read_tokenizer,
    refuse_overlap,
    sample,
    windows,
)
from llmopt_cli.quant.card import card
from llmopt_cli.quant.job import Job
from llmopt_cli.quant.kv_scales import KV_CACHE_SCHEME
from llmopt_cli.quant.outside import embedding_and_head, untied, with_head
from llmopt_cli.quant.pipeline import Pipeline
from llmopt_cli.quant.preflight import (
    Layout,
    known,
    refuse_full_disk,
    refuse_misfits,
    refuse_not_finite,
    refuse_not_quantizable,
)
from llmopt_cli.quant.quality import Quality
from llmopt_cli.quant.rehearse import rehearse
from llmopt_cli.quant.remarks import substitutes, summary, warnings
from llmopt_cli.quant.rotate import Rotation
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.walk import Walk
from llmopt_cli.quant.work import Work, fingerprint, working
from llmopt_cli.quant.write import refuse_existing, stored_dtypes, verify
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme

EVALUATION_WINDOWS = 64  # at most: the interval narrows with their root, the time grows with their number
NOT_THE_RUN = ("out", "overwrite", "max_kld")  # fields of a Job that change nothing about its blocks
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made and what it cost: the content of quality.json. Bytes are those of all stored tensors.

    `overlap` is the share of the evaluation's 13-grams that the calibration text has, too. `ends` are the weights
    outside the blocks that are quantized as well, and the precision of each. `untied_bytes` are those of an output head
    that in the base is the embedding, `head_bits` those of a weight of a quantized head. `products` is the dtype in
    which the calibration text was multiplied, `seconds` what this process took for quantizing and for judging.
    """

    model: str
    method: str
    scheme: Scheme
    ends: dict[str, str]
    format: str
    seed: int
    calibration: TextUsed
    evaluation: TextUsed
    products: str
    overlap: float
    summary: str
    warnings: tuple[str, ...]
    quality: Quality
    bytes_before: int
    bytes_after: int
    modules: tuple[ModuleReport, ...]
    rotated: bool = False
    untied_bytes: int = 0
    head_bits: float | None = None
    target_bpw: float | None = None
    kv_scales: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
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
    folder, layout, wishes, schemes = job.folder, job.layout, job.wishes, job.widths
    checkpoint = refuse_not_quantizable(Checkpoint.open(job.model))
    refuse_existing(folder, checkpoint.path, job.overwrite)
    fixed = job.files.fixed(checkpoint)
    stored = stored_dtypes(checkpoint)
    texts = read_texts(job, checkpoint)
    with Skeleton(checkpoint, pick_device(job.device)) as skeleton:
        parts = Layout.of(skeleton, fixed, wishes)
        for scheme in schemes.values() or [job.scheme]:
            refuse_misfits(parts, layout, scheme)
        tokens = round((len(texts.fitted) * job.streams + 2 * len(texts.judged)) * job.seq_len)
        refuse_full_disk(folder, parts, job.typical, checkpoint, tokens)
        settings, walk, steps = _settings(job, skeleton, parts, stored), Walk(skeleton), len(skeleton.blocks)
        run = _fingerprint(job, checkpoint, texts)
        with working(folder, steps + wishes.head, run, job.overwrite) as work:
            if not work.done:
                with progress(f"checking {checkpoint.name}") as report:
                    refuse_not_finite(checkpoint, report)
                rehearse(walk, settings.rotation, settings.kv_scales)
            pipeline = Pipeline(walk, work, texts.fitted, texts.judged, settings)
            pipeline.begin()
            if job.target_bpw is not None:
                with progress("weighing what bits are worth") as report:
                    pipeline = pipeline.allotted(schemes, job.target_bpw, report)
            with progress(f"quantizing {checkpoint.name} with {job.method}") as report:
                pipeline.run(report)
            return _finish(job, texts, pipeline, parts, progress)


def _finish(job: Job, texts: Texts, pipeline: Pipeline, parts: Layout, progress: Progress) -> Outcome:
    """Judge what was made, write it, read it back, and put it in its place."""
    work = pipeline.work
    with progress("comparing with the base") as report:
        quality = pipeline.quality(report)
    _gate(job, quality)
    written = _write(job, work, pipeline, parts, texts)
    outcome = _outcome(job, texts, pipeline, parts, quality, written)
    facts = {name: value for name, value in asdict(outcome).items() if name != "seconds"}  # equal runs, equal files
    (work.output / "quality.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (work.output / "README.md").write_text(card(outcome), encoding="utf-8")
    work.finish()
    return outcome


def read_texts(job: Job, checkpoint: Checkpoint) -> Texts:
    """Both texts in windows of at most the model's context; UsageError if too short or with a text in common."""
    calibration, evaluation = Corpus.read(job.calibration), Corpus.read(job.evaluation)
    refuse_overlap(calibration, evaluation)
    tokenizer = read_tokenizer(checkpoint)
    length = min(job.seq_len, checkpoint.spec.max_context or job.seq_len)
    fitted = sample(known(windows(calibration, tokenizer, length), checkpoint), job.samples, job.seed)
    judged = sample(known(windows(evaluation, tokenizer, length), checkpoint), EVALUATION_WINDOWS, job.seed)
    return Texts(calibration, evaluation, fitted, judged)


def _settings(job: Job, skeleton: Skeleton, parts: Layout, stored: Mapping[str, torch.dtype]) -> Settings:
    dtypes = {name: stored[place] for name, place in skeleton.stored.items() if place in stored}
    return Settings(
        job.how,
        job.layout,
        job.scheme,
        with_head(skeleton, dtypes),
        exceptions=parts.exceptions,
        ends=parts.ends,
        strict=job.strict,
        correct=job.corrected,
        rotation=Rotation.make(parts.hidden, job.seed, skeleton.device) if job.rotate else None,
        head=job.quantize_head,
        kv_scales=job.kv_scales,
        products=job.how.products(skeleton.device),
    )


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


def _write(job: Job, work: Work, pipeline: Pipeline, parts: Layout, texts: Texts) -> Checkpoint:
    """The model's files in the working folder, read back and compared with what was judged."""
    settings, checkpoint, files = pipeline.settings, pipeline.skeleton.checkpoint, job.files
    exceptions = {parts.stored[name]: scheme for name, scheme in settings.exceptions.items()}
    config = settings.format.config(settings.scheme, parts.left, exceptions)
    if settings.head and settings.format.head_key:
        config[settings.format.head_key] = True
    if settings.kv_scales and settings.format.cache_key:
        config[settings.format.cache_key] = dict(KV_CACHE_SCHEME)
    changes = {"quantization_config": config} | (untied(checkpoint.config) if job.rotate else {})
    used = TextUsed.of(texts.calibration, texts.fitted) if settings.method.needs_gram else None
    files.write(work.output, checkpoint, work.made, changes, used)
    return verify(work.output, checkpoint, pipeline.digests(), files.same(checkpoint))


def _outcome(
    job: Job, texts: Texts, pipeline: Pipeline, parts: Layout, quality: Quality, written: Checkpoint
) -> Outcome:
    reports, skeleton, settings = tuple(pipeline.reports()), pipeline.skeleton, pipeline.settings
    _, head = embedding_and_head(skeleton.model)
    checkpoint, shared = skeleton.checkpoint, overlap(texts.fitted, texts.judged)
    return Outcome(
        model=checkpoint.name,
        method=job.method,
        scheme=parts.on_average(settings.scheme, settings.exceptions),
        ends={skeleton.stored[name]: scheme.name for name, scheme in parts.ends.items()},
        format=job.layout.name,
        seed=job.seed,
        calibration=TextUsed.of(texts.calibration, texts.fitted),
        evaluation=TextUsed.of(texts.evaluation, texts.judged),
        products=str(settings.products).removeprefix("torch."),
        overlap=shared,
        summary=summary(reports, job.method),
        warnings=(*warnings(reports, shared), *substitutes(job.files.notes(checkpoint))),
        quality=quality,
        bytes_before=checkpoint.nbytes,
        bytes_after=written.nbytes,
        modules=reports,
        rotated=job.rotate,
        untied_bytes=_bytes_of(written, skeleton.place(head)) if skeleton.tied and job.rotate else 0,
        head_bits=settings.scheme_of(head).bits_per_weight if settings.head else None,
        target_bpw=job.target_bpw,
        kv_scales=job.kv_scales,
        seconds=pipeline.seconds,
    )


def _bytes_of(checkpoint: Checkpoint, linear: str) -> int:
    return sum(header.nbytes for name, header in checkpoint.tensors.items() if name.startswith(f"{linear}."))
