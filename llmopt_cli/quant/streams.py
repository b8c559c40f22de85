"""Hidden states on their way through a model, on disk: files that are mapped, so they cost no memory.

Knows files; neither models nor what the numbers mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that is there whole or not at all, whenever the power goes: flushed to the disk, then renamed."""
    rough = path.with_name(f"{path.name}.tmp")
    with rough.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    rough.replace(path)
    settle(path.parent)


def settle(folder: Path) -> None:
    """Make the names in a folder as durable as the contents of its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Stream:
    """`count` windows of hidden states [count, length, width], as they are before some block or inside of it."""

    path: Path
    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.float32

    @classmethod
    def open(cls, path: Path, windows: Tensor) -> Stream:
        """The float32 stream that was written there for token ids [N, L]."""
        count, length = windows.shape
        return cls(path, (count, length, path.stat().st_size // (4 * count * length)))

    @classmethod
    def write(cls, path: Path, batches: Iterable[Tensor]) -> Stream:
        """Write batches [B, L, H] one after the other, in their own dtype; the file appears when it is whole."""
        with Writer(path) as writer:
            for batch in batches:
                writer.add(batch)
        return writer.stream

    def batches(self, windows: int) -> Iterator[Tensor]:
        """The states, `windows` windows at a time, mapped from the file."""
        count, length, width = self.shape
        whole = torch.from_file(str(self.path), shared=False, size=count * length * width, dtype=self.dtype)
        yield from torch.split(whole.view(self.shape), windows)

    def mapped(self, path: Path, windows: int, step: Callable[[Tensor], Tensor]) -> Stream:
        """A new stream: `step` of every batch of this one."""
        return Stream.write(path, (step(batch) for batch in self.batches(windows)))


class Writer:
    """A stream in the making, for use as a context manager; `stream` is it, once it is whole."""

    stream: Stream

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._file = self._stack.enter_context(replacing(self._path))
        self._windows = 0
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, batch: Tensor) -> None:
        """Write the next windows [B, L, H], of the shape and dtype of those before but for B."""
        plain = batch.detach().cpu().contiguous()
        self._file.write(plain.view(torch.uint8).numpy().data)
        self._windows += len(plain)
        self.stream = Stream(self._path, (self._windows, plain.shape[1], plain.shape[2]), plain.dtype)
