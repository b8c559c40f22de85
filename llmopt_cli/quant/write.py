"""A quantized checkpoint on disk: written beside its place, read back, compared, and only then moved there.

Streams the base checkpoint tensor by tensor: what was not quantized keeps its bytes, and tied weights stay tied.
Knows files; nothing of how the integers came about.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.model.formats import awq
from llmopt_cli.quant.blocks import Quantization
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.scheme import Scheme

SHARD_BYTES = 4 * 10**9
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")  # what belongs to a model but its weights
REPLACED = ("config.json", "quality.json", "model.safetensors.index.json")


def refuse_existing(folder: Path, source: Path, overwrite: bool) -> None:
    """Raise UsageError where writing to `folder` would destroy something that was not meant to be destroyed."""
    if not folder.exists():
        return
    if not overwrite:
        raise UsageError(f"`{folder}` exists already", "add --overwrite to replace it, or name another folder with -o")
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"`{folder}` holds no model, so --overwrite does not replace it", "name another folder with -o"
        )
    if folder.resolve() == source.resolve():
        raise UsageError("a model can't be quantized onto itself", "name another folder with -o")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A working folder `FOLDER.partial` that takes the place of `folder` at the end; on any failure it vanishes."""
    partial, old = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".replaced"))
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write `{folder}`: {error}") from None
    finally:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)


def stored_dtypes(checkpoint: Checkpoint) -> dict[str, torch.dtype]:
    """The dtype on disk of every parameter; CheckpointError if one is no float."""
    for name, header in checkpoint.tensors.items():
        if name.endswith(".weight") and header.dtype not in DTYPES:
            raise CheckpointError(
                f"`{checkpoint.name}` stores `{name}` as {header.dtype}", "give a model with 16 or 32-bit weights"
            )
    return {name: DTYPES[header.dtype] for name, header in checkpoint.tensors.items() if header.dtype in DTYPES}


def write_model(folder: Path, checkpoint: Checkpoint, made: Quantization, scheme: Scheme, left: list[str]) -> None:
    """Write weights, config and what lies beside them. `left` names the linears that stay as they are."""
    config = dict(checkpoint.config) | {"quantization_config": awq.config(scheme, left)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _write_weights(folder, _tensors(checkpoint, made))
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors makes files that nobody else may read
    for pattern in COMPANIONS:
        for file in checkpoint.path.glob(pattern):
            if file.name not in REPLACED:
                shutil.copyfile(file, folder / file.name)


def verify(folder: Path, weights: Mapping[str, Tensor], made: Quantization) -> Checkpoint:
    """Read `folder` back and compare every tensor exactly with the float32 `weights` of the model that was judged.

    Raises CheckpointError at the first difference.
    """
    written = Checkpoint.open(folder)
    found = {name for name in written.tensors if not name.endswith(tuple(f".{suffix}" for suffix in awq.SUFFIXES))}
    read = dict(_read(written, sorted(found)))
    for name in made.linears:
        parts = dict(_read(written, [f"{name}.{suffix}" for suffix in awq.SUFFIXES]))
        packed = {suffix: parts[f"{name}.{suffix}"] for suffix in awq.SUFFIXES}
        read[f"{name}.weight"] = awq.unpack(packed).dequantize()
    for name, tensor in read.items():
        if name in weights and not torch.equal(tensor.float(), weights[name].cpu()):
            raise CheckpointError(f"`{name}` reads back from `{folder}` other than it was written", "check the disk")
    return written


def _tensors(checkpoint: Checkpoint, made: Quantization) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors, in the base's order."""
    stored = stored_dtypes(checkpoint)
    for name, tensor in _read(checkpoint, list(checkpoint.tensors)):
        linear = name.removesuffix(".weight")
        if linear in made.linears:
            packed = awq.pack(made.linears[linear])
            yield from ((f"{linear}.{suffix}", part.cpu()) for suffix, part in packed.items())
        elif name in made.vectors:
            yield name, made.vectors[name].to(stored[name]).cpu()
        else:
            yield name, tensor


def _read(checkpoint: Checkpoint, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as stored:
            for name in names:
                if checkpoint.tensors[name].file == file:
                    yield name, stored.get_tensor(name)


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One `model.safetensors`, or shards of SHARD_BYTES and their index. Peak memory: one shard."""
    shards: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(batch, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        if batch and sum(part.nbytes for part in batch.values()) + tensor.nbytes > SHARD_BYTES:
            flush()
        batch[name] = tensor.contiguous()
        total += tensor.nbytes
    flush()
    _name_shards(folder, shards, total)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, Any] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
