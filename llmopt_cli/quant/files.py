"""Which files a checkpoint becomes: safetensors with a config, or one GGUF file with all that belongs to it.

Knows what a kind of file decides for itself, how it is written, and when a tensor reads back as it was; the run that
leads there is the same for all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from llmopt_cli.errors import CheckpointError
from llmopt_cli.model.codes import GgmlCodes
from llmopt_cli.model.formats.gguf import block_scheme
from llmopt_cli.model.formats.layout import Format
from llmopt_cli.quant.calibrate import TextUsed
from llmopt_cli.quant.ggml_write import Made, block_types, outputs, tokenizer_keys, write_checkpoint
from llmopt_cli.quant.write import copy_companions, same_bytes, write_model
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.gguf import BLOCK_TYPES
from llmopt_cli.spec.gguf_checkpoint import GgufHeader
from llmopt_cli.spec.gguf_model import architecture_of
from llmopt_cli.spec.scheme import Scheme

IMATRIX = "quantize.imatrix"  # llama.cpp's keys for where the importance is from
Same = Callable[[Tensor, Tensor], bool]


class Files(Protocol):
    """One kind of files."""

    def fixed(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """Stored weight -> the precision that the files have for it, whatever is wanted; empty if they take any.

        ModelError or UsageError if they can't hold this model at all.
        """

    def notes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Stored weight -> why it gets another precision than others of its kind."""

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        made: Sequence[Path],
        changes: Mapping[str, Any],
        calibration: TextUsed | None,
    ) -> None:
        """Write the model: tensors of the safetensors files `made` in the place of those of `checkpoint`.

        `changes` is what config.json says other than that of `checkpoint`; `calibration` the text used, if any.
        """

    def same(self, checkpoint: Checkpoint) -> Same:
        """Whether a tensor that was not quantized, as it reads back, is that of `checkpoint`."""


@dataclass(frozen=True)
class Shards:
    """Safetensors files in the layout of `form`, and a config that says so."""

    form: Format

    def fixed(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """Nothing; CheckpointError if the base is a GGUF file, from which tensors are not copied."""
        if any(isinstance(header, GgufHeader) for header in checkpoint.tensors.values()):
            raise CheckpointError(
                f"`{checkpoint.name}` is a GGUF file, from which no {self.form.name} files are made",
                "give the model's safetensors, or take a GGUF --method such as q4_k_m",
            )
        return {}

    def notes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Nothing."""
        return {}

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        made: Sequence[Path],
        changes: Mapping[str, Any],
        calibration: TextUsed | None,
    ) -> None:
        """See Files."""
        write_model(folder, checkpoint, made, changes)
        if self.form.config_copy:
            text = json.dumps(changes["quantization_config"], indent=2) + "\n"
            (folder / self.form.config_copy).write_text(text, encoding="utf-8")

    def same(self, checkpoint: Checkpoint) -> Same:
        """Byte for byte."""
        return same_bytes


@dataclass(frozen=True)
class Gguf:
    """One GGUF file in the types of `mix`, beside it the base's config and tokenizer.

    `pre` is llama.cpp's name for how the tokenizer splits words, if the tokenizer does not tell.
    """

    mix: str
    pre: str | None = None

    def fixed(self, checkpoint: Checkpoint) -> dict[str, Scheme]:
        """The type of every tensor of the file, embedding, head and norms included."""
        tokenizer_keys(checkpoint, self.pre)
        return {name: block_scheme(kind) for name, kind in block_types(checkpoint, self.mix).items()}

    def notes(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Of rows that are no whole blocks."""
        found: dict[str, str] = {}
        for output in outputs(checkpoint, self.mix):
            if output.tensor.type != output.wanted:
                size, columns = BLOCK_TYPES[output.wanted].size, output.tensor.shape[-1]
                reason = f"{output.tensor.type} in place of {output.wanted}: {columns} inputs are no blocks of {size}"
                found |= dict.fromkeys(output.sources, reason)
        return found

    def write(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        made: Sequence[Path],
        changes: Mapping[str, Any],
        calibration: TextUsed | None,
    ) -> None:
        """See Files. The file bears the model's name; config.json stays the base's, for the file says the types."""
        (folder / "config.json").write_text(json.dumps(dict(checkpoint.config), indent=2) + "\n", encoding="utf-8")
        copy_companions(folder, checkpoint)
        types = block_types(checkpoint, self.mix)
        facts: dict[str, Any] = {}
        if calibration is not None:
            facts = {f"{IMATRIX}.dataset": calibration.file, f"{IMATRIX}.chunks_count": calibration.windows}
        file = folder / f"{Path(checkpoint.name).name}-{self.mix}.gguf"
        with _blocks(made, types) as find:
            write_checkpoint(file, checkpoint, self.mix, find, pre=self.pre, facts=facts)

    def same(self, checkpoint: Checkpoint) -> Same:
        """The same numbers in float32, where Gemma's norms are stored with one added."""
        return partial(_same_numbers, shift=architecture_of(checkpoint.config).norm_shift)


def _same_numbers(one: Tensor, other: Tensor, shift: float) -> bool:
    return torch.equal(one.float() + shift, other.float() + shift)


@contextmanager
def _blocks(files: Sequence[Path], types: Mapping[str, str]) -> Iterator[Made]:
    """The blocks in `files`, by the stored name of the weight."""
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        where = {f"{key.removesuffix('.blocks')}.weight": (key, file) for file in opened for key in file.keys()}  # noqa: SIM118

        def find(name: str) -> GgmlCodes | None:
            if name not in where:
                return None
            key, file = where[name]
            return GgmlCodes(file.get_tensor(key), types[name])

        yield find


def files_of(form: Format, mix: str, pre: str | None) -> Files:
    """The files of a format; `mix` and `pre` are for those of GGUF."""
    return Gguf(mix, pre) if form.name == "gguf" else Shards(form)
