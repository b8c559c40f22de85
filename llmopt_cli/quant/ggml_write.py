"""A checkpoint as one GGUF file: which tensor becomes which blocks, and the file, tensor by tensor.

Peak memory: one stored tensor (of all experts of a layer) in float32 and its blocks. What is given no blocks is encoded
here, without importance, as llama.cpp does it for embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt_cli.errors import UsageError
from llmopt_cli.model.codes import GgmlCodes
from llmopt_cli.model.formats.gguf import rotary_order
from llmopt_cli.model.stream import Store
from llmopt_cli.quant.ggml import encode
from llmopt_cli.spec.checkpoint import Checkpoint, read_json
from llmopt_cli.spec.gguf import MIXES, Mix, fitting
from llmopt_cli.spec.gguf_file import GgufTensor, write_gguf
from llmopt_cli.spec.gguf_model import ROPE_FREQS, Architecture, architecture_of, metadata_of, rope_factors
from llmopt_cli.spec.gguf_names import Place, place_of
from llmopt_cli.spec.gguf_tokenizer import tokenizer_metadata
from llmopt_cli.spec.model import ModelSpec

FULL = {"f16": Mix("f16", file_type=1), "f32": Mix("f32", file_type=0), "bf16": Mix("bf16", file_type=32)}
QUANTIZATION_VERSION = 2  # of the block layouts
DROPPED = ("rotary_emb.inv_freq",)  # old checkpoints store what is computed
Made = Callable[[str], GgmlCodes | None]  # a stored name -> the blocks it was quantized to


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the file and the checkpoint's tensors that it is made of: one, or one for each expert.

    `wanted` is the type that the mix would give to rows of whole blocks.
    """

    tensor: GgufTensor
    sources: tuple[str, ...]
    wanted: str


def block_types(checkpoint: Checkpoint, mix: str) -> dict[str, str]:
    """Stored name -> block type in the file; `f32` for what is never quantized. ModelError if GGUF can't hold it."""
    return {name: output.tensor.type for output in outputs(checkpoint, mix) for name in output.sources}


def outputs(checkpoint: Checkpoint, mix: str) -> list[Output]:
    """The file's tensors, in the checkpoint's order."""
    architecture, spec, rule = architecture_of(checkpoint.config), checkpoint.spec, (MIXES | FULL)[mix]
    sources: dict[str, list[tuple[int, str]]] = {}
    for name in checkpoint.tensors:
        if not name.endswith(DROPPED) and not (spec.tied_embeddings and name == "lm_head.weight"):
            place = place_of(architecture, name)
            sources.setdefault(place.name, []).append((place.expert or 0, name))
    found = []
    for target, members in sources.items():
        names = tuple(name for _, name in sorted(members))
        place, shape = Place(target), checkpoint.tensors[names[0]].shape
        if place.stem.endswith("_exps"):
            shape = (len(names), *shape)
        kind = "norm" if len(shape) == 1 else place.kind
        wanted = rule.wanted(kind, place.layer, spec)
        found.append(Output(GgufTensor(target, fitting(wanted, shape[-1]), tuple(shape)), names, wanted))
    return found


def write_checkpoint(
    file: Path,
    checkpoint: Checkpoint,
    mix: str,
    made: Made,
    *,
    pre: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write `checkpoint` to `file` in the types of `mix`; `facts` are further keys, as those of the importance matrix.

    `made` gives the blocks of a stored tensor in transformers' order of rows, or None for one to be encoded here.
    """
    spec, found = checkpoint.spec, outputs(checkpoint, mix)
    keys = metadata_of(checkpoint.config, spec) | {
        "general.type": "model",
        "general.name": checkpoint.name,
        "general.file_type": (MIXES | FULL)[mix].file_type,
        "general.quantization_version": QUANTIZATION_VERSION,
    }
    keys |= tokenizer_keys(checkpoint, pre) | dict(facts or {})
    tensors = [output.tensor for output in found]
    factors = rope_factors(checkpoint.config, spec.head_dim)
    extra = [] if factors is None else [GgufTensor(ROPE_FREQS, "f32", (len(factors),))]
    with Store(checkpoint) as store:
        data = _data(found, store, architecture_of(checkpoint.config), spec, made)
        scale = (_bytes(torch.tensor(factors)) for _ in extra)
        write_gguf(file, keys, extra + tensors, _chained(scale, data))


def _chained(*parts: Iterator[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        yield from part


def _data(
    found: list[Output], store: Store, architecture: Architecture, spec: ModelSpec, made: Made
) -> Iterator[memoryview]:
    for output in found:
        parts = [_rows(name, output.tensor, store, architecture, spec, made) for name in output.sources]
        yield _bytes(parts[0] if len(parts) == 1 else torch.cat(parts))


def _rows(
    name: str, tensor: GgufTensor, store: Store, architecture: Architecture, spec: ModelSpec, made: Made
) -> Tensor:
    """The bytes of one stored tensor, uint8 [out, bytes of a row], in ggml's order of rows."""
    codes = made(name)
    if codes is None:
        weight = store.get(name).float()
        if Place(tensor.name).stem.endswith("_norm"):
            weight = weight + architecture.norm_shift
        codes = encode(weight.view(-1, tensor.shape[-1] if weight.ndim > 1 else 1), tensor.type)
    assert codes.type == tensor.type, f"{name} is {codes.type} where the file has {tensor.type}"
    heads = {"attn_q": spec.num_heads, "attn_k": spec.num_kv_heads}.get(Place(tensor.name).stem)
    if architecture.permuted and heads:
        return codes.codes[rotary_order(len(codes.codes), heads)]
    return codes.codes


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def tokenizer_keys(checkpoint: Checkpoint, pre: str | None) -> dict[str, Any]:
    """The tokenizer's keys; UsageError if there is none, or none that llama.cpp has a name for and `pre` gives none."""
    folder = checkpoint.path
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(
            f"`{checkpoint.name}` has no tokenizer.json, which a GGUF file needs",
            "load its tokenizer with transformers and `save_pretrained` it beside the weights",
        )
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    document, size = read_json(folder / "tokenizer.json"), checkpoint.spec.vocab_size
    found = tokenizer_metadata(document, config, size, _chat_template(folder, config), pre)
    return found | _turn_end(checkpoint, found.get("tokenizer.ggml.eos_token_id"))


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    return template


def _turn_end(checkpoint: Checkpoint, end: int | None) -> dict[str, int]:
    """The other token that generation ends at: the end of a turn."""
    file = checkpoint.path / "generation_config.json"
    ends = read_json(file).get("eos_token_id") if file.is_file() else None
    others = [token for token in ends if token != end] if isinstance(ends, list) else []
    return {"tokenizer.ggml.eot_token_id": others[0]} if others else {}
