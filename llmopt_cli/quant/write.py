"""A quantized checkpoint on disk: written beside its place, read back, compared, and only then moved there.

Streams the base checkpoint tensor by tensor: what was not quantized keeps its bytes, and tied weights stay tied.
Knows files; nothing of how the integers came about.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.model.stream import Store
from llmopt_cli.quant.blocks import digest
from llmopt_cli.spec.checkpoint import Checkpoint, TensorHeader, read_header

SHARD_BYTES = 10**9
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")  # what belongs to a model but its weights
REPLACED = ("config.json", "quantize_config.json", "quality.json", "model.safetensors.index.json")


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
        raise UsageError("a model can't be written onto itself", "name another folder with -o")
    if folder.name in ("", ".."):
        raise UsageError(f"`{folder}` has no name beside which a new folder could grow", "call it by its name with -o")


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


def write_model(folder: Path, checkpoint: Checkpoint, made: Iterable[Path], config: Mapping[str, Any]) -> None:
    """Write weights, config and what lies beside them.

    `made` are the files of the steps: their tensors take the place of those of `checkpoint` that bear the same name,
    or the same but for `.weight`; those that take no place come last. `config` is what config.json says other than
    that of `checkpoint`.
    """
    document = dict(checkpoint.config) | dict(config)
    (folder / "config.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    write_weights(folder, _tensors(checkpoint, made))
    copy_companions(folder, checkpoint)


def copy_companions(folder: Path, checkpoint: Checkpoint) -> None:
    """Copy what lies beside the weights of `checkpoint`: tokenizer, templates, licence."""
    for pattern in COMPANIONS:
        for file in checkpoint.path.glob(pattern):
            if file.name not in REPLACED:
                shutil.copyfile(file, folder / file.name)


def verify(
    folder: Path, checkpoint: Checkpoint, digests: Mapping[str, str], same: Callable[[Tensor, Tensor], bool]
) -> Checkpoint:
    """Read `folder` back: weights must be those that were judged, by their `digests`; the rest those of `checkpoint`.

    `same` says when a tensor of the rest is. Raises CheckpointError at the first difference.
    """
    written = Checkpoint.open(folder)
    with Store(written) as store, Store(checkpoint) as base:
        for name in dict.fromkeys([*store.names, *digests]):
            if name in digests:
                equal = digest(store.get(name)) == digests[name]
            else:
                equal = name in checkpoint.tensors and same(store.read(name), base.read(name))
            if not equal:
                raise CheckpointError(f"`{name}` reads back from `{folder}` other than it was judged", "check the disk")
    return written


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same byte for byte."""
    return one.dtype == other.dtype and torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (one, other)))


def _tensors(checkpoint: Checkpoint, made: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors, in the base's order; then those that it lacks."""
    new: dict[str | None, list[tuple[str, TensorHeader]]] = {}
    for file in made:
        for name, header in read_header(file).items():
            new.setdefault(_replaced_by(name, checkpoint.tensors), []).append((name, header))
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(name: str, header: TensorHeader) -> Tensor:
            if header.file not in files:
                files[header.file] = stack.enter_context(safe_open(header.file, framework="pt"))
            tensor: Tensor = files[header.file].get_tensor(name)
            return tensor

        for name, header in checkpoint.tensors.items():
            yield from ((part, read(part, source)) for part, source in new.get(name, [(name, header)]))
        yield from ((part, read(part, source)) for part, source in new.get(None, []))


def _replaced_by(part: str, tensors: Mapping[str, TensorHeader]) -> str | None:
    """The tensor that `part` replaces: of its name, or a weight of which it is a part (`X.qweight` of `X.weight`)."""
    name = part
    while name and name not in tensors and f"{name}.weight" not in tensors:
        name = name.rpartition(".")[0]
    return None if not name else name if name in tensors else f"{name}.weight"


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]]) -> None:
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
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)  # safetensors makes files that nobody else may read


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
