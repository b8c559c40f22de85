"""One forward pass for a plan: packed tokens in, rows of logits for what is sampled or scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.load import LoadedModel
from llmopt_cli.model.lora import Loras
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_kernels import PagedBatch, Rowwise, Span


class ModelRunner:
    """Drives a loaded model whose layers hold their cache. Knows nothing of sampling or text.

    `deterministic`: the logits of a request do not depend on what else runs; ModelError if the model has no such way.
    """

    def __init__(self, loaded: LoadedModel, block_size: int, loras: Loras, deterministic: bool = False) -> None:
        self._loaded = loaded
        self._loras = loras
        self._block_size = block_size
        self._mode: Rowwise | nullcontext[None] = Rowwise() if deterministic else nullcontext()
        if deterministic:
            self._try_rowwise()

    @torch.inference_mode()
    def run(self, chunks: Sequence[Chunk], requests: Mapping[str, Request]) -> Tensor:
        """Compute all chunks at once; returns float32 logits (N, V), as many rows of each chunk as it says.

        They are those of its last tokens: of the one that samples, or of all that are scored.
        """
        device = self._loaded.device
        tokens: list[int] = []
        spans: list[Span] = []
        last: list[int] = []
        adapted: dict[str, list[int]] = {}  # by adapter, the rows of its requests
        for chunk in chunks:
            request = requests[chunk.request_id]
            end = chunk.start + chunk.length
            tokens += request.token_ids[chunk.start : end]
            spans.append(Span(chunk.length, end, request.blocks))
            last += range(len(tokens) - chunk.num_logits, len(tokens))
            if request.params.adapter:
                rows = range(len(tokens) - chunk.length, len(tokens))
                adapted.setdefault(request.params.adapter, []).extend(rows)
        batch = PagedBatch(spans, self._block_size, device)
        context = self._loaded.context
        self._loras.choose(adapted, len(tokens), device)
        context.batch = batch
        try:
            with self._mode:
                out = self._loaded.model(
                    input_ids=torch.tensor([tokens], device=device),
                    position_ids=batch.positions[None],
                    use_cache=False,
                    logits_to_keep=torch.tensor(last, device=device, dtype=torch.long),
                )
        finally:
            context.batch = None
            self._loras.choose({}, 0, device)
        return _wide(out.logits[0])

    @torch.inference_mode()
    def _try_rowwise(self) -> None:
        """Run two tokens, so that what has no way to be computed row by row is found before the first request."""
        model, device = self._loaded.model, self._loaded.device
        if hasattr(model.config, "_experts_implementation"):
            model.set_experts_implementation("eager")  # grouped products are chosen by how many tokens an expert has
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        try:
            with self._mode:
                model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
        except NotImplementedError as error:
            raise ModelError(
                f"this model can't run deterministically: {error}", "leave out `--deterministic`"
            ) from None


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32: what is drawn from them is not to depend on the model's dtype."""
    return logits.float()
