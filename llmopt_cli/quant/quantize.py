"""`llmopt quantize`, the whole of it: read, quantize, judge against the base, write, verify.

Peak memory: two float32 copies of the model (base and quantized, while they are compared) and the calibration
activations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli import __version__
from llmopt_cli.errors import CheckpointError, ModelError, UnknownNameError, UsageError
from llmopt_cli.model.load import pick_device, read_config
from llmopt_cli.output import Report
from llmopt_cli.quant.blocks import METHODS, ModuleReport, quantize_model, refuse_misfits
from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION, Corpus, refuse_overlap, sample, windows
from llmopt_cli.quant.card import card
from llmopt_cli.quant.quality import Quality, compare
from llmopt_cli.quant.structure import find_blocks
from llmopt_cli.quant.write import new_folder, refuse_existing, stored_dtypes, verify, write_model
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme, find_scheme

FORMATS = ("awq",)
EVALUATION_WINDOWS = 64  # at most: the interval narrows with their root, the time grows with their number
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Job:
    """What is wanted. `samples` windows of `seq_len` tokens calibrate; without `out` the job names the folder."""

    model: str
    method: str = "awq"
    format: str = "awq"
    group_size: int = 128
    out: Path | None = None
    overwrite: bool = False
    samples: int = 32
    seq_len: int = 512
    seed: int = 0
    calibration: Path = CALIBRATION
    evaluation: Path = EVALUATION
    device: str = "auto"

    @property
    def scheme(self) -> Scheme:
        """The precision wanted; UsageError if there is no such method, format or group size."""
        if self.method not in METHODS:
            raise UnknownNameError("method", self.method, METHODS)
        if self.format not in FORMATS:
            raise UnknownNameError("format", self.format, FORMATS)
        if self.group_size < 1 and self.group_size != -1:
            raise UsageError(f"the group size {self.group_size} is neither positive nor -1 (one group a row)")
        return replace(find_scheme(self.method), group_size=max(self.group_size, 0))

    @property
    def folder(self) -> Path:
        """Where the model goes."""
        if self.out is not None:
            return self.out
        scheme = self.scheme
        group = f"g{scheme.group_size}" if scheme.group_size else ""
        return Path(f"{Path(self.model).resolve().name}-{scheme.method}-w{scheme.weight_bits}{group}")


@dataclass(frozen=True, slots=True)
class TextUsed:
    """A text by its file name and hash, and how much of it was used."""

    file: str
    sha256: str
    windows: int
    window: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made and what it cost: the content of quality.json. Bytes are those of all stored tensors."""

    model: str
    scheme: Scheme
    format: str
    seed: int
    calibration: TextUsed
    evaluation: TextUsed
    summary: str
    quality: Quality
    bytes_before: int
    bytes_after: int
    modules: tuple[ModuleReport, ...]
    llmopt: str = __version__


def quantize(job: Job, progress: Progress) -> Outcome:
    """Quantize `job.model` into `job.folder`, which appears complete and verified, or not at all."""
    scheme, folder = job.scheme, job.folder
    checkpoint = Checkpoint.open(job.model)
    refuse_existing(folder, checkpoint.path, job.overwrite)
    stored = stored_dtypes(_unquantized(checkpoint))
    calibration, evaluation = Corpus.read(job.calibration), Corpus.read(job.evaluation)
    refuse_overlap(calibration, evaluation)
    device = pick_device(job.device)
    model = _load(checkpoint, device)
    _same_names(checkpoint, model)
    refuse_misfits(model, scheme)
    fitted, judged = _tokens(job, checkpoint, model, calibration, evaluation)
    with new_folder(folder) as partial:
        with progress(f"quantizing {checkpoint.name} with {scheme.method}") as report:
            made = quantize_model(model, scheme, fitted, stored, report)
        left = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in made.linears]
        write_model(partial, checkpoint, made, scheme, left)
        written = verify(partial, model.state_dict(), made)
        with progress("comparing with the base") as report:
            quality = compare(_logits(_load(checkpoint, device)), _logits(model), judged, report)
        outcome = Outcome(
            model=checkpoint.name,
            scheme=scheme,
            format=job.format,
            seed=job.seed,
            calibration=TextUsed(calibration.name, calibration.sha256, *fitted.shape),
            evaluation=TextUsed(evaluation.name, evaluation.sha256, *judged.shape),
            summary=_summary(made.reports, str(scheme.method)),
            quality=quality,
            bytes_before=checkpoint.nbytes,
            bytes_after=written.nbytes,
            modules=tuple(made.reports),
        )
        (partial / "quality.json").write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(outcome), encoding="utf-8")
    return outcome


def _unquantized(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method")
        raise CheckpointError(f"`{checkpoint.name}` is quantized already ({method})", "give the model it was made from")
    return checkpoint


def _load(checkpoint: Checkpoint, device: torch.device) -> Any:
    """The transformers model in float32; ModelError or CheckpointError if there is none in the files."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config = read_config(checkpoint)
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path, config=config, dtype=torch.float32, output_loading_info=True
        )
    except ValueError as error:
        raise ModelError(f"`{checkpoint.name}` is no causal language model: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:  # transformers would go on with random numbers
        raise CheckpointError(f"`{checkpoint.path}` lacks weights of the model, such as `{min(info['missing_keys'])}`")
    return model.to(device).eval().requires_grad_(False)


def _same_names(checkpoint: Checkpoint, model: Any) -> None:
    """ModelError unless the blocks' parameters are stored under their own names: else new ones would have no place."""
    prefix, blocks = find_blocks(model)
    for name, _ in blocks.named_parameters(prefix):
        if name not in checkpoint.tensors:
            raise ModelError(f"`{checkpoint.name}` does not store `{name}` under this name, so it can't be replaced")


def _tokens(
    job: Job, checkpoint: Checkpoint, model: Any, calibration: Corpus, evaluation: Corpus
) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] to calibrate on and to judge by; L is at most the model's context."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{checkpoint.path}` has no usable tokenizer: {str(error).splitlines()[0]}") from None
    length = min(job.seq_len, getattr(model.config.get_text_config(), "max_position_embeddings", job.seq_len))
    fitted = sample(windows(calibration, tokenizer, length), job.samples, job.seed)
    return fitted, sample(windows(evaluation, tokenizer, length), EVALUATION_WINDOWS, job.seed)


def _logits(model: Any) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return logits

    return run


def _summary(reports: list[ModuleReport], method: str) -> str:
    done = sum(report.method == method for report in reports)
    return f"{done}/{len(reports)} {method.upper()}, {len(reports) - done} fallback"
