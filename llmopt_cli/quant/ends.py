"""The ends of a model, embedding, last norm and head, where they are not those of the base: turned or quantized.

What needs no statistics is made once, before the first block, and kept with the blocks: the weights that a rotation
turns, and those that a file format quantizes as well. Knows no method; what reads and runs a model is elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llmopt_cli.quant.blocks import Settings
from llmopt_cli.quant.outside import embedding_and_head, find_outside, turned
from llmopt_cli.quant.skeleton import Skeleton, trim
from llmopt_cli.quant.walk import Walk
from llmopt_cli.quant.work import Work


@dataclass(frozen=True, eq=False)
class Ends:
    """Weights outside the blocks. `trial` are token ids [1, L] on which the model shows which they are."""

    walk: Walk
    work: Work
    settings: Settings
    trial: Tensor

    @property
    def skeleton(self) -> Skeleton:
        """The model."""
        return self.walk.skeleton

    @torch.inference_mode()
    def make(self) -> None:
        """Keep them, unless that is done. Peak memory: the outside twice in float32, or one weight and its codes."""
        settings = self.settings
        if self.work.ends.exists() or not (settings.ends or settings.rotation):
            return
        tensors: dict[str, Tensor] = {}
        for name, scheme in settings.ends.items():
            codes = settings.method.blind_solver(self.skeleton.read(name), None, scheme).codes
            linear = self.skeleton.place(name).removesuffix(".weight")
            parts = settings.format.pack(codes, scheme)
            tensors |= {f"{linear}.{suffix}": part.cpu() for suffix, part in parts.items()}
        if settings.rotation:
            with self.skeleton.outside():
                found = self.turned()
            later = f"{embedding_and_head(self.skeleton.model)[1]}.weight" if settings.head else None
            for name in found.keys() - {later}:
                tensors[self.skeleton.place(name)] = found[name].to("cpu", settings.stored[name])
        self.work.keep(self.work.ends, tensors)
        trim()

    def turned(self) -> dict[str, Tensor]:
        """What a rotation makes of them, float32, if there is one. Needs the outside."""
        if self.settings.rotation is None:
            return {}
        return turned(self.skeleton, find_outside(self.walk, self.trial), self.settings.rotation)

    def weights(self) -> dict[str, Tensor]:
        """Name in the tree and what is stored of it, float32 on the device; the head as its step left it, if it did."""
        files = [file for file in (self.work.ends, self.work.weights(len(self.skeleton.blocks))) if file.exists()]
        return {name: weight for file in files for name, weight in self._read(file)}

    def _read(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        settings, names = self.settings, {place: name for name, place in self.skeleton.stored.items()}
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            coded = settings.format.linears(keys)
            for linear, parts in coded.items():
                name = names.get(f"{linear}.weight", f"{linear}.weight")
                scheme = settings.ends.get(name) or settings.scheme_of(name.removesuffix(".weight"))
                read = {suffix: opened.get_tensor(key) for suffix, key in parts.items()}
                yield name, settings.format.unpack(read, scheme).dequantize().to(self.skeleton.device)
            inner = {part for parts in coded.values() for part in parts.values()}
            for key in keys:
                if key not in inner:
                    yield names.get(key, key), opened.get_tensor(key).to(self.skeleton.device, torch.float32)
