"""What is found out before an hour is spent: shapes that don't fit, numbers that are none, a disk that is too small.

Knows headers and shapes; of the weights only whether they are finite.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from llmopt_cli.errors import CapacityError, CheckpointError, ModelError
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.model.stream import Store
from llmopt_cli.output import Report
from llmopt_cli.quant.skeleton import Skeleton
from llmopt_cli.quant.structure import find_linears, find_routers
from llmopt_cli.quant.wishes import Wishes, head_of
from llmopt_cli.spec.checkpoint import Checkpoint, TensorHeader
from llmopt_cli.spec.scheme import Scheme

GROUP_SIZES = (128, 64, 32, 16)
UNTOUCHED = "f32"  # the name of the precision that holds every stored number as it is
STREAMS = 2  # of each, while a block's input and output both lie on the disk


@dataclass(frozen=True, eq=False)
class Layout:
    """The linears to quantize, name in the tree -> (outputs, inputs); `stored` says what each is called in the files.

    `left` are the linears that stay as they are, by their names in the files; `hidden` the width between blocks.
    `fixed` is what the files decide about stored tensors, `ends` the part of that outside the blocks, by the names in
    the tree. `added` are tensors, but for linears to quantize, that the base does not have, by their stored names.
    """

    linears: Mapping[str, tuple[int, int]]
    stored: Mapping[str, str]
    left: tuple[str, ...]
    hidden: int
    fixed: Mapping[str, Scheme]
    ends: Mapping[str, Scheme]
    added: Mapping[str, TensorHeader]

    @classmethod
    def of(cls, skeleton: Skeleton, fixed: Mapping[str, Scheme], wishes: Wishes) -> Layout:
        """ModelError if a block holds weights that would be left out, or a wish can't be fulfilled."""
        linears: dict[str, tuple[int, int]] = {}
        routers: list[str] = []
        for index, block in enumerate(skeleton.blocks):
            where = f"{skeleton.prefix}.{index}"
            found = find_linears(block, where)
            linears |= {f"{where}.{name}": (one.out_features, one.in_features) for name, one in found.items()}
            routers += [f"{where}.{name}" for name in find_routers(block)]
        if wishes.head:
            linears |= head_of(skeleton, wishes)
        stored = {
            name: skeleton.stored.get(f"{name}.weight", name).removesuffix(".weight")
            for name, module in skeleton.model.named_modules()
            if isinstance(module, nn.Linear) or name in routers
        }
        left = tuple(place for name, place in stored.items() if name not in linears)
        ends = {
            name: fixed[place]
            for name, place in skeleton.stored.items()
            if place in fixed and fixed[place].name != UNTOUCHED and name.removesuffix(".weight") not in linears
        }
        hidden = skeleton.model.config.get_text_config().hidden_size
        return cls(linears, stored, left, hidden, fixed, ends, wishes.added(skeleton))

    @property
    def weights(self) -> int:
        """Weights to quantize."""
        return sum(rows * columns for rows, columns in self.linears.values())

    @property
    def exceptions(self) -> dict[str, Scheme]:
        """What the files decide about the linears, by their names in the tree."""
        places = {name: f"{self.stored[name]}.weight" for name in self.linears}
        return {name: self.fixed[place] for name, place in places.items() if place in self.fixed}

    def on_average(self, scheme: Scheme, exceptions: Mapping[str, Scheme]) -> Scheme:
        """`scheme` with the bits a weight that linears have on average where some are of another one."""
        if not exceptions:
            return scheme
        bits = sum(
            math.prod(shape) * exceptions.get(name, scheme).bits_per_weight for name, shape in self.linears.items()
        )
        return replace(scheme, extra_bits=scheme.extra_bits + bits / self.weights - scheme.bits_per_weight)


