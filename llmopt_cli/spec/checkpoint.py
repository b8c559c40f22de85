"""`Checkpoint`: a model on disk and how its weights are stored. Reads headers and JSON, never weights; no torch.

Only safetensors is opened: a pickle runs the code inside it. The header format is the safetensors specification's:
8 bytes little-endian header length, a JSON header, then the tensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.spec.model import ModelSpec

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = {"demo": ASSETS / "bookworm-6m", "demo-draft": ASSETS / "bookworm-1m"}
FLOATS = ("F64", "F32", "F16", "BF16")  # what a model computes with; all else are codes
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.py"]
HUB_LEAVES = ["consolidated*", "original/*"]  # the same weights once more, under their makers' names


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where one stored tensor lies: its file, dtype in safetensors' words (`BF16`, `I32`), shape and size in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def held(self, value_bytes: int) -> int:
        """Bytes in a model that computes with values of `value_bytes`: floats become those, codes stay as they are."""
        return math.prod(self.shape) * value_bytes if self.dtype in FLOATS else self.nbytes


@dataclass(frozen=True)
class Checkpoint:
    """A model folder that was found complete: config.json and safetensors files whose headers and sizes agree, or GGUF.

    `name` is the folder's, or the hub id: the snapshot of one lies in a folder named after its commit.
    """

    name: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]

    @classmethod
    def open(cls, source: str | Path, revision: str | None = None) -> Self:
        """Open a local folder, a GGUF file or a folder with one, `demo`, or a hub id (downloaded or from the cache).

        Raises CheckpointError if it is missing, holds only pickles, or is damaged.
        """
        name = str(source)
        if name.endswith(".gguf"):
            return cls._open_gguf(Path(source).expanduser())
        path = BUNDLED.get(name) or _folder(source)
        if path is None:
            path = _download(name, revision)
        elif name not in BUNDLED:
            name = path.resolve().name  # that of `.` is empty
        if file := _gguf_file(path):
            return replace(cls._open_gguf(file, path), name=name)
        return cls(name=name, path=path, config=read_json(path / "config.json"), tensors=_headers(path))

    @classmethod
    def _open_gguf(cls, file: Path, folder: Path | None = None) -> Self:
        from llmopt_cli.spec.gguf_checkpoint import open_gguf

        model = open_gguf(file, folder)
        return cls(name=file.stem, path=model.folder, config=model.config, tensors=model.tensors)

    @cached_property
    def spec(self) -> ModelSpec:
        """The architecture's facts, from config.json."""
        return ModelSpec.from_hf(self.config, name=self.name)

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` of config.json, if the weights are quantized."""
        found = self.config.get("quantization_config")
        return found if isinstance(found, Mapping) else None

    @property
    def heads(self) -> str | None:
        """Which kind of heads that draft it is, if any: `medusa` or `eagle`."""
        if "medusa_num_heads" in self.config:
            return "medusa"
        return "eagle" if "fc.weight" in self.tensors else None

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The safetensors files, each once, in name order."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing or damaged file raises CheckpointError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"`{path.parent}` has no {path.name}", "give a folder with config.json and *.safetensors, or `demo`"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{path}` cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"`{path}` does not hold a JSON object")
    return data


def _folder(source: str | Path) -> Path | None:
    """The folder that `source` names, if there is one."""
    try:
        path = Path(source).expanduser()
        return path if path.is_dir() else None
    except (RuntimeError, OSError):  # no such user, a name longer than names may be
        return None


def _gguf_file(folder: Path) -> Path | None:
    """The GGUF file that is the model of a folder without safetensors; CheckpointError if there are several."""
    found = [] if any(folder.glob("*.safetensors*")) else sorted(folder.glob("*.gguf"))
    if len(found) > 1:
        raise CheckpointError(f"`{folder}` holds {len(found)} GGUF files", f"give one of them, such as `{found[0]}`")
    return found[0] if found else None


def _headers(folder: Path) -> dict[str, TensorHeader]:
    files = _weight_files(folder)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        tensors |= read_header(file)
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files the index names, or all there are; missing shards and pickles are told apart."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"`{index}` has no weight_map")
        files = sorted({folder / str(name) for name in weight_map.values()})
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"`{folder}` lacks {len(missing)} of {len(files)} shards, first `{missing[0]}`", "download it again"
            )
        return files
    # One file of the usual name is the whole model; beside it the same weights may lie under another naming.
    files = sorted(folder.glob("model.safetensors")) or sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"`{folder}` holds only pickled weights (`{pickles[0]}`), and opening a pickle runs the code inside it",
            "take the model's safetensors revision, or save it with `save_pretrained` where you trust it",
        )
    raise CheckpointError(f"`{folder}` has no *.safetensors file", "give a folder that holds the weights, or `demo`")


def read_header(file: Path) -> dict[str, TensorHeader]:
    """Tensor name -> header of one safetensors file; raises CheckpointError if it is truncated or damaged."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise CheckpointError(f"`{file}` is truncated: its header ends past the file", "download it again")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(file, info["dtype"], tuple(info["shape"]), end - start)
            for name, info in header.items()
            for start, end in [info["data_offsets"]]
        }
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"`{file}` is not a safetensors file: {error}", "download it again") from None
    expected = 8 + length + max((info["data_offsets"][1] for info in header.values()), default=0)
    if size != expected:
        raise CheckpointError(f"`{file}` has {size:,} bytes where its header says {expected:,}", "download it again")
    return tensors


def _download(name: str, revision: str | None) -> Path:
    """A hub id's folder in the local cache, fetched if need be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(
            f"there is no folder `{name}`", "give a folder with config.json, a hub id `owner/name`, or `demo`"
        )
    if "/" not in name:
        raise UsageError(f"unknown model `{name}`", "give a local folder, a hub id `owner/name`, or `demo`")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=HUB_LEAVES))
    except HFValidationError:
        raise UsageError(f"`{name}` is neither a folder nor a hub id", "hub ids look like `owner/name`") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise CheckpointError(f"the hub refused `{name}`: {str(error).splitlines()[0]}") from None
        raise CheckpointError(
            f"`{name}` is not in the local cache and the hub cannot be reached",
            "check the spelling, download it where there is a network, or give a local folder; `demo` works offline",
        ) from None
