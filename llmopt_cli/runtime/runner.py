"""One forward pass for a plan: packed tokens in, rows of logits for what is sampled or scored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.load import LoadedModel
from llmopt_cli.model.lora import Loras
from llmopt_cli.runtime.compression.compressor import Compressor
from llmopt_cli.runtime.request import Request
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_kernels import PagedBatch, Rowwise, Span, indices


class ModelRunner:
    """Drives a loaded model whose layers hold their cache. Knows nothing of sampling or text.

    `deterministic`: the logits of a request do not depend on what else runs; ModelError if the model has no such way.
    The `compressor` is asked about steps with requests that have a KV policy. `see` is shown the hidden states (T, H)
    of every step's tokens, chunk after chunk.
    """

    see: Callable[[Sequence[Chunk], Tensor], None] | None = None

    def __init__(
        self,
        loaded: LoadedModel,
        block_size: int,
        loras: Loras,
        compressor: Compressor | None = None,
        deterministic: bool = False,
    ) -> None:
        self._loaded = loaded
        self._loras = loras
        self._compressor = compressor
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
        adapted: dict[str, list[int]] = {}  # by adapter, the rows of its requests
        watched: AbstractContextManager[None] = nullcontext()
        wanted: list[int] = []  # places of the tokens whose logits are
        for chunk in chunks:
            request, length = requests[chunk.request_id], chunk.length
            end = chunk.start + length
            tokens += request.token_ids[chunk.start : end]
            if request.drafts:
                known = len(request.token_ids)
                tokens += request.drafts[max(0, chunk.start - known) : max(0, end - known)]
            ahead = request.num_computed - request.num_cached
            spans.append(Span(length, end - ahead, request.blocks, ahead))
            if request.params.kv_policy is not None and self._compressor is not None:
                watched = self._compressor.step(chunks, requests, spans)
            wanted += range(len(tokens) - chunk.num_logits, len(tokens))
            if request.params.adapter:
                rows = range(len(tokens) - length, len(tokens))
                adapted.setdefault(request.params.adapter, []).extend(rows)
        batch = PagedBatch(spans, self._block_size, device)
        context = self._loaded.context
        self._loras.choose(adapted, len(tokens), device)
        context.batch = batch
        try:
            with self._mode, watched:
                keep = None if len(wanted) == len(tokens) else indices(wanted, device)
                see = None if self.see is None else partial(self.see, chunks)
                logits = self._loaded.logits(indices(tokens, device), batch.positions, keep, see)
        finally:
            context.batch = None
            self._loras.choose({}, 0, device)
        return _wide(logits)

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
