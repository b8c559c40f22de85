"""GGUF's block types and llama.cpp's mixes of them: which matrix of a model is stored in which, and what it costs.

Bits are those of the block layouts (ggml-common.h), mixes those that `llama-quantize` chooses with an importance
matrix. Knows names and sizes, not how blocks are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmopt_cli.spec.model import Matrix, ModelSpec


@dataclass(frozen=True, slots=True)
class BlockType:
    """How a row is cut: blocks of `size` weights take `nbytes` bytes, scales included.

    `number` is ggml's name for the type; `fallback` the type for rows that are not whole blocks.
    """

    name: str
    number: int
    size: int
    nbytes: int
    fallback: str | None = None

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.nbytes / self.size


SUPER_BLOCK = 256  # weights of a k-quant's block
BLOCK_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("f32", 0, 1, 4),
        BlockType("f16", 1, 1, 2),
        BlockType("q4_0", 2, 32, 18),
        BlockType("q4_1", 3, 32, 20),
        BlockType("q5_0", 6, 32, 22),
        BlockType("q5_1", 7, 32, 24),
        BlockType("q8_0", 8, 32, 34),
        BlockType("q2_k", 10, SUPER_BLOCK, 84, fallback="q4_0"),
        BlockType("q3_k", 11, SUPER_BLOCK, 110, fallback="q4_0"),
        BlockType("q4_k", 12, SUPER_BLOCK, 144, fallback="q5_0"),
        BlockType("q5_k", 13, SUPER_BLOCK, 176, fallback="q5_1"),
        BlockType("q6_k", 14, SUPER_BLOCK, 210, fallback="q8_0"),
        BlockType("bf16", 30, 1, 2),
    )
}
BLOCK_BITS = {name: kind.bits for name, kind in BLOCK_TYPES.items()}
Where = Callable[[int, ModelSpec], bool]  # the number of a layer -> whether it is one of the better ones


def _spread(layer: int, spec: ModelSpec) -> bool:
    """What the _M mixes give more: the first and last eighth, and every third between."""
    eighth, last = spec.num_layers // 8, 7 * spec.num_layers // 8
    return layer < eighth or layer >= last or (layer - eighth) % 3 == 2


def _first(share: int) -> Where:
    """The first 1/`share` of the layers."""
    return lambda layer, spec: layer < spec.num_layers // share


def _shared(layer: int, spec: ModelSpec) -> bool:
    """All layers where four heads or more share a value head, else none."""
    return spec.num_heads >= 4 * spec.num_kv_heads


@dataclass(frozen=True, slots=True)
class Better:
    """A matrix in another type than the rest: `type`, and in the layers `where` that holds `best`."""

    type: str
    best: str = "f32"
    where: Where = lambda layer, spec: False


@dataclass(frozen=True, slots=True)
class Mix:
    """The block types of one mix: `rest`, except for the matrices named in `better`.

    `file_type` is llama.cpp's number of the mix. Models of eight experts get more for what all experts share, the
    output projection only where the mix `lifts_output`.
    """

    rest: str
    better: Mapping[Matrix, Better] = field(default_factory=dict, hash=False)
    file_type: int = 0
    lifts_output: bool = False

    def bits(self, spec: ModelSpec) -> dict[Matrix, float]:
        """Bits per weight of every kind of matrix of `spec`."""
        return {
            kind: sum(BLOCK_BITS[self.type_of(kind, layer, spec)] for layer in range(spec.num_layers)) / spec.num_layers
            for kind in spec.matrices()
        }

    def type_of(self, kind: Matrix, layer: int, spec: ModelSpec) -> str:
        """The block type of a matrix of this kind in this layer."""
        return fitting(self.wanted(kind, layer, spec), spec.columns(kind))

    def wanted(self, kind: Matrix, layer: int, spec: ModelSpec) -> str:
        """The same for rows of any length: what `type_of` is where they are whole blocks."""
        if kind in ("norm", "router"):
            return "f32"
        # A tied embedding is the head as well, and stored as such.
        role = "head" if kind == "embedding" and spec.tied_embeddings else ROLES.get(kind, kind)
        chosen = self.better.get(role, Better(self.rest))
        name = chosen.best if chosen.where(layer, spec) else chosen.type
        return self._lifted(role, name, spec)

    def _lifted(self, role: Matrix, name: str, spec: ModelSpec) -> str:
        """What small matrices get where much depends on them: eight experts, or the eight heads of a 70B."""
        if spec.experts and spec.experts.count == EIGHT:
            if role in ("key", "value"):
                return "q8_0"
            if role == "output":
                return "q5_k" if self.lifts_output else self.rest
        big = spec.num_layers == LAYERS_70B and spec.num_heads != spec.num_kv_heads
        return "q5_k" if role == "value" and big and name in ("q3_k", "q4_k") else name


ROLES: dict[Matrix, Matrix] = {"expert_ffn": "ffn", "expert_down": "down"}
EIGHT = 8  # experts, of Mixtral
LAYERS_70B = 80


def fitting(name: str, columns: int) -> str:
    """The type for rows of so many weights where `name` is wanted: its fallback, or f16, if no whole blocks."""
    while columns % BLOCK_TYPES[name].size:
        name = BLOCK_TYPES[name].fallback or "f16"
    return name


_HEAD = Better("q6_k")
MIXES: dict[str, Mix] = {
    "q8_0": Mix("q8_0", file_type=7),
    "q6_k": Mix("q6_k", file_type=18),
    "q5_k_m": Mix(
        "q5_k",
        {"head": _HEAD, "value": Better("q5_k", "q6_k", _spread), "down": Better("q5_k", "q6_k", _spread)},
        file_type=17,
    ),
    "q5_k_s": Mix("q5_k", {"head": _HEAD}, file_type=16),
    "q4_k_m": Mix(
        "q4_k",
        {"head": _HEAD, "value": Better("q4_k", "q6_k", _spread), "down": Better("q4_k", "q6_k", _spread)},
        file_type=15,
        lifts_output=True,
    ),
    "q4_k_s": Mix(
        "q4_k",
        {
            "head": _HEAD,
            "value": Better("q4_k", "q5_k", lambda layer, spec: layer < 4),
            "down": Better("q4_k", "q5_k", _first(8)),
        },
        file_type=14,
        lifts_output=True,
    ),
    "q4_0": Mix("q4_0", {"head": _HEAD, "down": Better("q4_0", "q4_1", _first(8))}, file_type=2),
    "q3_k_m": Mix(
        "q3_k",
        {
            "head": _HEAD,
            "value": Better("q4_k", "q5_k", lambda layer, spec: layer < 2),
            "down": Better("q4_k", "q5_k", _first(16)),
            "output": Better("q4_k"),
        },
        file_type=12,
        lifts_output=True,
    ),
    "q2_k": Mix(
        "q2_k",
        {
            "head": _HEAD,
            "value": Better("q3_k", "q4_k", _shared),
            "down": Better("q3_k"),
            "output": Better("q3_k"),
        },
        file_type=10,
        lifts_output=True,
    ),
}


def block_of(name: str) -> str:
    """The block type of this name, or the one that most of a mix of this name is."""
    return MIXES[name].rest if name in MIXES else name
