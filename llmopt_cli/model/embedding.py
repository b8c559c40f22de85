"""Token embeddings that stay as a file codes them, and the output head that shares their codes where a model ties them.

A step looks up a few rows and needs no more of them expanded. Knows no file format.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.model.codes import GgmlCodes, kind_of
from llmopt_cli.model.linear import Stored, quantized_twin
from llmopt_cli.spec.gguf import BLOCK_TYPES, block_of
from llmopt_cli.spec.scheme import Scheme


class CodedEmbedding(nn.Module):
    """Rows of GGML blocks, `codes` uint8 (rows, bytes of a row). ids (...) -> (..., columns) in `dtype`."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme) -> None:
        super().__init__()
        block = BLOCK_TYPES[block_of(scheme.name)]
        rows, columns = embedding.weight.shape
        self.block_type, self.dtype = block.name, embedding.weight.dtype
        codes = torch.empty(rows, columns // block.size * block.nbytes, dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Expand the rows of `ids`."""
        found = GgmlCodes(self.codes[ids.flatten()], self.block_type).dequantize()
        return found.to(self.dtype).view(*ids.shape, -1)


def swap_embedding(model: Any, path: str, scheme: Scheme) -> None:
    """Put an empty embedding that holds codes at `path`, and a head beside it if the model ties the two."""
    parent, _, child = path.rpartition(".")
    plain, head = model.get_submodule(path), model.get_output_embeddings()
    coded = CodedEmbedding(plain, scheme)
    setattr(model.get_submodule(parent), child, coded)
    if getattr(head, "weight", None) is plain.weight:
        model.set_output_embeddings(quantized_twin("lm_head", head, kind_of(scheme), scheme, Stored()))


def tie(model: Any) -> None:
    """Let tied weights be one tensor again, after they were given memory: as the model does it, or coded ones here."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, CodedEmbedding):
        model.tie_weights()
    elif model.config.get_text_config().tie_word_embeddings:
        head.codes = embedding.codes
