"""Log-probabilities as OpenAI's two endpoints and vLLM word them. Knows tokens and their texts; nothing of a request.

A token that holds a part of a character has U+FFFD in its text, and the bytes themselves in `bytes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmopt_cli.runtime.request import TokenLogprobs
from llmopt_cli.runtime.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True, slots=True)
class Worder:
    """Words log-probabilities with the tokens of one tokenizer."""

    tokenizer: Tokenizer

    def chat(self, positions: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat completion."""
        content = [
            self._spelled(one.token, one.logprob)
            | {"top_logprobs": [self._spelled(token, logprob) for token, logprob in one.top]}
            for one in positions
        ]
        return {"content": content, "refusal": None}

    def completion(self, positions: Sequence[TokenLogprobs | int], start: int) -> dict[str, Any]:
        """`choices[].logprobs` of a text completion; the first token stands at character `start` of the text.

        A token without a log-probability, the first of a prompt, is given as its id.
        """
        told = [None if isinstance(one, int) else one for one in positions]
        tokens = [one if isinstance(one, int) else one.token for one in positions]
        return {
            "tokens": [self._text(token) for token in tokens],
            "token_logprobs": [None if one is None else _finite(one.logprob) for one in told],
            "top_logprobs": [None if one is None else self._likeliest(one) for one in told],
            "text_offset": self.offsets(tokens, start),
        }

    def prompt(self, positions: Sequence[TokenLogprobs]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: for each token of a prompt the likeliest by id, and itself; the first has none."""
        found: list[dict[str, Any] | None] = [None]
        for one in positions:
            ranked = [(token, logprob, rank) for rank, (token, logprob) in enumerate(one.top, start=1)]
            listed = [*ranked, (one.token, one.logprob, one.rank)]
            found.append(
                {
                    str(token): {"logprob": _finite(logprob), "rank": rank, "decoded_token": self._text(token)}
                    for token, logprob, rank in listed
                }
            )
        return found

    def length(self, tokens: Sequence[int]) -> int:
        """Characters that `tokens` stand for in a text: a character counts where it begins."""
        return sum(_begun(self._shown(token)) for token in tokens)

    def offsets(self, tokens: Sequence[int], start: int) -> list[int]:
        """At which character of the text each token begins; one that goes on with a character begins with it."""
        offsets, place = [], start
        for token in tokens:
            shown = self._shown(token)
            offsets.append(max(place - (shown[:1] > b"\x7f" and not _begun(shown[:1])), 0))
            place += _begun(shown)
        return offsets

    def _likeliest(self, one: TokenLogprobs) -> dict[str, float]:
        return {self._text(token): _finite(logprob) for token, logprob in (*one.top, (one.token, one.logprob))}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.tokenizer.token_bytes(token)
        return {"token": _decoded(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}

    def _text(self, token: int) -> str:
        return _decoded(self.tokenizer.token_bytes(token))

    def _shown(self, token: int) -> bytes:
        return b"" if self.tokenizer.is_special(token) else self.tokenizer.token_bytes(token)


def _decoded(spelled: bytes) -> str:
    return spelled.decode(errors="replace")


def _begun(text: bytes) -> int:
    """Characters that begin in a piece of UTF-8."""
    return sum(byte & 0xC0 != 0x80 for byte in text)


def _finite(logprob: float) -> float:
    return max(logprob, LEAST)
