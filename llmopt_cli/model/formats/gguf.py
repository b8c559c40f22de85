"""GGUF as a checkpoint: which stored tensor is what, and one linear's blocks in and out of it.

A quantized matrix `X` shows as `X.blocks`, uint8 [out, bytes of a row] in the order of transformers' rows; what is
plain as `X.weight`. Files and names are `spec.gguf_file`'s and `spec.gguf_model`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import GgmlCodes
from llmopt_cli.model.formats.layout import Format, Schemes, check, taken
from llmopt_cli.spec.gguf import BLOCK_TYPES, block_of
from llmopt_cli.spec.gguf_checkpoint import GgufHeader
from llmopt_cli.spec.scheme import Scheme

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def block_scheme(name: str) -> Scheme:
    """The precision that blocks of one type are."""
    kind = BLOCK_TYPES[name]
    whole = int(kind.bits)
    return Scheme(name, whole, extra_bits=kind.bits - whole, covers="all", note="GGUF blocks of one type")


def pack(weight: GgmlCodes, scheme: Scheme) -> dict[str, Tensor]:
    """The stored tensors of one linear, by suffix."""
    assert weight.type == block_of(scheme.name)
    return {"blocks": weight.codes.cpu().contiguous()}


def unpack(parts: Mapping[str, Tensor], scheme: Scheme) -> GgmlCodes:
    """The linear in its stored tensors."""
    [blocks] = taken(parts, "blocks")
    kind = BLOCK_TYPES[block_of(scheme.name)]
    check(blocks.ndim == 2 and blocks.shape[1] % kind.nbytes == 0, parts, f"rows of {kind.name} blocks")
    return GgmlCodes(blocks, kind.name)


def misfit(out_features: int, in_features: int, scheme: Scheme) -> str | None:
    """Why a linear cannot be stored, or None: rows that are not whole blocks take another type."""
    return None


def config(scheme: Scheme, left: Sequence[str], exceptions: Mapping[str, Scheme]) -> dict[str, Any]:
    """What a checkpoint that was opened from a GGUF file says of its linears."""
    return {"quant_method": "gguf", "types": {linear: one.name for linear, one in exceptions.items()}}


@dataclass(frozen=True, slots=True)
class ByName(Schemes):
    """Every linear has its own type: they are looked up, not matched."""

    types: Mapping[str, str] = field(default_factory=dict)

    def of(self, linear: str) -> Scheme:
        """The scheme of the linear of this name."""
        return block_scheme(self.types[linear])


def parse_config(found: Mapping[str, Any]) -> Schemes:
    """The block type of every linear."""
    return ByName(block_scheme("f16"), types=found["types"])


def rotary_order(rows: int, heads: int) -> Tensor:
    """For each row of ggml's q or k, which of transformers' rows it is: int64 [rows].

    ggml rotates a head's rows 2i and 2i + 1 together, transformers rows i and i + half.
    """
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def read_tensor(header: GgufHeader) -> Tensor:
    """A stored tensor in transformers' order: floats, or uint8 [out, bytes of a row] of blocks."""
    with header.file.open("rb") as stream:
        stream.seek(header.offset)
        raw = bytearray(stream.read(header.nbytes))
    if len(raw) != header.nbytes:
        raise CheckpointError(f"`{header.file}` is cut off", "download it again")
    tensor = torch.frombuffer(raw, dtype=PLAIN.get(header.type, torch.uint8)).view(header.shape)
    if header.heads:
        tensor = tensor[rotary_order(len(tensor), header.heads).argsort()]
    return tensor - header.shift if header.shift else tensor


GGUF = Format(
    name="gguf",
    quant_method="gguf",
    bits=(2, 3, 4, 5, 6, 8),
    markers=("blocks",),
    suffixes=("blocks",),
    engines={"llmopt": "yes", "llama.cpp": "yes", "Ollama": "yes", "LM Studio": "yes"},
    pack=pack,
    unpack=unpack,
    misfit=misfit,
    config=config,
    parse_config=parse_config,
)
