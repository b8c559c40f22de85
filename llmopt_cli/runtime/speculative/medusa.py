"""Medusa: heads that each guess one of the next tokens from the model's last hidden state, all in one go.

Head i says what comes i + 2 tokens after the one whose hidden state it reads (arXiv 2401.10774): its guesses do not see
each other. A draft is the chain of what each head finds likeliest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llmopt_cli.model.load import LoadedModel
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.heads import MAP, Heads
from llmopt_cli.runtime.speculative.proposer import Draft
from llmopt_kernels import argmax, linear

RECALLED, LATELY = 16, 8  # hidden states that are kept of a request, and how many tell that it has not drafted lately


class MedusaHeads:
    """The weights, by layer and for all heads together; one output matrix where all have the same.

    `blocks` are weights (n, H, H) and biases (n, H) of each layer, `outs` matrices (V, H), one a head or one for all,
    or with the rows of the `tokens` (K,) alone.
    """

    def __init__(
        self, blocks: Sequence[tuple[Tensor, Tensor]], outs: Sequence[Tensor], tokens: Tensor | None = None
    ) -> None:
        self.blocks, self.outs, self.tokens = list(blocks), list(outs), tokens
        self.count = blocks[0][0].shape[0]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any], output: Tensor | None) -> MedusaHeads:
        """From the tensors of a file. Where all output matrices are `output` (V, H), that one is used instead."""
        heads, layers = range(config["medusa_num_heads"]), config["medusa_num_layers"]
        blocks = [
            (
                torch.stack([tensors[f"{head}.{layer}.linear.weight"] for head in heads]),
                torch.stack([tensors[f"{head}.{layer}.linear.bias"] for head in heads]),
            )
            for layer in range(layers)
        ]
        outs = [tensors[f"{head}.{layers}.weight"] for head in heads]
        first = outs[0] if output is None else output
        outs = [first] if all(torch.equal(out, first) for out in outs) else outs
        tokens = tensors.get(MAP)
        return cls(blocks, outs if tokens is None else [out[tokens] for out in outs], tokens)

    def __call__(self, hidden: Tensor, count: int) -> Tensor:
        """The likeliest tokens int64 (B, count) of the first `count` heads, from hidden states (B, H)."""
        x = self._states(hidden, count)
        if len(self.outs) == 1:
            found = argmax(linear(x.flatten(0, 1), self.outs[0])).view(-1, count)
        else:
            found = torch.stack([argmax(linear(x[:, head], self.outs[head])) for head in range(count)], dim=1)
        return found if self.tokens is None else self.tokens[found]

    def _states(self, hidden: Tensor, count: int) -> Tensor:
        """(B, count, H): what each head has made of a hidden state before its output matrix."""
        x = hidden[:, None]
        for layer, (weight, bias) in enumerate(self.blocks):
            if layer == 0:  # all read the same: one product
                made = linear(hidden, weight[:count].flatten(0, 1), bias[:count].flatten())
                made = made.view(len(hidden), count, -1)
            else:
                made = torch.stack([linear(x[:, head], weight[head], bias[head]) for head in range(count)], dim=1)
            x = x + F.silu(made)
        return x


def _recalled(guesses: Sequence[Sequence[int]], request: Request) -> tuple[tuple[int, int], ...]:
    """What `Draft.recalled` is, from what all heads guess at the places before the one that is drafted from."""
    tokens = request.token_ids
    places = len(guesses[0]) if guesses else 0
    judged, right = [0] * places, [0] * places
    for back, guess in enumerate(reversed(guesses)):
        came = tokens[len(tokens) - 1 - back :]
        for place, (one, other) in enumerate(zip(guess, came, strict=False)):
            judged[place] += 1
            if one != other:
                break
            right[place] += 1
    return tuple(zip(judged, right, strict=True))


class Medusa:
    """Drafts with Medusa heads: certain drafts, no longer than there are heads."""

    unseen = 32  # of all requests together: many recall nothing, but then many are compared
    in_turn = False

    def __init__(self, heads: Heads, loaded: LoadedModel) -> None:
        output = getattr(loaded.model.get_output_embeddings(), "weight", None)
        self._heads = MedusaHeads.of(heads.tensors(loaded.dtype, loaded.device), heads.checkpoint.config, output)
        self._seen: dict[str, tuple[int, Tensor]] = {}  # a position, and the hidden states from there on

    def see(self, chunks: Sequence[Chunk], hidden: Tensor) -> None:
        """Keep what a draft may start from: the states (T, H) of a chunk's last known token, and of its drafts."""
        begin = 0
        for chunk in chunks:
            end = begin + chunk.length
            if chunk.samples:
                kept = hidden[end - 1 - chunk.drafts : end]
                # A view would keep a whole prompt's.
                kept = kept.clone() if chunk.length > len(kept) else kept
                self._keep(chunk.request_id, chunk.start + chunk.length - len(kept), kept)
            begin = end

    def _keep(self, name: str, start: int, rows: Tensor) -> None:
        """Those from `start` on; what lies before is kept, too, if it leads there, for a while."""
        first, before = self._seen.get(name, (0, None))
        if before is not None and len(rows) == 1 and first + len(before) == start:
            rows = torch.cat((before, rows))[-RECALLED:]
            start -= len(rows) - 1
        self._seen[name] = (start, rows)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where the last hidden state was not seen."""
        found = {
            index: rows
            for index, (request, length) in enumerate(zip(requests, lengths, strict=True))
            if length and (rows := self._rows(request)) is not None
        }
        drafts = [Draft()] * len(requests)
        if not found:
            return drafts
        count, parts = min(self._heads.count, max(lengths)), list(found.values())
        tokens = self._heads(torch.cat(parts) if len(parts) > 1 else parts[0], count).tolist()
        for index, rows in found.items():
            own, tokens = tokens[: len(rows)], tokens[len(rows) :]
            drafts[index] = Draft(tuple(own[-1][: lengths[index]]), recalled=_recalled(own[:-1], requests[index]))
        return drafts

    def _rows(self, request: Request) -> Tensor | None:
        """(n, H), the last of the token before the last known one, which predicted that; 1 if it drafted lately."""
        start, rows = self._seen.get(request.request_id, (0, None))
        end = request.num_computed - start
        if rows is None or not 0 < end <= len(rows):
            return None
        first = end - 1
        if end > max(LATELY, self._heads.count + 1):
            first = max(1, request.num_prompt - 1 - start)  # it may have drafted from that at 0
        self._seen[request.request_id] = (request.num_computed - 1, rows[end - 1 : end])
        return rows[first:end]

    def forget(self, request_id: str) -> None:
        """Drop what was seen of a request."""
        self._seen.pop(request_id, None)

    def close(self) -> None:
        """Drop all of it."""
        self._seen.clear()