def refuse_not_quantizable(checkpoint: Checkpoint) -> Checkpoint:
    """`checkpoint`; CheckpointError if it is quantized already."""
    if checkpoint.quantization is not None:
        method = checkpoint.quantization.get("quant_method")
        raise CheckpointError(f"`{checkpoint.name}` is quantized already ({method})", "give the model it was made from")
    return checkpoint


def known(ids: Tensor, checkpoint: Checkpoint) -> Tensor:
    """`ids`; CheckpointError if the model has no embedding for one of them: the tokenizer is another model's."""
    if int(ids.max()) >= checkpoint.spec.vocab_size:
        raise CheckpointError(
            f"the tokenizer beside `{checkpoint.name}` makes token {int(ids.max()):,}, "
            f"and the model has {checkpoint.spec.vocab_size:,}",
            "put the model's own tokenizer there",
        )
    return ids


def misfits(layout: Layout, form: Format, scheme: Scheme) -> dict[str, str]:
    """Linear -> why the format can't hold it."""
    reasons = {name: form.misfit(*shape, scheme) for name, shape in layout.linears.items()}
    return {name: reason for name, reason in reasons.items() if reason}


def refuse_misfits(layout: Layout, form: Format, scheme: Scheme) -> None:
    """ModelError names the linears that the format can't hold: none is skipped silently."""
    found = misfits(layout, form, scheme)
    if not found:
        return
    first, reason = next(iter(found.items()))
    others = f", nor {len(found) - 1} other linears" if len(found) > 1 else ""
    sizes = [size for size in GROUP_SIZES if all(columns % size == 0 for _, columns in layout.linears.values())]
    fits = scheme.group_size and sizes and any(columns % scheme.group_size for _, columns in layout.linears.values())
    hint = f"take --group-size {sizes[0]}, which divides all inputs" if fits else "try another --format or --group-size"
    groups = f"in groups of {scheme.group_size}" if scheme.group_size else "with one scale a row"
    raise ModelError(f"`{first}` can't be stored {groups}: {reason}{others}", hint)


def refuse_not_finite(checkpoint: Checkpoint, report: Report) -> None:
    """ModelError names the first tensor that holds NaN or infinity. Reads all weights once, one tensor at a time."""
    with Store(checkpoint) as store:
        for done, name in enumerate(store.names, start=1):
            tensor = store.read(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ModelError(f"`{name}` holds numbers that are not finite", "download the checkpoint again")
            report(done, len(store.names))


def stream_bytes(layout: Layout, tokens: int) -> int:
    """Bytes on the disk for hidden states of `tokens` tokens, those before and behind a block."""
    return STREAMS * tokens * layout.hidden * 4


def output_bytes(layout: Layout, scheme: Scheme, checkpoint: Checkpoint) -> int:
    """Bytes of the tensors that will be written, nearly: the format may round up to whole words."""
    fixed = {f"{layout.stored[name]}.weight": scheme for name in layout.linears} | dict(layout.fixed)
    bits = sum(
        math.prod(header.shape) * fixed[name].bits_per_weight if name in fixed else 8 * header.nbytes
        for name, header in (dict(checkpoint.tensors) | dict(layout.added)).items()
    )
    own = [name for name in layout.linears if f"{layout.stored[name]}.weight" not in checkpoint.tensors]
    return round((bits + sum(math.prod(layout.linears[name]) for name in own) * scheme.bits_per_weight) / 8)


def refuse_full_disk(folder: Path, layout: Layout, scheme: Scheme, checkpoint: Checkpoint, tokens: int) -> None:
    """CapacityError unless the disk holds the streams, the blocks as they are done, and the model."""
    output = output_bytes(layout, scheme, checkpoint)
    needed = stream_bytes(layout, tokens) + 2 * output
    existing = next(parent for parent in folder.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise CapacityError(
            f"`{existing}` has {free / 1e9:,.1f} GB free; quantizing needs {needed / 1e9:,.1f} GB "
            f"({output / 1e9:,.1f} GB stay)",
            "make room, name a folder on another disk with -o, or take fewer --samples",
        )
