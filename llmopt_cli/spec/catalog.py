"""The bundled catalogues of models and accelerators, and forgiving names for both.

The tables are `assets/catalog/*.csv`, read when first asked for; every row carries the source of its figures.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from llmopt_cli.errors import AmbiguousNameError, CheckpointError, ConfigFileError, UnknownNameError, UsageError
from llmopt_cli.spec.checkpoint import ASSETS, BUNDLED, read_json
from llmopt_cli.spec.hardware import EXAMPLE, Hardware, HardwareFile
from llmopt_cli.spec.model import Experts, LatentAttention, LinearAttention, ModelSpec
from llmopt_cli.spec.yaml_file import read_yaml

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """One row: the noun, the names it answers to (its own first), and where its figures are from."""

    item: T
    names: tuple[str, ...]
    source: str


@cache
def gpus() -> tuple[Entry[Hardware], ...]:
    """Every accelerator of the catalogue."""
    return tuple(
        Entry(_build(Hardware, row), (row["name"], *_split(row["aliases"])), row["spec_source"])
        for row in _rows("gpus.csv")
    )


@cache
def models() -> tuple[Entry[ModelSpec], ...]:
    """Every model of the catalogue."""
    return tuple(
        Entry(_model(row), (row["name"], row["hub_id"], *_split(row["aliases"])), row["source"])
        for row in _rows("models.csv")
    )


COUNTED = re.compile(
    r"(?P<name>.+?)\s*[x*](?P<after>\d{1,3})|(?P<before>\d{1,3})\s*[x*]\s*(?P<other>.+)", re.IGNORECASE
)


def find_gpu(text: str) -> tuple[Hardware, int | None]:
    """`a100`, `A100-80GB`, `h100x4`, `4xh100`, `my.yaml`: the accelerator, and how many where a count is given.

    A YAML file has the fields of `Hardware` and, if it likes, a `count`. Raises UnknownNameError for a name that fits
    none, AmbiguousNameError for one that fits several, ConfigFileError for a file that is wrong.
    """
    # At most three digits: the x of `rtx4090` is no count.
    counted = COUNTED.fullmatch(text.strip())
    name, count = text.strip(), None
    if counted:
        name, count = counted["name"] or counted["other"], int(counted["after"] or counted["before"])
    if count == 0:
        raise UsageError(f"`{text}` asks for no accelerator at all", "write NAMExN with N from 1, such as `h100x4`")
    if name.lower().endswith((".yaml", ".yml")):
        found = _gpu_file(Path(os.path.expanduser(name)))
        return found.hardware(name), count or found.count
    return _find("accelerator", name, gpus(), see="llmopt gpus"), count


def _gpu_file(path: Path) -> HardwareFile:
    try:
        return read_yaml(path, HardwareFile)
    except ConfigFileError as error:
        raise ConfigFileError(error.message, error.hint or EXAMPLE) from None


def find_model(text: str) -> ModelSpec:
    """A name of the catalogue (`70b`, `qwen3-32b`, a hub id), `demo`, a local folder or a config.json.

    Raises UnknownNameError for a name that fits none, AmbiguousNameError for one that fits several, UsageError for a
    file that is missing, damaged or not a decoder's.
    """
    path = BUNDLED.get(text) or Path(os.path.expanduser(text))
    if os.path.isfile(path):  # not Path's: it raises for a name too long to be a file's
        return _read_model(path, path.resolve().parent.name)
    if os.path.isfile(path / "config.json") or text.startswith((".", "/", "~")) or text.endswith(".json"):
        folder = path.parent if text.endswith(".json") else path
        return _read_model(folder / "config.json", text if text in BUNDLED else folder.resolve().name)
    try:
        return _find("model", text, models(), see="llmopt models")
    except UnknownNameError as error:
        if "/" not in text:
            raise
        raise UsageError(
            f"`{text}` is neither a folder nor in the catalogue, and nothing is looked up on the hub",
            f"fetch its config.json and give that file with --model; {error.hint}",
        ) from None


def _read_model(path: Path, name: str) -> ModelSpec:
    """The spec in a config.json; what is wrong in a file that was named is a matter of usage."""
    try:
        return ModelSpec.from_hf(read_json(path), name=name)
    except CheckpointError as error:
        raise UsageError(error.message, error.hint) from None
    except RecursionError:
        raise UsageError(f"`{path}` is nested too deeply to be a config.json") from None


def _find(kind: str, name: str, entries: Sequence[Entry[T]], see: str) -> T:
    """The entry that has this name, else the only one whose name contains all its words in this order."""
    query = _words(name)
    found = [entry for entry in entries if query in map(_words, entry.names)] or [
        entry for entry in entries if any(_within(query, _words(known)) for known in entry.names)
    ]
    if len(found) > 1:
        raise AmbiguousNameError(kind, name, [entry.names[0] for entry in found])
    if not found:
        raise UnknownNameError(kind, name, [entry.names[0] for entry in entries], see)
    return found[0].item


_NOISE = frozenset(("base", "chat", "hf", "instruct", "it", "meta"))  # words that change no figure


def _words(name: str) -> tuple[str, ...]:
    """`meta-llama/Llama-3.1-70B-Instruct` as ("llama", "3.1", "70", "b"): owner, punctuation and noise dropped."""
    words = re.findall(r"[a-z]+|\d+(?:\.\d+)?", name.lower().rpartition("/")[2])
    return tuple(word for word in words if word not in _NOISE)


def _within(part: Sequence[str], whole: Sequence[str]) -> bool:
    rest = iter(whole)
    return bool(part) and all(word in rest for word in part)


def _rows(file: str) -> Iterator[dict[str, str]]:
    with (ASSETS / "catalog" / file).open(encoding="utf-8", newline="") as text:
        yield from csv.DictReader(text)


def _model(row: dict[str, str]) -> ModelSpec:
    return dataclasses.replace(
        _build(ModelSpec, row),
        experts=_build(Experts, row, "experts.") if row["experts.count"] else None,
        latent=_build(LatentAttention, row, "latent.") if row["latent.kv_rank"] else None,
        linear_attention=_build(LinearAttention, row, "linear.") if row["linear.key_heads"] else None,
    )


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(";") if part.strip())


# How a cell becomes a field, by the field's annotation. An empty cell leaves the field at its default.
_PARSE: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "int | None": int,
    "float": float,
    "float | None": float,
    "bool": lambda text: text == "yes",
    "tuple[str, ...]": _split,
}


def _build(kind: Callable[..., T], row: dict[str, str], prefix: str = "") -> T:
    """A dataclass from the columns named like its fields, after `prefix`."""
    fields = {field.name: str(field.type) for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    cells = {name: row.get(prefix + name) for name in fields}
    return kind(**{name: _PARSE[fields[name]](cell) for name, cell in cells.items() if cell})
