"""Answers that follow a JSON schema, a regular expression, a list of choices or a grammar: llguidance says which tokens
may come next (github.com/guidance-ai/llguidance).

Knows tokens and masks; nothing of batches. Compiling may take long for a large schema, hence happens off the loop.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.runtime.request import Grammar


class GrammarCompiler:
    """Compiles grammars for one tokenizer. `eos_ids` may come when a grammar is complete."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        from llguidance import LLTokenizer

        self._tokenizer = LLTokenizer(tokenizer.to_str(), n_vocab=vocab_size, eos_token=sorted(eos_ids) or None)

    def compile(self, grammar: Grammar) -> Constraint:
        """A new constraint at its start; UsageError says what is wrong with the grammar."""
        from llguidance import LLMatcher

        try:
            text = _SOURCES[grammar.kind](grammar.text)
            matcher = LLMatcher(self._tokenizer, text, log_level=0)
        except (ValueError, TypeError) as error:
            raise UsageError(f"the {grammar.kind} is wrong: {_first_line(error)}") from None
        if problem := matcher.get_error():
            raise UsageError(f"the {grammar.kind} is wrong: {_first_line(problem)}")
        return Constraint(matcher)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One answer's way through its grammar."""

    matcher: Any

    def mask(self, row: Tensor) -> str | None:
        """Set the logits (V,) of tokens that may not come to minus infinity; returns what went wrong, if anything."""
        packed = torch.frombuffer(bytearray(self.matcher.compute_bitmask()), dtype=torch.uint8)
        bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        allowed = torch.zeros(len(row), dtype=torch.bool)
        count = min(len(row), bits.numel())
        allowed[:count] = bits.flatten()[:count].bool()
        if self.matcher.is_error() or not bool(allowed.any()):
            return f"no token can follow in the grammar: {_first_line(self.matcher.get_error())}"
        row.masked_fill_(~allowed.to(row.device), float("-inf"))
        return None

    def accept(self, token: int) -> bool:
        """Go on by the token that was chosen; True if the answer is complete and nothing may follow."""
        self.matcher.consume_token(token)
        return bool(self.matcher.is_stopped())


def _choice(text: str) -> Any:
    from llguidance import LLMatcher

    choices = json.loads(text)
    if not (isinstance(choices, list) and choices and all(isinstance(one, str) and one for one in choices)):
        raise ValueError("it must be a list of texts")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices))


def _json_schema(text: str) -> Any:
    from llguidance import LLMatcher

    # Any white space between tokens would be valid, too: small models then write it until their limit.
    return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})


def _regex(text: str) -> Any:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(text)


def _lark(text: str) -> Any:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(text)


_SOURCES = {"choice": _choice, "json schema": _json_schema, "regex": _regex, "grammar": _lark}


def _first_line(error: object) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else "unknown"
