"""`BlockPool`: who holds which page of the KV cache. Numbers only; the tensors are in `kv_cache`."""

from __future__ import annotations

from collections.abc import Iterable


class BlockPool:
    """Hands out block numbers 0..num_blocks-1, each to one holder at a time, in O(1)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks; the caller has seen that there are as many."""
        assert count <= len(self._free), "allocation is checked before it is asked for"
        return [self._free.pop() for _ in range(count)]

    def release(self, blocks: Iterable[int]) -> None:
        """Give blocks back."""
        self._free.extend(blocks)

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that free and held blocks together are all blocks, each once."""
        held = [block for table in tables for block in table]
        assert sorted(self._free + held) == list(range(self.num_blocks)), "a block leaked or has two holders"
