"""Texts into token windows: what a quantizer looks at, and the other text on which its result is judged.

Knows files, a tokenizer and packing; no model. The bundled texts serve every model that is given no files.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.spec.checkpoint import ASSETS

CALIBRATION = ASSETS / "bookworm-text" / "calibration.jsonl"
EVALUATION = ASSETS / "bookworm-text" / "evaluation.jsonl"


@dataclass(frozen=True)
class Corpus:
    """The texts of one file, and the hash by which a model card names them."""

    name: str
    texts: tuple[str, ...]

    @classmethod
    def read(cls, path: Path) -> Corpus:
        """Read `*.jsonl` (one `{"text": ...}` a line) or any other file as one text; UsageError if it is neither."""
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"cannot read `{path}`: {error}", 'give a text file, or JSON lines `{"text": ...}`'
            ) from None
        texts = _json_lines(path, content) if path.suffix == ".jsonl" else (content,)
        if not any(text.strip() for text in texts):
            raise UsageError(f"`{path}` holds no text")
        return cls(path.name, texts)

    @property
    def sha256(self) -> str:
        """The hash of all texts in order."""
        return hashlib.sha256("\x00".join(self.texts).encode()).hexdigest()


def refuse_overlap(calibration: Corpus, evaluation: Corpus) -> None:
    """Raise UsageError if any text is in both: a model is never judged on what it was fitted to."""
    shared = set(calibration.texts) & set(evaluation.texts)
    if shared:
        raise UsageError(
            f"`{evaluation.name}` shares {len(shared)} of its {len(evaluation.texts)} texts with the calibration set",
            "give --calibration and --evaluation files that have no text in common",
        )


def windows(corpus: Corpus, tokenizer: Any, length: int) -> Tensor:
    """All texts one after the other, cut into windows: token ids int64 [count, length], the rest dropped.

    A text that begins with the BOS token gets no second one. Raises UsageError if fewer than two windows result.
    """
    ids: list[int] = []
    for text in corpus.texts:
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        # verbose: a text may well be longer than the context, since it is cut into windows here.
        ids += tokenizer(text, add_special_tokens=not has_bos, verbose=False)["input_ids"]
    count = len(ids) // length
    if count < 2:
        raise UsageError(
            f"`{corpus.name}` has {len(ids):,} tokens, which is not two windows of {length:,}",
            "give a longer text, or a shorter --seq-len",
        )
    return torch.tensor(ids[: count * length]).view(count, length)


def sample(tokens: Tensor, count: int, seed: int) -> Tensor:
    """At most `count` of the windows, drawn without replacement; the same `seed` draws the same ones."""
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
    return tokens[order[:count]]


def _json_lines(path: Path, content: str) -> tuple[str, ...]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UsageError(f'`{path}`, line {number} is not `{{"text": "..."}}`')
        texts.append(text)
    return tuple(texts)
