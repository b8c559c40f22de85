"""Hidden states on their way through a model, on disk: float32 files that are mapped, so they cost no memory.

Knows files; neither models nor what the numbers mean.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

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
    """`count` windows of hidden states, float32 [count, length, width], as they are before some block."""

    path: Path
    shape: tuple[int, int, int]

    @classmethod
    def open(cls, path: Path, windows: Tensor) -> Stream:
        """The stream that was written there for token ids [N, L]."""
        count, length = windows.shape
        return cls(path, (count, length, path.stat().st_size // (4 * count * length)))

    @classmethod
    def write(cls, path: Path, batches: Iterable[Tensor]) -> Stream:
        """Write batches [B, L, H] one after the other; the file appears when it is whole."""
        return cls.write_all({"": path}, ({"": batch} for batch in batches))[""]

    @classmethod
    def write_all(cls, paths: Mapping[str, Path], batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Stream]:
        """The same for several streams, of which every batch has a part."""
        shapes = dict.fromkeys(paths, (0, 0, 0))
        with ExitStack() as stack:
            files = {name: stack.enter_context(replacing(path)) for name, path in paths.items()}
            for batch in batches:
                for name, file in files.items():
                    part = batch[name]
                    file.write(part.detach().to("cpu", torch.float32).contiguous().numpy().data)
                    shapes[name] = (shapes[name][0] + part.shape[0], part.shape[1], part.shape[2])
        return {name: cls(path, shapes[name]) for name, path in paths.items()}

    def batches(self, windows: int) -> Iterator[Tensor]:
        """The states, `windows` windows at a time, mapped from the file."""
        count, length, width = self.shape
        whole = torch.from_file(str(self.path), shared=False, size=count * length * width, dtype=torch.float32)
        yield from torch.split(whole.view(self.shape), windows)

    def mapped(self, path: Path, windows: int, step: Callable[[Tensor], Tensor]) -> Stream:
        """A new stream: `step` of every batch of this one."""
        return Stream.write(path, (step(batch) for batch in self.batches(windows)))
