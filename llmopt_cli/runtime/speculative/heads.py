"""Heads that draft, as files: which kind lies in a folder, and whether it was made for a model.

Knows names and shapes of two published formats; config.json and file headers decide, before any weight is read:
Medusa's (FasterDecoding, arXiv 2401.10774) and EAGLE-1's for Llama (SafeAILab, arXiv 2401.15077).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt_cli.errors import CheckpointError, ModelError, UnknownNameError
from llmopt_cli.spec.checkpoint import FLOATS, Checkpoint
from llmopt_cli.spec.model import ModelSpec

MEDUSA_FILE = "medusa_lm_head.safetensors"
EAGLE_FILE = "model.safetensors"
LAYER = "layers.0."
MAP = "token_map"  # vLLM's: the tokens that are drafted, where they are not all
UNUSED = ("embed_tokens.weight", "lm_head.weight")  # copies of the base model's: that one's own are used
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Heads:
    """A folder of heads that fit a model: of which `kind`, and what is stored in it."""

    kind: str
    checkpoint: Checkpoint

    @classmethod
    def open(cls, source: str | Path, base: Checkpoint, kind: str | None = None) -> Self:
        """Open a folder or hub id. CheckpointError if it is damaged, ModelError if its heads are not for `base`.

        A `kind` is the one that is wanted: ModelError if it holds another.
        """
        if kind is not None and kind not in KINDS:
            raise UnknownNameError("kind of heads", kind, KINDS)
        checkpoint = Checkpoint.open(source)
        found = checkpoint.heads
        if found is None:
            raise ModelError(f"`{checkpoint.name}` holds no heads that draft", _advice(base, kind or "medusa"))
        if kind not in (None, found):
            raise ModelError(f"`{checkpoint.name}` holds {found} heads, not {kind}", f"give `--spec-method {found}`")
        _check(checkpoint, found, base)
        return cls(found, checkpoint)

    @property
    def cached_shapes(self) -> tuple[tuple[int, int], ...]:
        """(heads, head size) of all keys and values that are cached for a token: EAGLE's layer has one of each."""
        if self.kind != "eagle":
            return ()
        own = layer_spec(self.checkpoint.config)
        return ((own.num_kv_heads, own.head_dim),) * 2

    def tensors(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """All of them by name, but for copies of the base model's own. CheckpointError if one drafts no token."""
        stored = {name: t for file in self.checkpoint.files for name, t in load_file(file, str(device)).items()}
        vocabulary = _made_for(self.checkpoint, self.kind)[1]
        if MAP in stored and not ((stored[MAP] >= 0) & (stored[MAP] < vocabulary)).all():
            raise CheckpointError(
                f"`{MAP}` of `{self.checkpoint.name}` names tokens beyond the {vocabulary:,} there are"
            )
        return {
            name: tensor if name == MAP else tensor.to(dtype) for name, tensor in stored.items() if name not in UNUSED
        }


def write_heads(folder: Path, file: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write heads: config.json last, so that a folder with one is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # none may share memory
    save_file(held, folder / file, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def medusa_shapes(config: Mapping[str, Any], spec: ModelSpec) -> Shapes:
    """`{head}.{layer}.linear.*` of residual blocks x + silu(linear(x)), then `{head}.{layers}.weight` to the logits."""
    heads, layers = (_count(config, name) for name in ("medusa_num_heads", "medusa_num_layers"))
    size, shapes = spec.hidden_size, Shapes()
    for head in range(heads):
        for layer in range(layers):
            shapes |= {f"{head}.{layer}.linear.weight": (size, size), f"{head}.{layer}.linear.bias": (size,)}
        shapes[f"{head}.{layers}.weight"] = (spec.vocab_size, size)
    return shapes


def eagle_shapes(config: Mapping[str, Any], spec: ModelSpec) -> Shapes:
    """`fc` joins embedding and hidden state, one Llama layer without a norm before its attention follows."""
    own = layer_spec(config)
    if own.num_layers != 1 or config.get("hidden_act", "silu") != "silu":
        raise ModelError("EAGLE heads are one layer with a SiLU", "give heads in the format of EAGLE-1 for Llama")
    size, queries, keys = spec.hidden_size, own.num_heads * own.head_dim, own.num_kv_heads * own.head_dim
    return {
        "fc.weight": (size, 2 * size),
        **{f"{LAYER}self_attn.{name}_proj.weight": (keys, size) for name in "kv"},
        f"{LAYER}self_attn.q_proj.weight": (queries, size),
        f"{LAYER}self_attn.o_proj.weight": (size, queries),
        **{f"{LAYER}mlp.{name}_proj.weight": (own.ffn_size, size) for name in ("gate", "up")},
        f"{LAYER}mlp.down_proj.weight": (size, own.ffn_size),
        f"{LAYER}post_attention_layernorm.weight": (size,),
    }


def layer_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The shape of EAGLE's one layer."""
    return ModelSpec.from_hf({"model_type": "llama", **config}, "heads")


KINDS: dict[str, Callable[[Mapping[str, Any], ModelSpec], Shapes]] = {"medusa": medusa_shapes, "eagle": eagle_shapes}


def _check(checkpoint: Checkpoint, kind: str, base: Checkpoint) -> None:
    name, stored = checkpoint.name, checkpoint.tensors
    hidden, vocabulary = _made_for(checkpoint, kind)
    spec = base.spec
    if (hidden, vocabulary) != (spec.hidden_size, spec.vocab_size):
        raise ModelError(
            f"`{name}` is for a model of hidden size {hidden:,} with {vocabulary:,} tokens, "
            f"and `{base.name}` has {spec.hidden_size:,} and {spec.vocab_size:,}",
            _advice(base, kind),
        )
    shapes = KINDS[kind](checkpoint.config, spec)
    shapes |= {bias: shapes[matrix][:1] for bias, matrix in _biases(shapes).items() if bias in stored}
    for tensor, shape in shapes.items():
        if tensor not in stored:
            raise CheckpointError(f"`{name}` lacks `{tensor}`, which its config.json speaks of", "download it again")
        if stored[tensor].shape != shape or stored[tensor].dtype not in FLOATS:
            found = f"{stored[tensor].dtype} {list(stored[tensor].shape)}"
            raise CheckpointError(f"`{tensor}` of `{name}` is {found} where config.json makes it {list(shape)}")
    more = {tensor for tensor in stored if kind == "medusa" and tensor.partition(".")[0].isdigit()}  # further heads
    strange = stored.keys() - shapes.keys() - {*UNUSED, MAP, *more}
    if strange:
        raise ModelError(f"`{name}` stores `{min(strange)}`, which {kind} heads of this format do not have")


def _made_for(checkpoint: Checkpoint, kind: str) -> tuple[int, int]:
    """The hidden size and the vocabulary of the model that heads are for."""
    config, stored = checkpoint.config, checkpoint.tensors
    if kind == "eagle":
        return stored["fc.weight"].shape[0], _count(config, "vocab_size")
    last = f"0.{_count(config, 'medusa_num_layers')}.weight"
    if last not in stored or len(stored[last].shape) != 2:
        raise CheckpointError(f"`{checkpoint.name}` lacks `{last}`, which its config.json speaks of")
    vocabulary, hidden = stored[last].shape
    return hidden, vocabulary


def _biases(shapes: Shapes) -> dict[str, str]:
    """Those that some EAGLE heads have, and whose they are."""
    return {name.replace("weight", "bias"): name for name in shapes if name.startswith(("fc.", f"{LAYER}self_attn"))}


def _count(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json of the heads has no {name} of at least 1")
    return value


def _advice(base: Checkpoint, kind: str) -> str:
    return f"train heads for it: `llmopt train-heads {base.name} --kind {kind}`"
