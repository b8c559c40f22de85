"""`llmopt eval`: what distinguishes two checkpoints on the same text, block by block, so that neither is ever loaded.

Any two that share a tokenizer: base and quantized in whatever format, or two trainings. Knows no method.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.load import pick_device
from llmopt_cli.output import Report
from llmopt_cli.quant.calibrate import EVALUATION, Corpus, TextUsed, read_tokenizer, sample, windows
from llmopt_cli.quant.preflight import known
from llmopt_cli.quant.quality import Quality, compare_pairs
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.streams import Stream
from llmopt_cli.quant.walk import Walk, at_once
from llmopt_cli.spec.checkpoint import Checkpoint

Progress = Callable[[str], AbstractContextManager[Report]]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`other` against `base` on one text; bytes are those of all stored tensors."""

    base: str
    other: str
    text: TextUsed
    quality: Quality
    bytes_base: int
    bytes_other: int


def evaluate(
    base: str,
    other: str,
    progress: Progress,
    text: str | Path = EVALUATION,
    samples: int = 64,
    seq_len: int = 512,
    seed: int = 0,
    device: str = "auto",
) -> Comparison:
    """Compare two checkpoints on at most `samples` windows of `seq_len` tokens.

    Raises ModelError if their vocabularies differ: divergence needs the same tokens.
    """
    checkpoints = [Checkpoint.open(name) for name in (base, other)]
    sizes = [checkpoint.spec.vocab_size for checkpoint in checkpoints]
    if sizes[0] != sizes[1]:
        raise ModelError(
            f"`{base}` has {sizes[0]:,} tokens and `{other}` {sizes[1]:,}: they can't be compared token by token",
            "give two versions of one model",
        )
    corpus = Corpus.read(text)
    length = min(seq_len, *(checkpoint.spec.max_context or seq_len for checkpoint in checkpoints))
    ids = sample(known(windows(corpus, read_tokenizer(checkpoints[0]), length), checkpoints[0]), samples, seed)
    place = pick_device(device)
    with (
        tempfile.TemporaryDirectory(prefix="llmopt-eval-") as folder,
        Skeleton(checkpoints[0], place) as one,
        Skeleton(checkpoints[1], place) as two,
    ):
        walks = [Walk(one), Walk(two)]
        streams = [_through(walk, ids, Path(folder) / str(index), progress) for index, walk in enumerate(walks)]

        def both(ids: Tensor, first: Tensor, second: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
            return walks[0].at(ids, first, positions), walks[1].at(ids, second, positions)

        with progress("comparing") as report, one.outside(), two.outside():
            batches = zip(torch.split(ids, 1), *(stream.batches(1) for stream in streams), strict=True)
            quality = compare_pairs(((partial(both, *batch), batch[0]) for batch in batches), len(ids), report)
    sizes = [checkpoint.nbytes for checkpoint in checkpoints]
    return Comparison(base, other, TextUsed.of(corpus, ids), quality, *sizes)


def _through(walk: Walk, ids: Tensor, path: Path, progress: Progress) -> Stream:
    """The hidden states of `ids` behind the last block."""
    blocks = walk.skeleton.blocks
    with progress(f"running {walk.skeleton.checkpoint.name}") as report:
        walk.learn(ids)
        with walk.skeleton.outside():
            stream = Stream.write(path, walk.enter(ids, at_once(ids)))
        for index in range(len(blocks)):
            with walk.skeleton.block(index):
                stream = stream.mapped(path, at_once(ids), partial(walk.run, index))
            report(index + 1, len(blocks))
    return stream
