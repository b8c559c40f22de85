"""What a user may wish beside a method: a rotated model, a quantized head, scales of a KV cache; and what forbids it.

Knows the model's tree and what formats and methods can do; neither tries nor does anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmopt_cli.errors import UsageError
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.quant.kv_scales import attention_of
from llmopt_cli.quant.methods import Method
from llmopt_cli.quant.outside import embedding_and_head
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.spec.checkpoint import TensorHeader

SCALE = TensorHeader(Path(), "F32", (1,), 4)  # of a layer's keys, and of its values


@dataclass(frozen=True, slots=True)
class Wishes:
    """Whether the model is rotated, its output head quantized, and scales of its KV cache stored."""

    rotate: bool = False
    head: bool = False
    scales: bool = False

    def check(self, method: Method, form: Format) -> Wishes:
        """These; UsageError if the method or the format has no way to fulfil them."""
        if self.scales and form.cache_key is None:
            other = "add --format compressed-tensors, or " * ("compressed-tensors" in method.formats)
            raise UsageError(
                f"`{form.name}` files have no place for the scales of a KV cache", f"{other}leave --kv-scales out"
            )
        if self.head and method.own_grid:
            raise UsageError(f"{method.name} decides by itself about the output head", "leave --quantize-head out")
        if self.rotate and form.name == "gguf":
            raise UsageError("GGUF files are not made of rotated models", "leave --rotate out, or take --method gptq")
        return self

    def added(self, skeleton: Skeleton) -> dict[str, TensorHeader]:
        """Tensors that the base does not have, but for a quantized head, by their stored names."""
        found: dict[str, TensorHeader] = {}
        if self.rotate and skeleton.tied and not self.head:
            embedding, head = embedding_and_head(skeleton.model)
            weight, own = (skeleton.place(f"{name}.weight") for name in (embedding, head))
            found[own] = skeleton.checkpoint.tensors[weight]
        if self.scales:
            homes = [attention_of(block, f"{skeleton.prefix}.{i}") for i, block in enumerate(skeleton.blocks)]
            names = [f"{skeleton.place(home)}.{leaf}" for home in homes for leaf in ("k_scale", "v_scale")]
            found |= dict.fromkeys(names, SCALE)
        return found


def head_of(skeleton: Skeleton, wishes: Wishes) -> dict[str, tuple[int, int]]:
    """The head's name in the tree and its shape; UsageError if it is the embedding and stays so."""
    if skeleton.tied and not wishes.rotate:
        raise UsageError(
            f"the output head of `{skeleton.checkpoint.name}` is its embedding, so that it can't be quantized alone",
            "add --rotate, which gives it a head of its own, or leave --quantize-head out",
        )
    _, head = embedding_and_head(skeleton.model)
    rows, columns = skeleton.model.get_parameter(f"{head}.weight").shape
    return {head: (rows, columns)}
