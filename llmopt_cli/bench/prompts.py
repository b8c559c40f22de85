"""From lengths to requests: prompts cut out of the bundled text, made unique, with their sampling parameters.

Works on token ids where a tokenizer is at hand, else on pieces of text as long as a usual token. Knows no engine
and no clock.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Any

from llmopt_cli.runtime.request import SamplingParams
from llmopt_cli.spec.checkpoint import ASSETS
from llmopt_cli.spec.workload import Workload

TEXT = ASSETS / "bookworm-text" / "evaluation.jsonl"
NONCE_LEN = 4
CHARS_PER_TOKEN = 4  # the usual figure for English; the report shows how many tokens the server counted


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to send: token ids or text, the prompt length that was wanted, and how to continue it."""

    prompt: tuple[int, ...] | str
    input_len: int
    params: SamplingParams


def read_source(encode: Callable[[str], list[int]] | None) -> list[Any]:
    """The bundled text as one run of token ids, or of pieces of text without `encode`."""
    return [piece for text in read_texts() for piece in (encode or _pieces)(text)]


def make_asks(workload: Workload, source: list[Any], context: int | None, nonce: str) -> list[Ask]:
    """The requests of `workload`, a function of its seed and `nonce` alone, clipped to `context` tokens.

    A few tokens drawn from `nonce` stand before each prompt's own text, so that no two runs and no two requests share
    a prefix unless the workload says so.
    """
    asks = []
    for index, size in enumerate(workload.sizes(context)[0]):
        pieces = _cut(source, size.input_len, workload.shared_prefix, Random(f"{workload.seed}/{nonce}/{index}"))
        params = SamplingParams(
            max_tokens=size.output_len,
            temperature=workload.temperature,
            seed=workload.seed + index if workload.temperature else None,
            ignore_eos=workload.ignore_eos,
        )
        prompt = "".join(pieces) if isinstance(pieces[0], str) else tuple(pieces)
        asks.append(Ask(prompt, size.input_len, params))
    return asks


def read_texts() -> list[str]:
    """The bundled texts that no calibration sees, a page or so each."""
    with TEXT.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


def _pieces(text: str) -> list[str]:
    return [text[start : start + CHARS_PER_TOKEN] for start in range(0, len(text), CHARS_PER_TOKEN)]


def _cut(source: list[Any], length: int, shared: int, rng: Random) -> list[Any]:
    """`length` tokens or pieces of text: the shared beginning, the nonce, then the source from a random place on."""
    nonce = rng.choices(source, k=NONCE_LEN)
    start = rng.randrange(len(source))
    own = list(islice(cycle(source), start, start + length))
    return [*source[:shared], *nonce, *own][:length]
