"""The table of file formats, and which of them a checkpoint is in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.formats.awq import AWQ
from llmopt_cli.model.formats.bitsandbytes import BITSANDBYTES
from llmopt_cli.model.formats.compressed_tensors import COMPRESSED_TENSORS
from llmopt_cli.model.formats.fp8 import FP8
from llmopt_cli.model.formats.gguf import GGUF
from llmopt_cli.model.formats.gptq import GPTQ, GPTQ_V2
from llmopt_cli.model.formats.layout import Format

FORMATS: dict[str, Format] = {
    one.name: one for one in (AWQ, GPTQ, GPTQ_V2, COMPRESSED_TENSORS, BITSANDBYTES, FP8, GGUF)
}


def format_of(quantization: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` declares; CheckpointError if none of ours reads it."""
    method = quantization.get("quant_method")
    ours = [one for one in FORMATS.values() if one.quant_method == method]
    if not ours:
        readable = ", ".join(dict.fromkeys(one.quant_method for one in FORMATS.values()))
        raise CheckpointError(f"weights quantized with `{method}` are not read", f"readable are: {readable}")
    layout = quantization.get("checkpoint_format")
    return next((one for one in ours if one.name == layout), ours[0])
