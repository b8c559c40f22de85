"""Files into modules: build on the meta device, fuse, then stream each tensor once, straight into its slot.

The architecture is transformers' module tree; names follow transformers' own weight conversion (renamed keys, stacked
experts). What the tree means to the runtime is the business of `fuse` and `attention`; formats are in `formats/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llmopt_cli.errors import CheckpointError, ModelError, UnknownNameError, UsageError
from llmopt_cli.model import attention
from llmopt_cli.model.attention import AttentionContext
from llmopt_cli.model.formats import awq
from llmopt_cli.model.fuse import fuse, named_slots
from llmopt_cli.model.linear import PackedLinear
from llmopt_cli.model.stream import packed_linears, stream
from llmopt_cli.output import Report
from llmopt_cli.spec.checkpoint import Checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to run: its tree, the context its attention layers share, what was fused."""

    model: Any  # a transformers PreTrainedModel
    context: AttentionContext
    fused: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory, shared ones counted once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(size for size in {t.data_ptr(): t.nbytes for t in tensors}.values())


def load_model(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> LoadedModel:
    """Load `checkpoint` for running. Peak memory is the weights as they run plus the largest stored tensor.

    Raises ModelError if the architecture cannot run exactly, CheckpointError if the files do not fit it.
    """
    place = pick_device(device)
    config = read_config(checkpoint, trust_remote_code)
    kind = pick_dtype(dtype, config, place)
    model = _build(config, kind, trust_remote_code)
    if checkpoint.quantization is not None:
        _swap_quantized(model, checkpoint)
    fused = fuse(model)
    model.to_empty(device=place)
    _fill_computed_buffers(model)
    model.tie_weights()
    _fill(model, checkpoint, report)
    context = attention.attach(model)
    model.eval()
    _probe(model, checkpoint)
    return LoadedModel(model, context, fused, kind, place)


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnknownNameError("device", name, ["auto", "cpu", "cuda", "cuda:0"]) from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"`{name}` was asked for, but torch sees no GPU", "use `--device cpu`")
    return device


def pick_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """`auto` is the checkpoint's own, save float16 on the CPU: that runs as float32, exact and faster there."""
    if name != "auto":
        if name not in DTYPES:
            raise UnknownNameError("dtype", name, ["auto", *DTYPES])
        return DTYPES[name]
    stored = getattr(config, "dtype", None) or torch.float32
    kind = DTYPES.get(stored, torch.float32) if isinstance(stored, str) else stored
    return torch.float32 if kind == torch.float16 and device.type == "cpu" else kind


def read_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint, without its quantization (llmopt reads that itself)."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = str(checkpoint.config.get("model_type"))
    if model_type not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in checkpoint.config:
            raise ModelError(
                f"`{checkpoint.name}` brings its own Python code, which is not run unasked",
                "read the code, then add `--trust-remote-code`",
            )
        raise ModelError(f"`{checkpoint.name}` is of type `{model_type}`, which this transformers does not know")
    config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The transformers tree on the meta device, its attention going through our interface."""
    from transformers import AutoModelForCausalLM

    attention.register()
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.NAME, trust_remote_code=trust_remote_code
            )
    except ValueError as error:
        raise ModelError(f"`{config.model_type}` is no causal language model: {str(error).splitlines()[0]}") from None
    except KeyError:
        raise ModelError(f"`{config.model_type}` models do not use transformers' attention interface") from None


def _swap_quantized(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put an empty PackedLinear where the checkpoint stores codes."""
    assert checkpoint.quantization is not None
    method = checkpoint.quantization.get("quant_method")
    if method != "awq":
        raise ModelError(f"`{checkpoint.name}` is quantized with `{method}`, which the loader does not read")
    scheme = awq.parse_config(checkpoint.quantization)
    for name in packed_linears(checkpoint):
        parent, _, child = name.rpartition(".")
        linear = getattr(model.get_submodule(parent), child, None)
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"`{checkpoint.name}` stores codes for `{name}`, which is no linear layer of the model")
        with torch.device("meta"):
            setattr(model.get_submodule(parent), child, PackedLinear.like(child, linear, scheme.group_size))


def _fill_computed_buffers(model: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies, embedding scales), by the model's own initialisation."""
    owners = {name.rpartition(".")[0] for name, _ in model.named_non_persistent_buffers()}
    for owner in owners:
        model._init_weights(model.get_submodule(owner))


@torch.no_grad()
def _fill(model: Any, checkpoint: Checkpoint, report: Report | None) -> None:
    """Copy every stored tensor into its slot; a slot left empty is an error."""
    slots = dict(named_slots(model))
    filled: set[int] = set()
    for done, (name, tensor) in enumerate(stream(model, checkpoint, slots.keys()), 1):
        slot = slots[name]
        if slot.shape != tensor.shape:
            raise CheckpointError(
                f"`{name}` has shape {list(tensor.shape)} in `{checkpoint.path}` where the model has {list(slot.shape)}"
            )
        slot.copy_(tensor)
        filled.add(slot.data_ptr())
        if report:
            report(done, len(slots))
    missing = [name for name, slot in slots.items() if slot.data_ptr() not in filled]  # tied weights share a pointer
    if missing:
        raise CheckpointError(f"`{checkpoint.path}` lacks {len(missing)} tensors of the model, first `{missing[0]}`")


@torch.inference_mode()
def _probe(model: Any, checkpoint: Checkpoint) -> None:
    """Run two tokens without a cache: every decoder layer must go through the paged interface, once."""
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
    layers, expected = len(attention.paged_layers(model)), checkpoint.spec.num_layers
    if layers != expected:
        raise ModelError(
            f"`{checkpoint.name}` sends {layers} of its {expected} layers through the attention interface; "
            "the others keep a state that the runtime does not page"
        )
