"""The weight stream: stored tensors under the model's names, one at a time.

Reads safetensors lazily, unpacks each format of `formats/` into the in-memory form of `PackedLinear`, and renames or
stacks by transformers' own conversion mapping of the architecture. Knows neither fusing nor devices.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.model.formats import awq
from llmopt_cli.spec.checkpoint import Checkpoint

PACKED = ("codes", "scales", "zeros")  # the in-memory tensors of a packed linear


def stream(model: Any, checkpoint: Checkpoint, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(model name, tensor on the CPU) for all that is stored.

    Peak memory: the stored parts of one model tensor, and while a packed linear is unpacked some 16 times its bytes.

    `wanted` are the model's names. A stored tensor that the model has no place for raises ModelError.
    """
    with ExitStack() as stack:
        stored = _Stored(checkpoint, stack)
        for target, (converter, sources) in _plan(model, stored.names, wanted).items():
            if converter is None:
                yield target, stored.get(sources[0][0])
                continue
            once = copy.deepcopy(converter)
            for name, pattern in sources:
                once.add_tensor(target, name, pattern, stored.get(name))
            for name, tensor in once.convert(target, model=model, config=model.config).items():
                yield name, tensor[0] if isinstance(tensor, list) else tensor


def packed_linears(checkpoint: Checkpoint) -> list[str]:
    """The names of the linears that the checkpoint stores as integer codes."""
    marker = f".{awq.SUFFIXES[0]}"
    return [name.removesuffix(marker) for name in checkpoint.tensors if name.endswith(marker)]


class _Stored:
    """The checkpoint's tensors by name, where a packed linear `X` shows as X.codes, X.scales and X.zeros."""

    def __init__(self, checkpoint: Checkpoint, stack: ExitStack) -> None:
        self._headers = checkpoint.tensors
        self._stack = stack
        self._files: dict[Path, Any] = {}
        self._packed = set(packed_linears(checkpoint))
        self._unpacked: tuple[str, dict[str, Tensor]] = ("", {})
        raw = {f"{linear}.{suffix}" for linear in self._packed for suffix in awq.SUFFIXES}
        plain = [name for name in checkpoint.tensors if name not in raw]
        names = plain + [f"{linear}.{suffix}" for linear in self._packed for suffix in PACKED]
        self.names = sorted(names, key=_natural)

    def get(self, name: str) -> Tensor:
        """Read one tensor from disk, unpacking it if it belongs to a packed linear."""
        linear, _, suffix = name.rpartition(".")
        if linear not in self._packed or suffix not in PACKED:
            return self._read(name)
        if self._unpacked[0] != linear:
            weight = awq.unpack({part: self._read(f"{linear}.{part}") for part in awq.SUFFIXES})
            nibbles = weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4)
            self._unpacked = linear, {"codes": nibbles, "scales": weight.scales, "zeros": weight.zeros}
        return self._unpacked[1][suffix]

    def _read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            file = self._headers[name].file
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = self._files[file].get_tensor(name)
        except KeyError:
            raise CheckpointError(f"the checkpoint stores no `{name}`") from None
        except SafetensorError as error:
            raise CheckpointError(f"`{file}` cannot be read: {error}", "download it again") from None
        return tensor


Source = tuple[str, str]  # (stored name, the converter's pattern that matched it)


def _plan(model: Any, names: list[str], wanted: Collection[str]) -> dict[str, tuple[Any, list[Source]]]:
    """Model name -> (transformers' converter or None, what it is made from), for every stored name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = dict.fromkeys(wanted, True)
    plan: dict[str, tuple[Any, list[Source]]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known:
            plan.setdefault(target, (by_pattern.get(pattern), []))[1].append((name, pattern or name))
        elif not _ignorable(model, target):
            raise ModelError(f"the checkpoint stores `{name}`, which the model has no place for")
    return plan


def _ignorable(model: Any, name: str) -> bool:
    """Whether transformers, too, drops this tensor in silence (rotary tables, heads for training)."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    return any(re.search(pattern, name) for pattern in patterns)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`: experts are stacked in the order they come."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
