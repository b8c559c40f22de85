"""The GGUF container: typed metadata, tensor headers, aligned data; read and written as its specification says.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3, little-endian. Knows neither what keys mean nor
what is in a tensor's bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llmopt_cli.errors import CheckpointError
from llmopt_cli.spec.gguf import BLOCK_TYPES

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS: dict[int, str] = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
TYPES: dict[type, int] = {bool: 7, int: 4, float: 6, str: STRING}  # how a value of Python's is written
ARRAY_TYPES = TYPES | {int: 5}  # lists of integers are signed, as token types are
NAMES = {kind.number: name for name, kind in BLOCK_TYPES.items()}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One stored tensor: its block type, its shape (the rows' length last, as torch has it), where its bytes begin."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int = 0  # from the beginning of the file

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        kind = BLOCK_TYPES[self.type]
        return math.prod(self.shape) // kind.size * kind.nbytes


def read_gguf(path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    """Metadata and tensors of a file; CheckpointError if it is none, cut off, or has a type that is not read."""
    try:
        with path.open("rb") as stream:
            return _read(stream, path)
    except (OSError, struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"`{path}` is no complete GGUF file: {error}", "download it again") from None


def _read(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], list[GgufTensor]]:
    magic, version, count, keys = struct.unpack("<4sIQQ", stream.read(24))
    if magic != MAGIC or version not in (2, VERSION):
        raise CheckpointError(f"`{path}` is no GGUF file of version 2 or 3", "give a GGUF file, or a model folder")
    metadata = {}
    for _ in range(keys):
        key = _string(stream)
        metadata[key] = _value(stream, *_unpack(stream, "I"))
    headers = [_header(stream, path) for _ in range(count)]
    start = _aligned(stream.tell(), metadata.get("general.alignment", ALIGNMENT))
    tensors = [GgufTensor(one.name, one.type, one.shape, start + one.offset) for one in headers]
    end = max((one.offset + one.nbytes for one in tensors), default=start)
    if path.stat().st_size < end:
        raise CheckpointError(f"`{path}` has {path.stat().st_size:,} bytes of {end:,}", "download it again")
    return metadata, tensors


def _header(stream: BinaryIO, path: Path) -> GgufTensor:
    name = _string(stream)
    (dims,) = _unpack(stream, "I")
    shape = _unpack(stream, f"{dims}Q")[::-1]  # the file has the fastest dimension first
    number, offset = _unpack(stream, "IQ")
    if number not in NAMES:
        known = ", ".join(BLOCK_TYPES)
        raise CheckpointError(f"`{path}` stores `{name}` in ggml type {number}", f"read are: {known}")
    return GgufTensor(name, NAMES[number], shape, offset)


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    return stream.read(length).decode()


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == STRING:
        return _string(stream)
    if kind != ARRAY:
        return _unpack(stream, SCALARS[kind])[0]
    inner, length = _unpack(stream, "IQ")
    if inner in SCALARS:
        return list(_unpack(stream, f"{length}{SCALARS[inner]}"))
    return [_value(stream, inner) for _ in range(length)]


def write_gguf(
    path: Path, metadata: Mapping[str, Any], tensors: Sequence[GgufTensor], data: Iterable[bytes | memoryview]
) -> None:
    """Write a file. `data` are the bytes of the `tensors` in order, asked for one at a time; their offsets are ignored.

    Values are written by their Python type: bool, int (unsigned), float, str, or a list of one of them.
    """
    with path.open("wb") as stream:
        stream.write(struct.pack("<4sIQQ", MAGIC, VERSION, len(tensors), len(metadata)))
        for key, value in metadata.items():
            stream.write(_packed_string(key) + _packed(value))
        offset = 0
        for tensor in tensors:
            dims = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
            kind = struct.pack("<IQ", BLOCK_TYPES[tensor.type].number, offset)
            stream.write(_packed_string(tensor.name) + dims + kind)
            offset += _aligned(tensor.nbytes, ALIGNMENT)
        for tensor, part in zip(tensors, data, strict=True):
            stream.write(b"\0" * (_aligned(stream.tell(), ALIGNMENT) - stream.tell()))
            assert len(part) == tensor.nbytes, f"{tensor.name} has {len(part)} bytes, not {tensor.nbytes}"
            stream.write(part)
        stream.write(b"\0" * (_aligned(stream.tell(), ALIGNMENT) - stream.tell()))


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _packed_string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _packed(value: Any) -> bytes:
    if not isinstance(value, list):
        kind = TYPES[type(value)]
        body = _packed_string(value) if kind == STRING else struct.pack(f"<{SCALARS[kind]}", value)
        return struct.pack("<I", kind) + body
    kind = ARRAY_TYPES[type(value[0])] if value else STRING
    head = struct.pack("<IIQ", ARRAY, kind, len(value))
    if kind == STRING:
        return head + b"".join(map(_packed_string, value))
    return head + struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
