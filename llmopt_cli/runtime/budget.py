"""How memory is shared out between weights, a step's peak, the KV cache and a reserve; or what would make it suffice.

Counts bytes. What takes how much is `estimate.memory`'s business, what there is `probe`'s; no tensors here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from llmopt_cli.errors import CapacityError
from llmopt_cli.estimate.memory import Budget, kv_block_bytes, own_budget, weight_bytes
from llmopt_cli.spec.model import ModelSpec
from llmopt_cli.spec.recipe import Batching
from llmopt_cli.spec.scheme import find_scheme

SMALL_STEP = 256  # tokens of a step that prompts are still prefilled well with
FIXES = 3  # that a refusal names


@dataclass(frozen=True)
class CacheSize:
    """How large the cache is: blocks of `block_size` tokens, `block_bytes` each over all layers."""

    num_blocks: int
    block_size: int
    block_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens that fit."""
        return self.num_blocks * self.block_size

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.num_blocks * self.block_bytes


@dataclass(frozen=True)
class Needs:
    """A model as it is to run, in bytes: its `weights`, a value it computes with, a cached value and head's scale.

    `batching` has a `max_model_len`. `quantized` says whether the weights are; `name` is what the user calls it.
    """

    name: str
    spec: ModelSpec
    batching: Batching
    weights: int
    value_bytes: int
    kv_bytes: int
    kv_scale_bytes: int = 0
    quantized: bool = False

    @cached_property
    def block_bytes(self) -> int:
        """One block of the cache."""
        return kv_block_bytes(self.spec, self.batching.block_size, self.kv_bytes, self.kv_scale_bytes)

    @property
    def blocks_per_request(self) -> int:
        """Blocks of a request of full length: the least that a cache must have."""
        assert self.batching.max_model_len is not None
        return -(-self.batching.max_model_len // self.batching.block_size)

    @property
    def request_bytes(self) -> int:
        """Cache of a request of full length."""
        return self.blocks_per_request * self.block_bytes

    def on(self, free: int) -> Budget:
        """The budget where `free` bytes are left beside the weights."""
        return own_budget(self.spec, self.batching, free, self.weights, self.value_bytes)

    def room(self, free: int) -> int:
        """What the cache may take of `free` bytes: a step's peak must fit beside it."""
        found = self.on(free)
        return int(found.free if found.kv_limit is not None else min(found.free, free - found.activations))


@dataclass(frozen=True)
class Shares:
    """How the memory of one device is shared out, in bytes: `total` there, `free` of it beside the weights."""

    total: int
    free: int
    weights: int
    activations: int
    cache: CacheSize

    @property
    def reserve(self) -> int:
        """What nobody of ours takes: for whoever else allocates."""
        return max(self.free - self.activations - self.cache.nbytes, 0)

    def record(self) -> dict[str, Any]:
        """All of it by name, for reports."""
        return {
            "memory_bytes": self.total,
            "free_bytes": self.free,
            "weights_bytes": self.weights,
            "activations_bytes": self.activations,
            "kv_cache_bytes": self.cache.nbytes,
            "kv_cache_tokens": self.cache.num_tokens,
            "num_blocks": self.cache.num_blocks,
            "block_size": self.cache.block_size,
            "reserve_bytes": self.reserve,
        }


def share_out(needs: Needs, free: int, total: int) -> Shares:
    """The cache that full-length requests can use of `free` bytes, or that was asked for, and what stays beside it.

    Raises CapacityError with the cheapest ways out if not even one request of full length fits.
    """
    limit = needs.batching.kv_cache_memory_bytes
    if limit is not None and needs.request_bytes <= free < limit:
        raise CapacityError(
            f"the device has no {mib(limit)} left for the KV cache, but {mib(free)}",
            f"give at most `--kv-cache-memory-bytes {free}`, or leave it out",
        )
    affordable = max(needs.room(free), 0) // needs.block_bytes
    most = needs.blocks_per_request * needs.batching.max_num_seqs
    num_blocks = affordable if limit is not None else min(affordable, most)
    if num_blocks < needs.blocks_per_request:
        raise CapacityError(_shortage(needs, free, num_blocks), "; ".join(fixes(needs, free)))
    cache = CacheSize(num_blocks, needs.batching.block_size, needs.block_bytes)
    return Shares(total, free, needs.weights, int(needs.on(free).activations), cache)


def _shortage(needs: Needs, free: int, num_blocks: int) -> str:
    limit = needs.batching.kv_cache_memory_bytes
    beside = f"{mib(max(free, 0))} are free beside the weights, {mib(needs.on(free).activations)} of them for a step"
    return (
        f"the KV cache would hold {num_blocks * needs.batching.block_size:,} tokens, less than one request of "
        f"{needs.batching.max_model_len:,} ({mib(needs.request_bytes)}): "
        + (beside if limit is None else f"{mib(limit)} were given")
    )


def fixes(needs: Needs, free: int) -> list[str]:
    """The three cheapest ways out: those that suffice alone, by what they cost, then those that save most."""
    found = sorted(_ways(needs, free), key=lambda fix: (not fix.suffices, 0 if fix.suffices else -fix.saves))
    return [fix.text if fix.suffices else f"{fix.text} (not enough alone)" for fix in found[:FIXES]]


class Fix(NamedTuple):
    """A way to need less: what to do and what it saves, and whether nothing else is needed then."""

    text: str
    saves: float
    suffices: bool


def _ways(needs: Needs, free: int) -> list[Fix]:
    """Every way out, from the one that is missed least: speed, a little quality, length, more quality."""
    batching, room = needs.batching, max(needs.room(free), 0)
    limited = batching.kv_cache_memory_bytes is not None
    ways = []
    if limited and needs.request_bytes <= free:
        ways.append(Fix(f"`--kv-cache-memory-bytes {needs.request_bytes}` is enough", 0, suffices=True))
    small = max(SMALL_STEP, batching.max_num_seqs)
    if small < batching.max_num_batched_tokens and not limited:
        ways.append(_changed(needs, free, "--max-num-batched-tokens", small))
    if batching.max_num_seqs > 1 and not limited:
        ways.append(_changed(needs, free, "--max-num-seqs", -(-batching.max_num_seqs // 4)))
    if not needs.kv_scale_bytes:
        coded = replace(needs, kv_bytes=1, kv_scale_bytes=4)
        ways.append(_saving("`--kv-cache-dtype int8`", needs.request_bytes - coded.request_bytes, coded, free))
    if shorter := room // needs.block_bytes * batching.block_size:
        ways.append(_changed(needs, free, "--max-model-len", shorter))
    saved = needs.weights - weight_bytes(needs.spec, find_scheme("awq"))
    if saved > 0 and not (needs.quantized or limited):
        ways.append(_saving(f"`llmopt quantize {needs.name} --method awq`", saved, needs, free + int(saved)))
    return [way for way in ways if way.suffices or way.saves > 0]


def _changed(needs: Needs, free: int, flag: str, value: int) -> Fix:
    """Another number for a flag of the batching: what it saves of a step and of a request."""
    change: dict[str, Any] = {flag.removeprefix("--").replace("-", "_"): value}
    other = replace(needs, batching=replace(needs.batching, **change))
    saves = needs.request_bytes - other.request_bytes + needs.on(free).activations - other.on(free).activations
    return _saving(f"`{flag} {value}`", saves, other, free)


def _saving(text: str, saves: float, other: Needs, free: int) -> Fix:
    return Fix(f"{text} saves {mib(saves)}", saves, suffices=other.room(free) >= other.request_bytes)


def mib(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
