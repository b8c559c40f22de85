"""The weight stream: stored tensors under the model's names, one at a time.

Reads safetensors lazily, unpacks each format of `formats/`, and renames or stacks by transformers' own conversion
mapping of the architecture. Knows neither fusing nor devices.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.model.codes import Codes
from llmopt_cli.model.formats.gguf import read_tensor
from llmopt_cli.model.formats.table import format_of
from llmopt_cli.model.linear import Stored, resident
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.gguf_checkpoint import GgufHeader
from llmopt_cli.spec.scheme import Scheme

CACHE_SCALES = r"\.[kv]_scale$"  # an offer to engines whose fp8 cache has one scale a layer; ours scales every token
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Suffixes of the tensors that say which group an input is in, that hold scales, zeros, and absolute maxima of scales.
ORDERS = ("g_idx", "weight_g_idx")
SCALES = ("scales", "weight_scale", "weight_scale_inv", "SCB")
ZEROS = ("qzeros", "weight_zero_point")
NESTED = "weight.nested_absmax"


class Store:
    """A checkpoint's tensors by name, open for reading; those of a quantized linear `X` show as `X.weight` alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._stack = ExitStack()
        self._files: dict[Path, Any] = {}
        self._parts: dict[str, dict[str, str]] = {}
        if checkpoint.quantization is not None:
            self._format = format_of(checkpoint.quantization)
            self._schemes = self._format.parse_config(checkpoint.quantization)
            self._parts = self._format.linears(checkpoint.tensors)
        inner = {name for parts in self._parts.values() for name in parts.values()}
        plain = [name for name in checkpoint.tensors if name not in inner]
        self.names = sorted([*plain, *(f"{linear}.weight" for linear in self._parts)], key=_natural)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def linears(self) -> dict[str, Scheme]:
        """The linears that are stored quantized, and how."""
        return {linear: self._schemes.of(linear) for linear in self._parts}

    @property
    def in_blocks(self) -> bool:
        """Whether the codes are GGML's, which embeddings can be, too."""
        return bool(self._parts) and self._format.name == "gguf"

    def stored(self, linear: str) -> Stored:
        """How a quantized linear is stored, from its file's header; `ordered` if groups are not of neighbours."""
        parts = self._parts[linear]
        headers = {suffix: self._checkpoint.tensors[name] for suffix, name in parts.items()}
        scales = next((headers[suffix] for suffix in SCALES if suffix in headers), None)
        orders = [self.read(parts[suffix]) for suffix in ORDERS if suffix in parts]
        return Stored(
            scales=FLOATS.get(scales.dtype, torch.float32) if scales else torch.float32,
            single=scales is not None and math.prod(scales.shape) == 1,
            zeros=any(suffix in headers for suffix in ZEROS),
            ordered=any(bool((groups.diff() < 0).any()) for groups in orders),
            nested=headers[NESTED].shape[0] if NESTED in headers else 0,
        )

    def codes(self, linear: str) -> Codes:
        """A quantized linear out of its file; CheckpointError names it if its tensors do not belong together."""
        parts = {suffix: self.read(name) for suffix, name in self._parts[linear].items()}
        try:
            return self._format.unpack(parts, self._schemes.of(linear))
        except CheckpointError as error:
            raise CheckpointError(f"`{linear}`: {error.message}", error.hint) from None

    def get(self, name: str) -> Tensor:
        """One of `names`; a quantized weight is expanded to float32."""
        linear = name.removesuffix(".weight")
        return self.codes(linear).dequantize() if linear in self._parts else self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        from safetensors import SafetensorError, safe_open

        try:
            header = self._checkpoint.tensors[name]
            if isinstance(header, GgufHeader):
                return read_tensor(header)
            file = header.file
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            tensor: Tensor = self._files[file].get_tensor(name)
        except KeyError:
            raise CheckpointError(f"the checkpoint stores no `{name}`") from None
        except SafetensorError as error:
            raise CheckpointError(f"`{file}` cannot be read: {error}", "download it again") from None
        return tensor


def stream(model: Any, store: Store, wanted: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(model name, tensor on the CPU) for all that is stored.

    Peak memory: the stored parts of one model tensor, and while a quantized linear is unpacked some 16 times its bytes.

    `wanted` are the model's names: `X.codes` for a linear that holds codes. A quantized weight of any other place in
    the model (stacked experts) comes expanded. A stored tensor that the model has no place for raises ModelError.
    """
    coded = {name.removesuffix("codes") + "weight" for name in wanted if name.endswith(".codes")}
    for target, (converter, sources) in plan(model, store.names, {*wanted, *coded}).items():
        if target in coded:
            linear = target.removesuffix("weight")
            name = sources[0][0].removesuffix(".weight")
            held = resident(store.codes(name), store.stored(name))
            yield from ((f"{linear}{field}", tensor) for field, tensor in held.items())
        elif converter is None:
            yield target, store.get(sources[0][0])
        else:
            once = copy.deepcopy(converter)
            for name, pattern in sources:
                once.add_tensor(target, name, pattern, store.get(name))
            for name, tensor in once.convert(target, model=model, config=model.config).items():
                yield name, tensor[0] if isinstance(tensor, list) else tensor


def quantized_places(model: nn.Module, store: Store, wanted: Collection[str]) -> dict[str, str]:
    """Where the model has a linear, or for blocks of GGML an embedding, for a quantized one: path -> stored name."""
    names = [f"{linear}.weight" for linear in store.linears]
    kinds = (nn.Linear, nn.Embedding) if store.in_blocks else (nn.Linear,)
    own = {path for path, module in model.named_modules() if type(module) in kinds}
    places = {}
    for target, (converter, sources) in plan(model, names, wanted).items():
        path = target.removesuffix(".weight")
        if converter is None and path in own:
            places[path] = sources[0][0].removesuffix(".weight")
    return places


Source = tuple[str, str]  # (stored name, the converter's pattern that matched it)


def plan(model: Any, names: list[str], wanted: Collection[str]) -> dict[str, tuple[Any, list[Source]]]:
    """Model name -> (transformers' converter or None, what it is made from), for every stored name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    known = dict.fromkeys(wanted, True)
    found: dict[str, tuple[Any, list[Source]]] = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known and name in known:
            target, pattern = name, None
        if target in known:
            found.setdefault(target, (by_pattern.get(pattern), []))[1].append((name, pattern or name))
        elif not _ignorable(model, target):
            raise ModelError(f"the checkpoint stores `{name}`, which the model has no place for")
    return found


def _ignorable(model: Any, name: str) -> bool:
    """Whether this tensor is dropped in silence: what transformers, too, leaves out, and scales for an fp8 cache."""
    patterns = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$", CACHE_SCALES]
    return any(re.search(pattern, name) for pattern in patterns)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`: experts are stacked in the order they come."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
