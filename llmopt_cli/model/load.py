"""Files into modules: build on the meta device, fuse, then stream each tensor once, straight into its slot.

The architecture is transformers' module tree; names follow transformers' own weight conversion (renamed keys, stacked
experts). What the tree means to the runtime is the business of `fuse` and `attention`; formats are in `formats/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmopt_cli.errors import CheckpointError, ModelError, UnknownNameError, UsageError
from llmopt_cli.model import attention
from llmopt_cli.model.attention import AttentionContext, Reach
from llmopt_cli.model.codes import kind_of
from llmopt_cli.model.decoder import Decoder, See
from llmopt_cli.model.embedding import swap_embedding, tie
from llmopt_cli.model.fuse import fuse, named_slots
from llmopt_cli.model.linear import quantized_twin
from llmopt_cli.model.stream import Store, quantized_places, stream
from llmopt_cli.output import Report
from llmopt_cli.spec.checkpoint import Checkpoint

UNSET = {True: float("nan"), False: -1}  # what a computed buffer holds before it is computed: (floating?) -> value
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to run: its tree, the context its attention layers share, what was fused.

    `decoder` is the short way through the tree, where that gives the same numbers.
    """

    model: Any  # a transformers PreTrainedModel
    context: AttentionContext
    fused: Mapping[str, int]
    dtype: torch.dtype
    device: torch.device
    decoder: Decoder | None = None

    def logits(self, ids: Tensor, positions: Tensor, rows: Tensor | None = None, see: See | None = None) -> Tensor:
        """Those (N, V) of the `rows` (N,) of packed tokens `ids` (T,) at `positions` (T,), or of all tokens.

        `see` is shown the hidden states (T, H) that the output head reads.
        """
        ids, positions = ids[None], positions[None]
        if self.decoder is not None:
            return self.decoder(ids, positions, rows, see)[0]
        keep = 0 if rows is None else rows  # 0 is its word for all
        with nullcontext() if see is None else _watched(self.model.base_model, see):
            found = self.model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=keep)
        logits: Tensor = found.logits[0]
        return logits

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in memory, shared ones counted once."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return sum(size for size in {t.data_ptr(): t.nbytes for t in tensors}.values())


@contextmanager
def _watched(inner: Any, see: See) -> Iterator[None]:
    """Show what the inner model puts out, (1, T, H), as (T, H)."""
    hook = inner.register_forward_hook(lambda _, args, output: see(output[0][0]))
    try:
        yield
    finally:
        hook.remove()


def load_model(
    checkpoint: Checkpoint,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    report: Report | None = None,
) -> LoadedModel:
    """Load `checkpoint` for running. Peak memory is the weights as they run plus what `stream` holds at a time.

    Raises ModelError if the architecture cannot run exactly, CheckpointError if the files do not fit it.
    """
    place = pick_device(device)
    config = read_config(checkpoint, trust_remote_code)
    kind = pick_dtype(dtype, config, place)
    model = _build(config, kind, trust_remote_code)
    with Store(checkpoint) as store:
        _swap_quantized(model, store)
        fused = fuse(model)
        model.to_empty(device=place)
        fill_computed_buffers(model)
        tie(model)
        _fill(model, store, checkpoint, report)
    context = attention.attach(model)
    model.eval()
    _probe(model, checkpoint)
    return LoadedModel(model, context, fused, kind, place, Decoder.of(model))


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, or the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise UnknownNameError("device", name, ["auto", "cpu", "cuda", "cuda:0"])
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"`{name}` was asked for, but torch sees {torch.cuda.device_count()} GPUs", "use `--device cpu`"
        )
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
    from huggingface_hub.errors import StrictDataclassError
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
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise CheckpointError(f"config.json of `{checkpoint.name}` is wrong: {str(error).splitlines()[0]}") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def context_limit(checkpoint: Checkpoint) -> int:
    """Tokens that a request may have: the model's own limit, less where its angles would depend on other requests.

    Above its first length `longrope` turns every token of a batch by other angles than below.
    """
    config, limit = checkpoint.config, checkpoint.spec.max_context
    angles = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if angles.get("rope_type", angles.get("type")) not in ("longrope", "su"):
        return limit
    first = angles.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return min(limit, first or limit)


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
    except KeyError as error:
        if attention.NAME in str(error):
            raise ModelError(f"`{config.model_type}` models do not use transformers' attention interface") from None
        raise ModelError(f"config.json names {error}, which this transformers does not know") from None


