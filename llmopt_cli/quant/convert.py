"""Quantized checkpoints from one file format into another without changing a weight: codes are moved, never rounded.

Reads everything once to see whether the new format can hold it, before anything is written; then linear by linear, and
reads the result back. Peak memory: a few linears.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UnknownNameError
from llmopt_cli.model.codes import Codes, IntCodes
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.model.formats.table import FORMATS
from llmopt_cli.model.stream import Store
from llmopt_cli.output import Report
from llmopt_cli.quant.write import copy_companions, new_folder, refuse_existing, write_weights
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme

TARGETS = ("awq", "gptq", "gptq_v2", "compressed-tensors")
Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Converted:
    """What was made: formats by name, quantized linears, bytes of all stored tensors."""

    source: str
    source_format: str
    format: str
    path: str
    linears: int
    bytes_before: int
    bytes_after: int


def convert(source: str, form: str, out: Path | None, overwrite: bool, progress: Progress) -> Converted:
    """Write the quantized model `source` in the format `form`; CheckpointError says why it cannot hold the codes."""
    if form not in TARGETS:
        raise UnknownNameError("format", form, TARGETS)
    checkpoint, target = Checkpoint.open(source), FORMATS[form]
    folder = out or Path(f"{Path(source).resolve().name}-{form}")
    refuse_existing(folder, checkpoint.path, overwrite)
    with Store(checkpoint) as store:
        if not store.linears:
            raise CheckpointError(
                f"`{checkpoint.name}` is not quantized", f"`llmopt quantize {source} --format {form}` does that"
            )
        with progress(f"reading {checkpoint.name}") as report:
            schemes = _schemes(store, target, report)
        with new_folder(folder) as partial:
            with progress(f"writing {folder.name}") as report:
                _write(partial, checkpoint, store, target, schemes, report)
            with progress("reading it back") as report:
                written = _verify(partial, store, report)
    assert checkpoint.quantization is not None
    method = str(checkpoint.quantization.get("quant_method"))
    return Converted(checkpoint.name, method, form, str(folder), len(schemes), checkpoint.nbytes, written.nbytes)


def _schemes(store: Store, target: Format, report: Report) -> dict[str, Scheme]:
    """How each linear will be stored; CheckpointError at the first that cannot be."""
    schemes, symmetric = {}, True
    for done, (linear, scheme) in enumerate(store.linears.items(), 1):
        codes = store.codes(linear)
        reason = _obstacle(codes, scheme, target)
        if reason is not None:
            raise CheckpointError(
                f"`{linear}` cannot be stored as {target.name} without a change: {reason}",
                "quantize the base model with `llmopt quantize --format` instead",
            )
        assert isinstance(codes, IntCodes)
        schemes[linear], symmetric = scheme, symmetric and codes.symmetric
        report(done, len(store.linears))
    return {linear: replace(scheme, symmetric=symmetric) for linear, scheme in schemes.items()}


def _obstacle(codes: Codes, scheme: Scheme, target: Format) -> str | None:
    """Why the target cannot hold exactly these codes, or None."""
    if not isinstance(codes, IntCodes):
        return "its weights are no integers with a scale"
    if codes.groups is not None:
        return "its groups are not of neighbouring inputs (desc_act)"
    rows, columns = codes.codes.shape
    reason = target.misfit(rows, columns, scheme)
    if reason is not None:
        return reason
    exact = replace(scheme, symmetric=codes.symmetric)
    same = torch.equal(target.unpack(target.pack(codes, exact), exact).dequantize(), codes.dequantize())
    return None if same else "its scales are no float16 numbers"


def _write(
    folder: Path,
    checkpoint: Checkpoint,
    store: Store,
    target: Format,
    schemes: Mapping[str, Scheme],
    report: Report,
) -> None:
    default = max(set(schemes.values()), key=list(schemes.values()).count)
    others = {linear: scheme for linear, scheme in schemes.items() if scheme != default}
    quantization = target.config(default, _left(store, schemes), others)
    config = dict(checkpoint.config) | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if target.config_copy is not None:
        (folder / target.config_copy).write_text(json.dumps(quantization, indent=2) + "\n", encoding="utf-8")
    write_weights(folder, _tensors(store, target, schemes, report))
    copy_companions(folder, checkpoint)


def _left(store: Store, schemes: Mapping[str, Scheme]) -> list[str]:
    """The matrices that are not quantized, by the name of their module: what a reader must not expect codes for.

    Embeddings may be among them: naming them does no harm.
    """
    matrices = (name for name in store.names if name.endswith(".weight"))
    plain = (name.removesuffix(".weight") for name in matrices if name.removesuffix(".weight") not in schemes)
    left = [name for name in plain if store.read(f"{name}.weight").ndim == 2]
    return left if "lm_head" in (*left, *schemes) else [*left, "lm_head"]


def _tensors(
    store: Store, target: Format, schemes: Mapping[str, Scheme], report: Report
) -> Iterator[tuple[str, Tensor]]:
    for done, name in enumerate(store.names, 1):
        linear = name.removesuffix(".weight")
        if linear in schemes:
            packed = target.pack(store.codes(linear), schemes[linear])
            yield from ((f"{linear}.{suffix}", part) for suffix, part in packed.items())
        else:
            yield name, store.read(name)
        report(done, len(store.names))


def _verify(folder: Path, source: Store, report: Report) -> Checkpoint:
    """Compare every tensor and every quantized weight with the source's; CheckpointError at the first difference."""
    written = Checkpoint.open(folder)
    with Store(written) as store:
        for done, name in enumerate(source.names, 1):
            if name not in store.names or not torch.equal(store.get(name), source.get(name)):
                raise CheckpointError(f"`{name}` reads back other than it was written", "check the disk")
            report(done, len(source.names))
    return written
