"""One forward pass for a plan: packed tokens in, rows of logits for what is sampled or scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llmopt_cli.model.load import LoadedModel
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_kernels import PagedBatch, Span


class ModelRunner:
    """Drives a loaded model whose layers hold their cache. Knows nothing of sampling or text."""

    def __init__(self, loaded: LoadedModel, block_size: int) -> None:
        self._loaded = loaded
        self._block_size = block_size

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> Tensor:
        """Compute all chunks at once; returns float32 logits (N, V), as many rows of each chunk as it says.

        They are those of its last tokens: of the one that samples, or of all that are scored.
        """
        device = self._loaded.device
        tokens: list[int] = []
        spans: list[Span] = []
        last: list[int] = []
        for chunk in chunks:
            request = requests[chunk.request_id]
            end = chunk.start + chunk.length
            tokens += request.token_ids[chunk.start : end]
            spans.append(Span(chunk.length, end, request.blocks))
            last += range(len(tokens) - chunk.num_logits, len(tokens))
        batch = PagedBatch(spans, self._block_size, device)
        context = self._loaded.context
        context.batch = batch
        try:
            out = self._loaded.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=torch.tensor(last, device=device, dtype=torch.long),
            )
        finally:
            context.batch = None
        logits: Tensor = out.logits[0].float()
        return logits
