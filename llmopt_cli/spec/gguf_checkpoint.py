"""A GGUF file as a checkpoint: its config, its tensors under transformers' names, and the small files beside them.

What other parts of llmopt, and transformers, look for in a model's folder (config, tokenizer, chat template) is
unpacked once into the user's cache, unless it lies beside the file. Reads headers, never weights; no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmopt_cli.errors import CheckpointError
from llmopt_cli.spec.checkpoint import TensorHeader
from llmopt_cli.spec.gguf import BLOCK_TYPES
from llmopt_cli.spec.gguf_file import GgufTensor, read_gguf
from llmopt_cli.spec.gguf_model import ROPE_FREQS, Architecture, config_of, found_architecture
from llmopt_cli.spec.gguf_names import Place, names_of
from llmopt_cli.spec.gguf_tokenizer import tokenizer_files

COMPANIONS = ("config.json", "tokenizer.json")
PLAIN = ("f32", "f16", "bf16")
ROTATED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # and how many heads they have


@dataclass(frozen=True, slots=True)
class GgufHeader(TensorHeader):
    """Where a tensor's bytes begin, in which type of block they are, and what is to be undone.

    Rows are permuted within `heads` heads (0: not at all), and `shift` was added.
    """

    type: str
    offset: int
    heads: int
    shift: float


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What a file says: the folder of its unpacked companions, config.json, and tensors by transformers' names."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, GgufHeader]


def open_gguf(file: Path, folder: Path | None = None) -> GgufModel:
    """Read a file's headers and unpack its companions, unless `folder` has them.

    CheckpointError if it is damaged or of an unknown kind.
    """
    metadata, stored = read_gguf(file)
    architecture = found_architecture(metadata)
    try:
        config = config_of(metadata, {tensor.name for tensor in stored}, _rope_factors(file, stored))
    except KeyError as error:
        raise CheckpointError(f"`{file}` lacks {error}", "convert the model anew") from None
    tensors = dict(_tensors(file, stored, architecture, config))
    types = {name.removesuffix(".blocks"): one.type for name, one in tensors.items() if name.endswith(".blocks")}
    if types:
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    if folder is None or not all((folder / name).is_file() for name in COMPANIONS):
        folder = _unpacked(file.stem, _companions(metadata, config))
    return GgufModel(folder, config, tensors)


def _rope_factors(file: Path, stored: Iterable[GgufTensor]) -> list[float] | None:
    found = [tensor for tensor in stored if tensor.name == ROPE_FREQS]
    if not found:
        return None
    with file.open("rb") as stream:
        stream.seek(found[0].offset)
        return list(struct.unpack(f"<{found[0].shape[0]}f", stream.read(found[0].nbytes)))


def _tensors(
    file: Path, stored: Iterable[GgufTensor], architecture: Architecture, config: Mapping[str, Any]
) -> Iterable[tuple[str, GgufHeader]]:
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    for tensor in stored:
        if tensor.name == ROPE_FREQS:
            continue
        names = names_of(architecture, tensor.name, experts)
        for index, name in enumerate(names):
            header = _header(file, tensor, architecture, config, index, len(names))
            yield (name if tensor.type in PLAIN else name.removesuffix("weight") + "blocks"), header


def _header(
    file: Path, tensor: GgufTensor, architecture: Architecture, config: Mapping[str, Any], index: int, parts: int
) -> GgufHeader:
    """One part of a stored tensor, the only one unless it stacks experts."""
    shape = tensor.shape[1:] if parts > 1 or len(tensor.shape) > 2 else tensor.shape
    kind, nbytes = BLOCK_TYPES[tensor.type], tensor.nbytes // parts
    if tensor.type not in PLAIN:
        shape = (shape[0], shape[1] // kind.size * kind.nbytes)
    place = Place(tensor.name)
    heads = config[ROTATED[place.stem]] if architecture.permuted and place.stem in ROTATED else 0
    shift = architecture.norm_shift if place.stem.endswith("_norm") else 0.0
    dtype = tensor.type.upper() if tensor.type in PLAIN else "U8"
    return GgufHeader(file, dtype, shape, nbytes, tensor.type, tensor.offset + index * nbytes, heads, shift)


def _companions(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, str]:
    ends = [config.get("eos_token_id"), metadata.get("tokenizer.ggml.eot_token_id")]
    generation = {"eos_token_id": [token for token in dict.fromkeys(ends) if token is not None]}
    files = {"config.json": json.dumps(config)}
    if generation["eos_token_id"]:
        files["generation_config.json"] = json.dumps(generation)
    return files | (tokenizer_files(metadata) if "tokenizer.ggml.model" in metadata else {})


def _unpacked(stem: str, files: Mapping[str, str]) -> Path:
    """A folder in the cache with these files, named after their content: it is written once and never changed."""
    digest = hashlib.sha256("\0".join(f"{name}\0{text}" for name, text in files.items()).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmopt" / "gguf"
    folder = cache / f"{stem}-{digest[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            if not (folder / name).exists():
                unfinished = folder / f"{name}.{os.getpid()}"
                unfinished.write_text(text, encoding="utf-8")
                unfinished.replace(folder / name)
    except OSError as error:
        raise CheckpointError(f"cannot unpack the tokenizer: {error}", "set XDG_CACHE_HOME") from None
    return folder
