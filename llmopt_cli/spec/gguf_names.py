"""What a tensor is called in GGUF files and in transformers' checkpoints, and what it is to a mix of block types."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.spec.gguf_model import Architecture
from llmopt_cli.spec.model import Matrix

OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
KINDS: dict[str, Matrix] = {
    "token_embd": "embedding",
    "output": "head",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_qkv": "value",  # as llama.cpp counts it
    "attn_output": "output",
    "ffn_gate": "ffn",
    "ffn_up": "ffn",
    "ffn_down": "down",
    "ffn_gate_exps": "expert_ffn",
    "ffn_up_exps": "expert_ffn",
    "ffn_down_exps": "expert_down",
    "ffn_gate_inp": "router",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint is in a GGUF file: the tensor, and which of its experts."""

    name: str
    expert: int | None = None

    @property
    def stem(self) -> str:
        """The name without layer and suffix, as `attn_q`."""
        return self.name.rsplit(".", 1)[0].split(".")[-1]

    @property
    def layer(self) -> int:
        """The layer, 0 outside of them."""
        found = re.match(r"blk\.(\d+)\.", self.name)
        return int(found[1]) if found else 0

    @property
    def kind(self) -> Matrix:
        """What it is to a mix of block types: norms and biases stay as they are."""
        return KINDS[self.stem] if self.name.endswith(".weight") and self.stem in KINDS else "norm"


def place_of(architecture: Architecture, name: str) -> Place:
    """Where the tensor called `name` in a checkpoint goes; ModelError if GGUF has no place for it."""
    owner, _, suffix = name.rpartition(".")
    if owner in OUTSIDE:
        return Place(f"{OUTSIDE[owner]}.{suffix}")
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", owner)
    stem = found[2] if found else ""
    expert = re.search(r"experts\.(\d+)\.", stem)
    if expert:
        stem = stem.replace(expert[0], "experts.")
    if found is None or stem not in architecture.stems:
        raise ModelError(f"GGUF has no place for `{name}` in {architecture.name} models")
    return Place(f"blk.{found[1]}.{architecture.stems[stem]}.{suffix}", int(expert[1]) if expert else None)


def names_of(architecture: Architecture, name: str, experts: int) -> list[str]:
    """What a checkpoint calls the tensor `name` of a GGUF file: one name, or one for each of its experts."""
    place, suffix = Place(name), name.rsplit(".", 1)[1]
    owners = {gguf: own for own, gguf in OUTSIDE.items()} | {gguf: own for own, gguf in architecture.stems.items()}
    if place.stem not in owners:
        raise CheckpointError(f"the GGUF file stores `{name}`, which {architecture.name} models do not have")
    owner = owners[place.stem]
    if name.startswith("blk."):
        owner = f"model.layers.{place.layer}.{owner}"
    if not place.stem.endswith("_exps"):
        return [f"{owner}.{suffix}"]
    return [f"{owner.replace('experts.', f'experts.{index}.')}.{suffix}" for index in range(experts)]
