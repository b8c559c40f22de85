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


class Medusa:
    """Drafts with Medusa heads: certain drafts, no longer than there are heads."""

    unseen = 1
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
                self._seen[chunk.request_id] = (chunk.start + chunk.length - len(kept), kept)
            begin = end

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        """Nothing where the last hidden state was not seen."""
        found = {
            index: row
            for index, (request, length) in enumerate(zip(requests, lengths, strict=True))
            if length and (row := self._row(request)) is not None
        }
        if not found:
            return [Draft()] * len(requests)
        count = min(self._heads.count, max(lengths))
        rows = list(found.values())
        tokens = self._heads(torch.cat(rows) if len(rows) > 1 else rows[0], count).tolist()
        drafts = dict(zip(found, tokens, strict=True))
        return [Draft(tuple(drafts.get(index, ())[:length])) for index, length in enumerate(lengths)]

    def _row(self, request: Request) -> Tensor | None:
        """(1, H) of the token before the last known one, which predicted that."""
        start, rows = self._seen.get(request.request_id, (0, None))
        place = request.num_computed - 1 - start
        return rows[place : place + 1] if rows is not None and 0 <= place < len(rows) else None

    def forget(self, request_id: str) -> None:
        """Drop what was seen of a request."""
        self._seen.pop(request_id, None)

    def close(self) -> None:
        """Drop all of it."""
        self._seen.clear()