def _swap_quantized(model: nn.Module, store: Store) -> None:
    """Put an empty linear or embedding that holds codes where the store has them."""
    wanted = [name for name, _ in named_slots(model)]
    for path, linear in quantized_places(model, store, wanted).items():
        parent, _, child = path.rpartition(".")
        scheme, plain = store.linears[linear], model.get_submodule(path)
        with torch.device("meta"):
            if not isinstance(plain, nn.Linear):
                swap_embedding(model, path, scheme)
                continue
            twin = quantized_twin(child, plain, kind_of(scheme), scheme, store.stored(linear))
        setattr(model.get_submodule(parent), child, twin)


def fill_computed_buffers(model: Any) -> None:
    """Buffers that no checkpoint stores (rotary frequencies, embedding scales), by the model's own initialisation."""
    buffers = dict(model.named_non_persistent_buffers())
    for buffer in buffers.values():
        buffer.fill_(UNSET[buffer.is_floating_point()])
    for owner in {name.rpartition(".")[0] for name in buffers}:
        _model_of(model, owner)._init_weights(model.get_submodule(owner))
    for name, buffer in buffers.items():
        unset = buffer.isnan() if buffer.is_floating_point() else buffer == UNSET[False]
        if buffer.dtype != torch.bool and bool(unset.any()):
            raise ModelError(f"`{type(model).__name__}` does not say how its `{name}` is computed")


def _model_of(model: Any, path: str) -> Any:
    """The innermost transformers model that holds the module at `path`: it knows how to initialise it."""
    from transformers import PreTrainedModel

    parts = path.split(".")
    holders = (model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1))
    return next(holder for holder in holders if isinstance(holder, PreTrainedModel))


@torch.no_grad()
def _fill(model: Any, store: Store, checkpoint: Checkpoint, report: Report | None) -> None:
    """Copy every stored tensor into its slot; a slot left empty is an error."""
    slots = dict(named_slots(model))
    filled: set[int] = set()
    for done, (name, tensor) in enumerate(stream(model, store, slots.keys()), 1):
        slot = slots.get(name)
        if slot is None:
            raise CheckpointError(f"`{checkpoint.path}` stores `{name}`, which its config says nothing of")
        if slot.shape != tensor.shape:
            raise CheckpointError(
                f"`{name}` has shape {list(tensor.shape)} in `{checkpoint.path}` where the model has {list(slot.shape)}"
            )
        if slot.data_ptr() in filled and not torch.equal(slot, tensor.to(slot)):
            raise CheckpointError(
                f"`{checkpoint.path}` ties `{name}` to another tensor, yet stores both, and they differ"
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
    device = next(model.parameters()).device
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:
        with attention.probing(model):
            model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)
        model(input_ids=ids, position_ids=torch.arange(2, device=device)[None], use_cache=False)  # as it will run
    except (TypeError, AttributeError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"`{checkpoint.name}` does not run on packed tokens without its own cache: {reason}"
        ) from error
    layers, spec = attention.paged_layers(model), checkpoint.spec
    if len(layers) != spec.num_layers:
        raise ModelError(
            f"`{checkpoint.name}` sends {len(layers)} of its {spec.num_layers} layers through the attention interface; "
            "the others keep a state that the runtime does not page"
        )
    if any(layer.calls > 2 for layer in layers):
        raise ModelError(f"`{checkpoint.name}` attends several times in one layer, which the runtime does not page")
    # Windows are read from masks, or from the call: one that config.json has and neither told of would be lost.
    limited = sum(
        layer.reach not in (None, Reach()) or (layer.seen and layer.seen.window) is not None for layer in layers
    )
    if limited < spec.num_sliding_layers:
        raise ModelError(f"`{checkpoint.name}` limits attention in a way that the runtime does not see")
