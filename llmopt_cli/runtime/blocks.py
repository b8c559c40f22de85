"""`BlockPool`: who holds which page of the KV cache, and what the pages that nobody holds still contain.

Numbers only; the tensors are in `kv_cache`. A full block is known by the hash of all tokens up to its end, so requests
that begin alike share blocks. Every operation is O(1) per block.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Key = bytes  # the chained hash of a block: of its tokens and of everything before them
Chain = Callable[[Key, Sequence[int]], Key]


def chain(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block of `tokens` after the block `parent`; the first block's parent is a salt."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent[:64], digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Content:
    """What a block holds: `tokens`, after those of the block `parent` (None at the start of a sequence)."""

    key: Key
    tokens: tuple[int, ...]
    parent: int | None


class BlockPool:
    """Hands out block numbers 0..num_blocks-1. A block has any number of holders; without one it is free.

    Free blocks whose content is known stay findable until they are needed, the least recently held first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._empty = list(range(num_blocks - 1, -1, -1))  # free, content unknown
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, content known
        self._contents: dict[int, Content] = {}
        self._index: dict[Key, int] = {}
        self._children: dict[int, set[int]] = {}  # the known blocks behind a known one
        self._evicted: OrderedDict[Key, None] = OrderedDict()  # the last of them, as many as there are blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._idle)

    @property
    def num_known(self) -> int:
        """Blocks whose content can be found."""
        return len(self._contents)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, forgetting their content; the caller has seen that there are as many."""
        assert count <= self.num_free, "allocation is checked before it is asked for"
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def hold(self, block: int) -> None:
        """Share a block that `find` told of, or that somebody holds."""
        if not self._holders[block]:
            del self._idle[block]
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Let go of blocks. Give a sequence's last block first: then its head is found longest."""
        for block in blocks:
            self._holders[block] -= 1
            assert self._holders[block] >= 0, "a block was released by nobody who held it"
            if self._holders[block]:
                continue
            if block in self._contents:
                self._idle[block] = None
            else:
                self._empty.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether the block has several holders."""
        return self._holders[block] > 1

    def is_idle(self, block: int) -> bool:
        """Whether the block is free although its content is known."""
        return block in self._idle

    def find(self, key: Key, tokens: Sequence[int], parent: int | None) -> int | None:
        """The block that holds `tokens` after the block `parent`. Tokens are compared: a hash alone proves nothing."""
        block = self._index.get(key)
        return block if block is not None and self._contents[block] == Content(key, tuple(tokens), parent) else None

    def publish(self, block: int, key: Key, tokens: Sequence[int], parent: int | None) -> int:
        """Make a full, computed block findable. Returns the block that holds this content: another, if one did before.

        A key that other content has already leaves the block unknown. `parent` is a block that was published, too.
        """
        content = Content(key, tuple(tokens), parent)
        known = self._index.setdefault(key, block)
        if known == block:
            self._contents[block] = content
            if parent is not None:
                self._children.setdefault(parent, set()).add(block)
        return known if self._contents[known] == content else block

    def knows(self, block: int) -> bool:
        """Whether the block's content can be found."""
        return block in self._contents

    def was_evicted(self, key: Key) -> bool:
        """Whether the content of this key was given up for others, as far as is remembered."""
        return key in self._evicted

    def forget(self) -> None:
        """Forget all content; nobody's blocks change."""
        self._evicted.clear()
        self._empty.extend(self._idle)
        self._idle.clear()
        self._contents.clear()
        self._index.clear()
        self._children.clear()

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert that free, held and findable blocks are what the tables of all holders say."""
        holders = [0] * self.num_blocks
        for table in tables:
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "a block leaked, or its holders were miscounted"
        free = [block for block, count in enumerate(holders) if not count]
        assert sorted([*self._empty, *self._idle]) == free, "a free block is lost or listed twice"
        assert self._idle.keys() <= self._contents.keys(), "an idle block's content is unknown"
        assert {content.key: block for block, content in self._contents.items()} == self._index, "the index is wrong"
        assert all(c.parent is None or c.parent in self._contents for c in self._contents.values()), "an orphan"
        behind = [(c.parent, block) for block, c in self._contents.items() if c.parent is not None]
        known = [(parent, block) for parent, blocks in self._children.items() for block in blocks]
        assert sorted(behind) == sorted(known), "a block is listed behind another that it does not follow"

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        parent = self._contents[block].parent
        if parent is not None:
            self._children[parent].discard(block)
        lost = [block]
        while lost:  # what is behind it can't be found without it; only where a request dropped its middle is there any
            last = lost.pop()
            self._lose(last)
            lost += self._children.pop(last, ())
            if last in self._idle:
                del self._idle[last]
                self._empty.append(last)
        return block

    def _lose(self, block: int) -> None:
        """Forget the content of a block, and remember that it was there."""
        key = self._contents.pop(block).key
        del self._index[key]
        self._evicted[key] = None
        if len(self._evicted) > self.num_blocks:
            self._evicted.popitem(last=False)
