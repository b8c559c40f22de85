"""Texts into token windows: what a quantizer looks at, and the other text on which its result is judged.

Knows files, data sets of the hub, a tokenizer and packing; no model. The bundled texts serve every model that is given
none.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.spec.checkpoint import ASSETS, Checkpoint

CALIBRATION = str(ASSETS / "bookworm-text" / "calibration.jsonl")
EVALUATION = str(ASSETS / "bookworm-text" / "evaluation.jsonl")
FORMS = 'JSON lines of `{"text": ...}` or `{"messages": [...]}`, a plain text, or a data set `owner/name`'
DATASET_ROWS = 2000  # at most: more than any calibration looks at
GRAM = 13  # tokens in a row that two texts have in common by chance alone hardly ever
Text = str | list[dict[str, Any]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Corpus:
    """The texts of one file or data set, and the hash by which a model card names them."""

    name: str
    texts: tuple[Text, ...]

    @classmethod
    def read(cls, source: str | Path) -> Corpus:
        """Read `*.jsonl`, any other file as one text, or a data set: of the hub or in a folder. UsageError if none."""
        path = Path(source)
        named = not path.exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", str(source)) and not path.suffix
        if path.is_dir() or named:
            return cls(path.name if path.is_dir() else str(source), _dataset(str(source)))
        try:
            content = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot read `{path}`: {error}", f"give {FORMS}") from None
        texts = _json_lines(path, content) if path.suffix == ".jsonl" else (content,)
        if not any(not isinstance(text, str) or text.strip() for text in texts):
            raise UsageError(f"`{path}` holds no text")
        return cls(path.name, texts)

    @property
    def sha256(self) -> str:
        """The hash of all texts in order."""
        return hashlib.sha256("\x00".join(map(_plain, self.texts)).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TextUsed:
    """A text by its name and hash, and how much of it was used."""

    file: str
    sha256: str
    windows: int
    window: int

    @classmethod
    def of(cls, corpus: Corpus, tokens: Tensor) -> TextUsed:
        """The part of `corpus` that is `tokens` [N, L]."""
        return cls(corpus.name, corpus.sha256, *tokens.shape)


def refuse_overlap(calibration: Corpus, evaluation: Corpus) -> None:
    """Raise UsageError if any text is in both: a model is never judged on what it was fitted to."""
    shared = set(map(_plain, calibration.texts)) & set(map(_plain, evaluation.texts))
    if shared:
        raise UsageError(
            f"`{evaluation.name}` shares {len(shared)} of its {len(evaluation.texts)} texts with the calibration set",
            "give --calibration and --evaluation files that have no text in common",
        )


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """The share of `evaluation`'s 13-grams of tokens that occur in `calibration`; both token ids [N, L]."""
    grams = [
        {tuple(row[start : start + GRAM]) for row in tokens.tolist() for start in range(len(row) - GRAM + 1)}
        for tokens in (calibration, evaluation)
    ]
    return len(grams[0] & grams[1]) / len(grams[1]) if grams[1] else 0.0


def read_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer that lies beside the weights; CheckpointError if there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{checkpoint.path}` has no usable tokenizer: {str(error).splitlines()[0]}") from None


def windows(corpus: Corpus, tokenizer: Any, length: int) -> Tensor:
    """All texts one after the other, cut into windows: token ids int64 [count, length], the rest dropped.

    Conversations go through the tokenizer's chat template. A text that begins with the BOS token gets no second one.
    Raises UsageError if fewer than two windows result.
    """
    ids: list[int] = []
    for text in corpus.texts:
        plain = text if isinstance(text, str) else _rendered(text, tokenizer, corpus.name)
        has_bos = tokenizer.bos_token is not None and plain.startswith(tokenizer.bos_token)
        # verbose: a text may well be longer than the context, since it is cut into windows here.
        ids += tokenizer(plain, add_special_tokens=not has_bos, verbose=False)["input_ids"]
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


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else json.dumps(text, sort_keys=True)


def _rendered(messages: list[dict[str, Any]], tokenizer: Any, name: str) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(
            f"`{name}` holds conversations, but the model's tokenizer has no chat template",
            'give a text file, or JSON lines `{"text": ...}`',
        )
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except TemplateError as error:
        raise UsageError(f"`{name}` holds a conversation that the chat template refuses: {error}") from None
    return text


def _json_lines(path: Path, content: str) -> tuple[Text, ...]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            texts.append(_text_of(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'`{path}`, line {number} is neither `{{"text": "..."}}` nor `{{"messages": [...]}}`'
            ) from None
    return tuple(texts)


def _text_of(row: Any) -> Text:
    """The text or the messages of one row; KeyError, TypeError or ValueError if it has neither."""
    if "text" in row:
        if not isinstance(row["text"], str):
            raise TypeError
        return str(row["text"])
    messages = [{"role": str(one["role"]), "content": str(one["content"])} for one in row["messages"]]
    if not messages:
        raise ValueError
    return messages


def _dataset(name: str) -> tuple[Text, ...]:
    """Rows of the split `train` of a data set `owner/name` or `owner/name:config`, or of the files of a folder."""
    if importlib.util.find_spec("datasets") is None:
        raise UsageError(
            f"there is no file `{name}`, and data sets of the hub need the package `datasets`",
            "pip install 'llmopt[datasets]', or give a local file",
        )
    datasets: Any = importlib.import_module("datasets")
    path, _, config = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, config or None, split="train", streaming=True)
        texts = tuple(_text_of(row) for row in itertools.islice(rows, DATASET_ROWS))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"the data set `{name}` cannot be used: {reason}", f"give {FORMS}") from None
    if not texts:
        raise UsageError(f"the data set `{name}` holds no text")
    return texts
