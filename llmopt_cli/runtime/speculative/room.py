"""Room for what proposers cache: blocks of their own, of which those take some who are drafted for now."""

from __future__ import annotations

from collections.abc import Iterable

from llmopt_cli.runtime.blocks import BlockPool


class Room:
    """`num_blocks` blocks for `block_size` tokens each. Whoever finds its table empty has nothing cached any more.

    A table may hold blocks of its `pool` that are others', too.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool, self._block_size = BlockPool(num_blocks), block_size

    def make(self, blocks: list[int], tokens: int, others: Iterable[list[int]]) -> bool:
        """Let `blocks` grow to so many tokens, at the cost of `others` as far as that is needed; False if in vain."""
        missing = -(-tokens // self._block_size) - len(blocks)
        for other in others:
            if missing <= self.pool.num_free:
                break
            self.give_back(other)
        if missing > self.pool.num_free:
            return False
        blocks.extend(self.pool.allocate(max(0, missing)))
        return True

    def give_back(self, blocks: list[int]) -> None:
        """Empty a table."""
        self.pool.release(reversed(blocks))
        blocks.clear()

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that these tables hold all blocks that are not free."""
        self.pool.check_integrity(tables)
